"""The bytes of a disk as people read them: sixteen a line, in hexadecimal and as letters, line for line what nbddump prints.

    0000000000: 68 65 6c 6c 6f 20 77 6f  72 6c 64 0a 00 00 00 00 |hello world.....|
    *
    00000001f0: 00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00 |................|

A line equal to the one before it is not shown; one `*` stands for as many as follow each other. The first line is always shown,
and so is the disk's last. `dump` decides what to read: nothing of a range that the server says is zero. `_Sheet` makes bytes into
lines, many at once: a line by itself costs 2 µs, one of thousands 0.2 µs.
"""

from __future__ import annotations

import errno
import sys
from array import array
from binascii import hexlify
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain
from operator import ne

from nbdcore.clients.blocking.client import Client
from nbdcore.clients.blocking.pool import Pool
from nbdcore.disk.runs import pieces
from nbdcore.disk.sources import NBDSource
from nbdcore.errors import UsageError

__all__ = ["dump"]

# Bytes of a line.
_LINE = 16
_ZEROES = bytes(_LINE)
# Bytes of the first read, and of the largest: each is twice the one before. The first line is there at once over a slow network
# too, and a reader may want no more of them. Reads larger than the largest, which is nbddump's, are no faster.
_FIRST_READ, _LARGEST_READ = 64 << 10, 16 << 20
# Bytes that become text at once, five times as long.
_PIECE = 64 << 10
# What ranges of zeroes that are not read are made of: of a shorter one, a further read would take longer.
_UNIT = 64 << 10
# Lines that are made one by one, where fewer follow each other than pay for making many at once.
_FEW = 8


def dump(
    disk: Client | Pool, *, offset: int = 0, count: int | None = None, color: bool = False, timeout: float | None = None
) -> Iterator[str]:
    """Read a range of a disk, and yield its hexadecimal dump in pieces of whole lines.

    Where the metadata context base:allocation was selected, what it says is zero is not read. A range need not begin or end where
    the server's blocks do. No more than 40 MiB are in memory, however large the disk is.

    Args:
        disk: a client that is connected.
        offset: where to begin, in bytes; the first line begins there.
        count: bytes; None, or more than there are: to the end of the disk.
        color: with the colors of a terminal, and with `☆`, `│` and `·` in place of `*`, `|` and `.`.
        timeout: seconds for each request; None stands for the client's `command_timeout`.

    Raises UsageError for an offset beyond the end of the disk, before anything is read, and whatever the client raises.
    """
    size = disk.size
    if offset < 0 or offset > size or (count is not None and count < 0):
        raise UsageError(errno.EINVAL, f"a dump of {count} bytes at offset {offset}: the disk has {size} bytes")
    end = size if count is None else min(size, offset + count)
    return _dumped(NBDSource(disk, owned=False, timeout=timeout), offset, end, _Sheet(offset, size, color=color))


def _dumped(source: NBDSource, offset: int, end: int, sheet: _Sheet) -> Iterator[str]:
    most = _FIRST_READ
    for piece in pieces(source.data(offset, end), offset, end, unit=_UNIT, most=_LARGEST_READ):
        if piece.data:
            at = piece.begin
            while at < piece.end:
                count = min(most, piece.end - at)
                yield from sheet.add(source.read(count, at))
                at, most = at + count, min(2 * most, _LARGEST_READ)
        else:
            # The disk's last line may be shorter than the others, and is always shown.
            last = piece.length % _LINE or _LINE
            yield from sheet.add_zeroes(piece.length - last)
            yield from sheet.add(bytes(last))


# ---------------------------------------------------------------------------------------------- lines


class _Sheet:
    """What was dumped so far, as far as the next line depends on it.

    Args:
        offset: of the first line, in bytes.
        size: of the disk; the line that ends there is shown in any case.
        color: whether lines are for a terminal.
    """

    def __init__(self, offset: int, size: int, *, color: bool) -> None:
        self._at = offset
        self._size = size
        self._color = color
        self._before = b""
        self._same = b""  # a piece of lines like the one before
        self._starred = False

    def add_zeroes(self, count: int) -> Iterator[str]:
        """Go on with so many zeroes, which are whole lines, and not the last one."""
        if not count:
            return
        if self._before != _ZEROES:
            yield from self._piece(_ZEROES)
            count -= _LINE
        if count:
            yield self._star()
            self._at += count

    def add(self, data: bytes) -> Iterator[str]:
        """Go on with these bytes, which are whole lines but at the end."""
        last = b""
        if self._at + len(data) == self._size:
            last = data[(len(data) - 1) // _LINE * _LINE :]
        for begin in range(0, len(data) - len(last), _PIECE):
            yield from self._piece(data[begin : min(begin + _PIECE, len(data) - len(last))])
        if last:
            yield self._shown(last)

    def _piece(self, data: bytes) -> Iterator[str]:
        if data == self._same:
            yield self._star()
            self._at += len(data)
            return
        lines = [data[at : at + _LINE] for at in range(0, len(data), _LINE)]
        lines[-1] = lines[-1].ljust(_LINE, b"\0")  # nbddump takes a short line for what it would be with zeroes behind it
        changed = bytes(map(ne, lines, chain((self._before,), lines)))
        at = 0
        while at < len(changed):
            stop = changed.find(not changed[at], at)
            stop = len(changed) if stop < 0 else stop
            if changed[at]:
                yield self._shown(data[at * _LINE : stop * _LINE])
            else:
                yield self._star()
                self._at += (stop - at) * _LINE
            at = stop
        if self._before != lines[-1] or not self._same:
            self._before = lines[-1]
            self._same = self._before * (_PIECE // _LINE)

    def _star(self) -> str:
        if self._starred:
            return ""
        self._starred = True
        return "☆\n" if self._color else "*\n"

    def _shown(self, data: bytes) -> str:
        """Return the lines of these bytes, every one."""
        self._starred = False
        at = self._at
        self._at += len(data)
        if len(data) % _LINE == 0 and self._color:
            return _many_colored_lines(at, data)
        if len(data) % _LINE == 0 and len(data) >= _FEW * _LINE and _digits(at) == _digits(self._at):
            return _many_lines(at, data)
        line = _colored_line if self._color else _line
        return "".join(line(at + begin, data[begin : begin + _LINE]) for begin in range(0, len(data), _LINE))


def _digits(offset: int) -> int:
    return max(10, (offset.bit_length() + 3) // 4)


# ---------------------------------------------------------------------------------------------- plain

_LETTERS = bytes(byte if 0x20 <= byte < 0x7F else ord(".") for byte in range(256))
# Where each byte of a line stands behind the offset: two digits and a space, and one more space in the middle.
_PLACES = tuple(2 + 3 * index + (index >= _LINE // 2) for index in range(_LINE))
_FIRST_LETTER = _PLACES[-1] + 4
_EMPTY = b": ".ljust(_FIRST_LETTER - 1) + b"|" + b" " * _LINE + b"|\n"


def _line(offset: int, data: bytes) -> str:
    left, right = data[: _LINE // 2].hex(" "), data[_LINE // 2 :].hex(" ")
    return f"{offset:010x}: {left:23}  {right:23} |{data.translate(_LETTERS).decode('ascii'):{_LINE}}|\n"


def _many_lines(offset: int, data: bytes) -> str:
    """Return whole lines whose offsets have the same number of digits: column by column, which are as few as 80 steps."""
    width = _digits(offset)
    numbers = array("Q", range(offset, offset + len(data), _LINE))
    if sys.byteorder == "little":
        numbers.byteswap()
    offsets, digits, letters = hexlify(numbers), hexlify(data), data.translate(_LETTERS)
    empty = bytes(width) + _EMPTY
    sheet, step = bytearray(empty * len(numbers)), len(empty)
    for column in range(width):
        sheet[column::step] = offsets[16 - width + column :: 16]
    for index, place in enumerate(_PLACES):
        sheet[width + place :: step] = digits[2 * index :: 2 * _LINE]
        sheet[width + place + 1 :: step] = digits[2 * index + 1 :: 2 * _LINE]
        sheet[width + _FIRST_LETTER + index :: step] = letters[index::_LINE]
    return sheet.decode("ascii")


# ---------------------------------------------------------------------------------------------- with colors

# A terminal's sequences, and what nbddump uses each for.
_NO_COLOR = "\x1b[0m"
_GREEN, _GREY = "\x1b[22;32m", "\x1b[22;90m"  # offsets; zeroes, lines, and what is no character
_BLUE = "\x1b[1;34m"  # bytes that are not zero
_RED, _VIOLET = "\x1b[1;31m", "\x1b[1;35m"  # letters and digits; other characters


def _colored_letter(byte: int) -> str:
    letter = chr(byte)
    if not 0x20 <= byte < 0x7F:
        return f"{_GREY}·"
    return f"{_RED if letter.isalnum() else _VIOLET}{letter}"


_COLORED_BYTES = tuple(f"{_BLUE if byte else _GREY}{byte:02x} " for byte in range(256))
_COLORED_LETTERS = tuple(_colored_letter(byte) for byte in range(256))


def _colored_line(offset: int, data: bytes) -> str:
    """Return any line, even one that is shorter than others."""
    left, right = (_in_words(_COLORED_BYTES, half) for half in (data[: _LINE // 2], data[_LINE // 2 :]))
    missing = _LINE - len(data)
    # nbddump has the space in the middle of a line behind the color, where the line ends before it.
    middle, before = (" ", 3 * missing) if len(data) >= _LINE // 2 else ("", 3 * missing + 1)
    return (
        f"{_GREEN}{offset:010x}{_GREY}: {left}{middle}{right}{_GREY}{'':{before}}│"
        f"{_in_words(_COLORED_LETTERS, data)}{_GREY}{'':{missing}}│\n{_NO_COLOR}"
    )


def _in_words(words: Sequence[str], data: bytes) -> str:
    return "".join(map(words.__getitem__, data))


# Stands for the line `│` while words are joined: with it, which takes two bytes, each word would be widened by itself, in a third
# more time.
_BAR = "\x01"


def _many_colored_lines(offset: int, data: bytes) -> str:
    """Return whole lines: their words, column by column, each with what stands before or behind it in a line."""
    offsets = [f"{_GREEN}{at:010x}{_GREY}: " for at in range(offset, offset + len(data), _LINE)]
    columns = (map(words.__getitem__, data[index % _LINE :: _LINE]) for index, words in enumerate(_columns()))
    return "".join(chain.from_iterable(zip(offsets, *columns, strict=True))).replace(_BAR, "│")


@cache
def _columns() -> list[Sequence[str]]:
    """Return the words of each column, by the byte that is there: digits for all bytes of a line, then their letters."""
    columns: list[Sequence[str]] = [*[_COLORED_BYTES] * _LINE, *[_COLORED_LETTERS] * _LINE]
    columns[_LINE // 2] = [f" {word}" for word in _COLORED_BYTES]
    columns[_LINE] = [f"{_GREY}{_BAR}{word}" for word in _COLORED_LETTERS]
    columns[-1] = [f"{word}{_GREY}{_BAR}\n{_NO_COLOR}" for word in _COLORED_LETTERS]
    return columns

"""The input of the `_many` calls, turned into commands bit by bit: the same for every front end.

Nothing is consumed before a command is wanted, so an endless input is fine. A pair that is wrong raises UsageError at its turn. A
request too large for the server comes out in pieces that know the whole they belong to, which is finished when all of them are.
Pure; nothing is sent.
"""

from __future__ import annotations

import errno
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from nbdcore.clients.requests import single as requests
from nbdcore.clients.requests.arguments import bytes_view, whole_number, whole_numbers
from nbdcore.clients.requests.single import Request
from nbdcore.errors import UsageError
from nbdcore.protocol.constants import CommandFlag
from nbdcore.protocol.transmission import commands
from nbdcore.protocol.transmission.commands import Command, Limits
from nbdcore.protocol.transmission.memory import Memory

#: Requests under way at a time, where the caller does not say. Reads of 4 KiB from nbdkit, in thousands a second: 123 with 16,
#: 179 with 32, 218 with 64, 181 with 128.
DEPTH = 64


class SplitRequest:
    """A request in pieces. For whoever looks at the outcome it is like a command."""

    __slots__ = ("_memory", "left", "offset")

    def __init__(self, offset: int, memory: Memory | None = None) -> None:
        self.offset: int = offset
        self.left: int = 1  # pieces not finished; while not all have begun, one more
        self._memory = memory

    def result(self) -> bytes:
        """Return the data read."""
        return b"" if self._memory is None else self._memory.take()


def checked_depth(call: str, depth: Any) -> int:
    """Return the depth as an integer. Raises UsageError unless it is 1 or more."""
    depth = whole_number(call, "depth", depth)
    if depth < 1:
        raise UsageError(errno.EINVAL, f"{call}: depth is how many requests are under way at a time, 1 or more: not {depth}")
    return int(depth)


# ---------------------------------------------------------------------------------------------- input to commands


def reads(limits: Limits, ranges: Iterable[tuple[int, int]]) -> Generator[Command]:
    """Yield the commands that read (offset, count) ranges."""
    most, read = limits.data, commands.read
    for item in _iterator("pread_many", "offset and count", ranges):
        try:
            offset, count = item
        except (TypeError, ValueError):
            raise _no_pair("pread_many", "offset and count", item) from None
        if count.__class__ is not int or offset.__class__ is not int:
            count, offset = whole_numbers("pread_many", count, offset)
        if 0 < count <= most:
            yield read(limits, count, offset)
        elif not count:
            yield requests.read_nothing(limits, offset)
        else:
            memory = requests.memory_for(limits, count, offset)
            _, request = requests.read_into(limits, memory.view(), offset, df=False, call="pread_many")
            yield from _commands_of(request, SplitRequest(offset, memory))


def reads_into(limits: Limits, items: Iterable[tuple[int, Any]]) -> Generator[Command]:
    """Yield the commands that read into (offset, buffer) pairs."""
    most = limits.data
    for offset, buffer in _pairs("pread_into_many", "offset and buffer", items):
        if offset.__class__ is not int:
            offset = whole_number("pread_into_many", "offset", offset)  # noqa: PLW2901 (made plain)
        view = bytes_view("pread_into_many", buffer, writable=True)
        if 0 < len(view) <= most:
            ready = [commands.read(limits, len(view), offset, target=view)]
            del view  # nothing here holds on to it: the caller's memory is theirs again when the command has finished
            yield ready.pop()
        else:
            _, request = requests.read_into(limits, view, offset, df=False, call="pread_into_many")
            del view
            yield from _commands_of(request, SplitRequest(offset))


def writes(limits: Limits, items: Iterable[tuple[int, Any]], *, fua: bool) -> Generator[Command]:
    """Yield the commands that write (offset, data) pairs."""
    most, flags, write = limits.data, CommandFlag.FUA.value if fua else 0, commands.write
    for item in _iterator("pwrite_many", "offset and data", items):
        try:
            offset, data = item
        except (TypeError, ValueError):
            raise _no_pair("pwrite_many", "offset and data", item) from None
        if offset.__class__ is not int:
            offset = whole_number("pwrite_many", "offset", offset)
        # Bytes need no view, which costs as much as half a command.
        view = data if data.__class__ is bytes else bytes_view("pwrite_many", data, writable=False)
        if 0 < len(view) <= most:
            command = write(limits, view, offset, flags=flags)
            del view
            yield command
        else:
            request = requests.write(limits, memoryview(view), offset, fua=fua, call="pwrite_many")
            del view
            yield from _commands_of(request, SplitRequest(offset))


def zeroes(limits: Limits, ranges: Iterable[tuple[int, int]], *, fua: bool, no_hole: bool, fast_zero: bool) -> Generator[Command]:
    """Yield the commands that write zeroes to (offset, count) ranges."""
    for offset, count in _ranges("zero_many", ranges):
        request = requests.zero(limits, count, offset, fua=fua, no_hole=no_hole, fast_zero=fast_zero, call="zero_many")
        yield from _commands_of(request, SplitRequest(offset))


def trims(limits: Limits, ranges: Iterable[tuple[int, int]], *, fua: bool) -> Generator[Command]:
    """Yield the commands that trim (offset, count) ranges."""
    for offset, count in _ranges("trim_many", ranges):
        request = requests.trim(limits, count, offset, fua=fua, call="trim_many")
        yield from _commands_of(request, SplitRequest(offset))


def _ranges(call: str, ranges: Iterable[Any]) -> Iterator[tuple[int, int]]:
    for offset, count in _pairs(call, "offset and count", ranges):
        count, offset = whole_numbers(call, count, offset)  # noqa: PLW2901 (made plain)
        yield offset, count


def _pairs(call: str, what: str, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    for item in _iterator(call, what, items):
        try:
            first, second = item
        except (TypeError, ValueError):
            raise _no_pair(call, what, item) from None
        yield first, second


def _iterator(call: str, what: str, items: Iterable[Any]) -> Iterator[Any]:
    try:
        return iter(items)
    except TypeError:
        message = f"{call}: pairs of {what} are needed, as a list or anything else that `for` takes, not {type(items).__name__}"
        raise UsageError(errno.EINVAL, message) from None


def _no_pair(call: str, what: str, item: object) -> UsageError:
    return UsageError(errno.EINVAL, f"{call}: each item is a pair of {what}, not {item!r:.60}")


def _commands_of(request: Request, split: SplitRequest) -> Generator[Command]:
    """Yield the commands of a request; each piece knows the request that it is of."""
    if isinstance(request, Command):
        yield request
        return
    following = next(request, None)
    while following is not None:
        piece, following = following, next(request, None)
        piece.tag = split
        if following is not None:
            split.left += 1
        else:
            request.close()
        # Nothing here holds on to the caller's memory, which is theirs again when all pieces have finished.
        ready = [piece]
        del piece
        yield ready.pop()

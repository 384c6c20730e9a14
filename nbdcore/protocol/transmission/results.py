"""What a reply does to its command: ranges noted, extents kept, errors parsed. Functions of a command and a payload, no more.

Every number that the server declares is checked here before it is used, in plain integers. What is merely wrong fails the command
(`spoil`), for the stream is still in step; a range outside the command is a ProtocolViolation, since such a server is lost.
"""

from __future__ import annotations

import errno
import os
import sys
from array import array

from nbdcore.errors import CommandError, ProtocolViolation
from nbdcore.protocol import wire
from nbdcore.protocol.constants import MAX_STRING, CommandFlag, ErrorNumber
from nbdcore.protocol.transmission.commands import Command, Numbers

# A read's reply may come in pieces. So many separate ranges are remembered to find overlaps; a server that splits one request
# further than this is not answering but attacking: 64 MiB in pieces of one page are 16384.
_MAX_FRAGMENTS = 1 << 16

_ERRNO = {int(number): getattr(errno, number.name, errno.EINVAL) for number in ErrorNumber}

#: The extents of one context: its id, the length of each in bytes, and the flags of each.
Status = tuple[int, Numbers, Numbers]

# ---------------------------------------------------------------------------------------------- errors


# A read that must be answered in one piece may be larger than any piece that the server sends (section "Block size constraints").
_TOO_LARGE = frozenset({errno.EOVERFLOW, errno.EINVAL})
_TOO_LARGE_UNFRAGMENTED = "; the server may be unable to answer so much in one piece: read less at once, or without df"


def local_errno(number: int) -> int:
    """Return this platform's number for an error number on the wire; unknown ones count as EINVAL (section "Error values")."""
    return _ERRNO.get(number, errno.EINVAL)


def fail(command: Command, number: int, text: str = "") -> None:
    """Note the first error of a command."""
    if command.error is None:
        hint = _TOO_LARGE_UNFRAGMENTED if command.flags & CommandFlag.DF and number in _TOO_LARGE else ""
        command.error = CommandError(number, f"{command} failed: {os.strerror(number)}{hint}", server_text=text)


def spoil(command: Command, why: str) -> None:
    """Fail a command whose answer breaks the protocol though the stream is still in step."""
    if command.error is None:
        command.error = CommandError(errno.EPROTO, f"{command} failed: {why}")


def note_error(command: Command, payload: memoryview) -> int:
    """Note the error of an error chunk, whole or cut short: 32 bits error, 16 bits length, text. Returns where the text ends."""
    if len(payload) < 4:
        spoil(command, f"the server sent an error of {len(payload)} bytes")
        return len(payload)
    (number,) = wire.UINT32.unpack_from(payload)
    length = wire.UINT16.unpack_from(payload, 4)[0] if len(payload) >= 6 else 0
    text = bytes(payload[6 : 6 + length]) if length <= min(len(payload) - 6, MAX_STRING) else b""
    if number == 0:
        spoil(command, "the server sent an error chunk with error number 0")
    else:
        fail(command, local_errno(number), text.decode("utf-8", "surrogateescape"))
    return 6 + length


def error_offset(command: Command, payload: memoryview, after_text: int) -> int | None:
    """Return the offset that follows the text of NBD_REPLY_TYPE_ERROR_OFFSET, if it lies in the command."""
    if not isinstance(command.error, CommandError) or len(payload) < after_text + 8:
        return None
    offset: int = wire.UINT64.unpack_from(payload, after_text)[0]
    return offset if command.offset <= offset < command.offset + max(command.count, 1) else None


# ---------------------------------------------------------------------------------------------- data


def place(command: Command, offset: int, length: int) -> int:
    """Return where a range of the export lies in the read's memory. Raises ProtocolViolation for a range outside it."""
    begin = offset - command.offset
    if length > command.count or begin < 0 or begin > command.count - length:
        raise ProtocolViolation(
            errno.EPROTO, f"the server sends {length} bytes at offset {offset} in answer to a {command}: that is outside it"
        )
    return begin


def note_range(command: Command, offset: int, length: int) -> None:
    """Remember which range of a read has arrived."""
    command.received += length
    if not length or command.received == length == command.count:
        return
    if command.fragments is None:
        command.fragments = []
    last = command.fragments[-1] if command.fragments else None
    if last is not None and last[1] == offset:
        last[1] = offset + length
    else:
        command.fragments.append([offset, offset + length])
        if len(command.fragments) > _MAX_FRAGMENTS:
            raise ProtocolViolation(errno.EPROTO, f"the server answers a {command} in more than {_MAX_FRAGMENTS} separate pieces")


def check_coverage(command: Command) -> None:
    """A read that is declared a success must have got each byte, and each byte once."""
    if command.received != command.count:
        spoil(command, f"the server declares success after {command.received} bytes")
    elif command.fragments is not None:
        at = command.offset
        for begin, after in sorted(command.fragments):
            if begin < at:
                spoil(command, f"the server sent the bytes at offset {begin} twice")
            at = max(at, after)


# ---------------------------------------------------------------------------------------------- extents


def parse_status(command: Command, payload: memoryview) -> Status | None:
    """NBD_REPLY_TYPE_BLOCK_STATUS: 32 bits context id, then 32 bits length and 32 bits flags an extent.

    A server may send it under extended headers too, whatever length was asked about.
    """
    if len(payload) < 12 or len(payload) % 8 != 4:
        spoil(command, f"the server sent block status of {len(payload)} bytes")
        return None
    numbers = _numbers("I", payload[4:])
    return wire.UINT32.unpack_from(payload)[0], numbers[0::2], numbers[1::2]


def parse_status_ext(command: Command, payload: memoryview, *, extended: bool) -> Status | None:
    """NBD_REPLY_TYPE_BLOCK_STATUS_EXT: 32 bits context id, 32 bits count, then 64 bits length and 64 bits flags an extent.

    A count of 0 leaves it to the payload's length how many there are.
    """
    if len(payload) < 24 or len(payload) % 16 != 8:
        spoil(command, f"the server sent extended block status of {len(payload)} bytes")
        return None
    if not extended:
        spoil(command, "the server sent block status of 64 bits, and extended headers were not agreed on")
    context, count = wire.STATUS_EXT_HEAD.unpack_from(payload)
    numbers = _numbers("Q", payload[8:])
    if count not in (0, len(numbers) // 2):
        spoil(command, f"the server announced {count} extents and sent {len(numbers) // 2}")
    return context, numbers[0::2], numbers[1::2]


def _numbers(typecode: str, payload: memoryview) -> Numbers:
    """Return a payload of nothing but unsigned integers: "I" has 32 bits, "Q" 64. A million extents take 4 ms, as a tuple 75."""
    numbers: Numbers = array(typecode)
    numbers.frombytes(payload)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def possible_extents(command: Command, lengths: Numbers, flags: Numbers, size: int) -> tuple[Numbers, Numbers, int]:
    """Return the extents up to the first impossible one, and how many bytes they are.

    Impossible is one of no bytes, or past the end of an export of `size` bytes; where an earlier chunk has described some of it,
    `size` is without that.
    """
    # A million numbers: 4 ms for the first look, which mistakes some neighbours for a zero, and 16 for the second.
    if bytes(lengths.itemsize) in lengths.tobytes() and 0 in lengths:
        stop = lengths.index(0)
        lengths, flags = lengths[:stop], flags[:stop]
        if not lengths:
            spoil(command, "the server described an extent of no bytes")
    total, room = sum(lengths), size - command.offset  # in Python's integers: it cannot wrap
    if total > room:
        spoil(command, f"the server described extents {total - room} bytes past the end of the export")
        return *_cut(lengths, flags, room), room
    return lengths, flags, total


def _cut(lengths: Numbers, flags: Numbers, room: int) -> tuple[Numbers, Numbers]:
    """Return the extents that lie within `room` bytes, the last one shortened."""
    kept: Numbers = array(lengths.typecode)
    for length in lengths:
        if room <= 0:
            break
        kept.append(min(length, room))
        room -= length
    return kept, flags[: len(kept)]

"""From the arguments of a call to the commands that it sends: what to check, which flags to set, how many pieces it takes.

The same for every front end: a call that is wrong raises UsageError here, before anything is queued. Pure; nothing is sent.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from nbdcore.clients.extents.walking import ExtentWalk
from nbdcore.clients.requests.arguments import bytes_view, texts, whole_number, whole_numbers
from nbdcore.clients.requests.splitting import aligned, length_limit, pieces
from nbdcore.errors import UsageError
from nbdcore.protocol.constants import CommandFlag, TransmissionFlag
from nbdcore.protocol.handshake.agreement import Agreement
from nbdcore.protocol.transmission import commands
from nbdcore.protocol.transmission.commands import Command, Limits, Strict
from nbdcore.protocol.transmission.memory import Memory, new_memory

#: Pieces of one split request that are under way at a time: enough to keep a server busy, few enough to bound its memory.
PIECES_AT_A_TIME = 4


class Pieces(Iterator[Command]):
    """A request too large for one command, cut into ones that the server takes.

    Args:
        build: makes a command of a count and an offset.
        count, offset: the range in bytes.
        limit: the most bytes in one piece.
    """

    def __init__(self, build: Callable[[int, int], Command], count: int, offset: int, limit: int) -> None:
        self._build: Callable[[int, int], Command] | None = build
        self._ranges = pieces(count, offset, limit)

    def __next__(self) -> Command:
        if self._build is None:
            raise StopIteration
        return self._build(*next(self._ranges))

    def close(self) -> None:
        """Let go of the caller's memory: no more pieces are wanted, and an exception may keep this alive."""
        self._build = None


#: One command, or the pieces that a request too large for one comes in.
Request = Command | Pieces

# ---------------------------------------------------------------------------------------------- data


def read_nothing(limits: Limits, offset: int, *, df: bool = False) -> Command:
    """Build a read of no bytes: checked as any other, and done already."""
    return _done(commands.read(_for_nothing(limits, 0), 0, offset, flags=CommandFlag.DF if df else 0))


def memory_for(limits: Limits, count: int, offset: int) -> Memory:
    """Return memory for a read too large for one request, after a check of the whole: so that nonsense allocates nothing."""
    _check_whole(lambda part, at: commands.read(limits, part, at), count, offset)
    return new_memory(count)


def read_into(limits: Limits, buffer: Any, offset: Any, *, df: bool, call: str = "pread_into") -> tuple[int, Request]:
    """Build a read into a caller's buffer. Returns how many bytes that holds, too."""
    offset = whole_number(call, "offset", offset)
    view = bytes_view(call, buffer, writable=True)
    limits = _for_nothing(limits, len(view))
    flags = CommandFlag.DF if df else 0

    def build(count: int, at: int) -> Command:
        begin = at - offset
        return commands.read(limits, count, at, target=view[begin : begin + count], flags=flags)

    return len(view), _split(build, len(view), offset, len(view) if df else limits.data)


def write(limits: Limits, data: Any, offset: Any, *, fua: bool, call: str = "pwrite") -> Request:
    """Build a write."""
    if offset.__class__ is not int:  # as a rule it is, and the data are bytes, which saves two calls
        offset = whole_number(call, "offset", offset)
    view = memoryview(data) if data.__class__ is bytes else bytes_view(call, data, writable=False)
    flags = CommandFlag.FUA if fua else 0
    if 0 < len(view) <= limits.data:  # as a rule they are one command
        return commands.write(limits, view, offset, flags=flags)
    limits = _for_nothing(limits, len(view))

    def build(count: int, at: int) -> Command:
        begin = at - offset
        return commands.write(limits, view[begin : begin + count], at, flags=flags)

    return _split(build, len(view), offset, limits.data)


# ---------------------------------------------------------------------------------------------- ranges


def trim(limits: Limits, count: Any, offset: Any, *, fua: bool, call: str = "trim") -> Request:
    """Build a trim."""
    count, offset = whole_numbers(call, count, offset)
    limits = _for_nothing(limits, count)
    flags = CommandFlag.FUA if fua else 0
    limit = length_limit(limits, bounded=False)
    return _split(lambda part, at: commands.trim(limits, part, at, flags=flags), count, offset, limit)


def zero(limits: Limits, count: Any, offset: Any, *, fua: bool, no_hole: bool, fast_zero: bool, call: str = "zero") -> Request:
    """Build a write of zeroes."""
    count, offset = whole_numbers(call, count, offset)
    limits = _for_nothing(limits, count)
    wanted = ((fua, CommandFlag.FUA), (no_hole, CommandFlag.NO_HOLE), (fast_zero, CommandFlag.FAST_ZERO))
    flags = sum(int(flag) for asked, flag in wanted if asked)
    limit = length_limit(limits, bounded=not fast_zero)
    return _split(lambda part, at: commands.zero(limits, part, at, flags=flags), count, offset, limit)


def cache(limits: Limits, count: Any, offset: Any) -> Request:
    """Build a cache."""
    count, offset = whole_numbers("cache", count, offset)
    limits = _for_nothing(limits, count)
    return _split(lambda part, at: commands.cache(limits, part, at), count, offset, length_limit(limits, bounded=True))


# ---------------------------------------------------------------------------------------------- block status


def block_status(limits: Limits, count: Any, offset: Any, *, wanted: Iterable[int] | None, req_one: bool) -> Command:
    """Build a block status; `wanted` are ids of the contexts asked about, where the server can limit its answer to some."""
    count, offset = whole_numbers("block_status", count, offset)
    filtered = None if wanted is None or not limits.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD else tuple(wanted)
    count = min(count, length_limit(limits, bounded=False))
    return commands.block_status(limits, count, offset, context_ids=filtered, flags=CommandFlag.REQ_ONE if req_one else 0)


def selected(agreement: Agreement, names: Iterable[str]) -> dict[int, str]:
    """Return id -> name of these metadata contexts. Raises UsageError for one that is not selected, and for none at all."""
    have = {name: number for number, name in reversed(agreement.contexts.items())}
    wanted = dict.fromkeys(names)
    if not wanted:
        raise UsageError(errno.EINVAL, "block_status: no metadata context is named; None stands for all that are selected")
    missing = [name for name in wanted if name not in have]
    if missing:
        raise UsageError(
            errno.ENOTSUP,
            f"metadata context {', '.join(missing)} is not selected (selected: {', '.join(have) or 'none'}); ask for it with "
            "contexts=, and see whether the server has it",
        )
    return {have[name]: name for name in wanted}


def walk(
    limits: Limits, agreement: Agreement, contexts: Iterable[str], offset: Any, count: Any, *, columns: bool = False
) -> ExtentWalk:
    """Begin a walk over the extents of a range; a count of None is all that follows the offset."""
    offset = whole_number("extents", "offset", offset)
    count = limits.size - offset if count is None else whole_number("extents", "count", count)
    if offset < 0 or count < 0 or offset + count > limits.size:
        raise UsageError(
            errno.EINVAL, f"extents: {count} bytes at offset {offset} are no part of the export ({limits.size} bytes)"
        )
    names = texts("contexts", contexts)
    selected(agreement, names)
    return ExtentWalk(names, offset, count, columns=columns)


def next_of_walk(limits: Limits, extents: ExtentWalk) -> Command:
    """Build the request that a walk needs next, in whole blocks.

    A range may begin or end within a block, and so may a server's descriptors (section "Size constraints"): then what is asked
    about begins where the block does, and the walk leaves out what it knows.
    """
    begin = aligned(extents.position, limits.minimum)
    end = min(aligned(extents.end + limits.minimum - 1, limits.minimum), limits.size)
    return commands.block_status(limits, min(end - begin, length_limit(limits, bounded=False)), begin)


# ---------------------------------------------------------------------------------------------- pieces


def _for_nothing(limits: Limits, count: int) -> Limits:
    """Return the limits, for a request of no bytes without the check that there are any: it does nothing, as os.pread does."""
    return limits if count else replace(limits, strict=limits.strict & ~Strict.ZERO_SIZE)


def _done(command: Command) -> Command:
    """Return a command for no bytes as one that has finished well, and is not sent."""
    command.data, command.done = b"", True
    return command


def _split(build: Callable[[int, int], Command], count: int, offset: int, limit: int) -> Request:
    """Build one command, or, where that is too large, pieces after a check of the whole. One for no bytes is done already."""
    if count <= limit:
        command = build(count, offset)
        return command if count else _done(command)
    _check_whole(build, count, offset)
    return Pieces(build, count, offset, limit)


def _check_whole(build: Callable[[int, int], Command], count: int, offset: int) -> None:
    """Check a request as if it were one, so that what is wrong with it is known before the first piece is sent."""
    try:
        build(count, offset)
    except UsageError as exc:
        if exc.errno != errno.ERANGE:  # too long for one request: that is why it comes in pieces
            raise

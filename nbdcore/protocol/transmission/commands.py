"""Commands: one slotted object a request, one factory a command, and every check that the client makes before anything is sent.

A factory gets the Limits of the connection and the caller's arguments, checks them in a fixed order (flags, what the export can
do, zero length, bounds, alignment, size) and raises UsageError, or returns a Command ready to queue. Checks can be turned off one
by one (Strict), as libnbd lets testers of servers do; the limits of the header itself always hold. A Command then collects its
outcome: data, extents, the first error. It knows nothing of how bytes travel.
"""

from __future__ import annotations

import enum
import errno
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, TypeAlias

from nbdcore.errors import Error, UsageError
from nbdcore.protocol import wire
from nbdcore.protocol.constants import (
    DEFAULT_MAXIMUM,
    MAX_COMPACT_LENGTH,
    MAX_PAYLOAD,
    CommandFlag,
    CommandType,
    TransmissionFlag,
)
from nbdcore.protocol.transmission.memory import Memory, new_memory

Buffer = bytes | bytearray | memoryview


class Strict(enum.IntFlag):
    """Which client-side checks are made; the numbers are libnbd's."""

    COMMANDS = 1 << 0
    FLAGS = 1 << 1
    BOUNDS = 1 << 2
    ZERO_SIZE = 1 << 3
    ALIGN = 1 << 4
    PAYLOAD = 1 << 5
    AUTO_FLAG = 1 << 6


ALL_STRICT = Strict(0x7F)

# In plain ints what is looked at for every request: an operation on flags of the enum module costs as much as a whole request.
_ALL_STRICT = int(ALL_STRICT)
_COMMANDS, _FLAGS, _BOUNDS, _ZERO_SIZE = int(Strict.COMMANDS), int(Strict.FLAGS), int(Strict.BOUNDS), int(Strict.ZERO_SIZE)
_ALIGN, _PAYLOAD, _AUTO_FLAG = int(Strict.ALIGN), int(Strict.PAYLOAD), int(Strict.AUTO_FLAG)
_FUA, _NO_HOLE, _DF = int(CommandFlag.FUA), int(CommandFlag.NO_HOLE), int(CommandFlag.DF)
_REQ_ONE, _FAST_ZERO, _PAYLOAD_LEN = int(CommandFlag.REQ_ONE), int(CommandFlag.FAST_ZERO), int(CommandFlag.PAYLOAD_LEN)
_READ_ONLY, _SEND_FLUSH = int(TransmissionFlag.READ_ONLY), int(TransmissionFlag.SEND_FLUSH)
_SEND_TRIM, _SEND_CACHE = int(TransmissionFlag.SEND_TRIM), int(TransmissionFlag.SEND_CACHE)
_SEND_WRITE_ZEROES, _STATUS_PAYLOAD = int(TransmissionFlag.SEND_WRITE_ZEROES), int(TransmissionFlag.BLOCK_STATUS_PAYLOAD)
#: A flag of a command, and the flag of the export that offers it.
_OFFERED = (
    (_FUA, int(TransmissionFlag.SEND_FUA)),
    (_DF, int(TransmissionFlag.SEND_DF)),
    (_FAST_ZERO, int(TransmissionFlag.SEND_FAST_ZERO)),
)
_READ, _WRITE, _BLOCK_STATUS = int(CommandType.READ), int(CommandType.WRITE), int(CommandType.BLOCK_STATUS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What requests of a connection must obey.

    Attributes:
        size: of the export, in bytes.
        flags: what the export can do.
        minimum: block size in bytes that offsets and counts are multiples of.
        payload: most bytes that a single write is allowed to carry.
        maximum: most bytes that the server wants in one request; larger ones are split before they come here.
        extended: lengths of 64 bits may be used.
        structured: structured replies are on.
        contexts: metadata contexts are selected.
        strict: which checks are made.
        plain_reads: an offset in bytes. A read without flags that ends there or before is right as it is, and is not checked any
            further. 0: all reads are checked.
        plain_writes: the same for writes.
        data: most bytes of data to read or write in one request: the maximum in whole blocks.
    """

    size: int
    flags: int
    minimum: int = 1
    payload: int = MAX_PAYLOAD
    maximum: int = DEFAULT_MAXIMUM
    extended: bool = False
    structured: bool = False
    contexts: bool = False
    strict: int = ALL_STRICT
    plain_reads: int = field(init=False)
    plain_writes: int = field(init=False)
    data: int = field(init=False)

    def __post_init__(self) -> None:
        reads = self.size if self.strict == _ALL_STRICT and self.minimum <= 1 else 0
        object.__setattr__(self, "plain_reads", reads)
        object.__setattr__(self, "data", self.maximum - self.maximum % self.minimum)
        object.__setattr__(self, "plain_writes", 0 if self.flags & _READ_ONLY else reads)


#: Unsigned integers as they came, in 4 or 8 bytes each: a tuple of a million would take ten times the room.
Numbers: TypeAlias = "array[int]"


@dataclass(frozen=True, slots=True)
class StatusChunk:
    """The extents of one metadata context in a reply to block status.

    Attributes:
        context: its name.
        lengths: bytes of each extent, the first one beginning at the command's offset.
        flags: status of each extent.
    """

    context: str
    lengths: Numbers
    flags: Numbers


class Command:
    """One request and its outcome.

    Attributes:
        type, flags, offset, count: as in the request; count in bytes.
        payload: bytes that follow the header, else None.
        target: where read data go; None lets the reply's data become `data`, or memory of our own.
        data: outcome of a read without a target.
        chunks: outcome of block status.
        described: how many bytes it has told of, by context; None before it has told of any.
        error: the first error, else None.
        done: whether the outcome is final.
        completion: called once with the command when it is done.
        on_chunk: called for each piece of a read with the command, the kind of chunk, offset and length in bytes, and the errno
            of an error; data are in place by then. Called in the middle of decoding: it may submit commands, and nothing else.
        on_extents: called likewise with the command, a context, its lengths and its flags; then `chunks` stays empty.
        tag: whatever the front end wants to find again at the command's end.
    """

    __slots__ = (
        "chunks",
        "completion",
        "cookie",
        "count",
        "data",
        "described",
        "discard",
        "done",
        "error",
        "flags",
        "fragments",
        "mark",
        "memory",
        "offset",
        "on_chunk",
        "on_extents",
        "payload",
        "received",
        "tag",
        "target",
        "type",
    )

    def __init__(self, kind: int, flags: int, offset: int, count: int) -> None:
        self.type: int = kind
        self.flags: int = flags if flags.__class__ is int else int(index(flags))
        # Nothing but an int gets past here: what is no integer is a TypeError now, not an accident while packing.
        self.offset: int = offset if offset.__class__ is int else index(offset)
        self.count: int = count if count.__class__ is int else index(count)
        self.payload: bytes | memoryview | None = None
        self.target: memoryview | None = None
        self.data: bytes | None = None
        self.chunks: list[StatusChunk] = []
        self.described: dict[str, int] | None = None
        self.error: Error | None = None
        self.done: bool = False
        self.completion: Callable[[Command], Any] | None = None
        self.on_chunk: Callable[[Command, int, int, int, int], object] | None = None
        self.on_extents: Callable[[Command, str, Numbers, Numbers], object] | None = None
        self.tag: Any = None
        self.cookie: int = 0
        #: what the target is a view of, where the caller brought none
        self.memory: Memory | None = None
        #: which engine it was submitted to
        self.mark: object = None
        #: bytes of data received for a read, extents for block status
        self.received: int = 0
        #: ranges of a read that arrived in several pieces; None while one piece is all
        self.fragments: list[list[int]] | None = None
        #: the caller has given up: whatever still comes is thrown away
        self.discard: bool = False

    def __str__(self) -> str:
        name = _NAMES[self.type]
        return (
            name
            if self.type in (CommandType.FLUSH, CommandType.DISC)
            else f"{name} of {self.count} bytes at offset {self.offset}"
        )

    def allocate(self) -> memoryview:
        """Give a read memory of its own, where the caller brought none, and return where its data go."""
        if self.target is None:
            self.memory = new_memory(self.count)
            self.target = self.memory.view()
        return self.target

    def result(self) -> bytes:
        """Return the data of a finished read that had no target."""
        if self.data is None:
            target = self.allocate()
            if self.memory is None:  # the caller's, after all
                return bytes(target)
            del target
            memory, self.memory, self.target = self.memory, None, None
            self.data = memory.take()
        return self.data

    def free(self) -> None:
        """Let go of memory that `allocate` gave: the read has failed."""
        if self.memory is not None:
            self.memory = self.target = None


_NAMES: dict[int, str] = {
    CommandType.READ: "read",
    CommandType.WRITE: "write",
    CommandType.DISC: "disconnect",
    CommandType.FLUSH: "flush",
    CommandType.TRIM: "trim",
    CommandType.CACHE: "cache",
    CommandType.WRITE_ZEROES: "write zeroes",
    CommandType.BLOCK_STATUS: "block status",
}

# ---------------------------------------------------------------------------------------------- factories


def read(limits: Limits, count: int, offset: int, *, target: memoryview | None = None, flags: int = 0) -> Command:
    """Build NBD_CMD_READ. `target`, if given, is writable and holds exactly `count` bytes; flags: DF."""
    command = Command(_READ, flags, offset, count)
    offset, count = command.offset, command.count
    if command.flags or not (0 < count <= MAX_PAYLOAD and 0 <= offset <= limits.plain_reads - count):
        _check(limits, command, _DF, past_end=errno.EINVAL)
    command.target = target
    return command


def write(limits: Limits, data: bytes | memoryview, offset: int, *, flags: int = 0) -> Command:
    """Build NBD_CMD_WRITE. `data`, bytes or a view of them, must not change until the command is done; flags: FUA."""
    command = Command(_WRITE, flags, offset, len(data))
    offset, count = command.offset, command.count
    if not command.flags and 0 < count <= limits.payload and 0 <= offset <= limits.plain_writes - count:
        if limits.extended:
            command.flags = _PAYLOAD_LEN
    else:
        command.flags = _auto_payload_flag(limits, command.flags)
        _check(limits, command, _FUA | _PAYLOAD_LEN, past_end=errno.ENOSPC, writes=True, carries=True)
    command.payload = data
    return command


def flush(limits: Limits, *, flags: int = 0) -> Command:
    """Build NBD_CMD_FLUSH."""
    command = Command(CommandType.FLUSH, flags, 0, 0)
    _check_flags(limits, command, 0)
    _check_supported(limits, command, _SEND_FLUSH)
    return command


def trim(limits: Limits, count: int, offset: int, *, flags: int = 0) -> Command:
    """Build NBD_CMD_TRIM; flags: FUA."""
    command = Command(CommandType.TRIM, flags, offset, count)
    _check(limits, command, _FUA, needs=_SEND_TRIM, past_end=errno.ENOSPC, writes=True)
    return command


def cache(limits: Limits, count: int, offset: int, *, flags: int = 0) -> Command:
    """Build NBD_CMD_CACHE."""
    command = Command(CommandType.CACHE, flags, offset, count)
    _check(limits, command, 0, needs=_SEND_CACHE, past_end=errno.EINVAL)
    return command


def zero(limits: Limits, count: int, offset: int, *, flags: int = 0) -> Command:
    """Build NBD_CMD_WRITE_ZEROES; flags: FUA, NO_HOLE, FAST_ZERO."""
    command = Command(CommandType.WRITE_ZEROES, flags, offset, count)
    allowed = _FUA | _NO_HOLE | _FAST_ZERO
    _check(limits, command, allowed, needs=_SEND_WRITE_ZEROES, past_end=errno.ENOSPC, writes=True)
    return command


def block_status(limits: Limits, count: int, offset: int, *, context_ids: Sequence[int] | None = None, flags: int = 0) -> Command:
    """Build NBD_CMD_BLOCK_STATUS; `context_ids` limits the answer to some of the selected contexts; flags: REQ_ONE."""
    allowed = _REQ_ONE
    if context_ids is not None:
        flags = _auto_payload_flag(limits, flags)
        allowed |= _PAYLOAD_LEN
    command = Command(CommandType.BLOCK_STATUS, flags, offset, count)
    _check(limits, command, allowed, past_end=errno.EINVAL, carries=context_ids is not None)
    if context_ids is not None and flags & _PAYLOAD_LEN:  # without the flag the server takes it for the next request
        command.payload = memoryview(wire.UINT64.pack(count) + b"".join(map(wire.UINT32.pack, context_ids)))
    return command


def disconnect() -> Command:
    """Build NBD_CMD_DISC, which has no reply."""
    return Command(CommandType.DISC, 0, 0, 0)


# ---------------------------------------------------------------------------------------------- checks


def _auto_payload_flag(limits: Limits, flags: int) -> int:
    """Set PAYLOAD_LEN on a command with a payload exactly when extended headers are on, unless the caller sees to it."""
    if not limits.strict & _AUTO_FLAG:
        return flags
    return flags | _PAYLOAD_LEN if limits.extended else flags & ~_PAYLOAD_LEN


def _check(
    limits: Limits,
    command: Command,
    allowed: int,
    *,
    past_end: int,
    needs: int = 0,
    writes: bool = False,
    carries: bool = False,
) -> None:
    """Make every check of a command that has an offset and a count; `carries`: a payload is to follow its header."""
    _check_flags(limits, command, allowed)
    _check_supported(limits, command, needs)
    if limits.strict & _COMMANDS:
        _check_capabilities(limits, command, writes=writes, carries=carries)
    _check_range(limits, command, past_end)
    _check_length(limits, command)


def _check_flags(limits: Limits, command: Command, allowed: int) -> None:
    strange = command.flags & ~(allowed if limits.strict & _FLAGS else 0xFFFF)
    if strange:
        raise UsageError(errno.EINVAL, f"{command}: flags {strange:#x} do not belong to this command")


def _check_supported(limits: Limits, command: Command, needs: int) -> None:
    if limits.strict & _COMMANDS and limits.flags & needs != needs:
        raise UsageError(errno.EINVAL, f"{command}: the server does not offer this command for the export")


def _check_capabilities(limits: Limits, command: Command, *, writes: bool, carries: bool) -> None:
    if writes and limits.flags & _READ_ONLY:
        raise UsageError(errno.EPERM, f"{command}: the export is read-only")
    for flag, needs in _OFFERED:
        if command.flags & flag and not limits.flags & needs:
            name = CommandFlag(flag).name
            raise UsageError(errno.EINVAL, f"{command}: the server does not offer the flag {name} for the export")
    if command.type == _BLOCK_STATUS:
        if not (limits.structured and limits.contexts):
            raise UsageError(errno.ENOTSUP, f"{command}: no metadata context is selected, or the server has none")
        if carries and not (limits.extended and limits.flags & _STATUS_PAYLOAD):
            raise UsageError(errno.ENOTSUP, f"{command}: the server cannot limit it to some of the contexts")
    if bool(command.flags & _PAYLOAD_LEN) != (limits.extended and carries):
        raise UsageError(
            errno.EINVAL, f"{command}: the flag PAYLOAD_LEN goes with a payload under extended headers, and only there"
        )


def _check_range(limits: Limits, command: Command, past_end: int) -> None:
    offset, count = command.offset, command.count
    if count < 0 or offset < 0 or offset >= 1 << 64:
        raise UsageError(errno.EINVAL, f"{command}: offset and count must be numbers from 0 on that fit 64 bits")
    if count == 0 and limits.strict & _ZERO_SIZE:
        raise UsageError(errno.EINVAL, f"{command}: a request for no bytes has no defined meaning")
    if limits.strict & _BOUNDS and (offset > limits.size or count > limits.size - offset):
        raise UsageError(past_end, f"{command} reaches past the end of the export ({limits.size} bytes)")
    if limits.strict & _ALIGN and limits.minimum > 1 and not _is_aligned(limits, offset, count):
        raise UsageError(
            errno.EINVAL, f"{command}: the server wants multiples of {limits.minimum} bytes (its minimum block size)"
        )


def _is_aligned(limits: Limits, offset: int, count: int) -> bool:
    """Whether a request keeps to the minimum block size. One up to the end of an export that ends within a block does, too."""
    minimum = limits.minimum
    return not offset % minimum and (not count % minimum or (offset + count == limits.size and limits.size % minimum > 0))


def _check_length(limits: Limits, command: Command) -> None:
    if command.type in (_READ, _WRITE):
        most = MAX_PAYLOAD
        if command.type == _WRITE and limits.strict & _PAYLOAD:
            most = min(most, limits.payload)
    else:
        most = (1 << 64) - 1 if limits.extended else MAX_COMPACT_LENGTH
    if command.count > most:
        raise UsageError(errno.ERANGE, f"{command}: one request may cover {most} bytes at most; split it")

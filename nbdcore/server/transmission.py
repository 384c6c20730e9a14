"""The transmission phase, server side: one request after the other, from its header to its reply (section "Transmission").

The order inside a request is: framing (what bytes belong to it), the checks, its payload, the back end, the reply. A request that
is refused costs its payload, which is drained, never the connection; only a client whose bytes make no request, or that announces
more of them than can be borne, is cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from nbdcore.protocol import wire
from nbdcore.protocol.constants import (
    EXTENDED_REQUEST_MAGIC,
    MAX_PAYLOAD,
    REQUEST_MAGIC,
    AllocationFlag,
    CommandFlag,
    CommandType,
    ErrorNumber,
)
from nbdcore.server.agreement import CONTEXT_ID, Agreement
from nbdcore.server.backend import Refusal
from nbdcore.server.channel import Channel, ConnectionOver
from nbdcore.server.commands import Checks
from nbdcore.server.exports import Export
from nbdcore.server.replies import ChunkedReplies, ExtendedReplies, Replies, SimpleReplies, StructuredReplies
from nbdcore.server.shutdown import Shutdown

__all__ = ["transmit"]

# A large read goes out in chunks of this size, so that memory per client stays small, and the first bytes leave early.
_PIECE = 1 << 20
# Reads from this size on are looked up for holes first: below, the looking up costs more than sending zeroes.
_WORTH_HOLES = 64 << 10
# The shortest hole worth a chunk of its own, since each chunk costs both sides about a small read's work.
_SHORTEST_HOLE = 4 << 10
# Payloads of this size and less are drained when their request is refused ("any length less than 2^25 bytes should not be
# considered a denial of service attack"; twice that costs nothing more); beyond it the client is cut off.
_MAX_DRAIN = MAX_PAYLOAD

# Plain integers for the hot path.
_READ, _WRITE, _DISC, _STATUS = (
    int(command) for command in (CommandType.READ, CommandType.WRITE, CommandType.DISC, CommandType.BLOCK_STATUS)
)
_PAYLOAD_LEN, _FUA, _DF = int(CommandFlag.PAYLOAD_LEN), int(CommandFlag.FUA), int(CommandFlag.DF)


def transmit(channel: Channel, agreement: Agreement, shutdown: Shutdown) -> None:
    """Serve a client until it says goodbye. Raises ConnectionOver and OSError."""
    _Transmission(channel, agreement, shutdown).run()


class _Transmission:
    def __init__(self, channel: Channel, agreement: Agreement, shutdown: Shutdown) -> None:
        assert agreement.export is not None
        self._channel = channel
        self._export: Export = agreement.export
        self._shutdown = shutdown
        self._extended = agreement.extended
        self._checks = Checks(agreement, shutdown)
        self._chunked: ChunkedReplies | None = None
        if agreement.structured:
            self._chunked = (ExtendedReplies if agreement.extended else StructuredReplies)(channel.queue)
        self._replies: Replies = self._chunked or SimpleReplies(channel.queue)
        self._handlers: dict[int, Callable[[int, int, int, int], None]] = {
            CommandType.READ: self._read,
            CommandType.WRITE: self._write,
            CommandType.FLUSH: self._flush,
            CommandType.TRIM: self._trim,
            CommandType.CACHE: self._cache,
            CommandType.WRITE_ZEROES: self._write_zeroes,
            CommandType.BLOCK_STATUS: self._block_status,
        }

    def run(self) -> None:
        """The request loop; hot."""
        channel, handlers, check = self._channel, self._handlers, self._checks.check
        need, buffer, payload_of = channel.need, channel.buffer, self._payload
        expected = EXTENDED_REQUEST_MAGIC if self._extended else REQUEST_MAGIC
        layout = wire.EXTENDED_REQUEST if self._extended else wire.REQUEST
        size, unpack_from = layout.size, layout.unpack_from
        while True:
            start = need(size, between=True)
            magic, flags, command, cookie, offset, length = unpack_from(buffer, start)
            if magic != expected:
                raise ConnectionOver(f"a request with magic {magic:#x}", violation=True)
            if command == _DISC:
                channel.flush()
                return
            payload = payload_of(flags, command, cookie, offset, length)
            try:
                check(command, flags, offset, length)
            except Refusal as refusal:
                channel.drain(payload)
                self._replies.error(cookie, offset, refusal)
                continue
            try:
                handlers[command](flags, cookie, offset, length)
            except Refusal as refusal:
                self._replies.error(cookie, offset, refusal)

    def _payload(self, flags: int, command: int, cookie: int, offset: int, length: int) -> int:
        """Return how many bytes follow the header; end the connection where they are too many.

        Under extended headers a write must have NBD_CMD_FLAG_PAYLOAD_LEN, but QEMU's client (10.0) leaves it out, and sends the
        payload all the same: there is no other way to mean a write.
        """
        if command != _WRITE and not (self._extended and flags & _PAYLOAD_LEN):
            return 0
        if length > _MAX_DRAIN:
            reason = f"a payload of {length} bytes; at most {_MAX_DRAIN} are taken"
            self._replies.error(cookie, offset, Refusal(ErrorNumber.EINVAL, reason))
            self._channel.flush()
            raise ConnectionOver(reason, violation=True)
        return length

    # ------------------------------------------------------------------------------------------ reading

    def _read(self, flags: int, cookie: int, offset: int, length: int) -> None:
        chunked = self._chunked
        if length == 0:  # unspecified, but no reason to disconnect; a content chunk may not be empty
            self._replies.success(cookie, offset)
        elif chunked is None or flags & _DF or length < _WORTH_HOLES:
            self._replies.whole(cookie, offset, self._export.read(length, offset))
        else:
            self._read_in_pieces(chunked, cookie, offset, length)

    def _read_in_pieces(self, chunked: ChunkedReplies, cookie: int, offset: int, length: int) -> None:
        end = offset + length
        for at, count, hole in self._layout(offset, length):
            last = at + count == end
            if hole:
                chunked.hole(cookie, offset, at, count, last=last)
                continue
            try:
                data = self._export.read(count, at)
            except Refusal as refusal:
                refusal.at = at
                raise
            chunked.data(cookie, offset, at, data, last=last)

    def _layout(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (offset, length, whether a hole) of the pieces in which a range is sent, consecutive."""
        end = offset + length
        start = offset  # of data not yet yielded
        if self._export.knows_holes:
            for count, state in self._holes(offset, length):
                if state & AllocationFlag.ZERO and count >= _SHORTEST_HOLE:
                    yield from _pieces(start, offset)
                    yield offset, count, True
                    start = offset + count
                offset += count
        yield from _pieces(start, end)

    def _holes(self, offset: int, length: int) -> list[tuple[int, int]]:
        try:
            return self._export.extents(length, offset)
        except Refusal:  # not knowing the holes is no reason not to read; the export has logged what there is to log
            return []

    # ------------------------------------------------------------------------------------------ writing

    def _write(self, flags: int, cookie: int, offset: int, length: int) -> None:
        data = self._channel.payload(length)
        if length:
            self._export.write(data, offset)
        self._written(flags, cookie, offset)

    def _trim(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if length:
            self._export.trim(length, offset)
        self._written(flags, cookie, offset)

    def _write_zeroes(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if length:
            self._export.zero(
                length,
                offset,
                may_trim=not flags & CommandFlag.NO_HOLE,
                fast=bool(flags & CommandFlag.FAST_ZERO),
                interrupted=lambda: self._shutdown.requested,
            )
        self._written(flags, cookie, offset)

    def _written(self, flags: int, cookie: int, offset: int) -> None:
        if flags & _FUA:
            self._export.flush()
        self._replies.success(cookie, offset)

    def _flush(self, _flags: int, cookie: int, offset: int, _length: int) -> None:
        self._export.flush()
        self._replies.success(cookie, offset)

    def _cache(self, _flags: int, cookie: int, offset: int, length: int) -> None:
        if length:
            self._export.cache(length, offset)
        self._replies.success(cookie, offset)

    # ------------------------------------------------------------------------------------------ block status

    def _block_status(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if flags & _PAYLOAD_LEN:
            length = self._filtered(length)
            self._checks.check_range(_STATUS, offset, length)
        if length == 0:
            raise Refusal(ErrorNumber.EINVAL, "a block status request of no bytes")
        found = self._export.extents(length, offset, 1) if flags & CommandFlag.REQ_ONE else self._export.extents(length, offset)
        assert self._chunked is not None  # a context can only be selected after structured replies were
        self._chunked.status(cookie, offset, CONTEXT_ID, found)

    def _filtered(self, size: int) -> int:
        """Take the payload of a status request, which names the contexts wanted; return its effect length."""
        known = wire.UINT64.size + wire.UINT32.size  # all that is known here: a length and our one context
        if size != known:
            self._channel.drain(size)
            raise Refusal(ErrorNumber.EINVAL, f"a payload of {size} bytes, where a length and one selected context take {known}")
        payload = self._channel.payload(size)
        (length,) = wire.UINT64.unpack_from(payload)
        (context,) = wire.UINT32.unpack_from(payload, wire.UINT64.size)
        if context != CONTEXT_ID:
            raise Refusal(ErrorNumber.EINVAL, f"metadata context {context} was not selected")
        return int(length)


def _pieces(start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Yield a range of data in pieces that memory can bear."""
    while start < end:
        count = min(_PIECE, end - start)
        yield start, count, False
        start += count

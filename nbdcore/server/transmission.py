"""The transmission phase, server side: one request after the other, from its header to its reply (section "Transmission").

The order inside a request is: framing (what bytes belong to it), the checks, its payload, the back end, the reply. A request that
is refused costs its payload, which is drained, never the connection; only a client whose bytes make no request, or that announces
more of them than can be borne, is cut off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from nbdcore.protocol import wire
from nbdcore.protocol.constants import (
    EXTENDED_REQUEST_MAGIC,
    MAX_PAYLOAD,
    REQUEST_MAGIC,
    CommandFlag,
    CommandType,
    ErrorNumber,
)
from nbdcore.server.backend import Refusal
from nbdcore.server.budget import PIECE, MemoryBudget, PayloadBuffer
from nbdcore.server.channel import SCRATCH, Channel, ConnectionOver
from nbdcore.server.commands import Checks
from nbdcore.server.exports import ServedExport
from nbdcore.server.reading import Reader
from nbdcore.server.replies import ChunkedReplies, ExtendedReplies, Replies, SimpleReplies, StructuredReplies
from nbdcore.server.shutdown import Shutdown
from nbdcore.server.terms import CONTEXT_ID, Terms

__all__ = ["transmit"]

# Payloads of this size and less are drained when their request is refused ("any length less than 2^25 bytes should not be
# considered a denial of service attack"; twice that costs nothing more); beyond it the client is cut off.
_MAX_DRAIN = MAX_PAYLOAD

# Plain integers for the hot path.
_WRITE, _DISC, _STATUS = (int(command) for command in (CommandType.WRITE, CommandType.DISC, CommandType.BLOCK_STATUS))
_PAYLOAD_LEN, _FUA = int(CommandFlag.PAYLOAD_LEN), int(CommandFlag.FUA)


def transmit(channel: Channel, terms: Terms, shutdown: Shutdown, budget: MemoryBudget) -> None:
    """Serve a client until it says goodbye. Raises ConnectionOver and OSError."""
    buffer = PayloadBuffer(budget)
    try:
        _Transmission(channel, terms, shutdown, budget, buffer).run()
    finally:
        buffer.close()


class _Transmission:
    def __init__(self, channel: Channel, terms: Terms, shutdown: Shutdown, budget: MemoryBudget, buffer: PayloadBuffer) -> None:
        assert terms.export is not None
        self._channel = channel
        self._export: ServedExport = terms.export
        self._shutdown = shutdown
        self._buffer = buffer
        self._extended = terms.extended
        self._checks = Checks(terms, shutdown)
        self._chunked: ChunkedReplies | None = None
        if terms.structured:
            self._chunked = (ExtendedReplies if terms.extended else StructuredReplies)(channel.queue)
        self._replies: Replies = self._chunked or SimpleReplies(channel.queue)
        self._handlers: dict[int, Callable[[int, int, int, int], None]] = {
            CommandType.READ: Reader(channel, terms.export, self._replies, budget).read,
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
        need, buffer, extended = channel.need, channel.buffer, self._extended
        expected = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
        layout = wire.EXTENDED_REQUEST if extended else wire.REQUEST
        size, unpack_from = layout.size, layout.unpack_from
        while True:
            start = need(size, between=True)
            magic, flags, command, cookie, offset, length = unpack_from(buffer, start)
            if magic != expected:
                raise ConnectionOver(f"a request with magic {magic:#x}", violation=True)
            if command == _DISC:
                channel.flush()
                return
            # Under extended headers a write must have NBD_CMD_FLAG_PAYLOAD_LEN, but QEMU's client (10.0) leaves it out, and sends
            # the payload all the same: there is no other way to mean a write.
            payload = length if command == _WRITE or (extended and flags & _PAYLOAD_LEN) else 0
            if payload > _MAX_DRAIN:
                self._end_over(payload, cookie, offset)
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

    def _end_over(self, payload: int, cookie: int, offset: int) -> NoReturn:
        reason = f"a payload of {payload} bytes; at most {_MAX_DRAIN} are taken"
        self._replies.error(cookie, offset, Refusal(ErrorNumber.EINVAL, reason))
        self._channel.flush()
        raise ConnectionOver(reason, violation=True)

    # ------------------------------------------------------------------------------------------ writing

    def _write(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if length > SCRATCH:
            self._write_large(offset, length)
        else:
            data = self._channel.payload(length)
            if length:
                self._export.write(data, offset)
        self._written(flags, cookie, offset)

    def _write_large(self, offset: int, left: int) -> None:
        """Write a payload of `left` bytes at once, or in pieces where memory is short."""
        while left:
            piece = self._received(left)
            left -= len(piece)
            try:
                self._export.write(piece, offset)
            except Refusal:
                self._buffer.done()
                self._channel.drain(left)
                raise
            offset += len(piece)
            self._buffer.done()

    def _received(self, left: int) -> memoryview:
        """Receive as much of a payload as there is memory for, at best all that is left of it.

        Memory is taken when there is something to put into it: a client that announces much, and sends nothing, has none of it.
        """
        if left <= SCRATCH:
            return self._channel.payload(left)
        self._channel.fill()
        room = self._buffer.take(left) or self._buffer.take(min(PIECE, left))
        if room is None:
            return self._channel.payload(SCRATCH)
        self._channel.payload_into(room)
        return room

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

"""The decoder of the transmission phase: from received bytes to finished commands.

`buffer` says where the bytes go, `results` what a payload does to its command; here is which message they belong to.
`received` returns the commands that became final. A broken chunk whose end is known fails its command and the connection goes on;
a ProtocolViolation is raised where the two sides no longer agree on where a message begins.

`_decode` is longer than our functions usually are, and flat on purpose. Its loop runs once a reply, where calls, attribute chains
and allocations are most of the cost. It takes what is plain: the whole answer to a small read, and an acknowledgement without an
error. Everything else takes the slow path, in small methods of its own.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from struct import Struct, unpack_from

from nbdcore.errors import CommandError, ProtocolViolation
from nbdcore.protocol import wire
from nbdcore.protocol.constants import (
    CHUNK_ERROR,
    EXTENDED_REPLY_MAGIC,
    MAX_CHUNK,
    MAX_STRING,
    REPLY_FLAG_DONE,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    CommandType,
    ErrorNumber,
)
from nbdcore.protocol.handshake.agreement import Traffic
from nbdcore.protocol.transmission.buffer import ReceiveBuffer
from nbdcore.protocol.transmission.bursts import (
    DATA_DONE,
    DONE,
    SHORTEST,
    acknowledgements,
    data_chunks,
    empty_chunks,
    simple_reads,
)
from nbdcore.protocol.transmission.commands import Command, StatusChunk
from nbdcore.protocol.transmission.results import (
    Status,
    check_coverage,
    error_offset,
    fail,
    local_errno,
    note_error,
    note_range,
    parse_status,
    parse_status_ext,
    place,
    possible_extents,
    spoil,
)

#: A read of at least so many bytes is received straight into its own memory, a smaller one through the scratch buffer, which must
#: hold it in whole. With 16 in flight a read of 64 KiB took a client of nbdkit 39 us of processor time straight and 21 us by way
#: of scratch, one of 96 KiB 38 and 28 us, one of 128 KiB 40 us either way.
LARGE = 1 << 17
# What an error chunk can meaningfully hold: error, length, the longest string, offset. What is longer is skipped.
_LARGEST_ERROR = wire.CHUNK_ERROR_HEAD.size + MAX_STRING + 8

# Most extents taken from one chunk, and per context from one reply: the specification says that a server SHOULD NOT send more.
_MAX_EXTENTS = 1 << 20

_READ, _BLOCK_STATUS = int(CommandType.READ), int(CommandType.BLOCK_STATUS)
_HEADER = Struct(">IIQ")  # magic; error, or flags and type of a chunk; cookie: alike in all three headers
_DATA_HEADER = Struct(">IIQIQ")  # a structured chunk's header and the offset its data begin with
_EXTENDED_DATA = Struct(">IIQQQQ")  # an extended chunk's header and the offset its data begin with
_EXTENDED_HEADER = Struct(">IIQQQ")  # an extended chunk's whole header
_EXTENDED_TAIL = Struct(">QQ")  # offset of the request, length of the payload
_OFFSET = wire.UINT64
_SHUTDOWN = wire.UINT32.pack(ErrorNumber.ESHUTDOWN)


class Decoder:
    """Decodes replies to the commands in flight.

    Args:
        in_flight: cookie -> command, shared with the engine; finished commands are taken out.
        structured: structured replies were agreed on.
        extended: extended headers were agreed on.
        contexts: id -> name of the selected metadata contexts.
        size: of the export, in bytes.
        traffic: where headers are counted.

    Attributes:
        incoming: where bytes are received.
    """

    def __init__(
        self,
        in_flight: dict[int, Command],
        *,
        structured: bool,
        extended: bool,
        contexts: dict[int, str],
        size: int,
        traffic: Traffic,
    ) -> None:
        self._head = 16 if not structured else 40 if extended else 28
        self.incoming: ReceiveBuffer = ReceiveBuffer(self._head, in_flight)
        self._in_flight = in_flight
        self._structured = structured
        self._extended = extended
        self._contexts = contexts
        self._size = size
        self._traffic = traffic
        self._completed: list[Command] = []
        self._chunk_done = False
        self.shutdown_heard: bool = False  #: a command was answered with ESHUTDOWN
        self.raised: BaseException | None = None  #: what a callback raised in the middle of decoding

    # ------------------------------------------------------------------------------------------ for the engine

    def received(self, count: int) -> list[Command]:
        """Take in `count` bytes that were put into the room of `incoming`. Returns the commands that are final now."""
        if self.incoming.take_in(count):
            self._decode()
        completed, self._completed = self._completed, []
        return completed

    def received_alone(self, command: Command, count: int) -> bool:
        """Take `count` bytes in the room of `incoming`, if they are the plain answer to the one command in flight, and no more.

        If they are not, nothing has happened. What such an answer begins with is known before it comes.
        """
        incoming, in_flight, reading = self.incoming, self._in_flight, command.type == _READ
        # Block status is never a header and no more; and a length that fits into no header was not received either.
        if command.type == _BLOCK_STATUS or (reading and count < command.count):
            return False
        cookie, offset, length = command.cookie, command.offset, command.count + 8
        if not (self._extended or (reading and self._structured)):
            header = _HEADER.pack(SIMPLE_REPLY_MAGIC, 0, cookie)
        elif not self._extended:
            header = _DATA_HEADER.pack(STRUCTURED_REPLY_MAGIC, DATA_DONE, cookie, length, offset)
        elif reading:
            header = _EXTENDED_DATA.pack(EXTENDED_REPLY_MAGIC, DATA_DONE, cookie, offset, length, offset)
        else:
            header = _EXTENDED_HEADER.pack(EXTENDED_REPLY_MAGIC, DONE, cookie, offset, 0)
        begin = len(header)
        if (
            count != begin + (command.count if reading else 0)
            or incoming.end
            or incoming.finish is not None
            or not incoming.scratch.startswith(header)
            or len(in_flight) != 1
            or in_flight.get(cookie) is not command
            or command.received
            or command.error is not None
            or command.completion is not None
            or command.on_chunk is not None
        ):
            return False
        if reading:
            if command.target is None:
                command.data = bytes(incoming.view[begin:count])
            else:
                command.target[:] = incoming.view[begin:count]
        self._traffic.chunks_received += 1
        del in_flight[cookie]
        command.done = True
        return True

    def begins_alone(self, command: Command, count: int) -> list[memoryview]:
        """Take `count` bytes in the room of `incoming` if they begin the plain answer to a large read, the one command in flight.

        That is a header, with the offset of the data or without. Returns where the rest goes; then ask `ends_alone`. Empty: they
        do not, and nothing has happened.
        """
        incoming, in_flight, head = self.incoming, self._in_flight, self._head
        if command.type != _READ or not (count == head or (count == head - 8 and self._structured)):
            return []
        # The rest is much as in `received_alone`: one more call there would be a good part of what that spares.
        cookie, offset, length = command.cookie, command.offset, command.count + 8
        if not self._structured:
            header = _HEADER.pack(SIMPLE_REPLY_MAGIC, 0, cookie)
        elif not self._extended:
            header = _DATA_HEADER.pack(STRUCTURED_REPLY_MAGIC, DATA_DONE, cookie, length, offset)
        else:
            header = _EXTENDED_DATA.pack(EXTENDED_REPLY_MAGIC, DATA_DONE, cookie, offset, length, offset)
        if (
            incoming.end
            or incoming.finish is not None
            or not incoming.scratch.startswith(header[:count])
            or len(in_flight) != 1
            or in_flight.get(cookie) is not command
            or command.received
            or command.error is not None
            or command.completion is not None
            or command.on_chunk is not None
        ):
            return []
        incoming.end = count
        memory = command.allocate()
        return [memory] if count == head else [incoming.view[count:head], memory]

    def ends_alone(self, command: Command, count: int) -> bool:
        """Take `count` bytes in the places that `begins_alone` returned if they are all of the answer; the command is done then.

        Other commands may have been submitted meanwhile. False: the bytes are not all, and nothing has happened.
        """
        incoming, head = self.incoming, self._head
        if count != head - incoming.end + command.count:
            return False
        if self._structured and _OFFSET.unpack_from(incoming.scratch, head - 8)[0] != command.offset:
            return False
        incoming.end = 0
        incoming.large -= 1
        self._traffic.chunks_received += 1
        del self._in_flight[command.cookie]
        command.done = True
        return True

    def take_completed(self) -> list[Command]:
        """Return the commands that became final since the last time: after a ProtocolViolation, those before the broken reply."""
        completed, self._completed = self._completed, []
        return completed

    # ------------------------------------------------------------------------------------------ the hot loop

    def _decode(self) -> None:  # noqa: C901, PLR0912, PLR0915 (flat on purpose, see the top of this module)
        headers, head, incoming = 0, self._head, self.incoming
        without_offset = head - 8  # a chunk's header: all that an acknowledgement has
        scratch, view, end = incoming.scratch, incoming.view, incoming.end
        in_flight, structured, extended = self._in_flight, self._structured, self._extended
        unpack_header, unpack_data, unpack_extended = _HEADER.unpack_from, _DATA_HEADER.unpack_from, _EXTENDED_DATA.unpack_from
        chunk_magic = EXTENDED_REPLY_MAGIC if extended else STRUCTURED_REPLY_MAGIC
        complete = self._completed.append
        alike = 0  # bytes of the last reply, data and all, if it was a plain one
        if incoming.finish is not None and not incoming.advance_payload():
            return
        start = incoming.start
        while True:
            available = end - start
            command, begin, after = None, start, start
            if structured and available >= without_offset:
                # An acknowledgement has no offset: it is read from the bytes behind (the scratch has them), and not looked at.
                if extended:
                    magic, word, cookie, asked, length, offset = unpack_extended(scratch, start)
                else:
                    magic, word, cookie, length, offset = unpack_data(scratch, start)
                    asked = offset
                begin = start + head
                after = begin - 8 + length
                if magic == chunk_magic and after <= end:
                    if word == DATA_DONE:
                        command = in_flight.get(cookie)
                        if command is not None and (
                            length != command.count + 8
                            or command.offset != offset
                            or asked != offset
                            or command.type != _READ
                            or command.received
                            or command.error is not None  # or it was given up, which is an error too
                            or command.on_chunk is not None
                        ):
                            command = None
                    elif word == DONE and not length:
                        command = in_flight.get(cookie)
                        if command is not None and (command.type == _READ or (extended and asked != command.offset)):
                            command = None
            elif available < 16:
                incoming.start = start
                break
            else:
                magic, word, cookie = unpack_header(scratch, start)
            if magic == SIMPLE_REPLY_MAGIC and not (word or extended):
                command = in_flight.get(cookie)
                begin = after = start + 16
                if command is not None and command.type == _READ:
                    after += command.count
                    if structured or after > end or command.error is not None or command.on_chunk is not None:
                        command = None
            if command is None:
                incoming.start = start
                self._traffic.chunks_received += headers  # now: what follows may end the connection
                headers = 0
                if not self._slow_path(magic, word, cookie, available):
                    break
                headers += 1
                if incoming.finish is not None and not incoming.advance_payload():
                    break
                start = incoming.start
                continue
            headers += 1
            if command.type == _READ:
                if command.target is None:
                    command.data = bytes(view[begin:after])
                else:
                    command.target[:] = view[begin:after]
                if command.count >= LARGE:
                    incoming.large -= 1
            del in_flight[cookie]
            command.done = True
            complete(command)
            size, start = after - start, after
            if size != alike:
                alike = size
            elif (end - start) // size >= SHORTEST:
                taken = self._burst(magic, command, view[start : end - (end - start) % size])
                headers += taken
                start += taken * size
        self._traffic.chunks_received += headers

    def _burst(self, magic: int, command: Command, replies: memoryview) -> int:
        """Take the bytes that follow the reply to `command`, which began with `magic`, for more like it. Returns how many were.

        Large reads would have to be counted. None are among them, since the scratch buffer does not hold `SHORTEST` of these.
        """
        in_flight, completed = self._in_flight, self._completed
        before = len(completed)
        with contextlib.suppress(KeyError):  # the loop finds out what a reply means that nobody waits for
            if command.type != _READ:
                if magic == SIMPLE_REPLY_MAGIC:
                    acknowledgements(in_flight, completed, replies)
                else:
                    empty_chunks(in_flight, completed, replies, extended=self._extended)
            elif magic == SIMPLE_REPLY_MAGIC:
                simple_reads(in_flight, completed, replies, command.count)
            else:
                data_chunks(in_flight, completed, replies, command.count, extended=self._extended)
        return len(completed) - before

    def _slow_path(self, magic: int, word: int, cookie: int, available: int) -> bool:
        """Begin a reply that is not plain, or not there in whole. Returns False when more of it must be received first."""
        if magic != SIMPLE_REPLY_MAGIC or self._extended:
            return self._chunk(magic, word, cookie, available)
        command = self._in_flight.get(cookie)
        if command is not None and not word and available - 16 < command.count < LARGE:
            return False
        self.incoming.start += 16
        if command is None:
            self._unknown_simple(cookie, word)
        else:
            self._simple_with_more(command, word)
        return True

    def _no_longer_in_flight(self, command: Command) -> None:
        if command.count >= LARGE:
            self.incoming.large -= 1

    def _final(self, command: Command) -> None:
        """The command's last chunk has been dealt with."""
        if self._in_flight.pop(command.cookie, None) is None:
            return
        if command.type == _READ:
            self._no_longer_in_flight(command)
            if command.error is None and not command.discard:
                check_coverage(command)
            if command.error is not None:
                command.free()
        command.done = True
        self._completed.append(command)

    def _tell(self, callback: Callable[..., object], *arguments: object) -> None:
        """Call back in the middle of decoding. What it raises waits until all bytes at hand are decoded: no reply may be lost."""
        try:
            callback(*arguments)
        except BaseException as exc:  # noqa: BLE001 (the engine raises it again)
            self.raised = self.raised or exc

    # ------------------------------------------------------------------------------------------ simple replies

    def _unknown_simple(self, cookie: int, error: int) -> None:
        """A simple reply that nobody waits for has no data if it is an error, or if reads are answered in chunks."""
        if not (error or self._structured):
            raise ProtocolViolation(errno.EPROTO, f"the server answers a command that was not sent (cookie {cookie:#x})")

    def _simple_with_more(self, command: Command, error: int) -> None:
        """A simple reply that carries an error, or data."""
        if error:
            fail(command, local_errno(error))
            self.shutdown_heard |= error == ErrorNumber.ESHUTDOWN
            self._final(command)
            return
        if self._structured:
            spoil(command, "the server answered a read with a simple reply though structured replies were agreed on")
            self.incoming.expect(command, command.count, None, lambda: self._final(command))
            return
        sink = None if command.discard else command.allocate()
        self.incoming.expect(
            command, command.count, sink, lambda: self._data_arrived(command, command.offset, command.count, done=True)
        )

    # ------------------------------------------------------------------------------------------ chunks

    def _chunk(self, magic: int, word: int, cookie: int, available: int) -> bool:
        """Begin a chunk of a structured or extended reply. Returns False when more of its header must be received."""
        start = self.incoming.start
        if magic != (EXTENDED_REPLY_MAGIC if self._extended else STRUCTURED_REPLY_MAGIC):
            raise ProtocolViolation(0, f"the server sends {magic:#010x} where a reply must begin")
        if not self._structured:
            raise ProtocolViolation(errno.EPROTO, "the server sends a structured reply, and none was agreed on")
        kind = word & 0xFFFF
        if self._extended:
            header = 32
            if available < header:
                return False
            offset, length = _EXTENDED_TAIL.unpack_from(self.incoming.scratch, start + 16)
        else:
            header = 20
            if available < header:
                return False
            offset = None
            (length,) = unpack_from(">I", self.incoming.scratch, start + 16)
        if length > MAX_CHUNK:
            raise ProtocolViolation(
                errno.EPROTO, f"the server announces a chunk of {length} bytes; nothing that was asked for is so long"
            )
        command = self._in_flight.get(cookie)
        # Data are placed by the offset at their front: wait for it, so that their place is known before they come. Small ones are
        # waited for whole, so that the next receive brings the replies behind them as well.
        if kind == Chunk.OFFSET_DATA and length >= 8 and available < header + (length if length < LARGE else 8):
            return False
        self.incoming.start = start + header
        self._chunk_done = bool(word >> 16 & REPLY_FLAG_DONE)
        if command is None:
            self.incoming.expect(None, length, None, _nothing)
        elif offset is not None and offset != command.offset:
            self._spoil_chunk(command, length, f"the server answers for offset {offset}")
        else:
            self._sort(command, kind, length)
        return True

    def _sort(self, command: Command, kind: int, length: int) -> None:
        """Decide by its kind what becomes of a chunk."""
        if kind == Chunk.OFFSET_DATA and command.type == _READ and length >= 8:
            self._begin_data(command, length - 8)
        elif kind == Chunk.OFFSET_HOLE and command.type == _READ and length == wire.HOLE.size:
            self._gather(command, length, length, self._hole)
        elif kind in (Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT) and command.type == CommandType.BLOCK_STATUS:
            self._begin_status(command, kind, length)
        elif kind & CHUNK_ERROR:
            self._gather(command, length, _LARGEST_ERROR, self._error_offset if kind == Chunk.ERROR_OFFSET else self._error)
        elif kind == Chunk.NONE and not length and self._chunk_done:
            self._final(command)
        else:
            self._spoil_chunk(command, length, f"the server answers with a chunk of type {kind} and {length} bytes")

    def _gather(self, command: Command, length: int, keep: int, parse: Callable[[Command, memoryview], None]) -> None:
        """Receive a control payload into memory of its own, then parse it."""
        payload = memoryview(bytearray(min(length, keep)))
        done = self._chunk_done

        def finish() -> None:
            parse(command, payload)
            if done:
                self._final(command)

        self.incoming.expect(command, length, payload, finish)

    def _spoil_chunk(self, command: Command, length: int, why: str) -> None:
        """Skip a chunk that does not fit its command, and fail the command."""
        spoil(command, why)
        done = self._chunk_done
        self.incoming.expect(command, length, None, lambda: self._final(command) if done else None)

    # ------------------------------------------------------------------------------------------ data

    def _begin_data(self, command: Command, length: int) -> None:
        (offset,) = _OFFSET.unpack_from(self.incoming.scratch, self.incoming.start)
        self.incoming.start += 8
        begin = place(command, offset, length)
        sink = None if command.discard else command.allocate()[begin : begin + length]
        done = self._chunk_done
        self.incoming.expect(command, length, sink, lambda: self._data_arrived(command, offset, length, done=done))

    def _data_arrived(self, command: Command, offset: int, length: int, *, done: bool) -> None:
        note_range(command, offset, length)
        if command.on_chunk is not None:
            self._tell(command.on_chunk, command, Chunk.OFFSET_DATA, offset, length, 0)
        if done:
            self._final(command)

    def _hole(self, command: Command, payload: memoryview) -> None:
        offset, length = wire.HOLE.unpack(payload)
        begin = place(command, offset, length)
        if not command.discard and (command.target is not None or length < command.count):
            command.allocate()[begin : begin + length] = bytes(length)
        note_range(command, offset, length)
        if command.on_chunk is not None:
            self._tell(command.on_chunk, command, Chunk.OFFSET_HOLE, offset, length, 0)

    # ------------------------------------------------------------------------------------------ extents

    def _begin_status(self, command: Command, kind: int, length: int) -> None:
        extended = kind == Chunk.BLOCK_STATUS_EXT
        extents = length // (16 if extended else 8)
        command.received += extents
        if extents > _MAX_EXTENTS or command.received > _MAX_EXTENTS * max(1, len(self._contexts)):
            self._spoil_chunk(command, length, f"the server describes it in {command.received} extents")
        else:
            self._gather(command, length, length, self._status_ext if extended else self._status)

    def _status(self, command: Command, payload: memoryview) -> None:
        self._extents(command, parse_status(command, payload))

    def _status_ext(self, command: Command, payload: memoryview) -> None:
        self._extents(command, parse_status_ext(command, payload, extended=self._extended))

    def _extents(self, command: Command, status: Status | None) -> None:
        """Keep the extents of a context, as far as they are possible. Contexts that were not selected are ignored."""
        name = None if status is None else self._contexts.get(status[0])
        if status is None or name is None or command.discard:
            return
        described = command.described
        if described is None:
            described = command.described = {}
        before = described.get(name, 0)
        lengths, flags, total = possible_extents(command, status[1], status[2], self._size - before)
        if not lengths:
            return
        described[name] = before + total
        if command.on_extents is not None:
            self._tell(command.on_extents, command, name, lengths, flags)
        else:
            command.chunks.append(StatusChunk(name, lengths, flags))

    # ------------------------------------------------------------------------------------------ errors

    def _error(self, command: Command, payload: memoryview) -> None:
        """NBD_REPLY_TYPE_ERROR, or an error of a type that we do not know."""
        self._note_error(command, payload)

    def _note_error(self, command: Command, payload: memoryview) -> int:
        self.shutdown_heard |= payload[:4] == _SHUTDOWN
        return note_error(command, payload)

    def _error_offset(self, command: Command, payload: memoryview) -> None:
        """NBD_REPLY_TYPE_ERROR_OFFSET: the same, then 64 bits offset."""
        first = command.error is None
        offset = error_offset(command, payload, self._note_error(command, payload))
        if offset is None:
            return
        if first and isinstance(command.error, CommandError):
            command.error.offset = offset
        if command.on_chunk is not None:
            (number,) = wire.UINT32.unpack_from(payload)
            self._tell(command.on_chunk, command, Chunk.ERROR_OFFSET, offset, 0, local_errno(number))


def _nothing() -> None:
    """Nobody waits for the chunk that was just skipped."""

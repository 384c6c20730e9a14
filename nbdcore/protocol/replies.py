"""The decoder of the transmission phase: from received bytes to finished commands.

It is asked for memory (`room`) and told how much of it was filled (`received`). Between messages, room is a scratch buffer, so
that one receive brings dozens of small replies; within the payload of a large message it is the payload's own place, the caller's
memory for a read, so that large data are never copied. `received` returns the commands that became final.

Every number that the server declares is checked before it is used: against the command's own range, in plain integers, and data
are written through a view of exactly that range. A broken chunk whose end is known fails its command and the connection goes on;
a ProtocolViolation is raised where the two sides no longer agree on where a message begins.

`_decode` is longer than our functions usually are, and flat on purpose: it runs once a reply, and calls, attribute chains and
allocations are what a reply costs. Everything but a whole small answer to a read, or a plain acknowledgement, is handled by small
methods outside it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from struct import Struct, unpack_from

from nbdcore.errors import CommandError, ProtocolViolation
from nbdcore.protocol import wire
from nbdcore.protocol.agreement import Traffic
from nbdcore.protocol.commands import Command, StatusChunk
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

#: Bytes of scratch: one receive takes in what a server sends in a burst of small replies.
SCRATCH = 1 << 16
#: A read of at least so many bytes is better received straight into its own memory than through the scratch buffer.
LARGE = 1 << 15
# A read's reply may come in pieces. So many separate ranges are remembered to find overlaps; a server that splits one request
# further than this is not answering but attacking: 64 MiB in pieces of one page are 16384.
_MAX_FRAGMENTS = 1 << 16
# What an error chunk can meaningfully hold: error, length, the longest string, offset. What is longer is skipped.
_LARGEST_ERROR = wire.CHUNK_ERROR_HEAD.size + MAX_STRING + 8

# Most extents taken from one chunk, and per context from one reply: the specification says that a server SHOULD NOT send more.
_MAX_EXTENTS = 1 << 20

_READ = int(CommandType.READ)
_HEADER = Struct(">IIQ")  # magic; error, or flags and type of a chunk; cookie: alike in all three headers
_DATA_HEADER = Struct(">IIQIQ")  # a structured chunk's header and the offset its data begin with
_DATA_DONE = REPLY_FLAG_DONE << 16 | Chunk.OFFSET_DATA
_EXTENDED_TAIL = Struct(">QQ")  # offset of the request, length of the payload
_OFFSET = wire.UINT64

_ERRNO = {int(number): getattr(errno, number.name, errno.EINVAL) for number in ErrorNumber}


def local_errno(number: int) -> int:
    """Return this platform's number for an error number on the wire; unknown ones count as EINVAL (section "Error values")."""
    return _ERRNO.get(number, errno.EINVAL)


class Replies:
    """Decodes replies to the commands in flight.

    Args:
        in_flight: cookie -> command, shared with the engine; finished commands are taken out.
        structured: structured replies were agreed on.
        extended: extended headers were agreed on.
        contexts: id -> name of the selected metadata contexts.
        size: of the export, in bytes.
        traffic: where headers are counted.
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
        self._in_flight = in_flight
        self._structured = structured
        self._extended = extended
        self._contexts = contexts
        self._size = size
        self._traffic = traffic
        self._buffer = bytearray(SCRATCH)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._completed: list[Command] = []
        # The payload being received: its command, bytes still to come, where they go (None: nowhere), what to do at its end.
        self._command: Command | None = None
        self._left = 0
        self._sink: memoryview | None = None
        self._finish: Callable[[], None] | None = None
        self._chunk_done = False
        self.raised: BaseException | None = None  #: what a callback raised in the middle of decoding
        self.large = 0  #: commands in flight that are large reads, counted by the engine
        # Enough for a reply's header and the offset of its data, and not a byte of the data.
        self._head = 16 if not structured else 40 if extended else 28

    # ------------------------------------------------------------------------------------------ memory for bytes

    def room(self) -> memoryview:
        """Return where the next bytes must go; never empty."""
        if self._start == self._end:
            if self._sink is not None:
                return self._sink
            self._start = self._end = 0
        elif self._start:
            rest = self._end - self._start
            self._view[:rest] = self._view[self._start : self._end]
            self._start, self._end = 0, rest
        if self._finish is None and self.large and self.large == len(self._in_flight) and self._end < self._head:
            return self._view[self._end : self._head]
        return self._view[self._end :]

    def received(self, count: int) -> list[Command]:
        """Take in `count` bytes that were put into `room()`. Returns the commands that are final now."""
        if self._start == self._end and self._sink is not None:
            self._left -= count
            self._sink = self._sink[count:]
            self._close_sink()
            if not self._left:
                self._traffic.chunks_received += self._decode()
        else:
            self._end += count
            self._traffic.chunks_received += self._decode()
        return self.take_completed()

    def take_completed(self) -> list[Command]:
        """Return the commands that became final since the last time: after a ProtocolViolation, those before the broken reply."""
        completed, self._completed = self._completed, []
        return completed

    @property
    def between_messages(self) -> bool:
        """Whether everything received so far has been decoded: the server may hang up here without breaking a reply."""
        return self._finish is None and self._start == self._end

    def forget(self, command: Command) -> None:
        """Stop writing into the memory of a command that the caller has given up."""
        if self._command is command:
            self._sink = None

    def close(self) -> None:
        """The connection has ended: let go of whatever memory a payload was being received into."""
        self._command = self._sink = self._finish = None

    # ------------------------------------------------------------------------------------------ the hot loop

    def _decode(self) -> int:  # noqa: C901, PLR0912 (flat on purpose, see the top of this module)
        """Decode what is there. Returns how many headers of replies that were."""
        headers = 0
        buffer, view, end = self._buffer, self._view, self._end
        in_flight, structured, extended = self._in_flight, self._structured, self._extended
        unpack_header, unpack_data = _HEADER.unpack_from, _DATA_HEADER.unpack_from
        complete = self._completed.append
        while True:
            if self._finish is not None and not self._advance_payload():
                return headers
            start = self._start
            available = end - start
            if available >= 28 and structured and not extended:
                magic, word, cookie, length, offset = unpack_data(buffer, start)
                if word == _DATA_DONE and magic == STRUCTURED_REPLY_MAGIC and available >= 20 + length:
                    command = in_flight.get(cookie)
                    if (
                        command is not None
                        and length == command.count + 8
                        and offset == command.offset
                        and command.type == _READ
                        and not command.received
                        and command.error is None  # nor was it given up, which is an error too
                        and command.on_chunk is None
                    ):
                        headers += 1
                        begin, after = start + 28, start + 20 + length
                        if command.target is None:
                            command.data = bytes(view[begin:after])
                        else:
                            command.target[:] = view[begin:after]
                        self._start = after
                        del in_flight[cookie]
                        if command.count >= LARGE:
                            self.large -= 1
                        command.done = True
                        complete(command)
                        continue
            if available < 16:
                return headers
            magic, word, cookie = unpack_header(buffer, start)
            if magic == SIMPLE_REPLY_MAGIC and not extended:
                self._start = start + 16
                command = in_flight.get(cookie)
                if command is None:
                    self._unknown_simple(cookie, word)
                elif word or command.type == _READ:
                    self._simple_with_more(command, word)
                else:
                    del in_flight[cookie]
                    command.done = True
                    complete(command)
            elif not self._chunk(magic, word, cookie, available):
                return headers
            headers += 1

    # ------------------------------------------------------------------------------------------ payloads in general

    def _expect(self, command: Command | None, length: int, sink: memoryview | None, finish: Callable[[], None]) -> None:
        """A payload of `length` bytes follows. As much of it as `sink` holds is kept; then `finish` is called."""
        self._command, self._left, self._finish = command, length, finish
        self._sink = sink if sink is not None and len(sink) and length else None

    def _advance_payload(self) -> bool:
        """Move what the scratch buffer has of the payload to its place. Returns False when more must be received."""
        take = min(self._left, self._end - self._start)
        if take:
            if self._sink is not None:
                kept = min(take, len(self._sink))
                self._sink[:kept] = self._view[self._start : self._start + kept]
                self._sink = self._sink[kept:]
            self._start += take
            self._left -= take
            self._close_sink()
        if self._left:
            return False
        finish, self._finish, self._command, self._sink = self._finish, None, None, None
        if finish is not None:
            finish()
        return True

    def _close_sink(self) -> None:
        if self._sink is not None and not self._sink:
            self._sink = None

    def _final(self, command: Command) -> None:
        """The command's last chunk has been dealt with."""
        if self._in_flight.pop(command.cookie, None) is None:
            return
        if command.type == _READ:
            if command.count >= LARGE:
                self.large -= 1
            if command.error is None and not command.discard:
                self._check_coverage(command)
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
            self._fail(command, local_errno(error))
            self._final(command)
            return
        if self._structured:
            self._spoil(command, "the server answered a read with a simple reply though structured replies were agreed on")
            self._expect(command, command.count, None, lambda: self._final(command))
            return
        begin, after = self._start, self._start + command.count
        if after <= self._end and command.target is None and command.on_chunk is None and not command.discard:
            command.data = bytes(self._view[begin:after])
            command.received = command.count
            self._start = after
            self._final(command)
            return
        sink = None if command.discard else command.allocate()
        self._expect(command, command.count, sink, lambda: self._data_arrived(command, command.offset, command.count, done=True))

    # ------------------------------------------------------------------------------------------ chunks

    def _chunk(self, magic: int, word: int, cookie: int, available: int) -> bool:
        """Begin a chunk of a structured or extended reply. Returns False when more of its header must be received."""
        start = self._start
        if magic != (EXTENDED_REPLY_MAGIC if self._extended else STRUCTURED_REPLY_MAGIC):
            raise ProtocolViolation(0, f"the server sends {magic:#010x} where a reply must begin")
        if not self._structured:
            raise ProtocolViolation(errno.EPROTO, "the server sends a structured reply, and none was agreed on")
        kind = word & 0xFFFF
        if self._extended:
            header = 32
            if available < header:
                return False
            offset, length = _EXTENDED_TAIL.unpack_from(self._buffer, start + 16)
        else:
            header = 20
            if available < header:
                return False
            offset = None
            (length,) = unpack_from(">I", self._buffer, start + 16)
        if length > MAX_CHUNK:
            raise ProtocolViolation(
                errno.EPROTO, f"the server announces a chunk of {length} bytes; nothing that was asked for is so long"
            )
        command = self._in_flight.get(cookie)
        # Data are placed by the offset at their front: wait for it, so that their place is known before they come.
        if kind == Chunk.OFFSET_DATA and length >= 8 and available < header + 8:
            return False
        self._start = start + header
        self._chunk_done = bool(word >> 16 & REPLY_FLAG_DONE)
        if command is None:
            self._expect(None, length, None, _nothing)
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

        self._expect(command, length, payload, finish)

    def _spoil_chunk(self, command: Command, length: int, why: str) -> None:
        """Skip a chunk that does not fit its command, and fail the command."""
        self._spoil(command, why)
        done = self._chunk_done
        self._expect(command, length, None, lambda: self._final(command) if done else None)

    # ------------------------------------------------------------------------------------------ data

    def _begin_data(self, command: Command, length: int) -> None:
        (offset,) = _OFFSET.unpack_from(self._buffer, self._start)
        self._start += 8
        begin = self._place(command, offset, length)
        sink = None if command.discard else command.allocate()[begin : begin + length]
        done = self._chunk_done
        self._expect(command, length, sink, lambda: self._data_arrived(command, offset, length, done=done))

    def _place(self, command: Command, offset: int, length: int) -> int:
        """Return where a range of the export lies in the read's memory; a range outside it is fatal, as the server is lost."""
        begin = offset - command.offset
        if length > command.count or begin < 0 or begin > command.count - length:
            raise ProtocolViolation(
                errno.EPROTO, f"the server sends {length} bytes at offset {offset} in answer to a {command}: that is outside it"
            )
        return begin

    def _data_arrived(self, command: Command, offset: int, length: int, *, done: bool) -> None:
        self._note(command, offset, length)
        if command.on_chunk is not None:
            self._tell(command.on_chunk, command, Chunk.OFFSET_DATA, offset, length, 0)
        if done:
            self._final(command)

    def _hole(self, command: Command, payload: memoryview) -> None:
        offset, length = wire.HOLE.unpack(payload)
        begin = self._place(command, offset, length)
        if not command.discard and (command.target is not None or length < command.count):
            command.allocate()[begin : begin + length] = bytes(length)
        self._note(command, offset, length)
        if command.on_chunk is not None:
            self._tell(command.on_chunk, command, Chunk.OFFSET_HOLE, offset, length, 0)

    def _note(self, command: Command, offset: int, length: int) -> None:
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
                raise ProtocolViolation(
                    errno.EPROTO, f"the server answers a {command} in more than {_MAX_FRAGMENTS} separate pieces"
                )

    def _check_coverage(self, command: Command) -> None:
        """A read that is declared a success must have got each byte, and each byte once."""
        if command.received != command.count:
            self._spoil(command, f"the server declares success after {command.received} bytes")
        elif command.fragments is not None:
            at = command.offset
            for begin, after in sorted(command.fragments):
                if begin < at:
                    self._spoil(command, f"the server sent the bytes at offset {begin} twice")
                at = max(at, after)

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
        """NBD_REPLY_TYPE_BLOCK_STATUS: 32 bits context id, then 32 bits length and 32 bits flags an extent."""
        if len(payload) < 12 or len(payload) % 8 != 4:
            self._spoil(command, f"the server sent block status of {len(payload)} bytes")
            return
        if self._extended:
            self._spoil(command, "the server sent block status of 32 bits under extended headers")
        context, *numbers = unpack_from(f">{len(payload) // 4}I", payload)
        self._extents(command, context, tuple(numbers[0::2]), tuple(numbers[1::2]))

    def _status_ext(self, command: Command, payload: memoryview) -> None:
        """NBD_REPLY_TYPE_BLOCK_STATUS_EXT: 32 bits context id, 32 bits count, then 64 bits length and 64 bits flags an extent."""
        if len(payload) < 24 or len(payload) % 16 != 8:
            self._spoil(command, f"the server sent extended block status of {len(payload)} bytes")
            return
        if not self._extended:
            self._spoil(command, "the server sent block status of 64 bits, and extended headers were not agreed on")
        context, count = wire.STATUS_EXT_HEAD.unpack_from(payload)
        numbers = unpack_from(f">{len(payload) // 8 - 1}Q", payload, 8)
        if count != len(numbers) // 2:
            self._spoil(command, f"the server announced {count} extents and sent {len(numbers) // 2}")
        self._extents(command, context, numbers[0::2], numbers[1::2])

    def _extents(self, command: Command, context: int, lengths: tuple[int, ...], flags: tuple[int, ...]) -> None:
        """Keep the extents of a context, up to the first impossible one. Contexts that were not selected are ignored."""
        name = self._contexts.get(context)
        if name is None or command.discard:
            return
        if 0 in lengths:
            stop = lengths.index(0)
            lengths, flags = lengths[:stop], flags[:stop]
            if not lengths:
                self._spoil(command, "the server described an extent of no bytes")
                return
        past = sum(lengths) - (self._size - command.offset)
        if past > 0:
            self._spoil(command, f"the server described extents {past} bytes past the end of the export")
            lengths, flags = _cut(lengths, flags, self._size - command.offset)
        if command.on_extents is not None:
            self._tell(command.on_extents, command, name, lengths, flags)
        else:
            command.chunks.append(StatusChunk(name, lengths, flags))

    # ------------------------------------------------------------------------------------------ errors

    def _error(self, command: Command, payload: memoryview) -> None:
        """NBD_REPLY_TYPE_ERROR, or an error of a type that we do not know: 32 bits error, 16 bits length, text."""
        self._parse_error(command, payload)

    def _error_offset(self, command: Command, payload: memoryview) -> None:
        """NBD_REPLY_TYPE_ERROR_OFFSET: the same, then 64 bits offset."""
        first = command.error is None
        after_text = self._parse_error(command, payload)
        error = command.error
        if not isinstance(error, CommandError) or len(payload) < after_text + 8:
            return
        (offset,) = _OFFSET.unpack_from(payload, after_text)
        if command.offset <= offset < command.offset + max(command.count, 1):
            if first:
                error.offset = offset
            if command.on_chunk is not None:
                (number,) = wire.UINT32.unpack_from(payload)
                self._tell(command.on_chunk, command, Chunk.ERROR_OFFSET, offset, 0, local_errno(number))

    def _parse_error(self, command: Command, payload: memoryview) -> int:
        """Note the error of an error chunk, whole or cut short. Returns where in the payload its text ends."""
        if len(payload) < 4:
            self._spoil(command, f"the server sent an error of {len(payload)} bytes")
            return len(payload)
        (number,) = wire.UINT32.unpack_from(payload)
        length = wire.UINT16.unpack_from(payload, 4)[0] if len(payload) >= 6 else 0
        text = bytes(payload[6 : 6 + length]) if length <= min(len(payload) - 6, MAX_STRING) else b""
        if number == 0:
            self._spoil(command, "the server sent an error chunk with error number 0")
        else:
            self._fail(command, local_errno(number), text.decode("utf-8", "surrogateescape"))
        return 6 + length

    def _fail(self, command: Command, number: int, text: str = "") -> None:
        """Note the first error of a command."""
        if command.error is None:
            command.error = CommandError(number, f"{command} failed: {os.strerror(number)}", server_text=text)

    def _spoil(self, command: Command, why: str) -> None:
        """Fail a command whose answer breaks the protocol though the stream is still in step."""
        if command.error is None:
            command.error = CommandError(errno.EPROTO, f"{command} failed: {why}")


def _nothing() -> None:
    """Nobody waits for the chunk that was just skipped."""


def _cut(lengths: tuple[int, ...], flags: tuple[int, ...], room: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the extents that lie within `room` bytes, the last one shortened."""
    kept: list[int] = []
    for length in lengths:
        if room <= 0:
            break
        kept.append(min(length, room))
        room -= length
    return tuple(kept), flags[: len(kept)]

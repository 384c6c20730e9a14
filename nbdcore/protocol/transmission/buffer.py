"""Memory for what is received: a scratch buffer between messages, a payload's own place within one.

The half of the decoder that knows bytes and no NBD: where the next ones must go, how far a payload has come, and what to call
when it is complete. So that one receive brings dozens of small replies, and large data are never copied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from nbdcore.protocol.transmission.commands import Command

#: Bytes of scratch: one receive takes in what a server sends in a burst of small replies. Of 4 KiB reads, 64 in flight, each cost
#: a client of nbdkit 7.1 us of processor time with 64 KiB, 6.4 with 128 KiB, and 6.2 with 256 KiB, which holds all of them.
SCRATCH = 1 << 18

# Bytes behind the scratch: to unpack a header and an offset takes so many more than a header alone, where that comes last.
_BEHIND = 8
# Scratch buffers of connections at rest, for the next that needs one. It is theirs only while they receive: a thousand idle ones
# would hold 256 MiB. Making a new one costs as much as a small receive; a few are all that are busy at the same moment.
_spare: list[bytearray] = []
_MOST_SPARE = 8
_NONE = bytearray()
# The C library gives free memory at the end of its heap back to the system, and asks for it anew with the next burst of data: for
# 4 KiB reads, 64 in flight, that cost glibc 0.9 us a read. After a block of this size was freed it keeps twice as much
# (mallopt(3), M_MMAP_THRESHOLD); elsewhere this does nothing.
_KEPT = 1 << 19


class Receiver(ABC):
    """Takes bytes in, and lets `_decode` make sense of them.

    Args:
        head: bytes of a reply's header, with the offset of its data, and not a byte of the data.
    """

    def __init__(self, head: int) -> None:
        self._head = head
        self._buffer = _NONE
        self._view = memoryview(_NONE)
        self._start = self._end = 0
        # The payload being received: its command, bytes still to come, where they go (None: nowhere), what to do at its end.
        self._command: Command | None = None
        self._left = 0
        self._sink: memoryview | None = None
        self._finish: Callable[[], None] | None = None

    @abstractmethod
    def _decode(self) -> None:
        """Decode what is there, from `_start` to `_end` of the scratch buffer, and payloads through `_advance_payload`."""

    @abstractmethod
    def _only_large(self) -> bool:
        """Whether all that can come are large payloads, of which nothing should land in the scratch buffer."""

    def room(self) -> memoryview:
        """Return where the next bytes must go; never empty."""
        if self._start == self._end:
            if self._sink is not None:
                return self._sink
            self._start = self._end = 0
            if not self._view:
                self._take_scratch()
        elif self._start:
            rest = self._end - self._start
            self._view[:rest] = self._view[self._start : self._end]
            self._start, self._end = 0, rest
        if self._finish is None and self._end < self._head and self._only_large():
            return self._view[self._end : self._head]
        return self._view[self._end :]

    def rest(self) -> None:
        """Nothing more is to be received just now: do without a scratch buffer, unless there is part of a message in it."""
        if self._start == self._end and self._view:
            if len(_spare) < _MOST_SPARE:
                _spare.append(self._buffer)
            self._buffer, self._view = _NONE, memoryview(_NONE)

    def _take_scratch(self) -> None:
        try:
            self._buffer = _spare.pop()
        except IndexError:
            bytearray(_KEPT)
            self._buffer = bytearray(SCRATCH + _BEHIND)
        self._view = memoryview(self._buffer)[:SCRATCH]

    def _take_in(self, count: int) -> None:
        """Take in `count` bytes that were put into `room()`."""
        if self._start == self._end and self._sink is not None:
            self._left -= count
            self._sink = self._sink[count:]
            self._close_sink()
            if not self._left:
                self._decode()
        else:
            self._end += count
            self._decode()

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

    # ------------------------------------------------------------------------------------------ payloads

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

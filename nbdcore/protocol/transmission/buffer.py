"""Memory for what is received: a scratch buffer between messages, a payload's own place within one.

This part of the decoder knows bytes and no NBD. It says where the next bytes must go and how far a payload has come, and it calls
whoever waits for the payload's end. So one receive brings dozens of small replies, and large data are never copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sized

from nbdcore.protocol.transmission.commands import Command

#: Bytes of scratch: one receive takes in what a server sends in a burst of small replies. Of 4 KiB reads, 64 in flight, each cost
#: a client of nbdkit 7.1 us of processor time with 64 KiB, 6.4 with 128 KiB, and 6.2 with 256 KiB, which holds all of them.
SCRATCH = 1 << 18

# Bytes behind the scratch: a header is unpacked together with the offset behind it, and the last header may have none.
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


class ReceiveBuffer:
    """Takes bytes in, and tells payloads from what is to be decoded.

    Args:
        head: bytes of a reply's header, with the offset of its data, and not a byte of the data.
        awaited: what replies are waited for. Only how many there are is looked at.

    Attributes:
        scratch: received bytes, those from `start` to `end` not decoded yet. There are a few more behind `view`.
        view: of the scratch; what is put into `room` never goes further.
        finish: what is called at the end of the payload that is expected; None between payloads.
        large: how many of those awaited are replies with large payloads.
        into_memory: where the rest of a payload goes that is being received; None: to nowhere, or there is none.
    """

    def __init__(self, head: int, awaited: Sized) -> None:
        self._head = head
        self._awaited = awaited
        self.large: int = 0
        self.scratch: bytearray = _NONE
        self.view: memoryview = memoryview(_NONE)
        self.start: int = 0
        self.end: int = 0
        self.finish: Callable[[], None] | None = None
        # The payload being received: its command, bytes still to come, where they go (None: nowhere).
        self._command: Command | None = None
        self._left = 0
        self.into_memory: memoryview | None = None

    def room(self) -> memoryview:
        """Return where the next bytes must go; never empty."""
        if self.start == self.end:
            if self.into_memory is not None:
                return self.into_memory
            self.start = self.end = 0
            if not self.view:
                self._take_scratch()
        elif self.start:
            left = self.end - self.start
            self.view[:left] = self.view[self.start : self.end]
            self.start, self.end = 0, left
        # Where all that can come are large payloads, nothing of them should land in the scratch buffer.
        if self.finish is None and self.end < self._head and self.large > 0 and self.large == len(self._awaited):
            return self.view[self.end : self._head]
        return self.view[self.end :]

    def release(self) -> None:
        """Nothing more is to be received just now: do without a scratch buffer, unless there is part of a message in it."""
        if self.start == self.end and self.view:
            if len(_spare) < _MOST_SPARE:
                _spare.append(self.scratch)
            self.scratch, self.view = _NONE, memoryview(_NONE)

    def _take_scratch(self) -> None:
        try:
            self.scratch = _spare.pop()
        except IndexError:
            bytearray(_KEPT)
            self.scratch = bytearray(SCRATCH + _BEHIND)
        self.view = memoryview(self.scratch)[:SCRATCH]

    def take_in(self, count: int) -> bool:
        """Take in `count` bytes that were put into `room()`. Returns whether there is something to decode, or a payload's end."""
        if self.start == self.end and self.into_memory is not None:
            self._left -= count
            self.into_memory = self.into_memory[count:]
            self._close_sink()
            return not self._left
        self.end += count
        return True

    @property
    def direct(self) -> Command | None:
        """The command into whose own memory the next bytes go; None where they go into the scratch buffer."""
        return self._command if self.into_memory is not None and self.start == self.end else None

    @property
    def between_messages(self) -> bool:
        """Whether everything received so far has been decoded: the server may hang up here without breaking a reply."""
        return self.finish is None and self.start == self.end

    def forget(self, command: Command) -> None:
        """Stop writing into the memory of a command that the caller has given up."""
        if self._command is command:
            self.into_memory = None

    def close(self) -> None:
        """The connection has ended: let go of whatever memory a payload was being received into."""
        self._command = self.into_memory = self.finish = None

    # ------------------------------------------------------------------------------------------ payloads

    def expect(self, command: Command | None, length: int, sink: memoryview | None, finish: Callable[[], None]) -> None:
        """A payload of `length` bytes follows. As much of it as `sink` holds is kept; then `finish` is called."""
        self._command, self._left, self.finish = command, length, finish
        self.into_memory = sink if sink is not None and len(sink) and length else None

    def advance_payload(self) -> bool:
        """Move what the scratch buffer has of the payload to its place. Returns False when more must be received."""
        take = min(self._left, self.end - self.start)
        if take:
            if self.into_memory is not None:
                kept = min(take, len(self.into_memory))
                self.into_memory[:kept] = self.view[self.start : self.start + kept]
                self.into_memory = self.into_memory[kept:]
            self.start += take
            self._left -= take
            self._close_sink()
        if self._left:
            return False
        finish, self.finish, self._command, self.into_memory = self.finish, None, None, None
        if finish is not None:
            finish()
        return True

    def _close_sink(self) -> None:
        if self.into_memory is not None and not self.into_memory:
            self.into_memory = None

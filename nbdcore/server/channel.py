"""One client's bytes: received ahead into a scratch buffer, sent in batches, encrypted or not, waited for here and nowhere else.

A channel never holds more than its scratch buffer and a bounded queue of replies, whatever the client does: nothing is received
while replies wait for room. Requests that arrive together are taken from the scratch buffer one after the other, and
their replies leave in one send, right before more would be received. It knows no messages, only how many bytes are wanted.
"""

from __future__ import annotations

from nbdcore.server.offer import StartTLS
from nbdcore.server.shutdown import Shutdown
from nbdcore.streams.base import Stream, Want
from nbdcore.streams.waiting import NEVER, Deadline, Watch, wait, wait_any

__all__ = ["QUEUE", "SCRATCH", "Channel", "ConnectionOver"]

#: Bytes of a scratch buffer. One receive brings dozens of requests, or sixteen writes of 4 KiB with their payloads.
SCRATCH = 64 << 10
#: Replies are sent when so many bytes wait: a send this large costs no more per byte than a larger one.
QUEUE = 256 << 10
# Parts smaller than this are copied together: a copy is then cheaper than one more part for the kernel to walk.
_JOIN = 32 << 10
# Seconds for which a client that was told goodbye in TLS may take to say its own. Closing on it earlier would let the kernel
# reset the connection, and the client would miss ours.
_FAREWELL = 1.0


class ConnectionOver(Exception):  # not an error of ours: how a connection's thread finds its way out
    """This connection ends here, for the reason given.

    Attributes:
        violation: whether the client is to blame, which is worth a line in the log.
    """

    def __init__(self, reason: str, *, violation: bool = False) -> None:
        super().__init__(reason)
        self.violation = violation


class Channel:
    """Bytes from and to one client, for one thread. Every method may raise OSError or ConnectionOver: then close it.

    Attributes:
        secure: whether TLS was started, and its handshake is finished.
        heard: whether anything at all has come from the client.
        buffer: the scratch buffer; what `need` returned is where to unpack from.
        deadline: when waiting must end: the handshake's. Once a shutdown is requested, its deadline counts instead.
    """

    def __init__(self, stream: Stream, shutdown: Shutdown) -> None:
        self.secure: bool = False
        self.heard: bool = False
        self.buffer: bytearray = bytearray(SCRATCH)
        self.deadline: Deadline = NEVER
        self._stream = stream
        self._shutdown = shutdown
        self._view = memoryview(self.buffer)
        self._start = self._end = 0
        self._watch = Watch()
        self._parts: list[bytes] = []
        self._queued = 0

    # ------------------------------------------------------------------------------------------ receiving

    def need(self, count: int, *, between: bool = False) -> int:
        """Take `count` bytes, at most the scratch buffer's size, and return where they begin in `buffer`.

        They stay there until the next call. `between` says that a message begins here: only then is the end of the stream an
        orderly one, and only then does a shutdown end the connection when nothing has arrived.
        """
        if self._end - self._start < count:
            self._fill(count, between=between)
        start = self._start
        self._start = start + count
        return start

    def payload(self, count: int) -> memoryview:
        """Take `count` bytes, at most the scratch buffer's size; the view is valid until the next call."""
        start = self.need(count)
        return self._view[start : start + count]

    def fill(self) -> None:
        """Wait until the scratch buffer is full of what is still to be taken."""
        if self._end - self._start < SCRATCH:
            self._fill(SCRATCH, between=False)

    def payload_into(self, room: memoryview) -> None:
        """Take as many bytes as `room` has, and put them there."""
        filled = min(self._end - self._start, len(room))
        room[:filled] = self._view[self._start : self._start + filled]
        self._start += filled
        while filled < len(room):
            filled += self._receive(room[filled:])

    def drain(self, count: int) -> None:
        """Take and forget `count` bytes."""
        while count:
            piece = min(count, SCRATCH)
            self.need(piece)
            count -= piece

    def _fill(self, count: int, *, between: bool) -> None:
        left = self._end - self._start
        self._view[:left] = self._view[self._start : self._end]
        self._start, self._end = 0, left
        while self._end < count:
            self._end += self._receive(self._view[self._end :], between=between and self._end == 0)

    def _receive(self, room: memoryview, *, between: bool = False) -> int:
        """Send what is queued, then receive at least one byte."""
        if self._queued:
            self.flush()
        while (got := self._stream.recv_into(room)) is None:
            if between and self._shutdown.requested:
                raise ConnectionOver("the server is being shut down")
            self._wait(Want.READ, between=between)
        if got == 0:
            raise ConnectionOver("the client hung up" if between else "the client hung up inside a message")
        self.heard = True
        self._check_deadline()
        return got

    # ------------------------------------------------------------------------------------------ sending

    def queue(self, part: bytes, more: bytes = b"") -> None:
        """Queue bytes to be sent, one part and perhaps one `more` behind it, and send when enough have come together."""
        self._parts.append(part)
        if more:
            self._parts.append(more)
        self._queued += len(part) + len(more)
        if self._queued >= QUEUE:
            self.flush()

    def flush(self) -> None:
        """Send everything queued."""
        views = _gathered(self._parts)
        self._parts.clear()
        self._queued = 0
        while views or self._holds_back():
            sent = self._stream.send(views)
            if sent is None:
                self._wait(Want.WRITE)
                continue
            views = _after(views, sent)

    def _holds_back(self) -> bool:
        """Return whether the stream has taken bytes that have not left yet, as TLS may."""
        wants = self._stream.wants()
        # In this order since flags are slow, and this is asked for every reply.
        return wants is not Want.NOTHING and bool(wants & Want.WRITE)

    # ------------------------------------------------------------------------------------------ TLS, and the end

    def start_tls(self, start: StartTLS) -> None:
        """Send what is queued, then do the handshake of TLS; everything after it is encrypted. Raises TLSError where that fails.

        Bytes that are here already came in the clear, after the client had asked for TLS and before it could know the answer.
        Whoever sent them, they are not looked at.
        """
        if self._end > self._start:
            raise ConnectionOver("there were bytes in the clear behind the request for TLS", violation=True)
        self.flush()
        self._stream = stream = start(self._stream)
        while not stream.handshake():
            if self._shutdown.requested:
                raise ConnectionOver("the server is being shut down")
            self._wait(stream.wants(), between=True)
        self.secure = True

    def finish(self) -> None:
        """End the connection in order: send what is queued, then say goodbye. `close` is still to be called."""
        self.flush()
        while not self._stream.finish_sending():
            self._wait(Want.WRITE)
        if self.secure:
            self._await_farewell(Deadline.after(_FAREWELL))

    def _await_farewell(self, deadline: Deadline) -> None:
        while not deadline.expired and self._stream.recv_into(self._view) != 0:
            if not self._stream.buffered():
                wait_any([(self._stream.fileno(), Want.READ), (self._shutdown.fileno(), Want.READ)], deadline)
            if self._shutdown.requested:
                return

    def close(self) -> None:
        """Close the stream; in TLS goodbye is said if that goes through at once."""
        self._stream.close()

    # ------------------------------------------------------------------------------------------ waiting

    def _wait(self, want: Want, *, between: bool = False) -> None:
        """Wait for the client; `between` messages a shutdown ends that, else its deadline does."""
        stream, shutdown = self._stream, self._shutdown
        if stream.buffered() and want & Want.READ:
            self._check_deadline()
            return
        if (its_own := stream.wants()) is not Want.NOTHING:  # asked first since flags are slow
            want |= its_own
        if want is Want.READ and not shutdown.requested:  # nearly always, once for each burst of requests
            self._watch.wait((stream.fileno(), shutdown.fileno()), self.deadline)
            self._check_deadline()
        elif shutdown.requested and not between:
            wait(stream.fileno(), want, shutdown.deadline, "the client did not finish before the server's deadline")
        elif not wait_any([(stream.fileno(), want), (shutdown.fileno(), Want.READ)], self.deadline):
            self._check_deadline()

    def _check_deadline(self) -> None:
        """End what a client that always has a little more would drag on for ever."""
        if (self._shutdown.deadline if self._shutdown.requested else self.deadline).expired:
            raise ConnectionOver("the client took too long", violation=True)


def _gathered(parts: list[bytes]) -> list[memoryview]:
    """Return the bytes of `parts` as few views: small neighbours joined, large ones as they are."""
    views: list[memoryview] = []
    small: list[bytes] = []
    for part in parts:
        if len(part) < _JOIN:
            small.append(part)
            continue
        if small:
            views.append(memoryview(b"".join(small)))
            small = []
        views.append(memoryview(part))
    if small:
        views.append(memoryview(b"".join(small)))
    return views


def _after(views: list[memoryview], sent: int) -> list[memoryview]:
    """Return what is left of `views` after `sent` bytes."""
    for place, view in enumerate(views):
        if sent < len(view):
            return [view[sent:], *views[place + 1 :]]
        sent -= len(view)
    return []

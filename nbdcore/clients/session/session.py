"""A session joins one engine with one stream and moves bytes between them. It raises nothing because of a peer.

It does not wait, except in `wait`, `fill` and `send_all`, which are the stream's own calls.
Whoever owns it asks `interest()` what to wait for on `fileno()`, then calls `advance()`; outcomes are read from commands and
exchanges, and from the engine's phase and error. The stream comes as an argument: a session neither knows nor cares what kind it
is. When the engine has reached its end, the stream is closed here, at once.

When the server agrees to start TLS the stream is swapped for one over it, and the engine waits until that one's handshake is
finished. An encrypted stream may hold bytes that it received already: who waits on the descriptor looks at `buffered` first.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Sequence

from nbdcore.clients import log
from nbdcore.errors import Disconnected, Error, TLSError
from nbdcore.protocol.engine import Engine
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission.commands import Command
from nbdcore.streams.base import WANTS, Stream, Want, from_signal_handler

#: Swaps a plain stream for an encrypted one over it: a TLSStream, or any that shakes hands by itself before it moves bytes.
StartTLS = Callable[[Stream], Stream]

# Receives in one go before the owner is heard again: a server that always has more must not lock out a deadline. With 256 KiB of
# scratch at a time, these are 16 MiB at most.
_RECEIVES = 64
# What sending and half-closing come to where the server has hung up.
_HUNG_UP = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})
_OVER = (Phase.CLOSED, Phase.DEAD)
_NOTHING, _READ, _WRITE = Want.NOTHING, int(Want.READ), int(Want.WRITE)
_CONNECTED = Phase.CONNECTED


class Session:
    """One connection: an engine, and the stream under it.

    Args:
        engine: newly created; `begin` starts its handshake.
        stream: open; the session closes it.
        start_tls: what to do when the server agreed to start TLS; None: such a connection fails.
    """

    def __init__(self, engine: Engine, stream: Stream, *, start_tls: StartTLS | None = None) -> None:
        self.engine = engine
        self._use(stream)
        self._start_tls = start_tls
        self._shake_hands: Callable[[], bool] | None = None  # TLS's handshake, while it lasts
        self._half_closed = self._finishing = False
        #: Which events callers wait for on the descriptor, as the bits of a Want. While there are any, `close` only hangs up: the
        #: number of a closed descriptor could be given to another file.
        self.waited_for: int = 0
        #: somebody may be in `fill`: nobody else receives
        self.filling: bool = False
        #: somebody may be in `send_all`: nobody else sends
        self.sending: bool = False
        # The error of a send while another thread was in `fill`: that one is to receive the rest first.
        self._hung_up: Error | OSError | None = None
        self._process = os.getpid()
        self._ended = False  # which was logged

    def _use(self, stream: Stream) -> None:
        self._stream = stream
        # A plain socket owes nothing and holds nothing back, so it need not be asked with every request.
        self._owes = type(stream).wants is not Stream.wants
        self._holds = type(stream).buffered is not Stream.buffered
        self.fills: bool = type(stream).fill is not Stream.fill
        #: The stream's `fill`. The caller receives into `engine.room()`, with the lock released, and then calls `take_in`. Other
        #: threads may use the session meanwhile, as long as they do not receive.
        self.fill: Callable[..., bool] = stream.fill
        #: the stream's, likewise, for the engine's `large_payload`; how much was sent is for `count_sent`
        self.send_all: Callable[..., bool] = stream.send_all
        self.sends_all: bool = type(stream).send_all is not Stream.send_all

    def fileno(self) -> int:
        """Return the descriptor to wait on; -1 when the connection is over."""
        return self._stream.fileno()

    @property
    def over(self) -> bool:
        """Whether the connection has ended."""
        return self.engine.phase in _OVER

    def wait(self, seconds: float | None) -> bool:
        """Wait until there is something to receive, and return whether there is, as `Stream.wait` does: False, then poll."""
        return self._stream.wait(seconds)

    def stop_watching(self, wanted: int) -> None:
        """Nobody waits on the descriptor any more for these bits of a Want, nor in `fill` or `send_all`."""
        self.waited_for &= ~wanted
        if wanted & _READ:
            self.filling = False
        if wanted & _WRITE:
            self.sending = False

    def interest(self) -> Want:
        """Return what to wait for before `advance()` can do more."""
        return WANTS[self.wanted()]

    def wanted(self) -> int:
        """Return the same as the bits of a Want, in a plain int: operations on flags are slow."""
        engine = self.engine
        if engine.phase in _OVER:
            return 0
        bits = _READ if engine.phase is _CONNECTED or len(engine.room()) else 0
        if (self._finishing or engine.has_outgoing) and self._hung_up is None:
            bits |= _WRITE
        return bits | int(self._stream.wants()) if self._owes else bits

    @property
    def buffered(self) -> bool:
        """Whether `advance()` would find bytes that the stream holds already, though its descriptor may be quiet."""
        return self._holds and self._stream.buffered() and self.engine.phase not in _OVER and len(self.engine.room()) > 0

    def advance(self, *, eager: bool = False, pausing: bool = False) -> None:
        """Send and receive what can be sent and received now; `eager` and `pausing`: as `receive` has them."""
        if self._has_to_send or (self._owes and self._stream.wants() is not _NOTHING):
            self.send()
        self.receive(eager=eager, pausing=pausing)

    @property
    def _has_to_send(self) -> bool:
        return self.engine.has_outgoing or self._finishing or self._shake_hands is not None

    def send(self) -> None:
        """Send what is queued, as far as the stream takes it now."""
        engine, stream = self.engine, self._stream
        if self._hung_up is not None or self.sending:
            return
        try:
            if self._shake_hands is not None and not self._go_on_shaking(self._shake_hands):
                return
            while parts := engine.outgoing():
                count = stream.send(parts)
                if count is None:
                    return
                if not engine.sent(count):
                    break
            if engine.ending and engine.finished_sending and not self._half_closed:
                self._finish_sending()
            elif self._owes and stream.wants() & Want.WRITE:
                stream.send([])
        except (Error, OSError) as exc:
            self._sending_failed(exc)

    def send_alone(self, command: Command) -> bool:
        """Submit a command and send it, where nothing else is under way: as `engine.submit` and `send` do, in fewer calls.

        Returns False where it did not, and nothing has happened. If not all of it could be sent, the rest is for `send`.
        """
        engine = self.engine
        if self._owes or self.sending or self._hung_up is not None or not (parts := engine.submit_alone(command)):
            return False
        try:
            count = self._stream.send(parts)
        except (Error, OSError) as exc:
            self._sending_failed(exc)
            return True
        if count is not None and engine.sent(count):
            self.send()
        return True

    def count_sent(self, sent: list[int]) -> None:
        """Let the engine know how much `send_all` has sent."""
        count = sent.pop() if sent else 0
        if count and self.engine.phase not in _OVER:
            self.engine.sent(count)

    def _sending_failed(self, exc: Error | OSError) -> None:
        if exc.errno in _HUNG_UP and not from_signal_handler(exc):
            if self.filling:
                self._hung_up = exc  # whoever receives finds the end, after what the server answered before
                return
            self._receive_the_rest()
        self._broken(exc)

    def _receive_the_rest(self) -> None:
        """The server takes no more, since it has hung up; what it answered before counts."""
        engine = self.engine
        for _ in range(_RECEIVES):
            room = engine.room()
            try:
                count = self._stream.recv_into(room) if len(room) else None
            except OSError as exc:
                if from_signal_handler(exc):
                    raise
                return
            if count is None:
                return
            if not count:
                engine.received_eof()
                return
            engine.received(count)

    def _finish_sending(self) -> None:
        """Everything has been sent, and the goodbye was the last of it."""
        try:
            self._half_closed = self._stream.finish_sending()
            self._finishing = not self._half_closed
        except OSError as exc:
            if exc.errno not in _HUNG_UP or isinstance(exc, TLSError) or from_signal_handler(exc):
                raise
            # The server has read the goodbye and was faster to hang up.
            self._half_closed = over = True
        else:
            # A server that shuts down has answered everything before the goodbye was said. Nobody needs to wait for its end.
            over = self._half_closed and self.engine.shutting_down
        if over:
            self.engine.received_eof()
            self.close()

    def take_in(self, room: memoryview, taken: list[int], *, eager: bool = False) -> None:
        """Let the engine take in what `fill` received into `room`, then receive what else is there, as `receive` does."""
        engine = self.engine
        count = taken.pop() if taken else 0
        if engine.phase in _OVER:
            self.close()
            return
        if count:
            completed = engine.received(count)
            if self._hung_up is not None:
                self._receive_the_rest()
                self._broken(self._hung_up)
                return
            if engine.queue:
                self.send()
            if (eager and completed) or count < len(room) or engine.direct is not None:
                if engine.phase in _OVER:
                    self.close()
                return
        self.receive(eager=eager, pausing=True)

    def take_in_alone(self, command: Command, room: memoryview, taken: list[int]) -> Sequence[memoryview]:
        """Do as `take_in` does, for a command that is alone here.

        Returns where the rest of its large payload goes: for as many calls of `fill`, and then `take_in_payload`.
        """
        if taken and self._hung_up is None and (rest := self.engine.begins_alone(command, taken[0])):
            taken.clear()
            return rest
        self.take_in(room, taken)
        return ()

    def take_in_payload(self, command: Command, rooms: Sequence[memoryview], taken: list[int]) -> None:
        """Let the engine take in what `fill` received into the rooms that `take_in_alone` returned."""
        engine, counts = self.engine, taken.copy()
        taken.clear()
        if engine.ends_alone(command, sum(counts)):
            if engine.queue:
                self.send()
            return
        # There are fewer, where the wait was broken off. All are counted before anything else is received.
        for count in counts[:-1]:
            if engine.phase not in _OVER:
                engine.received(count)
        if counts:
            self.take_in(rooms[len(counts) - 1], counts[-1:])

    def receive(self, times: int = _RECEIVES, *, eager: bool = False, pausing: bool = False) -> None:
        """Receive what is there, let the engine take it in, and close the stream if that was the end.

        Receives so many times at most, or, where `eager`, until a command has its outcome, or, where `pausing`, until a large
        payload is next, which its caller can wait for with `fill`.
        """
        engine = self.engine
        for _ in range(times):
            stream = self._stream
            room = engine.room()
            if not len(room):
                break
            try:
                count = stream.recv_into(room)
            except (Error, OSError) as exc:
                self._broken(exc)
                break
            if count is None:
                break
            if not count:
                engine.received_eof()
                break
            # What a completion raises is its own matter, an OSError too: the connection goes on.
            completed = engine.received(count)
            if engine.wants_tls:
                self._secure()
            if engine.has_outgoing:
                self.send()
            if (
                (eager and completed)
                or (count < len(room) and not (self._holds and stream.buffered()))
                or (pausing and engine.direct is not None)
            ):
                break
        if engine.phase in _OVER:
            self.close()

    def fail(self, error: Error) -> None:
        """Give the connection up: everything pending fails with `error`."""
        self.engine.fail(error)
        self.close()

    @property
    def inherited(self) -> bool:
        """Whether this is the copy that a fork made of another process's session."""
        return self._process != os.getpid()

    def hang_up(self) -> None:
        """End the stream in both directions, so that whoever waits or moves bytes finds out. May be called at any time."""
        self._stream.hang_up()

    def give_up(self, exc: BaseException) -> None:
        """An exception broke off the moving of bytes, such as Ctrl-C: nobody knows how many have been, so the connection ends."""
        error = Disconnected(errno.ECONNABORTED, f"the connection was given up in the middle of moving bytes ({exc!r})")
        error.__cause__ = exc
        self.fail(error)

    def close(self) -> None:
        """Close the stream. What the engine still wanted to say (its goodbye in opt mode) is said if it goes through at once.

        While somebody waits on the descriptor it only wakes up; then call again. In a copy that a fork made only the descriptor
        is freed, and nothing is said: the connection is the parent's.
        """
        if self.inherited:
            self.engine.end()
            self._stream.close()
            return
        if self.engine.phase is Phase.NEGOTIATING:
            self.engine.abort()
        elif self.engine.phase not in _OVER:
            self.engine.end()
        if parts := self.engine.outgoing():
            # A goodbye that nobody hears is no loss; the error that ended the connection is already kept.
            with contextlib.suppress(OSError):
                self._stream.send(parts)
            parts.clear()
        if not self._ended:
            self._ended = True
            log.info("the connection to %s ended: %s", self._stream, self.engine.error or "this program left while negotiating")
        if self.waited_for:
            self._stream.hang_up()
        else:
            self._stream.close()

    def _broken(self, exc: Error | OSError) -> None:
        """The stream failed. An error of ours says already what happened; the operating system's is put into words.

        What a signal handler raised meanwhile is raised.
        """
        if from_signal_handler(exc):
            raise exc
        if not isinstance(exc, Error):
            error = Disconnected(exc.errno or 0, f"the connection broke: {exc.strerror or exc}")
            error.__cause__ = exc
            exc = error
        self.fail(exc)

    def _secure(self) -> None:
        """The server agreed to start TLS: what is received next is for the stream that does it."""
        if self._start_tls is None:
            self.fail(TLSError(errno.ENOTSUP, "the server agreed to start TLS, and this client was given no way to do it"))
            return
        try:
            self._use(self._start_tls(self._stream))
        except (Error, OSError) as exc:
            self._broken(exc)
            return
        self._shake_hands = getattr(self._stream, "handshake", _no_handshake)
        self.send()

    def _go_on_shaking(self, shake_hands: Callable[[], bool]) -> bool:
        """Go on with the TLS handshake, and return whether the engine has the connection back."""
        if not shake_hands():
            return False
        self._shake_hands = None
        log.debug("encrypted from here on: %s", self._stream)
        self.engine.tls_started()
        return True


def closed_by_program() -> Disconnected:
    """Return what a call raises that meets the end that this program made of the connection."""
    return Disconnected(errno.ENOTCONN, "the connection was closed by this program")


def _no_handshake() -> bool:
    return True

"""The polled client: for event loops that are somebody else's. Nothing waits but `poll` and `wait_for`, which say so.

A loop asks `fileno()` and `direction()`, waits as it likes, and calls `notify_read` or `notify_write`; everything that happens,
happens inside those calls (or `poll`, which is such a loop of one round): completions run there, and may submit commands. So it
is with connecting: a transport's connect is stepped by the same two questions, and the descriptor may change while it lasts.

A thin skin over a session: what to say to the server is the engine's business. Calls come from one thread at a time; whoever
shares a client among threads holds a lock of their own around each call.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Collection, Generator
from functools import partial
from typing import Any, TypeVar

from nbdcore.clients.connect.methods import ConnectMethods
from nbdcore.clients.connect.steps import Blocking, Steps
from nbdcore.clients.connect.target import Find
from nbdcore.clients.connect.tls import Encryption, Permissions
from nbdcore.clients.session.session import Session, StartTLS
from nbdcore.errors import Disconnected, Error, TransportError, UsageError
from nbdcore.protocol.engine import Engine, Exchange
from nbdcore.protocol.handshake.agreement import Settings, Traffic
from nbdcore.protocol.handshake.negotiation import Conversation
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission import commands
from nbdcore.protocol.transmission.commands import ALL_STRICT, Command
from nbdcore.streams.base import AnyOf, Opening, Stream, Want, from_signal_handler
from nbdcore.streams.connecting import in_thread, relay
from nbdcore.streams.waiting import NEVER, Deadline, Watch, wait_any

__all__ = ["PolledClient"]

Result = TypeVar("Result")

_WANT_READ = Want.READ
_CONNECTED = Phase.CONNECTED
# Commands queued while answers to others are awaited go out together, so many at most: one system call for all. With nothing
# under way a command is sent at once, so that there is always an answer whose arrival sends the rest.
_BURST = 16
# A payload of so many bytes gains nothing from waiting for company.
_LARGE_PAYLOAD = 1 << 15


class PolledClient(ConnectMethods[None]):
    """One connection, moved on by whoever watches its descriptor.

    Newly created it is not connected: call one of its `connect` methods, then let it advance until `phase` is CONNECTED, or
    NEGOTIATING in opt mode, or DEAD, with the reason in `error`. An attempt is made once: when to make another, and how long one
    may take, is for the loop to say, so `timeout` and `wait` are refused there. Looking up a host's name, reading certificates
    and starting a program take the time that they take; nothing else waits.

    Args:
        settings: what to ask the server for. Raises UsageError for a name in them that cannot be sent.
        strict: which client-side checks to make.
        start_tls: makes an encrypted stream out of a plain one, for servers that agree to start TLS.
        encryption: whether and how to encrypt, in place of `start_tls` and what the settings say of TLS.
        permissions: what a URI may do.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        strict: int = ALL_STRICT,
        start_tls: StartTLS | None = None,
        encryption: Encryption | None = None,
        permissions: Permissions | None = None,
    ) -> None:
        encryption = encryption or Encryption(policy=settings.tls, start_tls=start_tls)
        super().__init__(Engine(settings, strict=strict), encryption, permissions or Permissions())
        #: the engine underneath, for what is agreed on and for building commands
        self.engine: Engine = self._engine
        self._start_tls: StartTLS | None = None
        self._connecting: _OneByOne | None = None
        self._awaited: tuple[int, Want] = (-1, Want.NOTHING)
        self._session: Session | None = None
        self._advancing = False
        self._watch = Watch()

    @property
    def traffic(self) -> Traffic:
        """What has gone over the wire."""
        return self._engine.traffic

    @property
    def opening(self) -> bool:
        """Whether the way to the server is being opened: nothing has been said yet."""
        return self._connecting is not None

    @property
    def error(self) -> Error | None:
        """Why the connection ended, else None."""
        return self._engine.error

    # ------------------------------------------------------------------------------------------ connecting

    def _connect(self, call: str, find: Find, timeout: float | None, wait: float | None) -> None:
        if timeout is not None or wait is not None:
            raise UsageError(errno.EINVAL, f"{call}: the loop that a polled client is in says how long to wait, not the client")
        target = _at_once(self._find(call, find))
        self._begin_connecting(call, target)
        self._begin(target.endpoint.open(None), target.start_tls)

    def connect_steps(self, connecting: Opening[Stream]) -> None:
        """Start connecting by any generator that does what a transport's `connect` does. TLS is `start_tls` alone."""
        self._legal("connect_stream")
        self._engine.connecting()
        self._begin(connecting, self._encryption.start_tls)

    def _begin(self, connecting: Opening[Stream], start_tls: StartTLS | None) -> None:
        self._start_tls = start_tls
        self._connecting = relay(connecting, _one_descriptor)
        try:
            self._step(self._connecting)
        except BaseException as exc:
            self._look_for_interruption(exc)
            raise

    def _step(self, connecting: _OneByOne) -> None:
        """Let the transport go on until it has to wait again, or is done."""
        try:
            self._awaited = next(connecting)
        except StopIteration as end:
            self._connecting = None
            self._shake_hands(end.value)
        except (Error, OSError) as exc:
            if from_signal_handler(exc):
                raise
            self._connecting = None
            if not isinstance(exc, Error):
                cause = exc
                exc = TransportError(cause.errno or 0, f"cannot connect: {cause.strerror or cause}")
                exc.__cause__ = cause
            self._engine.fail(exc)

    def _shake_hands(self, stream: Stream) -> None:
        self._session = Session(self._engine, stream, start_tls=self._start_tls)
        self._engine.handshake()
        _move(self._session)

    # ------------------------------------------------------------------------------------------ for event loops

    def fileno(self) -> int:
        """Return the descriptor to wait on, -1 where there is none. It may change until the connection is open."""
        if self._connecting is not None:
            return self._awaited[0]
        return -1 if self._session is None else self._session.fileno()

    def direction(self) -> Want:
        """Return what to wait for; nothing while newly created, negotiating, closed or dead."""
        if self._connecting is not None:
            return self._awaited[1]
        return Want.NOTHING if self._session is None else self._session.interest()

    def notify_read(self) -> None:
        """The descriptor is readable, or both readable and writable: receive what is there, and send what can be sent.

        Raises the error that ends the connection, if one does; a server that hangs up between two replies is none.
        """
        self._notify(Want.READ)

    def notify_write(self) -> None:
        """The descriptor is writable: send what can be sent. Raises as `notify_read` does."""
        self._notify(Want.WRITE)

    def _notify(self, event: Want) -> None:
        if not self.direction() & event:
            raise UsageError(errno.EINVAL, f"{event.name} is not what this connection waits for, being {self.phase.value}")
        self.advance()

    def advance(self, *, receives: int | None = None) -> None:
        """Do what can be done now without waiting. Raises as `notify_read` does; UsageError (EDEADLK) from a callback.

        `receives` limits how often bytes are received: for who comes again while there are more.
        """
        self.check_may_wait()
        self._advancing = True
        try:
            if self._connecting is not None:
                self._step(self._connecting)
            elif self._session is not None:
                _move(self._session, receives)
        except BaseException as exc:
            self._look_for_interruption(exc)
            raise
        finally:
            self._advancing = False
        self._raise_if_dead()

    def _look_for_interruption(self, exc: BaseException) -> None:
        """Where a signal handler broke off the moving of bytes the connection ends. What a completion raises ends nothing."""
        if isinstance(exc, Exception) and not from_signal_handler(exc):
            return
        if self._connecting is not None:
            self._connecting.close()
            self._connecting = None
        if self._session is not None:
            self._session.give_up(exc)
        else:
            self._engine.fail(TransportError(0, f"connecting was given up ({exc!r})"))

    def _raise_if_dead(self) -> None:
        if self._engine.phase is Phase.DEAD and self._engine.error is not None:
            raise self._engine.error

    def poll(self, timeout: float | None = None, *, also: int = -1) -> bool:
        """Wait until something can be done, and do it. Returns False when `timeout` seconds passed first.

        `also` is a descriptor that ends the wait when it becomes readable; nothing is read from it. Raises UsageError where there
        is nothing to wait for, and as `notify_read` does.
        """
        self.check_may_wait()
        engine = self.engine
        if also < 0 and len(engine.in_flight) > 1 and self._answers_are_there():
            return True
        if engine.has_outgoing:
            self.send()
            self._raise_if_dead()
        want, fd = self.direction(), self.fileno()
        if not want:
            raise UsageError(errno.EINVAL, f"there is nothing to wait for while {self.phase.value}")
        if timeout is None and also < 0 and want is _WANT_READ:
            self._watch.wait((fd,), NEVER)
        else:
            waiting = ((fd, want),) if also < 0 else ((fd, want), (also, _WANT_READ))
            ready = wait_any(waiting, NEVER if timeout is None else Deadline.after(timeout))
            if all(found != fd for found, _ in ready):
                return bool(ready)
        self.advance(receives=1)
        return True

    def _answers_are_there(self) -> bool:
        """Send, and receive once. With many commands under way there mostly is something: to ask first would cost as much.

        Once brings dozens of small replies. Then the caller has the turn, and can submit more while the server is still busy with
        the rest: whoever took in all of them first would leave it idle meanwhile.
        """
        engine = self.engine
        if engine.phase is not _CONNECTED:
            return False
        before = engine.traffic.bytes_received
        self.advance(receives=1)
        return engine.traffic.bytes_received != before or engine.phase is not _CONNECTED

    # ------------------------------------------------------------------------------------------ options and commands

    def exchange(self, conversation: Conversation[Any], *, enters: bool = False) -> Exchange:
        """Start a conversation of opt mode; `enters`: its success opens the export. Its outcome is in what is returned.

        Raises UsageError, with nothing sent, outside opt mode and for arguments that cannot be sent.
        """
        exchange = self._engine.option(conversation, enters=enters)
        self.send()
        return exchange

    def submit(self, command: Command) -> int:
        """Queue a command and return its cookie; its outcome is in the command. A failure to send it is such an outcome too."""
        engine = self.engine
        cookie = engine.submit(command)
        if not self._advancing:
            payload = command.payload
            if len(engine.queue) >= _BURST or not engine.in_flight or (payload is not None and len(payload) >= _LARGE_PAYLOAD):
                self.send()
        return cookie

    def disconnect(self) -> None:
        """Queue the goodbye (NBD_CMD_DISC); the server hangs up then. No command may follow it: that is a UsageError."""
        self._engine.submit(commands.disconnect())
        self.send()

    def abandon_unsent(self) -> None:
        """Give up every command of which not a byte has been sent: it fails."""
        self._engine.abandon_unsent(Disconnected(errno.ENOTCONN, "the connection was closed by this program before it was sent"))

    def send(self) -> None:
        """Send what is queued, as far as it goes now: else it leaves with what is submitted next, or the next wait."""
        if self._session is not None and not self._advancing:
            self._advancing = True  # where the server has hung up, what it answered before is received, and callbacks run
            try:
                self._session.send()
            except BaseException as exc:
                self._look_for_interruption(exc)
                raise
            finally:
                self._advancing = False

    # ------------------------------------------------------------------------------------------ for blocking callers

    def check_may_wait(self) -> None:
        """Raise UsageError (EDEADLK) in a callback, which must not wait: before it starts what it would wait for."""
        if self._advancing:
            raise _deadlock()

    def wait_for(self, pending: Command | Exchange) -> None:
        """Advance until a command or an exchange is done, be it by the end of the connection. Raises nothing for either."""
        self.check_may_wait()
        while not pending.done:
            session = self._session
            try:
                if session is not None and self.engine.phase is _CONNECTED and session.wanted() == _WANT_READ:
                    self._receive_once(session)
                else:
                    self.poll()
            except Error:
                if not pending.done:
                    raise

    def _receive_once(self, session: Session) -> None:
        """Wait, and receive, where an answer is all that is missing: what `poll` comes to then, in half the time."""
        if not session.wait(None):
            self._watch.wait((session.fileno(),), NEVER)
        self._advancing = True
        try:
            session.receive(1)
            while session.buffered:
                session.receive()
        except BaseException as exc:
            self._look_for_interruption(exc)
            raise
        finally:
            self._advancing = False
        self._raise_if_dead()

    # ------------------------------------------------------------------------------------------ ending

    def close(self) -> None:
        """End the connection now; what is pending fails. Never raises, and may be called twice."""
        connecting, self._connecting = self._connecting, None
        if connecting is not None:
            # In the child of a fork, a thread of the parent's may be in the middle of a step.
            with contextlib.suppress(ValueError):
                connecting.close()
        if self._session is not None:
            self._session.close()
        elif self.phase not in (Phase.CLOSED, Phase.DEAD):
            self._engine.end()


def _at_once(steps: Steps[Result]) -> Result:
    """Run steps that make calls which block, and wait for nothing else."""
    answer: object = None
    while True:
        try:
            request = steps.send(answer)
        except StopIteration as end:
            result: Result = end.value
            return result
        assert isinstance(request, Blocking), "nothing is connected to while a target is found"
        answer = request.call()


#: A connection being opened, one descriptor at a time.
_OneByOne = Generator[tuple[int, Want], None, Stream]


def _one_descriptor(need: AnyOf) -> Generator[tuple[int, Want], None, Collection[int]]:
    """Wait in a loop that asks for one descriptor, and keeps no time for us.

    Where any of several descriptors is waited for, or a time, a thread waits, and the loop waits for the thread.
    """
    if need.seconds is None and len(need.waiting) == 1:
        yield need.waiting[0]
        return (need.waiting[0][0],)
    found = yield from in_thread(partial(wait_any, need.waiting, Deadline.after(need.seconds)))
    return [fd for fd, _ in found]


def _move(session: Session, receives: int | None = None) -> None:
    """Move bytes until only the descriptor can tell of more: a loop that is not ours asks nothing else."""
    session.send()
    if receives is None:
        session.receive()
    else:
        session.receive(receives)
    while session.buffered:
        session.receive()


def _deadlock() -> UsageError:
    return UsageError(errno.EDEADLK, "a callback may submit commands, but neither wait nor move bytes: others are moving")

"""Several threads on one session, or on several to the same export: whoever has something to wait for waits for all.

A caller queues its command under the lock and waits until it is done. At any time one of the waiting callers watches the
descriptors, with the lock released, and then moves the bytes for everybody; the others sleep until their outcome is there, or
until the watching is theirs to do. Sending is the exception: a caller whose bytes do not fit the send buffer waits for that as
well, since nobody else may be doing so. So a call costs no thread and no second descriptor, and one caller alone pays nothing
for the others.

One receive may bring the outcomes of many callers. As long as some that were woken have not come by here again, the others
leave it to them to send small amounts and to watch: so what a crowd of threads asks for goes out, and comes in, many at a time.

A signal handler may raise in the main thread at any point (Ctrl-C does). While a call waits that harms nobody: its command is
abandoned. So nothing here waits with the lock held, and the lock is taken by `with` alone, which an exception cannot get between.
In the middle of moving bytes an exception leaves the stream out of step; that ends the connection.
"""

from __future__ import annotations

import copy
import errno
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from operator import attrgetter
from typing import Any, Protocol, TypeVar

from nbdcore.clients.session import Session
from nbdcore.errors import DeadlineExceeded, Disconnected, Error
from nbdcore.protocol.commands import Command, disconnect
from nbdcore.protocol.engine import Engine
from nbdcore.streams.base import Want
from nbdcore.streams.waiting import Deadline, Watch, wait_any

_READ = int(Want.READ)
_WANTS = (Want.NOTHING, Want.READ, Want.WRITE, Want.READ | Want.WRITE)
# So many commands are sent at once while other callers are awake that may have more: fewer would keep the server waiting for the
# sake of a system call, of 16 threads that read 4 KiB each.
_SENT_TOGETHER = 4
_PENDING = attrgetter("pending")
# To look without waiting: what there is to do is here already.
_AT_ONCE = Deadline.after(0)


class Pending(Protocol):
    """What can be waited for: a Command, an Exchange, or any of several commands."""

    completion: Any
    """Called when it is done."""

    @property
    def done(self) -> bool:
        """Whether the outcome is final."""


Waited = TypeVar("Waited", bound=Pending)


class SharedSession:
    """One session or several, and the callers that wait on them. Safe to use from any thread.

    Several sessions are connections to the same export: a command goes to the one with the fewest under way, and the end of one
    is the end of its own commands only.

    Args:
        sessions: whose handshakes have begun, or are about to.
    """

    def __init__(self, *sessions: Session) -> None:
        self._sessions = sessions
        self._lock = threading.Lock()
        self._watch = Watch()
        self._crowd = _Crowd()
        self._leaving = False

    @property
    def engine(self) -> Engine:
        """The engine of the first session, or of the only one."""
        return self._sessions[0].engine

    @property
    def engines(self) -> list[Engine]:
        """The engines of the sessions that have not ended."""
        return [session.engine for session in self._sessions if not session.over]

    def run(self, start: Callable[[Engine], Waited], deadline: Deadline, what: str) -> Waited:
        """Start something and wait until it is done. Raises DeadlineExceeded; what that means for it is the caller's decision.

        Raises the connection's own error where that has ended; `what` is how messages name what is waited for.
        """
        with self._lock:
            self._refuse_if_over()
            pending = start(self.engine)
        self.wait(pending, deadline, what)
        return pending

    def run_command(self, command: Command, deadline: Deadline) -> None:
        """Run one command and raise its error. At the deadline, or when the caller is interrupted, it is abandoned."""
        try:
            self.wait(command, deadline, command, submit=(command,))
        except BaseException as exc:
            self.abandon((command,), exc)
            raise
        if command.error is not None:
            raise self.own(command.error)

    def run_all(self, commands: Iterator[Command], deadline: Deadline, *, depth: int) -> None:
        """Run commands with up to `depth` of them under way at a time, then raise the first error of any.

        After an error no more are begun, and those under way are waited for. At the deadline these are abandoned.
        """
        under_way: list[Command] = []
        failed: Error | None = None
        fresh = [*islice(commands, depth)]
        try:
            while fresh or under_way:
                under_way += fresh
                oldest = under_way[0]
                self.wait(oldest, deadline, oldest, submit=fresh)
                del under_way[0]
                failed = failed or oldest.error
                fresh = [] if failed else [*islice(commands, 1)]
        except BaseException as exc:
            self.abandon(under_way, exc)
            raise
        if failed is not None:
            raise self.own(failed)

    def take_leave(self, deadline: Deadline) -> None:
        """Say goodbye, unless another caller has, and wait until every connection has ended."""
        with self._lock:
            if not self._leaving:
                self._leaving = True
                for engine in self.engines:
                    engine.submit(disconnect())
        self.wait(_End(self._sessions), deadline, "the server was to hang up")

    def close(self, error: Error | None = None) -> None:
        """End all now. Callers that wait are woken, and get `error`, or that this program closed it."""
        with self._lock:
            for session in self._sessions:
                if error is not None:
                    session.fail(error)
                session.close()
            self._wake_others()

    def abandon(self, commands: Iterable[Command], why: BaseException) -> None:
        """Give commands up: their memory is not touched any more, and answers that come are thrown away."""
        # A copy: the original's traceback would hold on to the caller's memory for as long as the late answer takes.
        error = copy.copy(why) if isinstance(why, Error) else DeadlineExceeded(f"given up by the program ({why!r})")
        with self._lock:
            for command in commands:
                self._engine_of(command).abandon(command, error)

    def own(self, error: Error) -> Error:
        """Return the caller's own copy of an error that others may be raising as well."""
        if all(error is not session.engine.error for session in self._sessions):
            return error
        mine = copy.copy(error)
        mine.__cause__ = error.__cause__
        return mine

    # ------------------------------------------------------------------------------------------ steps of a caller

    def wait(
        self,
        pending: Pending,
        deadline: Deadline,
        what: object,
        *,
        submit: Sequence[Command] = (),
        any_of_several: bool = False,
    ) -> None:
        """Wait for one outcome, doing whatever nobody else is doing meanwhile; first of all, `submit` these commands.

        `any_of_several`: `pending` stands for several commands, and nothing calls its completion.

        Raises DeadlineExceeded, and the connection's own error where none is left to submit commands to.
        """
        turn = _Turn(pending, submit, any_of_several=any_of_several)
        expired = False
        try:
            while True:
                with self._lock:
                    if self._take(turn, expired=expired):
                        break
                if turn.sleeper is None:
                    self._look(turn.watched, _AT_ONCE if turn.at_once else deadline)
                else:
                    turn.sleeper.sleep(deadline)
                expired = deadline.at is not None and deadline.expired
        except BaseException:
            with self._lock:
                self._leave(turn)
            raise
        if not pending.done:
            raise DeadlineExceeded(f"no answer from the server in time ({what})")

    def _look(self, watched: list[tuple[Session, int]], deadline: Deadline) -> None:
        """Wait for what this caller watches, and leave it to the next look at the streams what happened there."""
        if len(watched) == 1 and watched[0][1] == _READ:
            self._watch.wait(watched[0][0].fileno(), deadline)
        else:
            wait_any([(session.fileno(), _WANTS[wanted]) for session, wanted in watched], deadline)

    # ------------------------------------------------------------------------------------------ with the lock held

    def _take(self, turn: _Turn, *, expired: bool) -> bool:
        """Take a turn: move bytes, then say what to wait for. Returns True when the caller's own wait is over."""
        try:
            if turn.watched:
                watched = turn.watched
                for session, wanted in watched:
                    session.waited_for &= ~wanted
                turn.watched = []
                self._receive(watched, eager=turn.any_of_several)
            else:
                self._get_up(turn)
                if turn.submit:
                    self._submit(turn.submit)
                    turn.submit = ()
                self._send()
            if turn.pending.done or expired:
                self._hand_over()
                return True
            if not self._crowd.awake:
                turn.watched = self._unwatched()
            if turn.watched:
                for session, wanted in turn.watched:
                    session.waited_for |= wanted
                turn.at_once = any(session.buffered for session, _ in turn.watched)
            else:
                self._lie_down(turn)
        except BaseException:
            self._leave(turn)
            raise
        return False

    def _lie_down(self, turn: _Turn) -> None:
        # An exception may come after any call: so the sleeper is the turn's before others know it.
        turn.sleeper = sleeper = _Sleeper(self._crowd, turn.pending)
        self._crowd.asleep[sleeper] = None
        if turn.any_of_several:
            self._crowd.groups[sleeper] = None
        else:
            turn.pending.completion = sleeper.wake

    def _get_up(self, turn: _Turn) -> None:
        """A caller is up, because it was woken or for a reason of its own."""
        crowd, sleeper = self._crowd, turn.sleeper
        if sleeper is None:
            return
        if sleeper.woken:
            crowd.awake -= 1
            sleeper.woken = False
        else:
            crowd.asleep.pop(sleeper, None)
            crowd.groups.pop(sleeper, None)
        turn.sleeper = None

    def _leave(self, turn: _Turn) -> None:
        """An exception ends a caller's wait."""
        for session, wanted in turn.watched:
            session.waited_for &= ~wanted
        turn.watched = []
        self._get_up(turn)
        self._hand_over()

    def _refuse_if_over(self) -> None:
        """Raise what ended the connection: another caller may have found out since this one looked at the phase."""
        if not self.engines:
            error = self.engine.error
            raise self.own(error) if error else Disconnected(errno.ENOTCONN, "the connection was closed by this program")

    def _submit(self, commands: Iterable[Command]) -> None:
        engines = self.engines
        if len(engines) == 1:
            for command in commands:
                engines[0].submit(command)
            return
        self._refuse_if_over()
        for command in commands:
            min(engines, key=_PENDING).submit(command)

    def _engine_of(self, command: Command) -> Engine:
        for session in self._sessions[1:]:
            if session.engine.knows(command):
                return session.engine
        return self.engine

    def _send(self) -> None:
        """Send what is queued, unless others are about to queue more and there is little of it."""
        for session in self._sessions:
            if not self._crowd.awake or len(session.engine.queue) >= _SENT_TOGETHER:
                self._move(session, session.send)

    def _receive(self, watched: list[tuple[Session, int]], *, eager: bool) -> None:
        for session, _ in watched:
            self._move(session, session.advance_eagerly if eager else session.advance)

    def _move(self, session: Session, move: Callable[[], None]) -> None:
        """Move bytes for everybody; whose outcome that brings is woken by its completion."""
        try:
            move()
        except BaseException as exc:
            error = Disconnected(errno.ECONNABORTED, f"the connection was given up in the middle of moving bytes ({exc!r})")
            error.__cause__ = exc
            session.fail(error)
            raise
        finally:
            if self._crowd.asleep:
                self._wake_others()

    def _wake_others(self) -> None:
        """Wake whom no completion wakes. The end of all connections is an outcome for everybody, whatever they wait for."""
        crowd = self._crowd
        if not self.engines:
            for sleeper in [*crowd.asleep]:
                sleeper.wake()
        elif crowd.groups:
            for sleeper in [sleeper for sleeper in crowd.groups if sleeper.pending.done]:
                sleeper.wake()

    def _unwatched(self) -> list[tuple[Session, int]]:
        """Return what nobody watches: each session, and for what, as the bits of a Want."""
        found = []
        for session in self._sessions:
            wanted = session.wanted() & ~session.waited_for
            if wanted:
                found.append((session, wanted))
        return found

    def _hand_over(self) -> None:
        """A caller is about to leave: if it did something that must go on, another takes its place."""
        for session in self._sessions:
            if session.over:
                session.close()  # what was kept open for those that watched
        crowd = self._crowd
        if crowd.asleep:
            self._wake_others()
            if crowd.asleep and not crowd.awake and self._unwatched():
                next(iter(crowd.asleep)).wake()


class _Crowd:
    """The callers that sleep, or were woken and have not come by since. Looked at with the lock held.

    Attributes:
        asleep: in the order in which they fell asleep.
        groups: those of them that wait for any of several commands.
        awake: how many were woken and have not come by.
    """

    __slots__ = ("asleep", "awake", "groups")

    def __init__(self) -> None:
        self.asleep: dict[_Sleeper, None] = {}
        self.groups: dict[_Sleeper, None] = {}
        self.awake = 0


class _Turn:
    """One caller's wait.

    Attributes:
        pending: what it waits for.
        submit: commands to submit first.
        any_of_several: nothing calls the completion of `pending`.
        watched: what it watches, with the lock released: sessions, and for what, as the bits of a Want.
        at_once: there is something to receive already.
        sleeper: what it sleeps in, when it does not watch.
    """

    __slots__ = ("any_of_several", "at_once", "pending", "sleeper", "submit", "watched")

    def __init__(self, pending: Pending, submit: Sequence[Command], *, any_of_several: bool) -> None:
        self.pending = pending
        self.submit = submit
        self.any_of_several = any_of_several
        self.watched: list[tuple[Session, int]] = []
        self.at_once = False
        self.sleeper: _Sleeper | None = None


class _Sleeper:
    """A caller that sleeps: woken once, when its outcome is there or something is to be done.

    Args:
        crowd: to which it belongs until it is woken.
        pending: what it waits for.
    """

    __slots__ = ("_alarm", "_crowd", "pending", "woken")

    def __init__(self, crowd: _Crowd, pending: Pending) -> None:
        self._alarm = threading.Lock()
        self._alarm.acquire()
        self._crowd = crowd
        self.pending = pending
        self.woken = False

    def sleep(self, deadline: Deadline) -> None:
        remaining = deadline.remaining()
        self._alarm.acquire(timeout=-1 if remaining is None else min(remaining, threading.TIMEOUT_MAX))

    def wake(self, _: object = None) -> None:
        crowd = self._crowd
        if self in crowd.asleep:
            del crowd.asleep[self]
            if crowd.groups:
                crowd.groups.pop(self, None)
            self.woken = True
            crowd.awake += 1
            self._alarm.release()


class _End:
    """The end of all connections, as something to wait for."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        self._sessions = sessions
        self.completion: Any = None

    @property
    def done(self) -> bool:
        return all(session.over for session in self._sessions)

"""Several threads on one session, or on several to the same export: whoever has something to wait for waits for all.

A caller queues its command under the lock and waits until it is done. At any time one of the waiting callers watches the
descriptors, with the lock released, and then moves the bytes for everybody. The others are parked (`waiters`) until their outcome
is there, or until the watching is theirs to do. Sending is the exception: a caller whose bytes do not fit the send buffer waits
for that as well, since nobody else may be doing so. So a call costs no thread and no second descriptor, and one caller alone pays
nothing for the others.

A signal handler may raise in the main thread at any point (Ctrl-C does). While a call waits that harms nobody: its command is
abandoned. So nothing here waits with the lock held, and the lock is taken by `with` alone, which an exception cannot get between.
In the middle of moving bytes an exception leaves the stream out of step; that ends the connection.

A signal handler may also call `close` while the call that it interrupted holds the lock. The lock can be taken again by the
thread that has it, so nothing deadlocks; but the engine may be in the middle of something. So `close` only hangs up then, which
ends every wait, and leaves the rest to the interrupted call, which looks for that each time it has released the lock. Any other
call is refused there.

The copy of a session that a fork makes may have its lock taken by a thread that the child does not have. Closing a copy frees its
descriptor and does nothing else: the connection is the parent's.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from nbdcore.clients.blocking.waiters import Pending, Wait, Waiters
from nbdcore.clients.session.group import Group
from nbdcore.clients.session.session import Session, closed_by_program
from nbdcore.errors import DeadlineExceeded, Error, UsageError, copied
from nbdcore.protocol.engine import Engine
from nbdcore.protocol.transmission.commands import Command, disconnect
from nbdcore.streams.base import WANTS, Want
from nbdcore.streams.waiting import Deadline, Watch, wait_any

_READ = int(Want.READ)
# So many commands are sent at once while other callers are woken that may have more. 16 threads that read 4 KiB each had 19
# thousand answers a second with 4, 22 thousand with 8, and 26 thousand with 16.
_SENT_TOGETHER = 16
# Seconds after which a caller that watches for room to send looks whether there is more to watch: short for somebody who waits.
_LOOK_AGAIN = 0.1


Waited = TypeVar("Waited", bound=Pending)


class SharedSession:
    """One session or several, and the callers that wait on them. Safe to use from any thread.

    Several sessions are connections to the same export: a command goes to the one with the fewest under way, and the end of one
    is the end of its own commands only.

    Args:
        sessions: open, or one in opt mode.
    """

    def __init__(self, *sessions: Session) -> None:
        self._sessions = sessions
        self._group = Group([session.engine for session in sessions])
        self._lock = threading.RLock()
        # Whether this thread has the lock. It is how threading.Condition asks, too, and there is no other way.
        self._interrupted: Callable[[], bool] = self._lock._is_owned  # type: ignore[attr-defined]  # noqa: SLF001
        self._closing: Error | None = None  # what a signal handler asked the call that it interrupted to end the connection with
        self._watch = Watch()
        self._waiters = Waiters()
        self._leaving = False

    @property
    def engine(self) -> Engine:
        """The engine that speaks for all."""
        return self._group.speaker

    @property
    def engines(self) -> list[Engine]:
        """The engines of the sessions that have not ended."""
        return self._group.live

    def run(self, start: Callable[[Engine], Waited], deadline: Deadline, what: str) -> Waited:
        """Start something and wait until it is done. Raises DeadlineExceeded; what that means for it is the caller's decision.

        Raises the connection's own error where that has ended; `what` is how messages name what is waited for.
        """
        self._refuse_if_interrupted(what)
        with self._lock:
            self._refuse_if_over()
            pending = start(self.engine)
        self.wait(pending, deadline, what)
        return pending

    def run_command(self, command: Command, deadline: Deadline) -> None:
        """Run one command and raise its error. At the deadline, or when the caller is interrupted, it is abandoned."""
        submit: Sequence[Command] = (command,)
        try:
            if len(self._sessions) == 1:
                submit = self._run_alone(command, self._sessions[0], deadline)
            if not command.done:
                self.wait(command, deadline, command, submit=submit)
        except BaseException as exc:
            self.abandon((command,), exc)
            raise
        if command.error is not None:
            raise self.own(command.error)

    def take_leave(self, deadline: Deadline) -> None:
        """Say goodbye, unless another caller has, and wait until every connection has ended."""
        self._refuse_if_interrupted("disconnect")
        with self._lock:
            if not self._leaving:
                self._leaving = True
                for engine in self.engines:
                    engine.submit(disconnect())
        self.wait(_End(self._sessions), deadline, "the server was to hang up")

    def close(self, error: Error | None = None) -> None:
        """End all now. Callers that wait are woken, and get `error`, or that this program closed it."""
        if self.inherited:
            for session in self._sessions:
                session.close()
            return
        if self._interrupted():
            self._closing = error or closed_by_program()
            for session in self._sessions:
                session.hang_up()
            return
        with self._lock:
            for session in self._sessions:
                if error is not None:
                    session.fail(error)
                session.close()
            self._wake_others()

    @property
    def inherited(self) -> bool:
        """Whether this is the copy that a fork made: the connection is the parent's."""
        return self._sessions[0].inherited

    def _close_if_asked(self) -> None:
        """A signal handler may have closed the connection while this thread held the lock."""
        if self._closing is not None:
            error, self._closing = self._closing, None
            self.close(error)

    def _refuse_if_interrupted(self, what: object) -> None:
        if self._interrupted():
            raise UsageError(
                errno.EDEADLK, f"{what}: a signal handler interrupted another call on this connection; it may only close it"
            )

    def abandon(self, commands: Iterable[Command], why: BaseException) -> None:
        """Give commands up: their memory is not touched any more, and answers that come are thrown away."""
        # A copy: the original's traceback would hold on to the caller's memory for as long as the late answer takes.
        error = copied(why) if isinstance(why, Error) else DeadlineExceeded(errno.ETIMEDOUT, f"given up by the program ({why!r})")
        with self._lock:
            self._submit_inbox()
            for command in commands:
                self._group.owner(command).abandon(command, error)
        self._close_if_asked()

    def own(self, error: Error) -> Error:
        """Return the caller's own copy of an error that others may be raising as well."""
        return self._group.own(error)

    # ------------------------------------------------------------------------------------------ steps of a caller

    def _run_alone(self, command: Command, session: Session, deadline: Deadline) -> Sequence[Command]:
        """What `wait` does, in the few steps that it takes where nobody else is here: a third less of Python for a small read.

        Returns what is still to be submitted. The command may need more waiting than once; that is for `wait` as well.
        """
        waiters = self._waiters
        watched = False
        if self._interrupted():
            self._refuse_if_interrupted(command)
        try:
            with self._lock:
                if session.waited_for or waiters.parked or waiters.woken:
                    return (command,)
                try:
                    session.engine.submit(command)
                except UsageError:  # not connected any more
                    self._refuse_if_over()
                    raise
                self._move(session, session.send)
                if session.wanted() != _READ or session.buffered:
                    return ()
                session.waited_for = _READ
                watched = True
            self._look(((session, _READ),), deadline)
            with self._lock:
                session.waited_for &= ~_READ
                watched = False
                self._move(session, session.receive)  # which also sends what others have queued meanwhile
                self._hand_over()
        except BaseException:
            if watched:
                with self._lock:
                    session.waited_for &= ~_READ
                    self._hand_over()
            raise
        finally:
            if self._closing is not None:
                self._close_if_asked()
        return ()

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
        waiters = self._waiters
        wait = Wait(pending, submit, any_of_several=any_of_several)
        expired = False
        self._refuse_if_interrupted(what)
        try:
            if waiters.woken and submit:
                parker = waiters.leave_to_others(wait)
                if waiters.woken and len(waiters.inbox) < _SENT_TOGETHER:
                    parker.park(deadline)
                    if waiters.may_leave(wait):
                        return
            while True:
                with self._lock:
                    over = self._take(wait, expired=expired)
                self._close_if_asked()
                if over:
                    break
                if wait.parker is None:
                    wait.ready = wait.watched if wait.at_once else self._look(wait.watched, deadline)
                else:
                    wait.parker.park(deadline)
                    if waiters.may_leave(wait):
                        return
                expired = deadline.at is not None and deadline.expired
        except BaseException:
            with self._lock:
                self._leave(wait)
            self._close_if_asked()
            raise
        if not pending.done:
            raise DeadlineExceeded(errno.ETIMEDOUT, f"no answer from the server in time ({what})")

    def _look(self, watched: Sequence[tuple[Session, int]], deadline: Deadline) -> Sequence[tuple[Session, int]]:
        """Wait for what this caller watches. Returns what of it is worth a look at the stream, which says what happened."""
        session, wanted = watched[0]
        if len(watched) == 1 and wanted == _READ and session.wait(deadline.remaining()):
            return watched
        if all(wanted == _READ for _, wanted in watched):
            ready = self._watch.wait(tuple([session.fileno() for session, _ in watched]), deadline)
        else:
            # A caller that received meanwhile may leave: nothing would wake this one to receive in its place, and a server that
            # is sending may read no more before somebody does.
            remaining = deadline.remaining()
            until = Deadline.after(_LOOK_AGAIN if remaining is None else min(remaining, _LOOK_AGAIN))
            ready = [fd for fd, _ in wait_any([(session.fileno(), WANTS[wanted]) for session, wanted in watched], until)]
        return [(session, wanted) for session, wanted in watched if session.fileno() in ready]

    # ------------------------------------------------------------------------------------------ with the lock held

    def _take(self, wait: Wait, *, expired: bool) -> bool:
        """Move bytes, then settle what to wait for. Returns True when the caller's own wait is over."""
        try:
            if wait.watched:
                for session, wanted in wait.watched:
                    session.waited_for &= ~wanted
                wait.watched = ()
                for session, wanted in wait.ready:
                    if not wanted & _READ:
                        # What there is to receive is for the caller that watches for it: the system may have woken that one, and
                        # have it wait on where nothing is left when it runs.
                        self._move(session, session.send)
                    else:
                        self._move(session, session.advance_eagerly if wait.any_of_several else session.advance)
            else:
                self._waiters.unpark(wait)
                if wait.submit:
                    self._submit(wait.submit)
                    wait.submit = ()
                self._send()
            if wait.pending.done or expired:
                self._hand_over()
                return True
            self._settle(wait)
        except BaseException:
            self._leave(wait)
            raise
        return False

    def _settle(self, wait: Wait) -> None:
        """Have a caller watch what nobody watches, or park it. While others are woken that may send more, they watch."""
        wait.at_once = False
        if not self._waiters.woken:
            wait.watched = self._unwatched()
        if not wait.watched:
            self._refuse_if_over()  # what an exception in the middle of moving bytes has lost, nobody would wake this one for
            self._waiters.park(wait)
            return
        for session, wanted in wait.watched:
            session.waited_for |= wanted
            if session.buffered:
                wait.at_once = True

    def _leave(self, wait: Wait) -> None:
        """An exception ends a caller's wait."""
        for session, wanted in wait.watched:
            session.waited_for &= ~wanted
        wait.watched = ()
        self._waiters.unpark(wait)
        self._hand_over()

    def _refuse_if_over(self) -> None:
        """Raise what ended the connection: another caller may have found out since this one looked at the phase."""
        if not self.engines:
            error = self.engine.error
            raise self.own(error) if error else closed_by_program()

    def _submit(self, commands: Sequence[Command]) -> None:
        """Queue commands, each where the fewest are under way."""
        try:
            self._group.submit(commands)
        except UsageError:  # not connected any more
            self._refuse_if_over()
            raise

    def _submit_inbox(self) -> None:
        """Queue what parked callers left. What cannot be queued is an outcome like others."""
        inbox = self._waiters.inbox
        while inbox:
            command = inbox.popleft()
            try:
                self._submit((command,))
            except Error as exc:
                command.error, command.done = exc, True
                if command.completion is not None:
                    command.completion(command)

    def _send(self) -> None:
        """Send what is queued, unless others are about to queue more and there is little of it."""
        if self._waiters.inbox:
            self._submit_inbox()
        for session in self._sessions:
            if not self._waiters.woken or len(session.engine.queue) >= _SENT_TOGETHER:
                self._move(session, session.send)

    def _move(self, session: Session, move: Callable[[], None]) -> None:
        """Move bytes for everybody; whose outcome that brings is woken by its completion."""
        try:
            move()
        except BaseException as exc:
            session.give_up(exc)
            raise
        finally:
            if self._waiters.parked:
                self._wake_others()

    def _wake_others(self) -> None:
        """Wake whom no completion wakes. The end of all connections is an outcome for everybody, whatever they wait for."""
        waiters = self._waiters
        if not self.engines:
            for parker in [*waiters.parked]:
                parker.wake()
        elif waiters.groups:
            for parker in [*waiters.groups]:
                if parker.pending.done:
                    parker.wake()

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
        waiters = self._waiters
        if waiters.parked:
            self._submit_inbox()
            self._wake_others()
            if waiters.parked and not waiters.woken and self._unwatched():
                [*waiters.parked][0].wake()  # noqa: RUF015 (an iterator does not outlive one more that parks)


class _End:
    """The end of all connections, as something to wait for."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        self._sessions = sessions
        self.completion: Any = None

    @property
    def done(self) -> bool:
        return all(session.over for session in self._sessions)

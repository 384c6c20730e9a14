"""Several threads on one session: whoever has something to wait for waits for all.

A caller queues its command under the lock and waits until it is done. At any time one of the waiting callers watches the
descriptor, with the lock released, and then moves the bytes for everybody (`moving` has what is done with the lock held). Where
it can, it does not only watch: it receives with the lock released. What may be touched meanwhile is the scratch buffer, which
nobody else receives into, or its own memory: a large payload of its own is one receive that waits for all of it. The others are
parked (`waiters`) until their outcome is there, or until the watching is theirs to do. Sending is the exception: a caller whose
bytes do not fit the send buffer waits for that as well, since nobody else may be doing so. So a call costs no thread and no
second descriptor, and one caller alone pays nothing for the others.

A signal handler may raise in the main thread at any point (Ctrl-C does). While a call waits that harms nobody: its command is
abandoned. So nothing here waits with the lock held, and the lock is taken by `with` alone, which an exception cannot get between.
In the middle of moving bytes an exception leaves the stream out of step; that ends the connection.

A signal handler may also call `close` while the call that it interrupted holds the lock. The lock can be taken again by the
thread that has it, so nothing deadlocks; but the engine may be in the middle of something. So `close` only hangs up then, which
ends every wait, and leaves the rest to the interrupted call, which looks for that each time it has released the lock. Any other
call is refused there; and where the interrupted call waits, and would have to be the one that wakes it.

A fork copies a session. Where another thread was using it just then the copy has ended (`forks`). Closing a copy frees its
descriptor and does nothing else: the connection is the parent's.
"""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import CodeType
from typing import Any, TypeVar

from nbdcore.clients.blocking.moving import SENT_TOGETHER, Mover
from nbdcore.clients.blocking.waiters import Pending, Wait, Waiters
from nbdcore.clients.session.forks import in_use_when_forked, is_taken, when_forked
from nbdcore.clients.session.pipeline import Pipeline
from nbdcore.clients.session.session import Session, closed_by_program
from nbdcore.errors import DeadlineExceeded, Error, UsageError, copied
from nbdcore.protocol.engine import Engine
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission.commands import Command, disconnect
from nbdcore.streams.base import WANTS, Want
from nbdcore.streams.waiting import LOOK_AGAIN, Deadline, Watch, sooner, wait_any

_READ = int(Want.READ)
_CONNECTED = Phase.CONNECTED

Waited = TypeVar("Waited", bound=Pending)


class SharedSession:
    """One session, and the callers that wait on it. Safe to use from any thread.

    Args:
        session: open, or in opt mode.

    Attributes:
        engine: the session's.
        assigned: commands that a pool gave to this connection and whose calls have not returned.
        pipelines: those that have commands of theirs here. Both are for a pool alone.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.engine: Engine = session.engine
        self.pipelines: dict[Pipeline, None] = {}
        self.assigned: dict[Command, None] = {}
        self._use_new_lock()
        self._closing: Error | None = None  # with which `close`, called in a signal handler, wants the connection ended
        self._watch = Watch()
        self._mover = Mover(session)
        self._leaving = False
        when_forked(self, SharedSession.forked)

    def _use_new_lock(self) -> None:
        self._lock = threading.RLock()
        # Whether this thread has the lock. It is how threading.Condition asks, too, and there is no other way.
        self._interrupted: Callable[[], bool] = self._lock._is_owned  # type: ignore[attr-defined]  # noqa: SLF001

    @property
    def connections(self) -> int:
        """How many connections have not ended: this one, or none."""
        return 0 if self._session.over else 1

    @property
    def over(self) -> bool:
        """Whether the connection has ended."""
        return self._session.over

    def run(self, start: Callable[[Engine], Waited], deadline: Deadline, what: str) -> Waited:
        """Start something and wait until it is done. Raises DeadlineExceeded; what that means for it is the caller's decision.

        Raises the connection's own error where that has ended; `what` is how messages name what is waited for.
        """
        self.refuse_if_interrupted(what)
        with self._lock:
            self._mover.refuse_if_over()
            pending = start(self.engine)
        self.wait(pending, deadline, what)
        return pending

    def run_command(self, command: Command, deadline: Deadline, *, retry_elsewhere: bool = False) -> None:
        """Run one command and raise its error. At the deadline, or when the caller is interrupted, it is abandoned.

        `retry_elsewhere`: if the connection ended before the command was queued on it, the command is left as it is, payload and
        all, so that another connection can take it. Its `mark` is None then.
        """
        if self._interrupted():
            self.refuse_if_interrupted(command)
        try:
            submit = self._run_alone(command, deadline)
            if not command.done:
                self.wait(command, deadline, command, submit=submit)
        except BaseException as exc:
            if not (retry_elsewhere and command.mark is None and isinstance(exc, Error)):
                self.abandon((command,), exc)
            raise
        if command.error is not None:
            raise self.own(command.error)

    def take_leave(self, deadline: Deadline) -> None:
        """Say goodbye, unless another caller has, and wait until the connection has ended."""
        self.say_goodbye()
        self.await_end(deadline)

    def say_goodbye(self) -> None:
        """Queue the goodbye, unless another caller has."""
        self.refuse_if_interrupted("disconnect")
        with self._lock:
            if not self._leaving:
                self._leaving = True
                if not self._session.over:
                    self.engine.submit(disconnect())

    def await_end(self, deadline: Deadline) -> None:
        """Wait until the connection has ended."""
        self.wait(_End(self._session), deadline, "the server was to hang up")

    def look_if_unwatched(self) -> None:
        """Take in what has come where nobody watches: the connection's end, or answers to commands that were given up."""
        try:
            with self._lock:
                if not (self._session.over or self._session.waited_for):
                    self._mover.move(self._session.receive)
                    self._mover.hand_over()
        finally:
            self._close_if_asked()

    def close(self, error: Error | None = None) -> None:
        """End it now. Callers that wait are woken, and get `error`, or that this program closed it."""
        if self.inherited:
            if error is not None:
                self.engine.fail(error)
            self._session.close()
            return
        if self._interrupted():
            self._closing = error or closed_by_program()
            self._session.hang_up()
            return
        with self._lock:
            if error is not None:
                self._session.fail(error)
            self._session.close()
            self._mover.wake_others()

    @property
    def inherited(self) -> bool:
        """Whether this is the copy that a fork made: the connection is the parent's."""
        return self._session.inherited

    def forked(self) -> None:
        """End this copy, in the child of a fork, where a call was under way: its thread is the parent's."""
        waiters = self._mover.waiters
        if is_taken(self._lock) or self._session.waited_for or waiters.parked or waiters.woken or waiters.inbox:
            self._use_new_lock()
            self._mover.waiters = Waiters()
            self._session.waited_for = 0
            self._session.fail(in_use_when_forked())

    def _close_if_asked(self) -> None:
        """A signal handler may have closed the connection while this thread held the lock."""
        if self._closing is not None:
            error, self._closing = self._closing, None
            self.close(error)

    def refuse_if_interrupted(self, what: object) -> None:
        """Raise UsageError in a signal handler that interrupted a call here while that held the lock."""
        if self._interrupted():
            raise _interrupted_another(what)

    def refuse_if_beneath(self, what: object) -> None:
        """Raise UsageError in a signal handler that interrupted a call here while that waited, which nothing can wake meanwhile.

        Where somebody waits it looks through what this thread is in the middle of: handlers run in the main one.
        """
        waiters = self._mover.waiters
        if not (self._session.waited_for or waiters.parked or waiters.woken):
            return
        if threading.current_thread() is not threading.main_thread():
            return
        frame = sys._getframe(1).f_back  # noqa: SLF001 (there is no other way to look)
        while frame is not None:
            if frame.f_code in WAITING and self in (frame.f_locals.get("self"), *frame.f_locals.get("waits", ())):
                raise _interrupted_another(what)
            frame = frame.f_back

    def abandon(self, commands: Iterable[Command], why: BaseException) -> None:
        """Give commands up: their memory is not touched any more, and answers that come are thrown away."""
        # A copy: the original's traceback would hold on to the caller's memory for as long as the late answer takes.
        error = copied(why) if isinstance(why, Error) else DeadlineExceeded(errno.ETIMEDOUT, f"given up by the program ({why!r})")
        if self._interrupted():
            # In a signal handler the engine may be in the middle of something. Only the end keeps memory from being written to.
            if any(self.engine.knows(command) for command in commands):
                self.close(error)
            return
        with self._lock:
            self._mover.submit_inbox()
            for command in commands:
                self.engine.abandon(command, error)
        self._close_if_asked()

    def own(self, error: Error) -> Error:
        """Return the caller's own copy of an error that others may be raising as well."""
        return copied(error) if error is self.engine.error else error

    # ------------------------------------------------------------------------------------------ pipelines

    def wait_for_any(self, pipeline: Pipeline, commands: Sequence[Command], deadline: Deadline) -> None:
        """Submit a pipeline's commands, and wait until there is something for it to settle."""
        self.wait(pipeline, deadline, pipeline, submit=commands, any_of_several=True)

    def forget(self, pipeline: Pipeline) -> None:
        """A pipeline has ended, and has no commands under way any more."""

    @property
    def takes_commands(self) -> bool:
        """Whether it is worth trying to submit here."""
        return self.engine.phase is Phase.CONNECTED and not self.engine.ending

    def submit(self, commands: Sequence[Command]) -> bool:
        """Queue commands, for a caller that then waits. Returns False where the connection has ended, or is about to."""
        with self._lock:
            submitted = self.takes_commands
            if submitted:
                self.engine.submit_all(commands)
        self._close_if_asked()
        return submitted

    def step(self, wait: Wait, *, expired: bool) -> bool:
        """One step of a caller's wait, which it makes on several connections: as `wait` makes it on one.

        Returns True when the wait is over; else the caller watches what `wait.watched` says, or is parked.
        """
        with self._lock:
            over = self._mover.step(wait, expired=expired)
        self._close_if_asked()
        return over

    def stop(self, wait: Wait, *, interrupted: bool = False) -> None:
        """The caller's wait on several connections is over. `interrupted`: an exception may have broken off this very call."""
        if wait.watched or wait.parker is not None or interrupted:
            with self._lock:
                self._mover.stop(wait)
            self._close_if_asked()

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._session.fileno()

    # ------------------------------------------------------------------------------------------ steps of a caller

    def _run_alone(self, command: Command, deadline: Deadline) -> Sequence[Command]:  # noqa: C901, PLR0912, PLR0915 (flat on purpose)
        """The short way of a caller that is alone: send, wait, take in. It is written out flat, since each call costs.

        Returns the commands that are still to be submitted: this one if other callers are here, else none. If the command is not
        done afterwards, the caller goes on with `wait`.
        """
        mover, session, engine = self._mover, self._session, self.engine
        waiters = mover.waiters
        watched, room = False, None
        payload: Sequence[memoryview] = ()
        taken: list[int] = []
        try:
            with self._lock:
                if session.waited_for or waiters.parked or waiters.woken:
                    return (command,)
                try:
                    sent = session.send_alone(command)
                except BaseException as exc:
                    mover.give_up(exc)
                    raise
                if not sent:
                    mover.submit((command,))
                    try:
                        session.send()
                    except BaseException as exc:
                        mover.give_up(exc)
                        raise
                if session.fills and engine.phase is _CONNECTED:
                    room = engine.room_when_sent()
                if room is None and (session.wanted() != _READ or session.buffered):
                    return ()
                watched = True
                session.waited_for, session.filling = _READ, room is not None
            if room is None or not session.fill(room, taken, None if deadline.at is None else deadline.remaining()):
                self._look(_READ, deadline, alone=True)
            with self._lock:
                session.waited_for &= ~_READ
                session.filling = watched = False
                if room is None:
                    mover.move(session.receive)  # which also sends what others have queued meanwhile
                else:
                    try:
                        if not taken or not engine.received_alone(command, taken[0]):
                            payload = session.take_in_alone(command, room, taken)
                    except BaseException as exc:
                        mover.give_up(exc)
                        raise
                if payload:
                    session.waited_for |= _READ
                    session.filling = watched = True
                elif waiters.parked or engine.phase is not _CONNECTED:
                    mover.hand_over()
            if not payload:
                return ()
            wanted = 0
            for rest in payload:
                wanted += len(rest)
                if not session.fill(rest, taken, None if deadline.at is None else deadline.remaining(), whole=True):
                    break
                if sum(taken) != wanted:  # nothing may have been added, where the stream has failed
                    break
            with self._lock:
                session.waited_for &= ~_READ
                session.filling = watched = False
                try:
                    session.take_in_payload(command, payload, taken)
                except BaseException as exc:
                    mover.give_up(exc)
                    raise
                if waiters.parked or engine.phase is not _CONNECTED:
                    mover.hand_over()
        except BaseException:
            if payload:
                self._stop_alone(partial(session.take_in_payload, command, payload), taken, watched=watched)
            else:
                self._stop_alone(None if room is None else partial(session.take_in, room), taken, watched=watched)
            raise
        finally:
            if self._closing is not None:
                self._close_if_asked()
        return ()

    def _stop_alone(self, take_in: Callable[[list[int]], None] | None, taken: list[int], *, watched: bool) -> None:
        """An exception ends the wait of a caller that was alone. What it has received counts, and others may have parked."""
        with self._lock:
            if watched:
                self._session.stop_watching(_READ)
                if take_in is not None and taken:
                    self._mover.move(partial(take_in, taken))
            self._mover.hand_over()

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
        mover, waiters = self._mover, self._mover.waiters
        wait = Wait(pending, submit, any_of_several=any_of_several)
        expired = False
        self.refuse_if_interrupted(what)
        self.refuse_if_beneath(what)
        try:
            if waiters.woken and submit:
                parker = waiters.leave_to_others(wait)
                if waiters.woken and len(waiters.inbox) < SENT_TOGETHER:
                    parker.park(deadline)
                    if waiters.may_leave(wait):
                        return
            while True:
                with self._lock:
                    over = mover.step(wait, expired=expired)
                self._close_if_asked()
                if over:
                    break
                if wait.parker is None:
                    wait.ready = self._watch_for(wait, deadline)
                else:
                    wait.parker.park(deadline)
                    if waiters.may_leave(wait):
                        return
                expired = deadline.at is not None and deadline.expired
        except BaseException:
            with self._lock:
                mover.stop(wait)
            self._close_if_asked()
            raise
        if not pending.done:
            raise DeadlineExceeded(errno.ETIMEDOUT, f"no answer from the server in time ({what})")

    def _watch_for(self, wait: Wait, deadline: Deadline) -> bool:
        """Wait for what this caller watches; where it can, receive or send meanwhile. Returns whether something happened."""
        session = self._session
        if wait.at_once:
            return True
        if wait.parts:
            return session.send_all(wait.parts, wait.sent, deadline.remaining())
        if wait.room is not None and session.fill(
            wait.room, wait.taken, deadline.remaining(), whole=self.engine.direct is not None
        ):
            return True
        return self._look(wait.watched, deadline, alone=wait.alone)

    def _look(self, wanted: int, deadline: Deadline, *, alone: bool) -> bool:
        """Wait for what this caller watches. Returns whether the stream is worth a look, which says what happened."""
        session = self._session
        if alone:
            return session.wait(deadline.remaining()) or bool(self._watch.wait((session.fileno(),), deadline))
        # Another caller, who receives or sends meanwhile, may leave, and nothing would wake this one to do it instead: while
        # nobody receives, a server that is sending may read no more, and what was queued behind a payload waits for that.
        return bool(wait_any([(session.fileno(), WANTS[wanted])], sooner(Deadline.after(LOOK_AGAIN), deadline)))


#: The code in which callers wait: for `refuse_if_beneath`.
WAITING: set[CodeType] = {SharedSession.wait.__code__, SharedSession._run_alone.__code__}  # noqa: SLF001 (of this module)


def _interrupted_another(what: object) -> UsageError:
    return UsageError(
        errno.EDEADLK, f"{what}: a signal handler interrupted another call on this connection; it may only close it"
    )


class _End:
    """The end of the connection, as something to wait for."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.completion: Any = None

    @property
    def done(self) -> bool:
        return self._session.over

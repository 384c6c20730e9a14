"""Several threads on one session: whoever has something to wait for waits for all.

A caller queues its command under the lock and waits until it is done. At any time one of the waiting callers polls the
descriptor, with the lock released, and then moves the bytes for everybody; the others sleep until their outcome is there, or
until the polling is theirs to do. Sending is the exception: a caller whose bytes do not fit the send buffer polls for that as
well, since nobody else may be doing so. So a call costs no thread and no second descriptor, and one caller alone pays nothing
for the others.

A signal handler may raise in the main thread at any point (Ctrl-C does). While a call waits that harms nobody: its command is
abandoned. So nothing here waits with the lock held, and the lock is taken by `with` alone, which an exception cannot get between.
In the middle of moving bytes an exception leaves the stream out of step; that ends the connection.
"""

from __future__ import annotations

import copy
import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, TypeVar

from nbdcore.clients.session import Session
from nbdcore.errors import DeadlineExceeded, Disconnected, Error
from nbdcore.protocol.commands import Command, disconnect
from nbdcore.protocol.engine import Engine
from nbdcore.streams.base import Want
from nbdcore.streams.waiting import Deadline, wait

# To look without waiting: what there is to do is here already.
_AT_ONCE = Deadline.after(0)


class Pending(Protocol):
    """What can be waited for: a Command or an Exchange."""

    completion: Any
    """Called when it is done."""

    @property
    def done(self) -> bool:
        """Whether the outcome is final."""


Waited = TypeVar("Waited", bound=Pending)


class SharedSession:
    """One session, and the callers that wait on it. Safe to use from any thread.

    Args:
        session: whose handshake has begun, or is about to.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lock = threading.Lock()
        self._polled = 0  # what the callers that poll wait for, each its own part: the bits of Want, as a plain int
        self._sleepers: dict[_Sleeper, None] = {}  # in the order in which they fell asleep
        self._leaving = False

    @property
    def engine(self) -> Engine:
        """The engine underneath."""
        return self._session.engine

    def run(self, start: Callable[[Engine], Waited], deadline: Deadline, what: str) -> Waited:
        """Start something and wait until it is done. Raises DeadlineExceeded; what that means for it is the caller's decision.

        Raises the connection's own error where that has ended; `what` is how messages name what is waited for.
        """
        with self._lock:
            self._refuse_if_over()
            pending = start(self.engine)
        self._wait(pending, deadline, what)
        return pending

    def run_command(self, command: Command, deadline: Deadline) -> None:
        """Run one command and raise its error. At the deadline, or when the caller is interrupted, it is abandoned."""
        try:
            self._wait(command, deadline, command, submit=(command,))
        except BaseException as exc:
            self._abandon([command], exc)
            raise
        if command.error is not None:
            raise self._own(command.error)

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
                self._wait(oldest, deadline, oldest, submit=fresh)
                del under_way[0]
                failed = failed or oldest.error
                fresh = [] if failed else [*islice(commands, 1)]
        except BaseException as exc:
            self._abandon(under_way, exc)
            raise
        if failed is not None:
            raise self._own(failed)

    def take_leave(self, deadline: Deadline) -> None:
        """Say goodbye, unless another caller has, and wait until the connection has ended."""
        with self._lock:
            if not self._leaving and not self._session.over:
                self._leaving = True
                self.engine.submit(disconnect())
        self._wait(_End(self._session), deadline, "the server was to hang up")

    def close(self, error: Error | None = None) -> None:
        """End the connection now. Callers that wait are woken, and get `error`, or that this program closed it."""
        with self._lock:
            if error is not None:
                self._session.fail(error)
            self._session.close()
            self._wake_at_the_end()

    # ------------------------------------------------------------------------------------------ steps of a caller

    def _abandon(self, commands: list[Command], why: BaseException) -> None:
        # A copy: the original's traceback would hold on to the caller's memory for as long as the late answer takes.
        error = copy.copy(why) if isinstance(why, Error) else DeadlineExceeded(f"given up by the program ({why!r})")
        with self._lock:
            for command in commands:
                self.engine.abandon(command, error)

    def _wait(self, pending: Pending, deadline: Deadline, what: object, *, submit: Sequence[Command] = ()) -> None:
        """Wait for one outcome, doing whatever nobody else is doing meanwhile; first of all, `submit` these commands."""
        mine, expired = 0, False
        sleeper: _Sleeper | None = None
        try:
            while True:
                with self._lock:
                    if mine:
                        self._polled &= ~mine
                        mine = 0
                        self._move(self._session.advance)
                    else:
                        if submit:
                            self._submit(submit)
                            submit = ()
                        self._move(self._session.send)
                    if pending.done or expired:
                        self._hand_over(sleeper)
                        break
                    fd, wanted = self._session.fileno(), self._session.interest()
                    mine = int(wanted) & ~self._polled
                    until = _AT_ONCE if self._session.buffered else deadline
                    if mine:
                        self._polled |= mine
                        self._session.waited_for = True
                    else:
                        sleeper = _Sleeper(self._sleepers)
                        pending.completion = sleeper.wake
                if mine:
                    _poll(fd, wanted, until)
                elif sleeper is not None:
                    sleeper.sleep(deadline)
                expired = deadline.expired
        except BaseException:
            with self._lock:
                self._polled &= ~mine
                self._hand_over(sleeper)
            raise
        if not pending.done:
            raise DeadlineExceeded(f"no answer from the server in time ({what})")

    # ------------------------------------------------------------------------------------------ with the lock held

    def _refuse_if_over(self) -> None:
        """Raise what ended the connection: another caller may have found out since this one looked at the phase."""
        if self._session.over:
            error = self.engine.error
            raise self._own(error) if error else Disconnected(errno.ENOTCONN, "the connection was closed by this program")

    def _submit(self, commands: Sequence[Command]) -> None:
        self._refuse_if_over()
        for command in commands:
            self.engine.submit(command)

    def _own(self, error: Error) -> Error:
        """Return the caller's own copy of an error that others may be raising as well."""
        if error is not self.engine.error:
            return error
        mine = copy.copy(error)
        mine.__cause__ = error.__cause__
        return mine

    def _move(self, move: Callable[[], None]) -> None:
        """Move bytes for everybody; whose outcome that brings is woken by its completion."""
        self._session.waited_for = self._polled != 0
        try:
            move()
        except BaseException as exc:
            error = Disconnected(errno.ECONNABORTED, f"the connection was given up in the middle of moving bytes ({exc!r})")
            error.__cause__ = exc
            self._session.fail(error)
            raise
        finally:
            if self._sleepers:
                self._wake_at_the_end()

    def _wake_at_the_end(self) -> None:
        """The end of the connection is an outcome for everybody, whatever it is that they wait for."""
        if self._session.over:
            for sleeper in [*self._sleepers]:
                sleeper.wake()

    def _hand_over(self, leaving: _Sleeper | None) -> None:
        """A caller is about to leave: if it did something that must go on, another takes its place."""
        if leaving is not None:
            self._sleepers.pop(leaving, None)
        self._session.waited_for = self._polled != 0
        if self._session.over:
            self._session.close()  # what was kept open for those that polled
            self._wake_at_the_end()
        if self._sleepers and int(self._session.interest()) & ~self._polled:
            next(iter(self._sleepers)).wake()


class _Sleeper:
    """A caller that sleeps: woken once, when its outcome is there or something is to be done.

    Args:
        sleepers: all there are; this one belongs to them until it is woken.
    """

    __slots__ = ("_asleep", "_sleepers")

    def __init__(self, sleepers: dict[_Sleeper, None]) -> None:
        self._asleep = threading.Lock()
        self._asleep.acquire()
        self._sleepers = sleepers
        sleepers[self] = None

    def sleep(self, deadline: Deadline) -> None:
        remaining = deadline.remaining()
        self._asleep.acquire(timeout=-1 if remaining is None else min(remaining, threading.TIMEOUT_MAX))

    def wake(self, _: object = None) -> None:
        if self in self._sleepers:
            del self._sleepers[self]
            self._asleep.release()


class _End:
    """The end of a connection, as something to wait for."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.completion: Any = None

    @property
    def done(self) -> bool:
        return self._session.over


def _poll(fd: int, wanted: Want, deadline: Deadline) -> None:
    """Wait for the descriptor, and leave it to the next look at the stream what happened there."""
    try:
        wait(fd, wanted, deadline, "")
    except (DeadlineExceeded, Disconnected):
        return

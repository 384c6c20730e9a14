"""Several threads on one session: whoever has something to wait for waits for all.

A caller queues its command under the lock and waits until it is done. At any time one of the waiting callers polls the
descriptor, with the lock released, and then moves the bytes for everybody; the others sleep until their outcome is there, or
until the polling is theirs to do. Sending is the exception: a caller whose bytes do not fit the send buffer polls for that as
well, since nobody else may be doing so. So a call costs no thread and no second descriptor, and one caller alone pays nothing
for the others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from nbdcore.clients.session import Session
from nbdcore.errors import DeadlineExceeded, Disconnected, Error
from nbdcore.protocol.commands import Command
from nbdcore.protocol.engine import Engine
from nbdcore.streams.base import Want
from nbdcore.streams.waiting import Deadline, wait


class Pending(Protocol):
    """What can be waited for: a Command or an Exchange."""

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
        self._changed = threading.Condition(self._lock)
        self._polled = Want.NOTHING

    @property
    def engine(self) -> Engine:
        """The engine underneath."""
        return self._session.engine

    def run(self, start: Callable[[Engine], Waited], deadline: Deadline) -> Waited:
        """Start something and wait until it is done. Raises DeadlineExceeded; what that means for it is the caller's decision."""
        with self._lock:
            pending = start(self.engine)
            self._wait(pending, deadline)
            return pending

    def run_all(self, commands: Iterator[Command], deadline: Deadline, *, depth: int) -> None:
        """Run commands with up to `depth` of them under way at a time, then raise the first error of any.

        At the deadline those under way are abandoned, and no more are begun.
        """
        with self._lock:
            under_way: list[Command] = []
            failed: Error | None = None
            try:
                for command in commands:
                    self.engine.submit(command)
                    under_way.append(command)
                    if len(under_way) >= depth:
                        failed = self._oldest(under_way, deadline)
                        if failed is not None:
                            break
                while under_way:
                    failed = self._oldest(under_way, deadline) or failed
            except DeadlineExceeded as exc:
                self._abandon(under_way, exc)
                raise
            except BaseException:
                self._abandon(under_way, DeadlineExceeded("given up by the program"))
                raise
            if failed is not None:
                raise failed

    def run_command(self, command: Command, deadline: Deadline) -> None:
        """Run one command and raise its error. At the deadline, or when the caller is interrupted, it is abandoned."""
        with self._lock:
            self.engine.submit(command)
            try:
                self._wait(command, deadline)
            except BaseException as exc:
                self._abandon([command], exc if isinstance(exc, Error) else DeadlineExceeded("given up by the program"))
                raise
        if command.error is not None:
            raise command.error

    def until_over(self, deadline: Deadline) -> None:
        """Wait until the connection has ended."""
        with self._lock:
            self._wait(_End(self._session), deadline)

    def close(self, error: Error | None = None) -> None:
        """End the connection now. Callers that wait are woken, and get `error`, or that this program closed it."""
        with self._lock:
            if error is not None:
                self._session.fail(error)
            self._session.close()
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------ with the lock held

    def _oldest(self, under_way: list[Command], deadline: Deadline) -> Error | None:
        self._wait(under_way[0], deadline)
        return under_way.pop(0).error

    def _abandon(self, commands: list[Command], error: Error) -> None:
        for command in commands:
            self.engine.abandon(command, error)

    def _wait(self, pending: Pending, deadline: Deadline) -> None:
        """Wait for one outcome, doing whatever nobody else is doing meanwhile."""
        self._session.send()
        expired = False
        while not pending.done:
            if expired:
                raise DeadlineExceeded(f"no answer from the server in time ({_what(pending)})")
            wanted = self._session.interest()
            if wanted & ~self._polled:
                self._poll(wanted, deadline)
            else:
                self._changed.wait(deadline.remaining())
            expired = deadline.expired

    def _poll(self, wanted: Want, deadline: Deadline) -> None:
        """Wait for the descriptor with the lock released, then move bytes for everybody and wake those who may be done."""
        mine = wanted & ~self._polled
        self._polled |= mine
        fd = self._session.fileno()
        closed: Disconnected | None = None
        self._lock.release()
        try:
            wait(fd, wanted, deadline, "")
        except DeadlineExceeded:
            pass  # the caller looks at its deadline after a last look at what has arrived
        except Disconnected as exc:
            closed = exc
        finally:
            self._lock.acquire()
            self._polled &= ~mine
            self._changed.notify_all()
        if closed is not None:
            self._session.fail(closed)  # counts only where it was not `close` in another thread, which has said so already
        else:
            self._session.advance()


class _End:
    """The end of a connection, as something to wait for."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def done(self) -> bool:
        return self._session.over


def _what(pending: Pending) -> str:
    return str(pending) if isinstance(pending, Command) else "the handshake"

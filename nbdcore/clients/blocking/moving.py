"""The steps that callers make on their session while they hold its lock: nothing here waits, and nothing takes the lock.

A step moves what bytes it can, for everybody; whoever has an outcome by then is woken. Then it settles what its own caller does
next: that one returns, watches the descriptor for what nobody else watches it for, or is parked among the `waiters`. Whoever
leaves sees to it that another takes over what must go on.

In the middle of moving bytes an exception, such as Ctrl-C, leaves the stream out of step; that ends the connection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from nbdcore.clients.blocking.waiters import Pending, Wait, Waiters
from nbdcore.clients.session.pipeline import Pipeline
from nbdcore.clients.session.session import Session, closed_by_program
from nbdcore.errors import Error, UsageError, copied
from nbdcore.protocol.engine import Engine
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission.commands import Command
from nbdcore.streams.base import Want

_READ, _WRITE = int(Want.READ), int(Want.WRITE)
# So many commands are sent at once while other callers are woken that may have more. 16 threads that read 4 KiB each had 19
# thousand answers a second with 4, 22 thousand with 8, and 26 thousand with 16.
SENT_TOGETHER = 16


class Mover:
    """Moves a session's bytes for all of its callers. Every call is made with the session's lock held.

    Args:
        session: open, or in opt mode.

    Attributes:
        waiters: the callers that do not watch the session.
    """

    def __init__(self, session: Session) -> None:
        self.session: Session = session
        self.engine: Engine = session.engine
        self.waiters: Waiters = Waiters()

    def step(self, wait: Wait, *, expired: bool) -> bool:
        """Move bytes, then settle what to wait for. Returns True when the caller's own wait is over."""
        session = self.session
        try:
            if watched := wait.watched:
                session.stop_watching(watched)
                wait.watched = 0
                wait.held_up = bool(wait.parts) and not wait.ready
                self._count_sent(wait)
                if not wait.ready:
                    pass
                elif wait.room is not None:
                    self.move(partial(session.take_in, wait.room, wait.taken, eager=wait.any_of_several))
                elif session.waited_for & _READ:
                    # What there is to receive is for the caller that watches for it: the system may have woken that one, and
                    # have it wait on where nothing is left when it runs.
                    self.move(session.send)
                else:
                    self.move(partial(session.advance, eager=wait.any_of_several, pausing=wait.gate is None))
            else:
                self.waiters.unpark(wait)
                if wait.submit:
                    self._submit_for(wait)
                self._send()
            if wait.pending.done or expired:
                self.hand_over()
                return True
            self._settle(wait)
        except BaseException:
            self.stop(wait)
            raise
        return False

    def _settle(self, wait: Wait) -> None:
        """Have a caller watch what nobody watches, or park it. While others are woken that may send more, they watch."""
        session = self.session
        wanted = session.wanted()
        wait.at_once = False
        if not self.waiters.woken:
            wait.watched = wanted & ~session.waited_for
        if not wait.watched:
            self.refuse_if_over()  # what an exception in the middle of moving bytes has lost, nobody would wake this one for
            self.waiters.park(wait)
            return
        if wait.watched & _WRITE:
            wait.parts = self._parts(wait)
            if wait.parts:
                wait.watched, session.sending = _WRITE, True
        session.waited_for |= wait.watched
        wait.at_once = session.buffered
        wait.alone = wait.watched == wanted == _READ
        wait.room = self._room(wait.pending) if wait.alone and wait.gate is None and not wait.at_once else None

    def _parts(self, wait: Wait) -> Sequence[memoryview]:
        """Return what a caller may send with the lock released, and wait until it is sent: a large payload of its own.

        Another's could be given up meanwhile, and its memory be used for something else. Nobody is parked then, who would have to
        receive.
        """
        pending = wait.pending
        if wait.gate is not None or wait.held_up or self.waiters.parked or not self.session.sends_all:
            return ()
        return self.engine.large_payload(partial(_is_part_of, pending))

    def _room(self, pending: Pending) -> memoryview | None:
        """Return where somebody who waits for `pending` may receive with the lock released; None: nowhere.

        The scratch buffer is nobody's. The memory of a caller may only be written to while that caller waits here.
        """
        engine = self.engine
        if not self.session.fills or engine.phase is not Phase.CONNECTED:
            return None
        command = engine.direct
        if command is None or _is_part_of(pending, command):
            self.session.filling = True
            return engine.room()
        return None

    def _count_sent(self, wait: Wait) -> None:
        if wait.parts:
            # An exception in here ends the connection, since nobody knows then whether they were counted.
            self.move(partial(self.session.count_sent, wait.sent))
            wait.parts = ()

    def stop(self, wait: Wait) -> None:
        """A caller waits no more, whether it has its outcome or not. What it has received counts."""
        self.session.stop_watching(wait.watched)
        wait.watched = 0
        if wait.room is not None and wait.taken:
            self.move(partial(self.session.take_in, wait.room, wait.taken))
        self._count_sent(wait)
        self.waiters.unpark(wait)
        self.hand_over()

    def refuse_if_over(self) -> None:
        """Raise what ended the connection: another caller may have found out since this one looked at the phase."""
        if self.session.over:
            error = self.engine.error
            raise copied(error) if error else closed_by_program()  # others may raise it as well

    def _submit_for(self, wait: Wait) -> None:
        """Queue a caller's commands. A loop has others under way: what keeps these from being queued is their outcome alone."""
        commands, wait.submit = wait.submit, ()
        try:
            self.submit(commands)
        except Error as exc:
            if not isinstance(wait.pending, Pipeline):
                raise
            wait.pending.refuse(commands, exc)

    def submit(self, commands: Sequence[Command]) -> None:
        """Queue commands."""
        try:
            self.engine.submit_all(commands)
        except UsageError:  # not connected any more
            self.refuse_if_over()
            raise

    def submit_inbox(self) -> None:
        """Queue what parked callers left. What cannot be queued is an outcome like others."""
        inbox = self.waiters.inbox
        while inbox:
            command = inbox.popleft()
            try:
                self.submit((command,))
            except Error as exc:
                command.error, command.done = exc, True
                if command.completion is not None:
                    command.completion(command)

    def _send(self) -> None:
        """Send what is queued, unless others are about to queue more and there is little of it."""
        if self.waiters.inbox:
            self.submit_inbox()
        if not self.waiters.woken or len(self.engine.queue) >= SENT_TOGETHER:
            self.move(self.session.send)

    def move(self, move: Callable[[], None]) -> None:
        """Move bytes for everybody; whose outcome that brings is woken by its completion."""
        try:
            move()
        except BaseException as exc:
            self.session.give_up(exc)
            raise
        finally:
            if self.waiters.parked:
                self.wake_others()

    def give_up(self, exc: BaseException) -> None:
        """An exception broke off the moving of bytes: the connection ends, for everybody."""
        self.session.give_up(exc)
        self.wake_others()

    def wake_others(self) -> None:
        """Wake whom no completion wakes. The end of the connection is an outcome for everybody, whatever they wait for."""
        waiters = self.waiters
        if self.session.over:
            for parker in [*waiters.parked]:
                parker.wake()
        elif waiters.waiting_for_any:
            for parker in [*waiters.waiting_for_any]:
                if parker.pending.done:
                    parker.wake()

    def hand_over(self) -> None:
        """A caller is about to leave: if it did something that must go on, another takes its place."""
        if self.session.over:
            self.session.close()  # what was kept open for those that watched
        waiters = self.waiters
        if waiters.parked:
            self.submit_inbox()
            self.wake_others()
            if waiters.parked and not waiters.woken and self.session.wanted() & ~self.session.waited_for:
                [*waiters.parked][0].wake()  # noqa: RUF015 (an iterator does not outlive one more that parks)


def _is_part_of(pending: Pending, command: Command) -> bool:
    """Whether whoever waits for `pending` waits for this command."""
    return command is pending or (isinstance(pending, Pipeline) and pending.owns(command))

"""Callers that sleep while another one watches the connection for them, and how they are woken.

One receive may bring the outcomes of many callers, and waking a thread costs more than a small read. So whoever was woken counts
as awake until it has come by, and as long as anybody is awake the others need neither the lock nor a system call: they leave
their command in the inbox and fall asleep. Each single step on the containers here is one that the interpreter makes without
another thread in between, and their order is what makes it safe: a command is in the inbox before its caller looks whether
somebody is awake, and a caller is no longer awake before it looks into the inbox. Who goes through a container takes a copy
first: others may fall asleep meanwhile.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from nbdcore.clients.session.session import Session
from nbdcore.protocol.transmission.commands import Command
from nbdcore.streams.waiting import Deadline


class Pending(Protocol):
    """What can be waited for: a Command, an Exchange, or any of several commands."""

    completion: Any
    """Called when it is done."""

    @property
    def done(self) -> bool:
        """Whether the outcome is final."""


class Crowd:
    """All callers of a session that do not watch it.

    Attributes:
        asleep: in the order in which they fell asleep.
        groups: those of them that wait for any of several commands.
        awake: those that were woken and have not come by.
        inbox: commands that they left for another to submit.
    """

    __slots__ = ("asleep", "awake", "groups", "inbox")

    def __init__(self) -> None:
        self.asleep: dict[Sleeper, None] = {}
        self.groups: dict[Sleeper, None] = {}
        self.awake: dict[Sleeper, None] = {}
        self.inbox: deque[Command] = deque()

    def lie_down(self, turn: Turn) -> Sleeper:
        """Let a caller be known as asleep, and be woken when what it waits for is done."""
        # An exception may come after any call: so the sleeper is the turn's before others know it.
        turn.sleeper = sleeper = Sleeper(self, turn.pending)
        if turn.any_of_several:
            self.groups[sleeper] = None
        else:
            turn.pending.completion = sleeper.wake
        self.asleep[sleeper] = None
        return sleeper

    def get_up(self, turn: Turn) -> None:
        """A caller is up, because it was woken or for a reason of its own."""
        sleeper = turn.sleeper
        if sleeper is not None:
            self.asleep.pop(sleeper, None)
            self.groups.pop(sleeper, None)
            self.awake.pop(sleeper, None)
            turn.sleeper = None

    def leave_to_others(self, turn: Turn) -> Sleeper:
        """Fall asleep without the lock, and leave to those that are awake what is to be submitted."""
        sleeper = self.lie_down(turn)
        self.inbox.extend(turn.submit)
        turn.submit = ()
        return sleeper

    def needs_nobody(self, turn: Turn) -> bool:
        """Whether a caller that has its outcome may leave without the lock, since others are awake that see to the rest."""
        sleeper = turn.sleeper
        # At its deadline it may be up with its outcome and not be woken yet: then it would be taken for awake ever after.
        if sleeper is None or not turn.pending.done or sleeper not in self.awake:
            return False
        self.awake.pop(sleeper, None)
        return bool(self.awake)


class Turn:
    """One caller's wait.

    Attributes:
        pending: what it waits for.
        submit: commands to submit first.
        any_of_several: `pending` stands for several commands, and nothing calls its completion.
        watched: what it watches, with the lock released: sessions, and for what, as the bits of a Want.
        ready: what of it something has happened to.
        at_once: there is something to receive already.
        sleeper: what it sleeps in, when it does not watch.
    """

    __slots__ = ("any_of_several", "at_once", "pending", "ready", "sleeper", "submit", "watched")

    def __init__(self, pending: Pending, submit: Sequence[Command], *, any_of_several: bool) -> None:
        self.pending: Pending = pending
        self.submit: Sequence[Command] = submit
        self.any_of_several: bool = any_of_several
        self.watched: Sequence[tuple[Session, int]] = ()
        self.ready: Sequence[tuple[Session, int]] = ()
        self.at_once: bool = False
        self.sleeper: Sleeper | None = None


class Sleeper:
    """A caller that sleeps: woken once, when its outcome is there or something is to be done.

    Args:
        crowd: to which it belongs.
        pending: what it waits for.
    """

    __slots__ = ("_alarm", "_crowd", "pending")

    def __init__(self, crowd: Crowd, pending: Pending) -> None:
        self._alarm = threading.Lock()
        self._alarm.acquire()
        self._crowd = crowd
        self.pending: Pending = pending

    def sleep(self, deadline: Deadline) -> None:
        """Sleep until woken, or until the deadline."""
        remaining = deadline.remaining()
        self._alarm.acquire(timeout=-1 if remaining is None else min(remaining, threading.TIMEOUT_MAX))

    def wake(self, _: object = None) -> None:
        """Wake it, unless it is up already. Called with the lock held; no exception can come between these statements."""
        crowd = self._crowd
        if self in crowd.asleep:
            crowd.awake[self] = None
            del crowd.asleep[self]
            crowd.groups.pop(self, None)
            self._alarm.release()

"""Callers that are parked while another one watches the connection for them, and how they are woken.

One receive may bring the outcomes of many callers, and waking a thread costs more than a small read. So a caller that was woken
counts as woken until it has come by. As long as anybody is woken, the others need neither the lock nor a system call: they leave
their commands in the inbox and park.

Two orders make that safe without the lock, since the interpreter makes each single step on these containers in one go. A command
is in the inbox before its caller looks whether somebody is woken; and a caller is no longer woken before it looks into the inbox.
Whoever goes through a container takes a copy first: others may park meanwhile.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from nbdcore.protocol.transmission.commands import Command
from nbdcore.streams.waiting import Deadline


class Pending(Protocol):
    """What can be waited for: a Command, an Exchange, or any of several commands."""

    completion: Any
    """Called when it is done."""

    @property
    def done(self) -> bool:
        """Whether the outcome is final."""


class Gate(Protocol):
    """What a parked caller waits for, however it does that."""

    def release(self) -> None:
        """Wake the caller. Called once for each time that it is parked."""


class Waiters:
    """The callers of a session that do not watch it.

    Attributes:
        parked: in the order in which they parked.
        waiting_for_any: those of them that wait for any of several commands.
        woken: those that were woken and have not come by.
        inbox: commands that they left for another to submit.
    """

    __slots__ = ("inbox", "parked", "waiting_for_any", "woken")

    def __init__(self) -> None:
        self.parked: dict[Parker, None] = {}
        self.waiting_for_any: dict[Parker, None] = {}
        self.woken: dict[Parker, None] = {}
        self.inbox: deque[Command] = deque()

    def park(self, wait: Wait) -> Parker:
        """Count a caller as parked, and have it woken when what it waits for is done."""
        # An exception may come after any call: so the wait has its parker before others know that.
        wait.parker = parker = Parker(self, wait.pending, wait.gate)
        if wait.any_of_several:
            self.waiting_for_any[parker] = None
        else:
            wait.pending.completion = parker.wake
        self.parked[parker] = None
        return parker

    def unpark(self, wait: Wait) -> None:
        """A caller goes on, because it was woken or for a reason of its own."""
        parker = wait.parker
        if parker is not None:
            self.parked.pop(parker, None)
            self.waiting_for_any.pop(parker, None)
            self.woken.pop(parker, None)
            wait.parker = None

    def leave_to_others(self, wait: Wait) -> Parker:
        """Park without the lock, and leave to those that are woken what is to be submitted."""
        parker = self.park(wait)
        self.inbox.extend(wait.submit)
        wait.submit = ()
        return parker

    def may_leave(self, wait: Wait) -> bool:
        """Whether a caller that has its outcome may return without the lock, since others are woken that see to the rest."""
        parker = wait.parker
        # The deadline may end its wait just as its outcome comes, before it is woken. If it left then, `wake` would count it as
        # woken later, for ever.
        if parker is None or not wait.pending.done or parker not in self.woken:
            return False
        self.woken.pop(parker, None)
        return bool(self.woken)


class Wait:
    """One caller's wait.

    Attributes:
        pending: what it waits for.
        submit: commands to submit first.
        any_of_several: `pending` stands for several commands, and nothing calls its completion.
        watched: what it watches the connection for, with the lock released, as the bits of a Want.
        alone: that is to receive, and nothing is left to send: nobody else need do anything before something comes.
        ready: whether something of what it watches for has happened.
        at_once: there is something to receive already.
        room: where it receives, with the lock released; None where it only looks whether there is something to receive.
        taken: how many bytes it has received there, until they are taken in.
        parts: what it sends, with the lock released; empty where it only looks whether something can be sent.
        sent: how many bytes of that it has sent, until they are counted.
        held_up: nothing could be sent so for a while: it is to look.
        gate: what wakes it, where it waits on several connections; None where on one: then a lock of the parker's does.
        parker: what it is parked in, when it does not watch.
    """

    __slots__ = (
        "alone",
        "any_of_several",
        "at_once",
        "gate",
        "held_up",
        "parker",
        "parts",
        "pending",
        "ready",
        "room",
        "sent",
        "submit",
        "taken",
        "watched",
    )

    def __init__(self, pending: Pending, submit: Sequence[Command], *, any_of_several: bool, gate: Gate | None = None) -> None:
        self.pending: Pending = pending
        self.submit: Sequence[Command] = submit
        self.any_of_several: bool = any_of_several
        self.watched: int = 0
        self.alone: bool = False
        self.ready: bool = False
        self.at_once: bool = False
        self.room: memoryview | None = None
        self.taken: list[int] = []
        self.parts: Sequence[memoryview] = ()
        self.sent: list[int] = []
        self.held_up: bool = False
        self.gate: Gate | None = gate
        self.parker: Parker | None = None


class Parker:
    """What a caller is parked in: woken once, when its outcome is there or something is to be done.

    Args:
        waiters: to which it belongs.
        pending: what it waits for.
        gate: what wakes the caller, which waits for that by itself; None: a lock, in which `park` waits.
    """

    __slots__ = ("_gate", "_lock", "_waiters", "pending")

    def __init__(self, waiters: Waiters, pending: Pending, gate: Gate | None = None) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._gate: Gate = self._lock if gate is None else gate
        self._waiters = waiters
        self.pending: Pending = pending

    def park(self, deadline: Deadline) -> None:
        """Wait until woken, or until the deadline."""
        remaining = deadline.remaining()
        self._lock.acquire(timeout=-1 if remaining is None else min(remaining, threading.TIMEOUT_MAX))

    def wake(self, _: object = None) -> None:
        """Wake it, unless it goes on already. Called with the lock held."""
        waiters = self._waiters
        if self in waiters.parked:
            waiters.woken[self] = None
            del waiters.parked[self]
            try:
                self._gate.release()
            except BaseException:  # a signal handler's; the gate may be open, and may not
                with contextlib.suppress(RuntimeError):  # a lock that is open already
                    self._gate.release()
                raise
            finally:
                waiters.waiting_for_any.pop(self, None)

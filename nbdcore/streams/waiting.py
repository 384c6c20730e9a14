"""The one module that waits: for descriptors, until a deadline. Everything else here returns at once.

It knows descriptors, `Want` and the monotonic clock, and never what the bytes mean. Blocking callers wait here for one descriptor
(`wait`), servers for many (`wait_any`), and `drive` runs a generator that says by itself what it must wait for.

A small answer often comes sooner than a thread falls asleep and is woken again, which costs many times a look at the
descriptor on a virtual machine. So whoever waits for answers uses a `Watch`, which looks a few times before it sleeps, as long
as that pays.

Readiness is the operating system's own, so it may be stale by the time the caller acts on it: a stream then answers None and the
caller waits again. An error or a hang-up counts as ready, so that the next receive or send reports what really happened. A
deadline passes only while there is nothing to do: whoever loops over a peer that always has a little more looks at
`Deadline.expired` as well.
"""

from __future__ import annotations

import errno
import math
import os
import select
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from nbdcore.errors import DeadlineExceeded, Disconnected, UsageError
from nbdcore.streams.base import Want

__all__ = ["NEVER", "Deadline", "Watch", "drive", "wait", "wait_any"]

Result = TypeVar("Result")


def _processors() -> int:
    """How many processors this program may use: on a single one, who looks keeps the server from answering."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


#: The longest single wait in seconds: poll takes its milliseconds as a C int. Longer ones go round the loop again.
_LONGEST = (2**31 - 1) / 1000


# Looks before sleeping: together about 30 us, in which nbdkit answers nine of ten single reads of 4 KiB.
_LOOKS = range(48) if _processors() > 1 else range(0)
# Most waits in a row that sleep at once after looking did not pay: what looking can cost a slow server's client is 1 us a wait.
_LONGEST_REST = 32
# Looking and sleeping are compared by the shortest of 8 runs of 8 waits; the slower one has every 32nd trial, which costs 3%
# where it takes twice as long.
_RUN, _TRIAL, _TRIALS = 8, 8, 32
# Looks that take so many seconds together were held up by other threads of this program.
_CROWDED = 0.001
_HAS_POLL = hasattr(select, "poll")


# --- time ---


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on the monotonic clock; None in `at` means never.

    Attributes:
        at: seconds on `time.monotonic()`.
    """

    at: float | None

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        """Return the deadline `seconds` from now: None never comes, 0 is here already.

        Raises UsageError (EINVAL) for a negative number and for NaN.
        """
        if seconds is None:
            return NEVER
        if not seconds >= 0:
            raise UsageError(errno.EINVAL, f"a timeout is a number of seconds, 0 or more, or None: not {seconds}")
        return cls(time.monotonic() + seconds)

    def remaining(self) -> float | None:
        """Return the seconds left, never less than 0; None when the deadline never comes."""
        return None if self.at is None else max(0.0, self.at - time.monotonic())

    @property
    def expired(self) -> bool:
        """Whether the moment has passed."""
        return self.at is not None and time.monotonic() >= self.at


#: The deadline that never comes; one for all, since a call without a timeout is the usual one.
NEVER = Deadline(None)


# --- waiting ---


def wait(fd: int, want: Want, deadline: Deadline, message: str) -> Want:
    """Wait until `fd` is ready for something of `want`, and return what of it is ready.

    Even a deadline that has passed looks once. Costs about a microsecond over the system call: it is called for every small read
    of a blocking client.

    Raises DeadlineExceeded with `message`, Disconnected (EBADF) when the descriptor is not open: another thread closed it.
    """
    wanted = {fd: want}
    while True:
        ready = _ready(wanted, deadline.remaining())
        if ready:
            found = ready[0][1]
            if not found:
                raise Disconnected(errno.EBADF, "the connection was closed by this program while it was waited for")
            return found
        if deadline.expired:
            raise DeadlineExceeded(message)


def wait_any(waiting: Iterable[tuple[int, Want]], deadline: Deadline) -> list[tuple[int, Want]]:
    """Wait until any of these descriptors is ready for what is wanted of it, and return all that are; [] at the deadline.

    A descriptor may be named twice; one of which nothing is wanted is left out. One that is not open counts as ready for
    everything: the next call on its stream says so. Raises ValueError rather than wait for nothing, for ever.
    """
    wanted: dict[int, Want] = {}
    for fd, want in waiting:
        if want:
            wanted[fd] = wanted[fd] | want if fd in wanted else want
    if not wanted and deadline.at is None:
        raise ValueError("no descriptor to wait for, and no deadline")
    while True:
        ready = _ready(wanted, deadline.remaining())
        if ready:
            return [(fd, found or wanted[fd]) for fd, found in ready]
        if deadline.expired:
            return []


def drive(generator: Generator[tuple[int, Want], None, Result], deadline: Deadline, message: str) -> Result:
    """Run a generator that yields what it must wait for (a transport's `connect`) to its end, and return its result.

    The generator is closed in every case, so whatever it had opened is freed when it fails or the deadline passes. Raises
    DeadlineExceeded with `message`, and whatever the generator raises.
    """
    try:
        while True:
            try:
                fd, want = next(generator)
            except StopIteration as end:
                result: Result = end.value
                return result
            wait(fd, want, deadline, message)
    finally:
        generator.close()


class Watch:
    """One descriptor that is waited for again and again until it is readable, by one thread at a time.

    Either looks at it a number of times before it sleeps, or sleeps at once. Which is faster depends on where the system runs the
    server: on the processor that a sleeping client leaves free, and then the two take turns at little cost; or on another one,
    which takes long to wake. So both are tried now and then, and what took less time from wait to wait is kept.

    Where the answer did not come while looking, more and more of the next waits do without, up to `_LONGEST_REST`, so that a slow
    server costs no processor time; and also where another thread wants the interpreter, since each look gives it away and may get
    it back late.
    """

    __slots__ = ("_begin", "_costs", "_fastest", "_fd", "_left", "_look", "_looks", "_misses", "_rest", "_runs")

    def __init__(self) -> None:
        self._fd = -1
        self._look: Callable[[int | None], list[tuple[int, int]]] | None = None
        self._misses = 0  # waits in a row in which the answer came too late for looking
        self._rest = 0  # waits to come that sleep at once
        self._looks = len(_LOOKS) > 0  # which of the two is tried now
        self._costs = [math.inf, math.inf]  # seconds from wait to wait, last time: of sleeping, and of looking
        self._runs = 0  # how many there have been, of `_RUN` waits each
        self._left = 0  # waits left of this one
        self._begin = self._fastest = math.inf  # when it began, and the shortest one of this trial

    def wait(self, fd: int, deadline: Deadline) -> None:
        """Wait until `fd` is readable, broken or not open, or the deadline has passed: the caller looks which."""
        if not _HAS_POLL or fd < 0:
            wait_any(((fd, Want.READ),), deadline)
            return
        if fd != self._fd or self._look is None:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            self._fd, self._look = fd, poll.poll
        if not self._left:
            self._choose()
        self._left -= 1
        if self._rest:
            self._rest -= 1
        elif self._looks and self._look_often(self._look):
            return
        remaining = deadline.remaining()
        self._look(None if remaining is None else math.ceil(min(remaining, _LONGEST) * 1000))

    def _choose(self) -> None:
        """A run of waits is over. At the end of a trial, which is a few of them, choose what to do in the next."""
        now = time.monotonic()
        self._fastest = min(self._fastest, now - self._begin)  # the others held a pause of the program's own
        self._runs += 1
        self._begin, self._left = now, _RUN
        if self._runs % _TRIAL or not _LOOKS:
            return
        self._costs[self._looks] = self._fastest
        self._fastest = math.inf
        faster = self._costs[True] <= self._costs[False]
        self._looks = faster if self._runs % (_TRIAL * _TRIALS) else not faster

    def _look_often(self, look: Callable[[int | None], list[tuple[int, int]]]) -> bool:
        """Look until there is something, but not for long. Returns whether there is."""
        if look(0):
            return True
        begin = time.monotonic()
        for _ in _LOOKS:
            if look(0):
                self._misses = 0
                break
        else:
            self._misses = min(self._misses + 1, _LONGEST_REST)
            self._rest = self._misses
        if time.monotonic() - begin > _CROWDED:
            self._rest = _LONGEST_REST
        return not self._rest


# --- the system's own calls: one look, however long; (fd, NOTHING) stands for a descriptor that is not open ---

_READ_WRITE = Want.READ | Want.WRITE
# By the number that a Want is: operations on flags cost more than the system call does.
_WANTS = (Want.NOTHING, Want.READ, Want.WRITE, _READ_WRITE)


def _by_select(wanted: Mapping[int, Want], seconds: float | None) -> list[tuple[int, Want]]:
    """Wait with select: where there is no poll (Windows)."""
    if closed := [fd for fd in wanted if fd < 0]:
        return [(fd, Want.NOTHING) for fd in closed]
    seconds = None if seconds is None else min(seconds, _LONGEST)
    if not wanted:
        # Windows refuses to select among nothing.
        time.sleep(seconds or 0)
        return []
    reading = [fd for fd, want in wanted.items() if want & Want.READ]
    writing = [fd for fd, want in wanted.items() if want & Want.WRITE]
    try:
        # Windows reports a connection that failed as exceptional, not as writable.
        readable, writable, failed = select.select(reading, writing, writing, seconds)
    except OSError:
        # Which of them is not open, select does not say.
        closed = [fd for fd in wanted if not _selectable(fd)]
        if not closed:
            raise
        return [(fd, Want.NOTHING) for fd in closed]
    found = dict.fromkeys(readable, Want.READ)
    for fd in {*writable, *failed}:
        found[fd] = _READ_WRITE if fd in found else Want.WRITE
    return list(found.items())


def _selectable(fd: int) -> bool:
    try:
        select.select([fd], [], [], 0)
    except OSError:
        return False
    return True


if _HAS_POLL:
    _EVENTS = (0, select.POLLIN, select.POLLOUT, select.POLLIN | select.POLLOUT)
    _BROKEN = select.POLLHUP | select.POLLERR

    def _by_poll(wanted: Mapping[int, Want], seconds: float | None) -> list[tuple[int, Want]]:
        """Wait with poll, which takes any descriptor number, and starts anew by itself after a signal."""
        poll = select.poll()
        for fd, want in wanted.items():
            if fd < 0:
                return [(fd, Want.NOTHING)]
            poll.register(fd, _EVENTS[want])
        ready = poll.poll(None if seconds is None else math.ceil(min(seconds, _LONGEST) * 1000))
        return [(fd, _found(events, wanted[fd])) for fd, events in ready]

    def _found(events: int, want: Want) -> Want:
        if events & select.POLLNVAL:
            return Want.NOTHING
        if events & _BROKEN:
            return want
        return _WANTS[(1 if events & select.POLLIN else 0) | (2 if events & select.POLLOUT else 0)]

    _ready: Callable[[Mapping[int, Want], float | None], list[tuple[int, Want]]] = _by_poll
else:
    _ready = _by_select

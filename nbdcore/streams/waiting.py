"""The one module that waits: for descriptors, until a deadline. Everything else here returns at once.

It knows descriptors, `Want` and the monotonic clock, and never what the bytes mean. Blocking callers wait here for one descriptor
(`wait`), or for a few again and again (`Watch`), servers for many (`wait_any`), and `drive` runs a generator that says by itself
what it must wait for. A stream may have a faster way to wait for its own bytes alone (`Stream.wait`).

Readiness is the operating system's own, so it may be stale by the time the caller acts on it: a stream then answers None and the
caller waits again. An error or a hang-up counts as ready, so that the next receive or send reports what really happened. A
deadline passes only while there is nothing to do: whoever loops over a peer that always has a little more looks at
`Deadline.expired` as well.
"""

from __future__ import annotations

import errno
import math
import select
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from nbdcore.errors import DeadlineExceeded, Disconnected, UsageError
from nbdcore.streams.base import WANTS, AnyOf, Opening, Want

__all__ = ["LOOK_AGAIN", "NEVER", "Deadline", "Watch", "drive", "sooner", "wait", "wait_any"]

Result = TypeVar("Result")


#: Seconds after which somebody who waits for what may never come, since nothing would tell, looks around: short for a person who
#: waits, and rare enough to cost nothing.
LOOK_AGAIN = 0.1
#: The longest single wait in seconds: poll takes its milliseconds as a C int. Longer ones go round the loop again.
_LONGEST = (2**31 - 1) / 1000
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
        """Return the deadline `seconds` from now: None and infinity never come, 0 is here already.

        Raises UsageError (EINVAL) for a negative number and for NaN.
        """
        if seconds is None or seconds == math.inf:
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


def sooner(one: Deadline, other: Deadline) -> Deadline:
    """Return the deadline that comes first."""
    if one.at is None or other.at is None:
        return other if one.at is None else one
    return one if one.at <= other.at else other


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
            raise DeadlineExceeded(errno.ETIMEDOUT, message)


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


def drive(generator: Opening[Result], deadline: Deadline, message: str) -> Result:
    """Run a generator that yields what it must wait for (a transport's `connect`) to its end, and return its result.

    The generator is closed in every case, so whatever it had opened is freed when it fails or the deadline passes. Raises
    DeadlineExceeded with `message`, and whatever the generator raises.
    """
    ready: Collection[int] | None = None
    try:
        while True:
            try:
                wanted = generator.send(ready)
            except StopIteration as end:
                result: Result = end.value
                return result
            need = AnyOf.of(wanted)
            ready = {fd for fd, _ in wait_any(need.waiting, sooner(Deadline.after(need.seconds), deadline))}
            if not ready and deadline.expired:
                raise DeadlineExceeded(errno.ETIMEDOUT, message)
    finally:
        generator.close()


class Watch:
    """Descriptors that are waited for again and again until one is readable, by one thread at a time.

    The system is told which only when they are others than the last time: that is most of what a short wait costs in Python.
    """

    __slots__ = ("_fds", "_poll")

    def __init__(self) -> None:
        self._fds: tuple[int, ...] = ()
        self._poll: Callable[[int | None], list[tuple[int, int]]] | None = None

    def wait(self, fds: tuple[int, ...], deadline: Deadline) -> list[int]:
        """Wait until any of `fds` is readable, broken or not open, and return those that are; [] at the deadline, or before."""
        if not _HAS_POLL or min(fds) < 0:
            return [fd for fd, _ in wait_any([(fd, Want.READ) for fd in fds], deadline)]
        if fds != self._fds or self._poll is None:
            poll = select.poll()
            for fd in fds:
                poll.register(fd, select.POLLIN)
            self._fds, self._poll = fds, poll.poll
        remaining = deadline.remaining()
        return [fd for fd, _ in self._poll(None if remaining is None else math.ceil(min(remaining, _LONGEST) * 1000))]


# --- the system's own calls: one look, however long; (fd, NOTHING) stands for a descriptor that is not open ---

_READ_WRITE = Want.READ | Want.WRITE


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
        return WANTS[(1 if events & select.POLLIN else 0) | (2 if events & select.POLLOUT else 0)]

    _ready: Callable[[Mapping[int, Want], float | None], list[tuple[int, Want]]] = _by_poll
else:
    _ready = _by_select

"""What transports open connections with: generators that never block, whoever drives them.

Each yields `(descriptor, Want)`, or `AnyOf` several, when it must wait, returns what it opened, and frees it when it fails or is
closed early. The driver resumes one only when a descriptor is ready, or the time of an `AnyOf` has passed, and sends the set of
those that are ready. Several can be run side by side, as one that waits for what any of them waits for (`Branch`); the first that
succeeds may be all that is wanted (`first_of`). It knows sockets, and nothing of NBD: not a byte is read or sent here.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any, Generic, NoReturn, Protocol, TypeVar, cast

from nbdcore.errors import Error, TransportError
from nbdcore.streams.base import AnyOf, Opening, Want
from nbdcore.streams.sockets import connected_pair, transport_errors

__all__ = ["Branch", "any_of", "connect_socket", "first_of", "in_thread", "relay"]

Result = TypeVar("Result")


class _Closable(Protocol):
    def close(self) -> object: ...


#: What an attempt opens.
Opened = TypeVar("Opened", bound=_Closable)
#: What a generator yields in place of what it was asked to relay.
Relayed = TypeVar("Relayed")

#: "Under way": EINTR too, since an interrupted connect goes on (POSIX), and EWOULDBLOCK, which is Windows' word for it.
_UNDER_WAY = frozenset({errno.EINPROGRESS, errno.EINTR, errno.EALREADY, errno.EWOULDBLOCK} - {errno.EAGAIN})
_UNIX = getattr(socket, "AF_UNIX", None)
#: Seconds between attempts while a unix server's backlog is full: short first, since servers usually accept at once; the longest
#: still answers a person at once, and costs next to nothing.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.1
#: Seconds after which the next address is tried too (RFC 8305, section 5, "Connection Attempt Delay").
ATTEMPT_DELAY = 0.25


def connect_socket(
    sock: socket.socket, name: Any, what: str, hints: Mapping[int, str] | None = None
) -> Generator[tuple[int, Want], None, socket.socket]:
    """Connect `sock` to the socket name `name` (as `socket.connect` takes it, with no host name to look up), and return it.

    `what` is how messages name the server, `hints` what some errno numbers mean there. The socket is non-blocking afterwards, and
    closed on any failure or when the generator is closed early. Raises TransportError with the system's error as its cause.
    """
    try:
        with transport_errors(f"connect to {what}", hints or {}):
            sock.setblocking(False)
            pause = _FIRST_PAUSE
            while (result := sock.connect_ex(name)) == errno.EAGAIN and sock.family == _UNIX:
                # The server's backlog is full, and no descriptor tells when it no longer is.
                yield from in_thread(partial(time.sleep, pause))
                pause = min(pause * 2, _LONGEST_PAUSE)
            if result in _UNDER_WAY:
                yield sock.fileno(), Want.WRITE
                result = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if result:
                _fail(result)
    except BaseException:
        sock.close()
        raise
    return sock


def _fail(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))


def relay(
    steps: Opening[Result], wait: Callable[[AnyOf], Generator[Relayed, Any, Collection[int]]]
) -> Generator[Relayed, Any, Result]:
    """Run `steps` to their end, while `wait`, a generator, does each of their waits in a way of its own. Returns their result.

    They are closed in every case, so whatever they had opened is freed when they fail, or a wait does.
    """
    ready: Collection[int] | None = None
    try:
        while True:
            try:
                wanted = steps.send(ready)
            except StopIteration as end:
                result: Result = end.value
                return result
            ready = yield from wait(AnyOf.of(wanted))
    finally:
        steps.close()


class Branch(Generic[Result]):
    """One of several generators that are run side by side.

    Attributes:
        need: what it waits for; None when it has ended.
        error: the error of nbdcore's that ended it, else None.
        result: what it returned; None before, and where it failed.
    """

    def __init__(self, steps: Opening[Result]) -> None:
        self._steps = steps
        self._until = inf
        self.need: AnyOf | None = None
        self.error: Error | None = None
        self.result: Result | None = None
        self._go_on(None)

    def take(self, ready: Collection[int]) -> None:
        """Go on, if what it waits for is among those that are ready, or its time has passed."""
        if self.need is not None:
            mine = frozenset(fd for fd, _ in self.need.waiting if fd in ready)
            if mine or time.monotonic() >= self._until:
                self._go_on(mine)

    def close(self) -> None:
        """Free what it has opened, unless it has returned that."""
        self._steps.close()

    def _go_on(self, ready: Collection[int] | None) -> None:
        self.need = None
        try:
            wanted = self._steps.send(ready)
        except StopIteration as end:
            self.result = end.value
        except Error as exc:
            self.error = exc
        else:
            self.need = AnyOf.of(wanted)
            self._until = inf if self.need.seconds is None else time.monotonic() + self.need.seconds

    @property
    def seconds_left(self) -> float:
        """Seconds until its time has passed."""
        return max(0.0, self._until - time.monotonic())


def any_of(branches: Iterable[Branch[Any]], seconds: float = inf) -> AnyOf:
    """Return what to wait for so that any of the branches can go on, or so many seconds pass."""
    waiting: list[tuple[int, Want]] = []
    for branch in branches:
        if branch.need is not None:
            waiting += branch.need.waiting
            seconds = min(seconds, branch.seconds_left)
    return AnyOf(tuple(waiting), None if seconds == inf else seconds)


def first_of(attempts: Sequence[Opening[Opened]], *, delay: float = ATTEMPT_DELAY) -> Opening[Opened]:
    """Make attempts until one succeeds (RFC 8305, "happy eyeballs"), and return its result.

    The next attempt is begun when the one before has failed, or has taken `delay` seconds, after which that one goes on. When one
    succeeds the others are closed, and whatever they have opened. When all have failed, raises one TransportError: the first
    attempt's, with the words of all.
    """
    begun: list[Branch[Opened]] = []
    chosen: Branch[Opened] | None = None
    next_at = 0.0
    try:
        while True:
            waiting = [branch for branch in begun if branch.need is not None]
            more = len(begun) < len(attempts)
            if more and (not waiting or time.monotonic() >= next_at):
                begun.append(Branch(attempts[len(begun)]))
                next_at = time.monotonic() + delay
                advanced = begun[-1:]
            elif waiting:
                ready = yield any_of(waiting, max(0.0, next_at - time.monotonic()) if more else inf)
                for branch in waiting:
                    branch.take(ready or ())
                advanced = waiting
            else:
                raise _all_failed([branch.error for branch in begun if branch.error is not None])
            done = [branch for branch in advanced if branch.need is None and branch.error is None]
            if done:
                chosen = done[0]
                return cast("Opened", chosen.result)
            if any(branch.error is not None for branch in advanced):
                next_at = 0.0
    finally:
        for branch in begun:
            if branch is not chosen and branch.result is not None:
                branch.result.close()
        for steps in attempts:
            steps.close()


def _all_failed(failures: Sequence[Error]) -> TransportError:
    """Return the one error for several: the first, whose address the resolver thought best, with the others' words."""
    error = TransportError(failures[0].errno or 0, "; ".join(failure.message for failure in failures))
    error.__cause__ = failures[0].__cause__
    error.failures = tuple(failures)
    return error


def in_thread(
    call: Callable[[], Result], *, discard: Callable[[Result], None] | None = None
) -> Generator[tuple[int, Want], None, Result]:
    """Run a call that blocks (a name look-up, a connect of another library) in a thread of its own, and return its result.

    Whatever it raises is raised here. A generator closed early does not wait for the thread: it ends when the call does, and
    hands a result that nobody is left to take to `discard`, in the thread. The thread does not keep the program from ending.
    """
    with transport_errors("connect: no sockets to wait on"):
        reader, writer = connected_pair()
    job = _Job(call, discard, writer)
    try:
        _start(job.run, writer)
        while not job.finished:
            yield reader.fileno(), Want.READ
        return job.take()
    finally:
        job.abandon()
        reader.close()


def _start(run: Callable[[], None], writer: socket.socket) -> None:
    try:
        threading.Thread(target=run, name="nbdcore-connecting", daemon=True).start()
    except RuntimeError as exc:  # no more threads, or the interpreter is shutting down
        writer.close()
        raise TransportError(errno.EAGAIN, f"cannot connect: {exc}") from exc


class _Job(Generic[Result]):
    """One call in a thread: its outcome, and whether anybody still wants it. Only the thread closes `writer`, as the signal."""

    def __init__(self, call: Callable[[], Result], discard: Callable[[Result], None] | None, writer: socket.socket) -> None:
        self._call = call
        self._discard = discard
        self._writer = writer
        self._lock = threading.Lock()
        self._results: list[Result] = []
        self._error: BaseException | None = None
        self._abandoned = False
        self.finished = False

    def run(self) -> None:
        with self._writer:
            try:
                self._results.append(self._call())
            except BaseException as exc:  # noqa: BLE001 (carried to the thread that asked, whatever it is)
                self._error = exc
            with self._lock:
                self.finished = True
                unwanted = self._abandoned
        if unwanted:
            self._drop()

    def take(self) -> Result:
        if self._error is not None:
            raise self._error
        return self._results.pop()

    def abandon(self) -> None:
        with self._lock:
            self._abandoned = True
            left_behind = self.finished
        if left_behind:
            self._drop()

    def _drop(self) -> None:
        while self._results and self._discard is not None:
            self._discard(self._results.pop())

"""What transports open connections with: generators that never block, whoever drives them.

Each yields `(descriptor, Want)` when it must wait, returns what it opened, and frees it when it fails or is closed early. The
driver resumes one only when the descriptor is ready. It knows sockets, and nothing of NBD: not a byte is read or sent here.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import Any, Generic, NoReturn, TypeVar

from nbdcore.errors import TransportError
from nbdcore.streams.base import Want
from nbdcore.streams.sockets import connected_pair, transport_errors

__all__ = ["connect_socket", "in_thread"]

Result = TypeVar("Result")

#: "Under way": EINTR too, since an interrupted connect goes on (POSIX), and EWOULDBLOCK, which is Windows' word for it.
_UNDER_WAY = frozenset({errno.EINPROGRESS, errno.EINTR, errno.EALREADY, errno.EWOULDBLOCK} - {errno.EAGAIN})
_UNIX = getattr(socket, "AF_UNIX", None)
#: Seconds between attempts while a unix server's backlog is full: short first, since servers usually accept at once; the longest
#: still answers a person at once, and costs next to nothing.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.1


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

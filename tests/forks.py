"""Children that a test forks, and what a parent does meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

#: A command that serves a disk of 1 MiB on its standard input.
SERVER = [
    sys.executable,
    "-c",
    """
import os, select, socket
from nbdcore.server import MemoryDisk, Server
from nbdcore.streams.sockets import SocketStream
with Server(MemoryDisk(1 << 20)) as server:
    server.serve_stream(SocketStream(socket.socket(fileno=os.dup(0)), peer="parent"))
    hung_up = select.poll()
    hung_up.register(0, getattr(select, "POLLRDHUP", select.POLLHUP))
    hung_up.poll()
""",
]

#: Seconds that a child may take. None takes so long unless it hangs.
_LIFETIME = 5
#: Seconds that the parent's own thread may take to begin, and to end.
_PATIENCE = 20.0


def status_of_child(work: Callable[[], Any]) -> int:
    """Fork, let the child work, and return its exit status: 0, 256 where it raised, 14 where it hung."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_LIFETIME)
        status = 1
        with contextlib.suppress(BaseException):
            work()
            status = 0
        os._exit(status)
    return os.waitpid(pid, 0)[1]


@contextlib.contextmanager
def busy(work: Callable[[], Any]) -> Iterator[list[Any]]:
    """Have another thread do this again and again until the block ends; yields what it returned each time."""
    stop = threading.Event()
    rounds: list[Any] = []

    def run() -> None:
        while not stop.is_set():
            rounds.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    end = time.monotonic() + _PATIENCE
    while not rounds and time.monotonic() < end:
        time.sleep(0.001)
    try:
        yield rounds
    finally:
        stop.set()
        thread.join(_PATIENCE)
        assert not thread.is_alive(), "the parent's thread hangs"


@contextlib.contextmanager
def stopped_in(function: Callable[..., Any], work: Callable[[], Any]) -> Iterator[None]:
    """Have another thread work, and stand still at the first line of this function while the block lasts."""
    there, go_on = threading.Event(), threading.Event()

    def trace(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is function.__code__ and not there.is_set():
            there.set()
            go_on.wait(_PATIENCE)

    def run() -> None:
        sys.settrace(trace)
        try:
            with contextlib.suppress(Exception):
                work()
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        assert there.wait(_PATIENCE), "the parent's thread never came there"
        yield
    finally:
        go_on.set()
        thread.join(_PATIENCE)
        assert not thread.is_alive(), "the parent's thread hangs"

"""How a command that runs until it is told otherwise hears of it: SIGINT and SIGTERM, once in order, twice at once."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

from nbdcore.streams.base import Want
from nbdcore.streams.sockets import connected_pair
from nbdcore.streams.waiting import NEVER, wait

__all__ = ["until_signalled"]


class _Stop(BaseException):
    """A signal asks the server to stop."""


def until_signalled(run: Callable[[Callable[[], None]], None]) -> None:
    """Call `run` with a function that waits for SIGINT or SIGTERM: the first ends it in order, a second the process at once.

    It is no context manager: a signal that came between its own code and the block's would be caught by neither.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    over = False

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (the interpreter's own signature)
        if not over:
            for each in numbers:
                signal.signal(each, signal.SIG_DFL)
            raise _Stop

    before = {number: signal.getsignal(number) for number in numbers}
    try:
        with contextlib.suppress(_Stop), _signalled() as signalled:
            try:
                for number in numbers:
                    signal.signal(number, stop)
                run(lambda: _sleep(signalled))
            finally:
                over = True  # what comes from here on has nothing to end
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _signalled() -> Iterator[socket.socket]:
    """Give a socket to which every signal that has a handler sends a byte.

    Sleeping is not enough: a signal that another thread takes, or that comes just before the sleep, interrupts nothing, and its
    handler would run when the sleep is over.
    """
    reader, writer = connected_pair()
    with reader, writer:
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(before)


def _sleep(signalled: socket.socket) -> None:
    """Sleep until the handler of a signal raises."""
    while True:
        wait(signalled.fileno(), Want.READ, NEVER, "")
        signalled.recv(64)

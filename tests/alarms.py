"""Signal handlers that come in the middle of a test's call, and what breaks a deadlock that one makes."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

needs_alarms = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")

#: Seconds after which a deadlock ends the test run. No handler of Python's would break one of the main thread.
_LATEST = 60.0


@contextlib.contextmanager
def watchdog() -> Iterator[None]:
    """End the test run where the block hangs; and have an alarm that comes after its call do no harm."""
    faulthandler.dump_traceback_later(_LATEST, exit=True)
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def alarm_after(seconds: float, handler: Callable[..., Any]) -> Iterator[None]:
    """Have a handler called so many seconds later, with a handler's arguments, unless the block has ended before."""
    armed = True
    signal.signal(signal.SIGALRM, lambda *arguments: armed and handler(*arguments))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)

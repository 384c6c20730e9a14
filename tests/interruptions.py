"""A signal handler that raises at a chosen place, or at each. Ctrl-C comes at any step, and hardly ever where a test wants it."""

from __future__ import annotations

import contextlib
import gc
import itertools
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def interrupted_at(function: Callable[..., Any], when: Callable[[FrameType], object] = lambda _: True) -> Iterator[None]:
    """Raise KeyboardInterrupt in this thread once, where `function` is entered and `when(frame)` holds. It must come to that."""
    code, pending = function.__code__, [True]

    def trace(frame: FrameType, event: str, _: object) -> None:
        if pending and event == "call" and frame.f_code is code and when(frame):
            pending.clear()
            raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
    assert not pending, f"{function.__qualname__} was not entered so"


def interrupted_at_each_step(work: Callable[[], Any]) -> Iterator[BaseException | None]:
    """Do the same work again and again, with KeyboardInterrupt raised in another of its steps each time, until it had none left.

    Steps are what CPython looks for signals at: a Python function begins, and a built-in one has returned. Yields after each what
    came of it: KeyboardInterrupt, what else was raised, or, at the end, None.
    """
    for number in itertools.count():
        outcome = _interrupted_at_step(number, work)
        yield outcome
        if outcome is None:
            return


def _interrupted_at_step(number: int, work: Callable[[], Any]) -> BaseException | None:
    left = [number]

    def profile(_frame: FrameType, event: str, _: object) -> None:
        if event in ("call", "c_return"):
            if not left[0]:
                sys.setprofile(None)
                raise KeyboardInterrupt
            left[0] -= 1

    gc.disable()  # what looks on while the collector works is no step of this
    sys.setprofile(profile)
    try:
        work()
    except BaseException as exc:  # noqa: BLE001 (the test looks at it)
        return exc
    finally:
        sys.setprofile(None)
        gc.enable()
    return None

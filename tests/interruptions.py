"""A signal handler that raises at a chosen place. Ctrl-C comes at any step, and hardly ever where a test wants it."""

from __future__ import annotations

import contextlib
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

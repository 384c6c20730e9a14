"""The blocking driver of steps that connect: it waits in the caller's own thread.

There is nothing yet whose end would tell that another thread, or a signal handler, closed the client: so it looks now and then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from nbdcore.clients.connect.steps import AnyOf, Blocking, Steps
from nbdcore.streams.waiting import LOOK_AGAIN, Deadline, wait_any

Result = TypeVar("Result")


def drive(steps: Steps[Result], check_wanted: Callable[[], None]) -> Result:
    """Run the steps to their end, and return their result. Raises what they raise, and what `check_wanted` raises meanwhile."""
    try:
        request = next(steps)
        while True:
            try:
                answer = _answer(request, check_wanted)
            except BaseException as exc:  # noqa: BLE001 (the steps close what they have opened, and raise it again)
                request = steps.throw(exc)
            else:
                request = steps.send(answer)
    except StopIteration as end:
        result: Result = end.value
        return result
    finally:
        steps.close()


def _answer(request: AnyOf | Blocking, check_wanted: Callable[[], None]) -> Any:
    if isinstance(request, Blocking):
        return request.call()
    end = Deadline.after(request.seconds)
    while True:
        remaining = end.remaining()
        pause = LOOK_AGAIN if remaining is None else min(remaining, LOOK_AGAIN)
        ready = wait_any(request.waiting, Deadline.after(pause))
        check_wanted()
        if ready or end.expired:
            return frozenset(fd for fd, _ in ready)

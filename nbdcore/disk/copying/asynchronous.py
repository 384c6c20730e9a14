"""A copy for asyncio: in a thread, since what moves data there waits in system calls without the interpreter's lock."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from nbdcore.disk.copying.copy import copy
from nbdcore.disk.copying.result import CopyProgress, CopyResult

__all__ = ["copy_async"]

Arguments = ParamSpec("Arguments")
Outcome = TypeVar("Outcome")


class _StoppedError(Exception):
    """The task is cancelled, or its progress callback has raised: the copy ends."""


def _taking_the_arguments_of(
    _: Callable[Arguments, Outcome],
) -> Callable[[Callable[..., Coroutine[Any, Any, Outcome]]], Callable[Arguments, Coroutine[Any, Any, Outcome]]]:
    """Tell type checkers that a coroutine function takes the arguments of another function."""
    return lambda function: function


@_taking_the_arguments_of(copy)
async def copy_async(*arguments: Any, **settings: Any) -> CopyResult:
    """Copy a disk as `copy` does, with the same arguments, while the event loop goes on.

    Cancelling the task stops the copy within a fraction of a second, and raises when nothing of it is left: what the
    destination is then is as after any failure. Only connecting, and waiting for a pipe, end in their own time; `timeout`
    bounds the former. `progress` and `started` are called in the event loop.
    """
    loop = asyncio.get_running_loop()
    told = dict(settings)
    relay = _Relay(told.get("progress"))
    told["progress"] = functools.partial(relay.tell, loop)
    if (started := told.get("started")) is not None:
        told["started"] = functools.partial(loop.call_soon_threadsafe, started)
    work = asyncio.ensure_future(asyncio.to_thread(copy, *arguments, **told))
    try:
        outcome = await asyncio.shield(work)
    except asyncio.CancelledError:
        relay.stopped = True
        while not work.done():  # a second cancellation waits for the end as well: nothing may be left behind
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await asyncio.shield(work)
        raise
    except _StoppedError as stopped:
        assert relay.failure is not None, "nothing else stops it"
        for note in getattr(stopped, "__notes__", ()):
            relay.failure.add_note(note)
        raise relay.failure from None
    if relay.failure is not None:  # at the very end: nothing was left to be stopped
        raise relay.failure
    return outcome


class _Relay:
    """Takes progress from the copy's thread to the loop's callback, and the word to stop back."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self.stopped = False
        self.failure: Exception | None = None

    def tell(self, loop: asyncio.AbstractEventLoop, now: CopyProgress) -> None:
        """In the copy's thread: tell the loop. Raises what ends the copy."""
        if self.stopped:
            raise _StoppedError
        if self._progress is not None:
            loop.call_soon_threadsafe(self._call, now)

    def _call(self, now: CopyProgress) -> None:
        try:
            self._progress(now)
        except Exception as problem:  # noqa: BLE001 (raised by the task)
            self.failure, self.stopped = problem, True

"""A copy for asyncio: in a thread, since what moves data there waits in system calls without the interpreter's lock."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import threading
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from nbdcore.disk.copying import copy as blocking
from nbdcore.disk.copying.result import CopyProgress, CopyResult, CopySettings

__all__ = ["copy"]

Arguments = ParamSpec("Arguments")
Outcome = TypeVar("Outcome")


class _StoppedError(Exception):
    """The task is cancelled, or its progress callback has raised: the copy ends."""


def _taking_the_arguments_of(
    other: Callable[Arguments, Outcome],
) -> Callable[[Callable[..., Coroutine[Any, Any, Outcome]]], Callable[Arguments, Coroutine[Any, Any, Outcome]]]:
    """Give a coroutine function the arguments of another function, for type checkers and for whoever asks at run time."""

    def give(function: Callable[..., Coroutine[Any, Any, Outcome]]) -> Callable[Arguments, Coroutine[Any, Any, Outcome]]:
        function.__annotations__ = dict(other.__annotations__)
        function.__wrapped__ = other  # type: ignore[attr-defined] # where inspect.signature looks
        return function

    return give


@_taking_the_arguments_of(blocking.copy)
async def copy(*arguments: Any, **settings: Any) -> CopyResult:
    """Copy a disk as `nbdcore.disk.copy` does, with the same arguments, while the event loop goes on.

    Cancelling the task stops the copy within a fraction of a second, and raises when nothing of it is left: what the
    destination is then is as after any failure. While the copy connects or opens a pipe, nothing has been changed yet: then
    cancelling raises at once, and the thread that connects ends in its own time. `progress` and `started` are called in the
    event loop.
    """
    loop = asyncio.get_running_loop()
    told = dict(settings)
    relay = _Relay(told.get("progress"))
    told["progress"] = functools.partial(relay.tell, loop)
    told["started"] = functools.partial(relay.begin, loop, told.get("started"))
    work: asyncio.Future[CopyResult] = _Thread(functools.partial(blocking.copy, *arguments, **told), loop).outcome
    try:
        outcome = await asyncio.shield(work)
    except asyncio.CancelledError:
        if relay.stop_before_the_beginning():  # nothing is changed: connecting, or opening a pipe, ends in its own time
            work.add_done_callback(lambda work: work.cancelled() or work.exception())
            raise
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


class _Thread:
    """Calls a function in a thread of its own: one of an executor would keep the event loop from ending."""

    def __init__(self, function: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
        self.outcome: asyncio.Future[Any] = loop.create_future()
        self._function = function
        self._loop = loop
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._run,), name="nbdcore-copy", daemon=True).start()

    def _run(self) -> None:
        try:
            result = self._function()
        except BaseException as problem:  # noqa: BLE001 (raised again in the task)
            self._tell(self.outcome.set_exception, problem)
        else:
            self._tell(self.outcome.set_result, result)

    def _tell(self, tell: Callable[[Any], None], what: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            self._loop.call_soon_threadsafe(lambda: None if self.outcome.done() else tell(what))


class _Relay:
    """Takes progress from the copy's thread to the loop's callback, and the word to stop back."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self.stopped = False
        self.failure: Exception | None = None
        self._begun = False
        self._beginning = threading.Lock()

    def begin(self, loop: asyncio.AbstractEventLoop, started: Any, settings: CopySettings) -> None:
        """In the copy's thread: both ends are open. Raises what ends the copy before it changes anything."""
        with self._beginning:
            if self.stopped:
                raise _StoppedError
            self._begun = True
        if started is not None:
            loop.call_soon_threadsafe(started, settings)

    def stop_before_the_beginning(self) -> bool:
        """In the loop: have the copy end. Returns whether it has not begun, and so will change nothing."""
        with self._beginning:
            self.stopped = True
            return not self._begun

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

"""The asyncio driver of steps that connect: it waits in the event loop, one thing at a time, and leaves what blocks to a thread.

Anybody may break a wait off. The loop forgets the descriptors before the wait ends, however it ends, so that their numbers may be
used for others at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Iterator
from functools import partial
from typing import Any, TypeVar

from nbdcore.clients.connect.steps import AnyOf, Blocking, Steps
from nbdcore.errors import Error, UsageError
from nbdcore.streams.base import Want

Result = TypeVar("Result")


class LoopDriver:
    """Drives one client's steps.

    Args:
        loop: running. Raises UsageError for one that cannot watch descriptors: Windows' default one.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        _check_loop(loop)
        self._loop = loop
        self._waiter: asyncio.Future[Error | None] | None = None
        self._broken_off: Error | None = None

    def break_off(self, error: Error) -> None:
        """Have the steps, wherever they are, raise `error`."""
        self._broken_off = error
        if self._waiter is not None:
            _settle(self._waiter, error)

    async def drive(self, steps: Steps[Result]) -> Result:
        """Run the steps to their end, and return their result. Raises what they raise.

        They are told of a cancellation, and closed in every case, so whatever they had opened is freed.
        """
        try:
            request = next(steps)
            while True:
                try:
                    answer = await self._answer(request)
                except BaseException as exc:  # noqa: BLE001 (the steps close what they have opened, and raise it again)
                    request = steps.throw(exc)
                else:
                    request = steps.send(answer)
        except StopIteration as end:
            result: Result = end.value
            return result
        finally:
            steps.close()

    async def _answer(self, request: AnyOf | Blocking) -> Any:
        if isinstance(request, Blocking):
            return await asyncio.to_thread(request.call)
        ready: set[int] = set()
        waiter: asyncio.Future[Error | None] = self._loop.create_future()
        alarm = None if request.seconds is None else self._loop.call_later(request.seconds, _settle, waiter, None)
        try:
            with self._watched(request, waiter, ready):
                error = await self._wait(waiter)
        finally:
            if alarm is not None:
                alarm.cancel()
        if error is not None:
            raise error
        return ready

    async def _wait(self, waiter: asyncio.Future[Error | None]) -> Error | None:
        # Errors are results here: as exceptions they would have to be taken, and a cancelled task takes none.
        self._waiter = waiter
        try:
            return self._broken_off or await waiter
        finally:
            self._waiter = None

    @contextlib.contextmanager
    def _watched(self, request: AnyOf, waiter: asyncio.Future[Error | None], ready: set[int]) -> Iterator[None]:
        loop = self._loop
        with contextlib.ExitStack() as forget:
            for descriptor, want in request.waiting:
                found = partial(_found, ready, descriptor, waiter)
                for wanted, add, remove in (
                    (Want.READ, loop.add_reader, loop.remove_reader),
                    (Want.WRITE, loop.add_writer, loop.remove_writer),
                ):
                    if want & wanted:
                        add(descriptor, found)
                        forget.callback(remove, descriptor)
            yield


def _check_loop(loop: asyncio.AbstractEventLoop) -> None:
    if type(loop).add_reader is asyncio.AbstractEventLoop.add_reader:
        raise UsageError(
            errno.ENOTSUP,
            f"{type(loop).__name__} cannot watch descriptors: use a loop that can, such as asyncio.SelectorEventLoop",
        )


def _found(ready: set[int], descriptor: int, waiter: asyncio.Future[Error | None]) -> None:
    ready.add(descriptor)
    _settle(waiter, None)


def _settle(waiter: asyncio.Future[Error | None], outcome: Error | None) -> None:
    if not waiter.done():
        waiter.set_result(outcome)

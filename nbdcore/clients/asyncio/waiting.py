"""Waiting in an event loop while there is no session yet: for a descriptor, or for time to pass. It knows no NBD.

One thing at a time, and anybody may break the wait off. The loop forgets the descriptor before the wait ends, however it ends, so
that its number may be used for another at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Generator, Iterator
from typing import TypeVar

from nbdcore.errors import DeadlineExceeded, Error, UsageError
from nbdcore.streams.base import Want
from nbdcore.streams.waiting import Deadline

Result = TypeVar("Result")


class LoopWait:
    """What one coroutine waits for.

    Args:
        loop: running.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiter: asyncio.Future[Error | None] | None = None
        self._broken_off: Error | None = None

    def break_off(self, error: Error) -> None:
        """Have whoever waits, or is about to, raise `error`."""
        self._broken_off = error
        if self._waiter is not None:
            _settle(self._waiter, error)

    async def pause(self, seconds: float) -> None:
        """Do nothing for a while."""
        with self._alarm(seconds, None) as waiter:
            await self._wait(waiter)

    async def drive(self, steps: Generator[tuple[int, Want], None, Result], deadline: Deadline, message: str) -> Result:
        """Run a generator that yields what it must wait for (a transport's `connect`) to its end, and return its result.

        The generator is closed in every case, so whatever it had opened is freed when it fails, when the deadline passes or when
        the task is cancelled. Raises DeadlineExceeded with `message`, and whatever the generator raises.
        """
        try:
            while True:
                try:
                    descriptor, want = next(steps)
                except StopIteration as end:
                    result: Result = end.value
                    return result
                await self._ready(descriptor, want, deadline, message)
        finally:
            steps.close()

    async def _ready(self, descriptor: int, want: Want, deadline: Deadline, message: str) -> None:
        with self._alarm(deadline.remaining(), DeadlineExceeded(message)) as waiter, self._watched(descriptor, want, waiter):
            await self._wait(waiter)

    async def _wait(self, waiter: asyncio.Future[Error | None]) -> None:
        self._waiter = waiter
        try:
            error = self._broken_off or await waiter
        finally:
            self._waiter = None
        if error is not None:
            raise error

    @contextlib.contextmanager
    def _alarm(self, seconds: float | None, outcome: Error | None) -> Iterator[asyncio.Future[Error | None]]:
        # Errors are results here: as exceptions they would have to be taken, and a cancelled task takes none.
        waiter: asyncio.Future[Error | None] = self._loop.create_future()
        alarm = None if seconds is None else self._loop.call_later(seconds, _settle, waiter, outcome)
        try:
            yield waiter
        finally:
            if alarm is not None:
                alarm.cancel()

    @contextlib.contextmanager
    def _watched(self, descriptor: int, want: Want, waiter: asyncio.Future[Error | None]) -> Iterator[None]:
        loop = self._loop
        with contextlib.ExitStack() as forget:
            for wanted, add, remove in (
                (Want.READ, loop.add_reader, loop.remove_reader),
                (Want.WRITE, loop.add_writer, loop.remove_writer),
            ):
                if want & wanted:
                    add(descriptor, _settle, waiter, None)
                    forget.callback(remove, descriptor)
            yield


def check_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Raise UsageError for a loop that cannot watch descriptors: Windows' default one."""
    if type(loop).add_reader is asyncio.AbstractEventLoop.add_reader:
        raise UsageError(
            errno.ENOTSUP,
            f"{type(loop).__name__} cannot watch descriptors: use a loop that can, such as asyncio.SelectorEventLoop",
        )


def _settle(waiter: asyncio.Future[Error | None], outcome: Error | None) -> None:
    if not waiter.done():
        waiter.set_result(outcome)

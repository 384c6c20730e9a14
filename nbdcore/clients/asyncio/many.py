"""Many requests in a loop, `async for` over their outcomes: without a task for each, in the order in which they finish.

The input is consumed as fast as the server answers, and never further than `depth` requests ahead of the caller. A request too
large for the server goes out in pieces, and counts as finished when all of them have. After the first error no more is asked;
what is under way is waited for and given to the caller, then the error is raised. Leaving the loop early, by whatever way,
gives up what is under way: no buffer is written to any more, and the connection goes on.

The iterator and its pipeline are two objects, so that nothing but the caller holds the first: when that goes, so does the rest.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable, Generator
from typing import Generic, TypeVar

from nbdcore.clients.asyncio.loop import Shared, call_in
from nbdcore.clients.asyncio.pipeline import LoopPipeline
from nbdcore.clients.requests.batches import SplitRequest
from nbdcore.errors import UsageError
from nbdcore.protocol.transmission.commands import Command

Item = TypeVar("Item")

# While the caller takes what has finished, new requests are begun when so great a part of the depth is free: one by one they cost
# more, and all at the end would leave the server with nothing to do while the caller is busy.
_BURSTS = 4


class Many(AsyncIterator[Item], Generic[Item]):
    """What a `_many` call returns: to be used with `async for`, by one task. A second one that waits in it gets a UsageError.

    A step that is cancelled, or that takes longer than its timeout, is the last one.
    """

    def __init__(
        self,
        session: Shared,
        fresh: Generator[Command],
        pick: Callable[[Command | SplitRequest], Item],
        *,
        depth: int,
        seconds: float | None,
        held: object,
    ) -> None:
        self._held = held  # the client, which nobody else may hold: it is open as long as the loop lasts
        self._session = session
        self._running = LoopPipeline(session, fresh, depth)
        self._finished = self._running.pipeline.finished
        self._fresh = fresh
        self._pick = pick
        self._seconds = seconds
        self._burst = max(1, depth // _BURSTS)
        self._taken = 0  # since the last time that some were begun

    async def __anext__(self) -> Item:
        finished, pipeline = self._finished, self._running.pipeline
        try:
            while True:
                if self._taken >= self._burst or not finished:
                    await self._go_on()
                self._taken += 1
                request = pipeline.settle(finished.popleft())
                if request is not None:
                    item = self._pick(request)
                    if request.__class__ is Command:
                        request.target = request.data = None  # the caller's memory is theirs again
                    return item
        except BaseException:
            if not self._running.waited_for:  # or another task is here, which goes on
                self._stop()
            raise

    async def _go_on(self) -> None:
        """Begin what there is room for, and wait until something has finished. Raises when nothing is left."""
        running, pipeline = self._running, self._running.pipeline
        if running.waited_for:
            raise UsageError(errno.EBUSY, "a loop over many requests is for one task, and another one waits in it")
        self._taken = 0
        running.begin()
        if not pipeline.done:
            await running.wait(self._seconds)
        if pipeline.under_way:
            return
        if pipeline.failed is None:
            raise StopAsyncIteration
        failed, pipeline.failed = pipeline.failed, None
        try:
            raise failed
        finally:
            del failed  # its traceback leads here

    async def aclose(self) -> None:
        """Give up what is under way. So does dropping the iterator."""
        self._stop()

    def __del__(self) -> None:
        if self._running.pipeline.under_way and not self._session.inherited:
            call_in(self._session.loop, self._running.abandon)

    def _stop(self) -> None:
        self._running.abandon()
        # CPython 3.13.0 keeps what a generator held when it is closed, which may be a buffer of the caller's.
        self._fresh.close()
        self._fresh = _nothing()


def _nothing() -> Generator[Command]:
    yield from ()

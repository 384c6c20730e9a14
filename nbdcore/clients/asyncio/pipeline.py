"""Many requests of one task: how it waits for any of them, and the pieces of one request that is too large for the server.

Commands that finish are put in a row, and their task is woken once for all that came together.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator

from nbdcore.clients.asyncio.loop import Shared, settle
from nbdcore.clients.requests.single import PIECES_AT_A_TIME, Pieces
from nbdcore.clients.session.pipeline import Pipeline
from nbdcore.errors import DeadlineExceeded, Error
from nbdcore.protocol.transmission.commands import Command
from nbdcore.streams.waiting import Deadline


class LoopPipeline:
    """A pipeline in an event loop.

    Attributes:
        pipeline: the commands.
    """

    __slots__ = ("_session", "_waiter", "pipeline")

    def __init__(self, session: Shared, fresh: Iterator[Command], depth: int) -> None:
        self._session = session
        self._waiter: asyncio.Future[bool] | None = None
        self.pipeline: Pipeline = Pipeline(fresh, depth, session.own, self._finish)

    @property
    def waited_for(self) -> bool:
        """Whether a task waits."""
        return self._waiter is not None

    def begin(self) -> None:
        """Submit as many fresh commands as there is room for. What keeps one from being submitted is its outcome."""
        submit = self._session.submit
        for command in self.pipeline.begin():
            try:
                submit(command)
            except Error as exc:
                self.pipeline.refuse((command,), exc)

    def _finish(self, command: Command) -> None:
        self.pipeline.finished.append(command)
        if self._waiter is not None:
            settle(self._waiter)

    async def wait(self, seconds: float | None) -> None:
        """Wait until a command has finished. Raises DeadlineExceeded, and then, as when cancelled, all that are left go on."""
        loop, pipeline = self._session.loop, self.pipeline
        waiter = self._waiter = loop.create_future()
        alarm = None if seconds is None else loop.call_later(seconds, settle, waiter, False)
        try:
            if not await waiter and not pipeline.done:
                raise DeadlineExceeded(errno.ETIMEDOUT, f"no answer from the server in time ({pipeline})")
        finally:
            self._waiter = None
            if alarm is not None:
                alarm.cancel()

    def abandon(self) -> None:
        """Give up whatever is under way: no memory of the caller's is touched any more. A task that waits is woken."""
        for command in self.pipeline.unfinished():
            self._session.abandon(command, "the rest is not wanted any more")
        self.pipeline.close()
        if self._waiter is not None:
            settle(self._waiter)


async def run_pieces(session: Shared, pieces: Pieces, deadline: Deadline) -> None:
    """Run the pieces of one request, then raise the first error of any.

    At the deadline, or when the task is cancelled, those that are under way are given up.
    """
    # An exception may be kept, and this frame with it: nothing in it may hold on to the caller's memory then.
    running = LoopPipeline(session, pieces, PIECES_AT_A_TIME)
    pipeline = running.pipeline
    try:
        while True:
            running.begin()
            if not pipeline.under_way:
                break
            if not pipeline.done:
                await running.wait(deadline.remaining())
            while pipeline.finished:
                pipeline.settle(pipeline.finished.popleft())
        if pipeline.failed is not None:
            raise pipeline.failed
    finally:
        running.abandon()
        pieces.close()

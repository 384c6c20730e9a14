"""Several commands of one caller under way at a time, without a task for each: a split request, and many small ones in a loop.

Commands that finish are put in a row, and their caller is woken once for all that came together.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from itertools import islice

from nbdcore.clients.asyncio.loop import LoopSessions, settle
from nbdcore.clients.requests.single import Pieces
from nbdcore.errors import DeadlineExceeded, Error
from nbdcore.protocol.transmission.commands import Command
from nbdcore.streams.waiting import Deadline


class Pipeline:
    """Commands under way, and those that have finished.

    Attributes:
        finished: in the order in which they did; whoever takes one out looks at its error.
    """

    __slots__ = ("_session", "_under_way", "_waiter", "finished")

    def __init__(self, session: LoopSessions) -> None:
        self._session = session
        self._under_way: set[Command] = set()
        self._waiter: asyncio.Future[bool] | None = None
        self.finished: deque[Command] = deque()

    @property
    def under_way(self) -> int:
        """How many commands have not finished."""
        return len(self._under_way)

    @property
    def waited_for(self) -> bool:
        """Whether somebody waits."""
        return self._waiter is not None

    def begin(self, commands: Iterable[Command]) -> None:
        """Queue commands. Raises as the engine does."""
        finish, submit, count = self._finish, self._session.submit, self._under_way.add
        for command in commands:
            command.completion = finish
            submit(command)
            count(command)

    def _finish(self, command: Command) -> None:
        self._under_way.discard(command)
        self._done(command)
        if self._waiter is not None:
            settle(self._waiter)

    def _done(self, command: Command) -> None:
        self.finished.append(command)

    async def wait(self, seconds: float | None) -> None:
        """Wait until a command has finished. Raises DeadlineExceeded, and then, as when cancelled, all that are left go on."""
        loop = self._session.loop
        waiter = self._waiter = loop.create_future()
        alarm = None if seconds is None else loop.call_later(seconds, settle, waiter, False)
        try:
            if not await waiter and self._under_way:
                oldest = min(self._under_way, key=lambda command: command.cookie)
                raise DeadlineExceeded(f"no answer from the server in time ({oldest})")
        finally:
            self._waiter = None
            if alarm is not None:
                alarm.cancel()

    def abandon(self) -> None:
        """Give up whatever is under way: no memory of the caller's is touched any more. Whoever waits is woken."""
        under_way, self._under_way = self._under_way, set()
        for command in under_way:
            self._session.abandon(command, "the rest is not wanted any more")
        if self._waiter is not None:
            settle(self._waiter)


async def run_all(session: LoopSessions, commands: Pieces, deadline: Deadline, *, depth: int) -> None:
    """Run commands with up to `depth` of them under way at a time, then raise the first error of any.

    After an error no more are begun, and those under way are waited for. At the deadline, or when cancelled, they are abandoned.
    """
    # An exception may be kept, and this frame with it: nothing in it may hold on to the caller's memory then.
    pipeline = Pipeline(session)
    failed: Error | None = None
    try:
        while True:
            if failed is None:
                pipeline.begin(islice(commands, depth - pipeline.under_way))
            if not pipeline.under_way and not pipeline.finished:
                break
            if not pipeline.finished:
                await pipeline.wait(deadline.remaining())
            while pipeline.finished:
                error = session.take_error(pipeline.finished.popleft())
                failed = failed or error
        if failed is not None:
            raise failed
    finally:
        pipeline.abandon()
        commands.close()
        failed = error = None

"""Several connections to one export, used as one, for asyncio. What a pool promises is in `pool`; here is how a loop keeps it.

Each connection is a session of its own in the loop. What a task asks goes to the one with the fewest requests under way, which
does all the rest as it does for a client of one connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Self, Unpack

from nbdcore.clients.asyncio.calls import AsyncCalls
from nbdcore.clients.asyncio.client import AsyncClient
from nbdcore.clients.asyncio.loop import LoopSession, LoopSessions, close_in_loop
from nbdcore.clients.blocking.pool import CONNECTIONS, GRACE, checked_connections, refuse_several
from nbdcore.clients.connect.options import ClientOptions
from nbdcore.clients.connect.several import agree, how_many_more
from nbdcore.clients.connect.target import Way, check_wanted, given_up, sooner
from nbdcore.errors import DeadlineExceeded, Error
from nbdcore.protocol.engine import Engine, Exchange
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission.commands import Command
from nbdcore.streams.base import Stream
from nbdcore.streams.waiting import Deadline


class LoopPool:
    """Several sessions in one loop, for their callers like one (`LoopSessions`).

    Args:
        sessions: one or more, with the same export open.
    """

    def __init__(self, sessions: Sequence[LoopSession]) -> None:
        self._sessions = sessions
        self.loop: asyncio.AbstractEventLoop = sessions[0].loop

    @property
    def live(self) -> list[LoopSession]:
        """The sessions that have not ended."""
        return [session for session in self._sessions if session.engine.phase is Phase.CONNECTED]

    @property
    def engine(self) -> Engine:
        """The engine that speaks for all: of a session that has not ended, else of one that this program ended, else of any."""
        for session in self._sessions:
            if session.engine.phase is Phase.CONNECTED:
                return session.engine
        ended = [session.engine for session in self._sessions if session.engine.ended_by_program]
        return ended[0] if ended else self._sessions[0].engine

    def submit(self, command: Command) -> None:
        """Queue a command where the fewest are under way."""
        self._least().submit(command)

    def run(self, command: Command, timeout: float | None) -> Awaitable[None]:
        """Run one command where the fewest are under way."""
        return self._least().run(command, timeout)

    def abandon(self, command: Command, why: str) -> None:
        """Give a command up, wherever it is under way."""
        knows = [session for session in self._sessions if session.engine.knows(command)]
        (knows or self._sessions)[0].abandon(command, why)

    def take_error(self, command: Command) -> Error | None:
        """Return a finished command's error for its caller to raise."""
        ended = [session for session in self._sessions if session.engine.error is command.error]
        return (ended or self._sessions)[0].take_error(command)

    async def exchange(self, start: Callable[[Engine], Exchange], deadline: Deadline, what: str) -> object:
        """Run one conversation on the first connection."""
        return await self._sessions[0].exchange(start, deadline, what)

    async def take_leave(self, deadline: Deadline) -> None:
        """Say goodbye on each, and wait until all have ended."""
        await asyncio.gather(*(session.take_leave(deadline) for session in self._sessions))

    def close(self, error: Error | None = None) -> None:
        """End all now."""
        for session in self._sessions:
            session.close(error)

    @property
    def inherited(self) -> bool:
        """Whether this is the copy that a fork made of another process's sessions."""
        return self._sessions[0].inherited

    def _least(self) -> LoopSession:
        return min(self.live or self._sessions, key=_pending)


def _pending(session: LoopSession) -> int:
    return session.engine.pending


class AsyncPool(AsyncCalls):
    """Up to so many connections to one export, used as one: `nbdcore.Pool` for asyncio.

    Has the calls, properties and errors of `AsyncClient`, but for opt mode and `list_exports`. How many connections there are,
    what a flush covers, and what is lost with a connection, is as `nbdcore.Pool` has it.

    Args:
        connections: how many to open, 1 to 128.
        options: those of `nbdcore.Client`. With `opt_mode` it raises UsageError.
    """

    def __init__(self, *, connections: int = CONNECTIONS, **options: Unpack[ClientOptions]) -> None:
        self._asked_for = checked_connections(connections, options)
        self._live = None  # the engine is asked for by way of it
        self._opening: list[AsyncClient] = []
        super().__init__(options)

    def __repr__(self) -> str:
        where = f", {self.connections} to {self._where}" if self._where else ""
        return f"<nbdcore.aio.AsyncPool {self.phase.value}{where}>"

    @property
    def connections(self) -> int:
        """How many connections there are now: 0 before connecting and after the end."""
        live = self._live
        if isinstance(live, LoopPool):
            return len(live.live)
        return int(live is not None and live.engine.phase is Phase.CONNECTED)

    @property
    def _engine(self) -> Engine:
        """The engine that stands for all: one whose connection lives, as long as there is one."""
        return self._first if self._live is None else self._live.engine

    @_engine.setter
    def _engine(self, engine: Engine) -> None:
        self._first = engine

    # ------------------------------------------------------------------------------------------ connecting

    async def connect_socket(self, socket: Any, *, timeout: float | None = None) -> Self:
        """Connect over a connected stream socket, or its descriptor: for a pool of one. See `AsyncClient.connect_socket`."""
        self._legal("connect_socket")
        refuse_several("connect_socket", "a socket is one connection", self._asked_for)
        return await super().connect_socket(socket, timeout=timeout)

    async def connect_stream(self, stream: Stream, *, timeout: float | None = None) -> Self:
        """Connect over a stream that is open already: for a pool of one. See `AsyncClient.connect_stream`."""
        self._legal("connect_stream")
        refuse_several("connect_stream", "a stream is one connection", self._asked_for)
        return await super().connect_stream(stream, timeout=timeout)

    async def _go(self, call: str, way: Way, **rest: Any) -> Self:
        if way.route.transport.starts_servers:
            refuse_several(call, "each connection would start a server of its own", self._asked_for)
        return await super()._go(call, way, **rest)

    async def _attempt(self, way: Way, deadline: Deadline) -> None:
        """Open the first connection, then more."""
        begin = time.monotonic()
        await super()._attempt(way, deadline)
        count = how_many_more(self._engine, self._asked_for)
        if not count:
            return
        patience = Deadline.after(time.monotonic() - begin + GRACE)
        try:
            further = await self._open_further(way, count, sooner(deadline, patience))
        except BaseException as exc:
            self._session().close(given_up(self._where, exc))
            raise
        first = self._live
        assert isinstance(first, LoopSession), "what an attempt leaves"
        self._use(LoopPool([first, *further]))

    async def _open_further(self, way: Way, count: int, deadline: Deadline) -> list[LoopSession]:
        """Open further connections, all at once and within a time; return those that agree with the first."""
        clients = self._opening = [AsyncClient() for _ in range(count)]
        tasks = [asyncio.create_task(client._connect_alike(way, self._engine.settings, deadline)) for client in clients]  # noqa: SLF001 (of the same family)
        try:
            await asyncio.wait(tasks, timeout=deadline.remaining())
            check_wanted(self._is_wanted)
            agreeing = [client for client in clients if client.phase is Phase.CONNECTED and agree(client._engine, self._engine)]  # noqa: SLF001 (likewise)
            return [client._release() for client in agreeing]  # noqa: SLF001 (likewise)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for client in clients:
                with contextlib.suppress(DeadlineExceeded):  # the goodbye is sent, and nobody waits for the server's end
                    await client.disconnect(timeout=0)
            self._opening = []

    def _is_wanted(self) -> bool:
        return not self._closed

    def _close(self) -> None:
        super()._close()
        for client in self._opening:
            client._close()  # noqa: SLF001 (of the same family)

    def _use(self, live: LoopSessions) -> None:
        if self._lost is not None:
            self._lost.detach()
        self._live = live
        self._lost = weakref.finalize(self, close_in_loop, live)

"""Several sessions in one loop, used as one. What a pool promises is in `blocking.pool`; here is how a loop keeps it.

Each connection is a session of its own in the loop. What a task asks goes to the one with the fewest requests under way, which
does all the rest as it does for a client of one connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from nbdcore.clients.asyncio.loop import LoopSession
from nbdcore.clients.session.group import Group
from nbdcore.errors import Error
from nbdcore.protocol.engine import Engine, Exchange
from nbdcore.protocol.transmission.commands import Command
from nbdcore.streams.waiting import Deadline


class LoopSessions:
    """Several sessions in one loop, for their callers like one (`Shared`).

    Args:
        sessions: one or more, with the same export open.
    """

    def __init__(self, sessions: Sequence[LoopSession]) -> None:
        self._sessions = {session.engine: session for session in sessions}
        self._group = Group([*self._sessions])
        self.loop: asyncio.AbstractEventLoop = sessions[0].loop

    @property
    def connections(self) -> int:
        """How many connections have not ended."""
        return len(self._group.live)

    @property
    def engine(self) -> Engine:
        """The engine that speaks for all."""
        return self._group.speaker

    def submit(self, command: Command) -> None:
        """Queue a command where the fewest are under way."""
        self._sessions[self._group.least].submit(command)

    def run(self, command: Command, timeout: float | None) -> Awaitable[None]:
        """Run one command where the fewest are under way."""
        return self._sessions[self._group.least].run(command, timeout)

    def abandon(self, command: Command, why: str) -> None:
        """Give a command up, wherever it is under way."""
        self._sessions[self._group.owner(command)].abandon(command, why)

    def own(self, error: Error) -> Error:
        """Return the caller's own copy of an error that others may be raising as well."""
        return self._group.own(error)

    async def exchange(self, start: Callable[[Engine], Exchange], deadline: Deadline, what: str) -> object:
        """Run one conversation on the connection that speaks for all."""
        return await self._sessions[self._group.speaker].exchange(start, deadline, what)

    async def take_leave(self, deadline: Deadline) -> None:
        """Say goodbye on each, and wait until all have ended."""
        await asyncio.gather(*(session.take_leave(deadline) for session in self._sessions.values()))

    def close(self, error: Error | None = None) -> None:
        """End all now."""
        for session in self._sessions.values():
            session.close(error)

    @property
    def inherited(self) -> bool:
        """Whether this is the copy that a fork made of another process's sessions."""
        return any(session.inherited for session in self._sessions.values())

"""asyncio clients and scripted servers in conversation, as most tests of this folder begin, and the table of calls they try."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import Any

from nbdcore import aio
from nbdcore.aio import AsyncClient
from nbdcore.streams.base import Stream
from nbdcore.testing.scripted import Connection, ScriptedServer, Step
from tests.clients import talking
from tests.clients.talking import DISK, DONE, PATIENCE, held, late, script

__all__ = ["CALLS", "DISK", "DONE", "PATIENCE", "SHORT", "held", "late", "talk", "until"]

#: Seconds of a deadline that a test wants to pass.
SHORT = 0.05


async def everything(iterator: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in iterator]


#: The blocking client's table: the same calls return coroutines here. Walking extents is a loop.
CALLS = {
    **talking.CALLS,
    "extents": dataclasses.replace(
        talking.CALLS["extents"], make=lambda client, **options: everything(client.extents(count=8, **options))
    ),
}


@contextlib.asynccontextmanager
async def talk(
    *steps: Step,
    options: dict[str, Any] | None = None,
    over: Callable[[Stream], Stream] = lambda stream: stream,
    **offer: Any,
) -> AsyncIterator[tuple[AsyncClient, Connection]]:
    """Connect a client to a server that plays `steps` once the export is open. Leaving does not say goodbye."""
    with ScriptedServer(script(*steps, **offer), patience=PATIENCE) as server:
        client = await aio.connect_stream(over(server.stream()), timeout=PATIENCE, **(options or {}))
        try:
            yield client, server.connections[0]
        finally:
            await client.close()


async def until(condition: Callable[[], object], what: str) -> None:
    """Let the loop run until a condition holds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 (what another thread does sets no event of the loop)
            await asyncio.sleep(0.001)
    assert condition(), what

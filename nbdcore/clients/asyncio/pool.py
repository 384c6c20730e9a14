"""Several connections to one export, used as one, for asyncio. What a pool promises is in `blocking.pool`."""

from __future__ import annotations

from typing import Unpack

from nbdcore.clients.asyncio.calls import AsyncCalls
from nbdcore.clients.connect.options import CONNECTIONS, ClientOptions, checked_connections
from nbdcore.protocol.engine import Engine


class AsyncPool(AsyncCalls["AsyncPool"]):
    """Up to so many connections to one export, used as one: `nbdcore.Pool` for asyncio.

    Has the calls, properties and errors of `AsyncClient`, but for opt mode and `list_exports`. How many connections there are,
    what a flush covers, and what is lost with a connection, is as `nbdcore.Pool` has it.

    Args:
        connections: how many to open, 1 to 128.
        options: those of `nbdcore.Client`. With `opt_mode` it raises UsageError.
    """

    _shown_as = "nbdcore.aio.AsyncPool"

    def __init__(self, *, connections: int = CONNECTIONS, **options: Unpack[ClientOptions]) -> None:
        self._connections = checked_connections(connections, options)
        self._shared = None  # the engine is asked for by way of it
        super().__init__(options)

    def _connected_to(self) -> str:
        return f"{self.connections} to {self.peer}" if self.peer else ""

    @property
    def connections(self) -> int:
        """How many connections there are now: 0 before connecting and after the end."""
        return 0 if self._shared is None else self._shared.connections

    @property
    def _engine(self) -> Engine:
        """The engine that stands for all: one whose connection lives, as long as there is one."""
        return self._first if self._shared is None else self._shared.engine

    @_engine.setter
    def _engine(self, engine: Engine) -> None:
        self._first = engine

"""Connecting in an event loop: `connect` calls that are coroutines. What is opened belongs to one event loop from then on."""

from __future__ import annotations

import asyncio
import errno
import functools
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, cast

from nbdcore.clients.asyncio.drive import LoopDriver
from nbdcore.clients.asyncio.loop import LoopSession, Shared, check_runs, close_in_loop
from nbdcore.clients.asyncio.several import LoopSessions
from nbdcore.clients.connect.establish import closed_meanwhile
from nbdcore.clients.connect.methods import Connected, ConnectMethods
from nbdcore.clients.connect.options import (
    ClientOptions,
    checked_encryption,
    checked_permissions,
    checked_settings,
    checked_timeout,
)
from nbdcore.clients.connect.target import Find
from nbdcore.clients.session.session import Session
from nbdcore.errors import UsageError
from nbdcore.protocol.engine import Engine, Exchange
from nbdcore.protocol.state import Phase
from nbdcore.streams.waiting import Deadline


class AsyncConnectMethods(ConnectMethods[Coroutine[Any, Any, Connected]]):
    """The `connect` calls; each is a coroutine that returns the client."""

    def __init__(self, options: ClientOptions) -> None:
        super().__init__(Engine(checked_settings(options)), checked_encryption(options), checked_permissions(options))
        self._command_timeout = checked_timeout(options)  # of calls that name none
        self._shared: Shared | None = None
        self._drivers: set[LoopDriver] = set()  # of connect calls that have not returned
        self._finalizer: weakref.finalize[..., Any] | None = None

    async def _connect(self, call: str, find: Find, timeout: float | None, wait: float | None) -> Connected:
        loop = asyncio.get_running_loop()
        driver = LoopDriver(loop)

        def use(sessions: list[Session]) -> None:
            self._take_over(sessions, loop)

        self._drivers.add(driver)
        try:
            await driver.drive(self._establish(call, find, timeout, wait, use))
        finally:
            self._drivers.discard(driver)
        return cast("Connected", self)

    def _take_over(self, sessions: list[Session], loop: asyncio.AbstractEventLoop) -> None:
        """Take the open sessions over. Raises Disconnected where another task has closed the client meanwhile."""
        if self._engine.phase is not Phase.CONNECTING:
            for session in sessions:
                session.close()
            raise closed_meanwhile()
        live = [LoopSession(session, loop) for session in sessions]
        self._shared = live[0] if len(live) == 1 else LoopSessions(live)
        self._engine = sessions[0].engine
        # A client that nobody knows any more is closed by this, not by a __del__: in a cycle (asyncio makes them, of cancelled
        # tasks) its socket could go before it, with a warning.
        self._finalizer = weakref.finalize(self, close_in_loop, self._shared)

    async def _exchange(self, start: Callable[[Engine], Exchange], deadline: Deadline, what: str) -> Any:
        return await self._session().exchange(start, deadline, what)

    def _session(self) -> Shared:
        """Return the session. Raises UsageError in any loop but its own, whose thread alone may touch it."""
        live = self._shared
        if live is None:
            raise UsageError(errno.ENOTCONN, "not connected")
        check_runs(live.loop)
        return live

    def _close(self) -> None:
        """End the connection now, from wherever this is called."""
        if self._shared is not None:
            close_in_loop(self._shared)
            return
        self._engine.end()
        for driver in self._drivers:
            driver.break_off(closed_meanwhile())


def _as_coroutine(method: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
    @functools.wraps(method)
    async def call(self: Any, *arguments: Any, **named: Any) -> Any:
        return await method(self, *arguments, **named)

    return call


# The calls stand once, for clients of all kinds. Here each is a coroutine function: `inspect.iscoroutinefunction` says so, and
# nothing of a call happens before it is awaited.
for _name, _method in vars(ConnectMethods).copy().items():
    if _name == "connect" or _name.startswith("connect_"):
        setattr(AsyncConnectMethods, _name, _as_coroutine(_method))

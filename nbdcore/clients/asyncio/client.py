"""The client for asyncio: one connection, which many tasks share.

What it does with an open export is in `calls`, opt mode in `options`, and how it connects in `connecting`.
"""

from __future__ import annotations

from functools import partial
from typing import Unpack

from nbdcore.clients.asyncio.calls import AsyncCalls
from nbdcore.clients.asyncio.opt_mode import AsyncOptionCalls
from nbdcore.clients.connect.options import ClientOptions
from nbdcore.clients.connect.target import already_found, target_of_another
from nbdcore.clients.requests.arguments import deadline_after
from nbdcore.protocol.handshake.agreement import Export
from nbdcore.protocol.state import Phase


class AsyncClient(AsyncCalls["AsyncClient"], AsyncOptionCalls):
    """A connection to one export of an NBD server, for asyncio. Its calls are those of `nbdcore.Client`, as coroutines.

    Newly created it is not connected: await one of its `connect` methods once, or use the functions `nbdcore.aio.connect` and its
    kind, which do both. As an asynchronous context manager it says goodbye and closes at the end. It belongs to the event loop
    that it was connected in; several tasks may use it at once, and their commands are under way together.
    One that nobody knows any more is closed.

    Every call that waits takes a `timeout` in seconds (None: for ever) and raises DeadlineExceeded when it runs out. A command is
    then abandoned, as it is when its task is cancelled: its buffer is not written to any more, whether the server carried it out
    is unknown, and the connection stays usable. While connecting, and in opt mode, either ends the connection. Any command raises
    UsageError for arguments that are wrong (nothing is sent), CommandError when the server refuses it (the connection lives),
    Disconnected or ProtocolViolation when the connection ended. Offsets and counts are bytes.

    Args:
        options: as for `nbdcore.Client`.
    """

    _shown_as = "nbdcore.aio.AsyncClient"

    def __init__(self, **options: Unpack[ClientOptions]) -> None:
        super().__init__(options)

    # ------------------------------------------------------------------------------------------ what else the server has

    async def list_exports(self, *, timeout: float | None = None) -> list[Export]:
        """Ask which exports the server has (section NBD_OPT_LIST).

        In opt mode on this connection; otherwise on one more connection to the same server, opened for the question. Raises
        UsageError where no other can be opened: before connecting, and after `connect_stream` and `connect_socket`.
        """
        if self.phase is Phase.NEGOTIATING:
            return await self.opt_list(timeout=timeout)
        target = target_of_another(self._target)
        deadline = deadline_after(timeout)
        async with AsyncClient(opt_mode=True) as other:
            await other._connect("connect", partial(already_found, target), timeout, None)
            return await other.opt_list(timeout=deadline.remaining())

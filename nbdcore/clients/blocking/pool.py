"""Several connections to one export, used as one. Blocking, and safe to use from several threads at once.

**How many.** The first connection is made as a client's is, and its errors are the pool's. More are opened only where the server
says that they see each other's writes (NBD_FLAG_CAN_MULTI_CONN): without that the specification advises against several, and the
pool has the one. A server may also allow fewer than were asked for; then there are fewer. No connection is opened again later.

**Which one.** A request goes to the connection with the fewest requests under way, so a slow one gets fewer. The pieces of a
request too large for the server are spread likewise, and the requests of a loop, over the connections that nobody else uses just
then. Nothing orders two requests that are under way at the same time, here no more than on one connection.

**Flush.** It is sent on one connection. The server has promised that a flush, and a write with FUA, count for all: so it covers
every write, on whichever connection, that was answered before it was sent, and also those answered on a connection that has been
lost since. What was under way on a lost connection has no answer, and nothing covers it: its caller got the error.

**Loss.** The end of a connection is the end of its own requests, which raise Disconnected (or what ended it); later ones go to
the connections that are left. The pool is lost when the last one is.
"""

from __future__ import annotations

from typing import Unpack

from nbdcore.clients.blocking.calls import BlockingCalls
from nbdcore.clients.connect.options import CONNECTIONS, ClientOptions, checked_connections
from nbdcore.protocol.engine import Engine


class Pool(BlockingCalls["Pool"]):
    """Up to so many connections to one export, used as one.

    Has the calls, properties and errors of `Client`, but for opt mode and `list_exports`. Newly created it is not connected: call
    one of its `connect` methods once, or use `nbdcore.create_pool`, which does both.

    There are fewer connections than asked for where the server does not say that it can do with several (`can_multi_conn`: then
    one), allows fewer, or takes too long: after the first connection has been made, the others have as long again as it took, and
    two seconds more, and never longer than `timeout`. One that shows another size, other flags or other contexts is not used.
    None of that is an error; `connections` tells how many there are.

    When a connection is lost, the requests under way on it raise what ended it. The others go on, and take what is asked later.
    `flush` covers every write that was answered before, on whichever connection.

    `connect_stream`, `connect_socket`, `connect_command` and `connect_socket_activation` raise UsageError, since there is no
    second way to the same server, unless `connections` is 1.

    Args:
        connections: how many to open, 1 to 128.
        options: those of `Client`. With `opt_mode` it raises UsageError.
    """

    _shown_as = "nbdcore.Pool"

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

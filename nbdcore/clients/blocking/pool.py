"""Several connections to one export, used as one. Blocking, and safe to use from several threads at once.

**How many.** The first connection is made as a client's is, and its errors are the pool's. More are opened only where the server
says that they see each other's writes (NBD_FLAG_CAN_MULTI_CONN): without that the specification advises against several, and the
pool has the one. A server may also allow fewer than were asked for; then there are fewer. No connection is opened again later.

**Which one.** A request goes to the connection with the fewest requests under way, so a slow one gets fewer. The pieces of a
request too large for the server are spread likewise. Nothing orders two requests that are under way at the same time, here no
more than on one connection.

**Flush.** It is sent on one connection. The server has promised that a flush, and a write with FUA, count for all: so it covers
every write, on whichever connection, that was answered before it was sent, and also those answered on a connection that has been
lost since. What was under way on a lost connection has no answer, and nothing covers it: its caller got the error.

**Loss.** The end of a connection is the end of its own requests, which raise Disconnected (or what ended it); later ones go to
the connections that are left. The pool is lost when the last one is.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from typing import Any, Self, Unpack

from nbdcore.clients.blocking.calls import BlockingCalls
from nbdcore.clients.connect.options import ClientOptions
from nbdcore.clients.connect.several import how_many_more, open_further
from nbdcore.clients.connect.target import Way, check_wanted, given_up, sooner
from nbdcore.clients.requests.arguments import whole_number
from nbdcore.clients.session.session import Session
from nbdcore.errors import UsageError
from nbdcore.protocol.engine import Engine
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission.commands import Limits
from nbdcore.streams.base import Stream
from nbdcore.streams.waiting import Deadline

#: Connections asked for where the caller does not say: as many as nbdcopy opens.
CONNECTIONS = 4
#: Most that may be asked for. Each is a descriptor, and looked at with every request; a server's threads end far below.
MOST_CONNECTIONS = 128
#: Seconds that the further connections may take beyond what the first one took. They are opened at the same time, so more than
#: that is a server that accepted a connection and will not greet, as qemu-nbd does with those beyond `--shared`.
GRACE = 2.0


class Pool(BlockingCalls):
    """Up to so many connections to one export, used as one.

    Has the calls, properties and errors of `Client`, but for opt mode and `list_exports`. Newly created it is not connected: call
    one of its `connect` methods once, or use `nbdcore.connect(..., connections=4)` and its kind, which do both.

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

    def __init__(self, *, connections: int = CONNECTIONS, **options: Unpack[ClientOptions]) -> None:
        self._asked_for = checked_connections(connections, options)
        self._shared = None  # the engine is asked for by way of it
        self._opening = False  # further connections: whoever waits must know of all that there will be
        super().__init__(options)

    def __repr__(self) -> str:
        where = f", {self.connections} to {self._where}" if self._where else ""
        return f"<nbdcore.Pool {self.phase.value}{where}>"

    @property
    def phase(self) -> Phase:
        """Where the connections stand: connecting until all are open that there will be, lost when all are."""
        phase = super().phase
        return Phase.CONNECTING if self._opening and phase is Phase.CONNECTED else phase

    @property
    def connections(self) -> int:
        """How many connections there are now: 0 before connecting and after the end."""
        return 0 if self._shared is None else len(self._shared.engines)

    @property
    def _engine(self) -> Engine:
        """The engine that stands for all: one whose connection lives, as long as there is one."""
        return self._first if self._shared is None else self._shared.engine

    @_engine.setter
    def _engine(self, engine: Engine) -> None:
        self._first = engine

    # ------------------------------------------------------------------------------------------ connecting

    def connect_socket(self, socket: Any, *, timeout: float | None = None) -> Self:
        """Connect over a connected stream socket, or its descriptor: for a pool of one. See `Client.connect_socket`."""
        self._legal("connect_socket")
        refuse_several("connect_socket", "a socket is one connection", self._asked_for)
        return super().connect_socket(socket, timeout=timeout)

    def connect_stream(self, stream: Stream, *, timeout: float | None = None) -> Self:
        """Connect over a stream that is open already: for a pool of one. See `Client.connect_stream`."""
        self._legal("connect_stream")
        refuse_several("connect_stream", "a stream is one connection", self._asked_for)
        return super().connect_stream(stream, timeout=timeout)

    def _connect(self, call: str, way: Way, *, timeout: float | None, wait: float | None = None, export: str = "") -> Self:
        if way.route.transport.starts_servers:
            refuse_several(call, "each connection would start a server of its own", self._asked_for)
        return super()._connect(call, way, timeout=timeout, wait=wait, export=export)

    def _attempt(self, way: Way, deadline: Deadline) -> None:
        """Open the first connection, then more."""
        begin = time.monotonic()
        self._opening = True
        try:
            super()._attempt(way, deadline)
            patience = Deadline.after(time.monotonic() - begin + GRACE)
            self._open_further(way, sooner(deadline, patience))
        finally:
            self._opening = False

    def _open_further(self, way: Way, deadline: Deadline) -> None:
        count = how_many_more(self._engine, self._asked_for)
        if not count:
            return
        try:
            self._join(open_further(way, self._engine, count, deadline, self._is_wanted))
        except BaseException as exc:
            self._session().close(given_up(self._where, exc))
            raise

    def _connected(self, call: str) -> Limits:
        if self._opening:
            raise UsageError(errno.EINVAL, f"{call}: the connection is connecting, and must be connected")
        return super()._connected(call)

    def _join(self, sessions: Sequence[Session]) -> None:
        """Use these connections too, unless another thread has closed the pool meanwhile."""
        with self._changing:
            if not self._closed:
                for session in sessions:
                    self._session().join(session)
                return
        for session in sessions:
            session.close()
        check_wanted(self._is_wanted)

    def _is_wanted(self) -> bool:
        return not self._closed


def checked_connections(connections: Any, options: ClientOptions) -> int:
    """Return the number of connections asked for. Raises UsageError unless it is 1 to 128, and for options of no pool."""
    number = int(whole_number("a pool", "connections", connections))
    if not 1 <= number <= MOST_CONNECTIONS:
        raise UsageError(errno.EINVAL, f"a pool has 1 to {MOST_CONNECTIONS} connections: not {number}")
    if options.get("opt_mode"):
        raise UsageError(errno.EINVAL, "a pool has no opt mode, which is about a single connection: use a client")
    return number


def refuse_several(call: str, why: str, number: int) -> None:
    """Raise UsageError where a call leads to one connection only, and more were asked for."""
    if number > 1:
        raise UsageError(errno.EINVAL, f"{call}: {why}, and a pool of {number} was asked for; use a client, or connections=1")


def refuse_pool(call: str, options: ClientOptions) -> None:
    """Raise UsageError where a function that cannot make a pool was asked for one."""
    if "connections" in options:
        raise UsageError(errno.EINVAL, f"{call}: there is no second way to the same server, so there is no pool of connections")

"""What all parts of a handle stand on: its settings, its connection, and how it waits.

A handle is settings until a connect call makes a PolledClient of them; from then on that client is the connection. Each other
module of this package adds one area of calls to the class.

Every call holds the handle's lock, which its own thread can take again, for the callbacks of a call make calls of their own. So a
signal handler can, too, that interrupts a call; but the connection may be in the middle of something then. Closing and shutting
down only hang up there, which ends every wait, and the interrupted call does the rest when it is over. Commands are refused.

A fork copies a handle. Where another thread was in the middle of a call of it the child can only close its copy: every other call
that takes the lock fails. Closing a copy frees its descriptor and does nothing else: the connection, and the process at its other
end, are the parent's.
"""

from __future__ import annotations

import errno
import itertools
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbdcore.clients.connect.target import Endpoint
from nbdcore.clients.polled import PolledClient
from nbdcore.clients.session.forks import is_taken, when_forked
from nbdcore.errors import Disconnected, TransportError
from nbdcore.libnbd.callbacks import Callbacks
from nbdcore.libnbd.settings import HandleSettings
from nbdcore.protocol.engine import Exchange
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission.commands import Command
from nbdcore.streams.base import Stream
from nbdcore.streams.process import Child
from nbdcore.streams.waiting import LOOK_AGAIN, Deadline

# libnbd's module makes two handles for itself when it is imported, so a program's first handle is the third.
_FIRST_HANDLE = 3
_numbers = itertools.count(_FIRST_HANDLE)

#: libnbd's names of the states that last, which programs look for in `connection_state`.
_STABLE_STATES = {
    Phase.CREATED: "START",
    Phase.NEGOTIATING: "NEGOTIATING",
    Phase.CLOSED: "CLOSED",
    Phase.DEAD: "DEAD",
}


@dataclass(slots=True)
class Reached:
    """What a connect call has reached so far. It does not know its handle, so it does not keep a dropped one alive.

    Attributes:
        host: the TCP host of this connection, for TLS; never that of an earlier attempt.
        route: where the server is; None where no URI leads there.
        stream: the open stream; TLS, if any, lies over it.
        child: the process at the other end, where this program started it.
    """

    host: str | None = None
    route: Endpoint | None = None
    stream: Stream | None = None
    child: Child | None = None


class Core(ABC):
    """The insides of a handle."""

    def __init__(self) -> None:
        self._closed = False
        self._closing = False  # closed in the middle of a call, which has to do the rest
        self._process = os.getpid()
        self._use_new_lock()
        self._lost = False  # to the parent, whose other thread was in the middle of a call when this process was forked
        self._inbox: deque[Command] = deque()  # commands whose callers wait for the lock: the next to get it submits all
        self._callbacks = Callbacks()
        # One for all commands, rather than a new bound method for each.
        self._complete_command: Callable[[Command], None] = self._callbacks.complete
        self._settings = HandleSettings()
        self._client: PolledClient | None = None
        self._reached = Reached()
        self._disconnecting = False
        self._name = f"nbd{next(_numbers)}"
        self._debug = os.environ.get("LIBNBD_DEBUG") == "1"
        self._slow_path = self._debug  # also set once the handle is closed, or lost: calls look at this first
        self._debug_callback: Callable[..., Any] | None = None
        self._private_data = 0
        when_forked(self, Core._forked)

    def _use_new_lock(self) -> None:
        self._lock = threading.RLock()
        # Whether this thread is in the middle of a call. It is how threading.Condition asks, too, and there is no other way.
        self._in_a_call: Callable[[], bool] = self._lock._is_owned  # type: ignore[attr-defined]  # noqa: SLF001

    def _forked(self) -> None:
        """In the child of a fork: see whether a thread of the parent's is in the middle of a call, or about to begin one."""
        if is_taken(self._lock) or self._inbox:
            self._use_new_lock()
            self._inbox.clear()
            self._lost = self._slow_path = True

    # ------------------------------------------------------------------------------------------ state

    @property
    def _phase(self) -> Phase:
        return Phase.CREATED if self._client is None else self._client.engine.phase

    @property
    def _state_name(self) -> str:
        """The short name of the state, as libnbd spells those that last."""
        phase = self._phase
        if phase in _STABLE_STATES:
            return _STABLE_STATES[phase]
        client = self._connection
        if phase is Phase.CONNECTING:
            if client.opening:
                return "CONNECT.CONNECTING"
            return "OPT.RECV_REPLY" if client.engine.agreement.protocol else "MAGIC.RECV_MAGIC"
        if client.engine.has_outgoing:
            return "ISSUE_COMMAND.SEND_REQUEST"
        return "READY" if client.engine.between_replies else "REPLY.RECV_REPLY"

    @property
    def _connection(self) -> PolledClient:
        """The connection. Only for calls that no state before connecting permits."""
        assert self._client is not None, "the table of states lets no call come here that is newly created"
        return self._client

    def _back_to_created(self) -> None:
        """Where no address of a TCP server answered, the handle is newly created again, as libnbd has it."""
        client = self._client
        if self._reached.host is not None and client is not None and isinstance(client.error, TransportError):
            self._client, self._reached = None, Reached()

    def _hang_up(self) -> None:
        """End every wait on the connection, in the middle of whatever another call does."""
        if self._reached.stream is not None:
            self._reached.stream.hang_up()

    @abstractmethod
    def _end_call(self) -> None:
        """The handle was closed in the middle of a call; where the outermost is over, do what closing does."""

    # ------------------------------------------------------------------------------------------ waiting

    def _poll_once(self, seconds: float | None = None, *, also: int = -1) -> bool:
        """Wait until something can be done, and do it, as `PolledClient.poll` does; a handler that closes ends the wait."""
        client, until = self._connection, Deadline.after(seconds)
        # While a connection is being opened there is no stream that a signal handler could hang up.
        while client.opening and not self._closing:
            left = until.remaining()
            if client.poll(LOOK_AGAIN if left is None else min(left, LOOK_AGAIN), also=also):
                return True
            if until.expired:
                return False
        self._refuse_if_closing()
        return client.poll(seconds, also=also)

    def _refuse_if_closing(self) -> None:
        if self._closing:
            raise Disconnected(errno.ENOTCONN, "the handle was closed in the middle of the call")

    def _wait(self, pending: Command | Exchange) -> None:
        """Wait for a command or an exchange."""
        self._connection.wait_for(pending)

    def _exchange(self, start: Callable[[], Exchange]) -> Any:
        """Run an exchange and return its result. Raises what the server, or the end of the connection, made of it."""
        self._connection.check_may_wait()
        exchange = start()
        self._wait(exchange)
        if exchange.error is not None:
            raise exchange.error
        return exchange.result

    def _say_goodbye(self) -> None:
        """Leave opt mode."""
        client = self._connection
        if not client.engine.agreement.fixed:
            gone = Disconnected(errno.ENOTCONN, "a server of this age can only be left by hanging up")
            client.engine.fail(gone, phase=Phase.DEAD)
        client.close()

    # ------------------------------------------------------------------------------------------ debug

    def _say(self, call: str, message: str) -> None:
        """Write a debug message, to the callback where there is one, else to standard error."""
        if self._debug_callback is not None:
            self._callbacks.call(self._debug_callback, call, message)
        elif sys.stderr is not None:
            sys.stderr.write(f"libnbd: debug: {self._name}: {call}: {message}\n")

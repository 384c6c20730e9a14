"""Connecting, for blocking callers: `connect` calls that return the client once it is connected."""

from __future__ import annotations

import threading
from typing import cast

from nbdcore.clients.blocking.drive import drive
from nbdcore.clients.blocking.several import Shared, SharedSessions
from nbdcore.clients.blocking.threads import SharedSession
from nbdcore.clients.connect.establish import closed_meanwhile
from nbdcore.clients.connect.methods import Connected, ConnectMethods
from nbdcore.clients.connect.options import (
    ClientOptions,
    checked_encryption,
    checked_permissions,
    checked_settings,
    checked_timeout,
)
from nbdcore.clients.connect.target import Find, Target
from nbdcore.clients.session.session import Session
from nbdcore.protocol.engine import Engine
from nbdcore.protocol.state import Phase


class BlockingConnectMethods(ConnectMethods[Connected]):
    """The `connect` calls; each returns the client."""

    def __init__(self, options: ClientOptions) -> None:
        super().__init__(Engine(checked_settings(options)), checked_encryption(options), checked_permissions(options))
        self._command_timeout = checked_timeout(options)  # of calls that name none
        self._shared: Shared | None = None
        # Held while the client changes hands: newly created, connecting, with a session, or closed before it had one. A signal
        # handler may close the client meanwhile, in the same thread.
        self._changing = threading.RLock()

    def _connect(self, call: str, find: Find, timeout: float | None, wait: float | None) -> Connected:
        drive(self._establish(call, find, timeout, wait, self._use), self._check_wanted)
        return cast("Connected", self)

    def _begin_connecting(self, call: str, target: Target) -> Engine:
        with self._changing:
            return super()._begin_connecting(call, target)

    def _use(self, sessions: list[Session]) -> None:
        """Take the open sessions over. Raises Disconnected where another thread has closed the client meanwhile."""
        connecting = self._engine
        with self._changing:
            # In this order: a signal handler may close the client between any two of these steps.
            self._shared = SharedSession(sessions[0]) if len(sessions) == 1 else SharedSessions(sessions)
            if connecting.phase is Phase.CONNECTING:
                self._engine = sessions[0].engine
                return
            self._shared = None
        for session in sessions:
            session.close()
        raise closed_meanwhile()

    def close(self) -> None:
        """Close the connection now: waiting calls end. Never raises; may be called twice, from any thread and signal handler.

        In a process that was forked it frees the copy's descriptor only: the connection goes on in the parent.
        """
        shared = self._shared
        if shared is None:
            with self._changing:
                shared = self._shared
                if shared is None:
                    self._engine.end()
                    return
        shared.close()

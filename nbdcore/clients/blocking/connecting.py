"""Connecting, for blocking callers: `connect` calls that return the client once it is connected.

A fork copies a client. Where another thread was connecting it just then the copy has ended (`forks`); closing the copy frees what
had been opened, and the parent connects on. One thing stays open: what was opened in a step that the thread was in the middle of,
and not waiting. In the child that step never ends, and only its frame knows the descriptor. It is closed when the child ends, or
runs another program; until then the server does not see the parent hang up.
"""

from __future__ import annotations

import contextlib
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
from nbdcore.clients.connect.steps import Steps
from nbdcore.clients.connect.target import Find, Target
from nbdcore.clients.session.forks import in_use_when_forked, is_taken, when_forked
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
        self._connects: dict[Steps[None], int] = {}  # connect calls that have not returned, each with its thread
        self._left_behind: list[Steps[None]] = []  # in a fork's child, those of its parent's other threads
        when_forked(self, BlockingConnectMethods._forked)

    def _forked(self) -> None:
        """In the child of a fork: end this copy where another thread of the parent's is connecting it."""
        if is_taken(self._changing):
            self._changing = threading.RLock()
        here = threading.get_ident()
        self._left_behind += [steps for steps, thread in self._connects.items() if thread != here]
        if self._left_behind:
            error = in_use_when_forked()
            if self._shared is not None:
                self._shared.close(error)
            self._engine.fail(error)

    def _connect(self, call: str, find: Find, timeout: float | None, wait: float | None) -> Connected:
        steps = self._establish(call, find, timeout, wait, self._take_over)
        try:
            self._connects[steps] = threading.get_ident()
            drive(steps, self._check_wanted)
        finally:
            self._connects.pop(steps, None)
        return cast("Connected", self)

    def _begin_connecting(self, call: str, target: Target) -> Engine:
        with self._changing:
            return super()._begin_connecting(call, target)

    def _take_over(self, sessions: list[Session]) -> None:
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

        In a process that was forked it frees the copy's descriptor only: the connection goes on in the parent. Where
        another thread was opening it in the very moment of the fork, the descriptor stays open in the child.
        """
        shared = self._shared
        if shared is None:
            with self._changing:
                shared = self._shared
                if shared is None:
                    self._engine.end()
                    self._free_what_was_left_behind()
                    return
        shared.close()

    def _free_what_was_left_behind(self) -> None:
        for steps in self._left_behind:
            # The thread may have been in the middle of a step, which never ends here.
            with contextlib.suppress(ValueError):
                steps.close()

"""Accepting clients on one listener, in a thread of its own: until the server stops, whatever the system lacks for a while."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

from nbdcore.errors import TransportError
from nbdcore.logs import server_log
from nbdcore.server.clients import Clients
from nbdcore.server.shutdown import Shutdown
from nbdcore.streams.base import Listener, Stream, Want
from nbdcore.streams.waiting import NEVER, Deadline, wait_any

__all__ = ["PAUSE", "start_accepting"]

#: Seconds after a failed accept, since trying again at once would only spin.
PAUSE = 0.25
# What accept fails with when the process or the system has no descriptors or no memory left.
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


def start_accepting(
    listener: Listener, shutdown: Shutdown, clients: Clients, welcome: Callable[[Stream], None]
) -> threading.Thread:
    """Start a thread that hands each client's stream to `welcome`, until `shutdown`. Returns it.

    Raises TransportError (EAGAIN) where the system gives no more threads.
    """
    name = f"nbdcore-accept {listener.address}"
    thread = threading.Thread(target=_accept, args=(listener, shutdown, clients, welcome), name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as failure:  # the system gives no more threads
        message = f"cannot accept clients on {listener.address}: {failure}; fewer threads or a higher limit would help"
        raise TransportError(errno.EAGAIN, message) from failure
    return thread


def _accept(listener: Listener, shutdown: Shutdown, clients: Clients, welcome: Callable[[Stream], None]) -> None:
    waiting = [(listener.fileno(), Want.READ), (shutdown.fileno(), Want.READ)]
    failing = False  # said once, not with every attempt
    while not shutdown.requested:
        try:
            wait_any(waiting, NEVER)
            stream = listener.accept()
        except Exception as problem:  # noqa: BLE001  # the transport may be anybody's, and this thread is the only one that accepts
            if not failing:
                server_log.warning("accepting on %s failed, and is tried again: %s", listener.address, problem)
            failing = True
            _make_room(problem, shutdown, clients)
            continue
        if stream is not None:
            failing = False
            _welcomed(stream, welcome)


def _welcomed(stream: Stream, welcome: Callable[[Stream], None]) -> None:
    try:
        welcome(stream)
    except Exception:  # noqa: BLE001  # a fault of ours costs this client, and must be seen, but not those that come after it
        server_log.exception("%s was disconnected by a fault of the server", stream)
        stream.close()


def _make_room(problem: Exception, shutdown: Shutdown, clients: Clients) -> None:
    """Wait before the next attempt to accept, at best for a client to be gone that gives its descriptor up."""
    exhausted = isinstance(problem, MemoryError) or getattr(problem, "errno", None) in _EXHAUSTED
    leaving = clients.send_one_away(f"the system has nothing left for another: {problem}") if exhausted else None
    if leaving is None:
        wait_any([(shutdown.fileno(), Want.READ)], Deadline.after(PAUSE))
    else:
        leaving.thread.join(PAUSE)

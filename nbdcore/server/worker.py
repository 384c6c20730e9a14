"""What a server's further process does: it serves the clients that it is handed, and reports what its server must know."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, Protocol

from nbdcore.logs import client_log, in_one_line, server_log
from nbdcore.server.settings import ExportSettings
from nbdcore.streams.base import Stream, Want
from nbdcore.streams.sockets import SocketStream, connected_pair
from nbdcore.streams.tls.credentials import ServerTLS
from nbdcore.streams.waiting import NEVER, wait_any

__all__ = ["Ended", "Guests", "Handed", "ServerSettings", "Stop", "work"]

# Seconds for clients to finish where the server has not said how long they have: it is gone, or this process got a signal.
_PATIENCE = 5.0


class Guests(Protocol):
    """A server that serves clients which another process has accepted."""

    on_end: Callable[[], None] | None
    """Called at the end of each client."""

    def serve_guest(self, stream: Stream) -> bool:
        """Serve a client; return False where it was turned away."""

    def stop(self, timeout: float | None = 5.0) -> None:
        """Stop within so many seconds."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What each process's server is made of.

    Attributes:
        make: makes it, of these; it is pickled by its name.
    """

    make: Callable[[ServerSettings], Guests]
    exports: Mapping[str, ExportSettings]
    read_only: bool
    tls: ServerTLS | None
    require_tls: bool | None
    max_clients: int
    memory_budget: int
    handshake_timeout: float | None


@dataclass(frozen=True, slots=True)
class Handed:
    """A connection, whose descriptor comes through a socket of its own. `peer` is how messages name the client."""

    peer: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop within so many seconds."""

    seconds: float | None


@dataclass(frozen=True, slots=True)
class Ended:
    """A client's connection has ended.

    `lacking`: before it began, since this process cannot have its descriptor.
    """

    lacking: bool = False


class _Reports:
    """The pipe to the server, for every thread of this process."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def send(self, message: Any) -> None:
        """Send a report; a server that is gone misses nothing."""
        with self._lock, contextlib.suppress(OSError):
            self._pipe.send(message)


class _ToServer(logging.Handler):
    """Sends records to the server's process, where its program's handlers are."""

    def __init__(self, reports: _Reports) -> None:
        super().__init__()
        self._reports = reports

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record in words: what it was made of may be only here."""
        text = in_one_line(record)
        self._reports.send(logging.LogRecord(record.name, record.levelno, record.pathname, record.lineno, text, None, None))


def work(orders: Connection, clients: socket.socket, pipe: Connection, settings: ServerSettings, level: int) -> None:
    """Serve what is handed over through `clients` until `orders` tells to stop, or until that pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server's process stops this one
    reports = _Reports(pipe)
    client_log.setLevel(level)  # the server's is below it
    client_log.addHandler(_ToServer(reports))
    server = settings.make(settings)
    server.on_end = lambda: reports.send(Ended())
    with orders, clients, _sigterm() as terminated:  # whose ends tell the server to hand nothing over any more
        seconds = _serve(orders, clients, terminated, server, reports)
    server.stop(seconds)


@contextlib.contextmanager
def _sigterm() -> Iterator[socket.socket]:
    """Give a socket that becomes readable when SIGTERM asks this process to stop, in order; a second one ends it at once.

    The signal may come to all processes of a group, as from service managers, while each is in the middle of requests. To
    ignore it would not do: `multiprocessing` ends processes with it that its program has not stopped.
    """
    reader, writer = connected_pair()
    with reader, writer:
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _serve(
    orders: Connection, clients: socket.socket, terminated: socket.socket, server: Guests, reports: _Reports
) -> float | None:
    """Serve clients; return how many seconds there are for stopping."""
    while True:
        ready = wait_any([(orders.fileno(), Want.READ), (terminated.fileno(), Want.READ)], NEVER)
        if terminated.fileno() in dict(ready):
            return _PATIENCE
        try:
            order = orders.recv()
            if isinstance(order, Stop):
                return order.seconds
            assert isinstance(order, Handed), "there are only those two"
        except (EOFError, OSError):
            return _PATIENCE
        try:
            (fd,) = reduction.recvfds(clients, 1)
            stream = SocketStream(socket.socket(fileno=fd), peer=order.peer)
        except EOFError:  # it could not be sent
            reports.send(Ended())
            continue
        except (OSError, RuntimeError) as problem:  # the latter where the message has come without it: the limit is reached
            server_log.warning("%s was disconnected: its descriptor could not be received: %s", order.peer, problem)
            reports.send(Ended(lacking=True))
            continue
        if not server.serve_guest(stream):
            reports.send(Ended())

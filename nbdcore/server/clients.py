"""A server's clients: a place and a thread for each, and who gives way when there are no more.

A client that has chosen no export yet loses nothing when it is sent away, and may be one that only keeps a place from others. So
when places, threads, descriptors or memory run out, the oldest of these gives way to the new one: one that has said nothing
before one that is in the middle of its handshake. Whoever has an export stays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from nbdcore.logs import server_log
from nbdcore.server.channel import Channel, ConnectionOver
from nbdcore.streams.base import Stream

__all__ = ["Client", "Clients"]


@dataclass(slots=True, eq=False)
class Client:
    """One connection, from its acceptance to its end.

    Attributes:
        stream: the connection as it was accepted.
        may_give_way: whether it came through a listener, and so may be sent away for another.
        channel: what its thread made of the stream; None before that.
        chosen: whether it has chosen an export.
        leaving: whether it was sent away, and has no place any more.
        thread: what serves it.
    """

    stream: Stream
    may_give_way: bool
    channel: Channel | None = None
    chosen: bool = False
    leaving: bool = False
    thread: threading.Thread = field(init=False)

    @property
    def silent(self) -> bool:
        """Whether it has said nothing at all."""
        return self.channel is None or not self.channel.heard


class Clients:
    """The clients of one server, oldest first. Safe from several threads, which share the server's lock."""

    def __init__(self, lock: threading.RLock, places: int) -> None:
        self._lock = lock
        self._places = places
        self._clients: dict[Client, None] = {}

    def __len__(self) -> int:
        return len(self._clients)

    def __iter__(self) -> Iterator[Client]:
        with self._lock:
            return iter([*self._clients])

    def has_place(self) -> bool:
        """Return whether one more has a place, where need be that of another."""
        with self._lock:
            staying = sum(not client.leaving for client in self._clients)
            return staying < self._places or self.send_one_away(f"all {self._places} places are taken") is not None

    def start(self, client: Client, serve: Callable[[Client], None]) -> None:
        """Serve a client in a thread of its own. Raises RuntimeError or MemoryError where the system gives none."""
        client.thread = threading.Thread(target=serve, args=(client,), name="nbdcore-client", daemon=True)
        with self._lock:
            self._clients[client] = None
            try:
                client.thread.start()
            except BaseException:
                del self._clients[client]
                raise

    def keep(self, client: Client) -> None:
        """Let a client stay: it has chosen its export, and is about to be told so. Raises ConnectionOver if it was sent away."""
        with self._lock:
            if client.leaving:
                raise ConnectionOver("it was sent away for another client")
            client.chosen = True

    def ended(self, client: Client) -> None:
        """Forget a client whose thread is at its end."""
        with self._lock:
            self._clients.pop(client, None)

    def send_one_away(self, why: str) -> Client | None:
        """End the connection of the client that can best be spared, and return it; its thread ends soon. None: nobody can."""
        with self._lock:
            spare = [client for client in self._clients if client.may_give_way and not (client.chosen or client.leaving)]
            chosen = next((client for client in spare if client.silent), spare[0] if spare else None)
            if chosen is not None:
                chosen.leaving = True
                said = "had said nothing" if chosen.silent else "had not chosen an export"
                server_log.warning("%s was disconnected for another client: it %s, and %s", chosen.stream, said, why)
                chosen.stream.hang_up()
            return chosen

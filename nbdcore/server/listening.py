"""The server: its listeners, its clients' threads, and their orderly end.

One thread accepts for each listener (`accepting`), one serves each client, in this process or in a further one (`workers`). All
of them wait for the shutdown as well, so that stopping wakes every thread and no thread is ever left: a request being carried
out is finished and answered, what comes later is answered NBD_ESHUTDOWN, idle clients are disconnected at once, and those that
will not finish when the deadline comes.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from nbdcore.errors import TLSError, TransportError, UsageError
from nbdcore.logs import server_log
from nbdcore.server.accepting import PAUSE, start_accepting
from nbdcore.server.budget import MemoryBudget
from nbdcore.server.channel import Channel, ConnectionOver
from nbdcore.server.clients import Client, Clients
from nbdcore.server.exports import exports_of
from nbdcore.server.negotiation import negotiate
from nbdcore.server.offer import offer_of
from nbdcore.server.settings import Exported, check_shareable, named_settings
from nbdcore.server.shutdown import Shutdown, moment_after
from nbdcore.server.transmission import transmit
from nbdcore.streams.base import Address, Listener, Stream, Want
from nbdcore.streams.tls.credentials import ServerTLS
from nbdcore.streams.waiting import NEVER, Deadline, wait_any
from nbdcore.uri import parse_uri

if TYPE_CHECKING:  # at run time they would bring pluggy, which only listening needs, and multiprocessing
    from nbdcore.plugins.spec import Transport
    from nbdcore.server.worker import ServerSettings
    from nbdcore.server.workers import Workers

__all__ = ["Server"]

# Enough for four clients that write 32 MiB each at once; a small machine can spare it.
_MEMORY = 128 << 20
# What a thread cut off at the deadline may still need to end.
_LAST_MOMENT = 0.5


class Server:
    """An NBD server inside this process.

        with Server(MemoryDisk(1 << 30)) as server:
            print(server.listen("tcp", host="127.0.0.1", port=0).address.uri())
            server.serve_forever()

    As a context manager it starts on entering and stops on leaving. It owns its back ends: stopping closes them. A stopped server
    stays stopped. All methods may be called from any thread.
    """

    def __init__(
        self,
        exports: Exported,
        *,
        read_only: bool = False,
        tls: ServerTLS | None = None,
        require_tls: bool | None = None,
        max_clients: int = 128,
        memory_budget: int = _MEMORY,
        handshake_timeout: float | None = 30.0,
        workers: int = 1,
    ) -> None:
        """Prepare to serve one export, called "", or several by name; nothing is opened yet.

        A single export is also found under the empty name, whatever it is called. `read_only` holds for all exports. A client
        beyond `max_clients` takes the place of one that has not chosen an export yet, the oldest silent one first; where there is
        none it is disconnected. One that has not chosen an export after `handshake_timeout` seconds is disconnected then.

        All clients together get at most `memory_budget` bytes of memory for data on their way, besides half a megabyte for each.
        A read or write that does not fit is carried out in pieces; nobody waits for another client's memory.

        With `tls`, whose files are read now, every client must start TLS before anything else. With `require_tls=False` it may do
        without, for the exports whose own settings do not require it.

        `workers` is how many processes may serve clients: further ones are started when several clients are here at once, where
        the back ends can be in several processes, as `FileDisk` and `SharedMemoryDisk` can. They are spawned, as those of
        `multiprocessing` are: a program's own work then stands behind `if __name__ == "__main__":`. The numbers above are for all
        of them together.

        Raises UsageError for exports and numbers that cannot be, for files of `tls` that cannot be used (with errno ENOTSUP for
        what this Python cannot do), and for TLS that is required without `tls`.
        """
        if max_clients < 1:
            raise UsageError(errno.EINVAL, f"max_clients is {max_clients}: it must be at least 1")
        if memory_budget < 0:
            raise UsageError(errno.EINVAL, f"memory_budget is {memory_budget}: it must be a number of bytes, at least 0")
        Deadline.after(handshake_timeout)  # raises UsageError where it is no number of seconds
        settings = named_settings(exports)
        self._offer = offer_of(exports_of(settings, read_only=read_only), tls, require_tls=require_tls)
        #: called at the end of each client, in its thread
        self.on_end: Callable[[], None] | None = None
        self._workers: Workers | None = None
        if workers != 1:
            from nbdcore.server.worker import ServerSettings  # multiprocessing, which most servers do without
            from nbdcore.server.workers import Workers, shared_out

            check_shareable(workers, settings)
            max_clients, *places = shared_out(max_clients, workers)
            memory_budget //= 1 + len(places)
            ours = ServerSettings(
                _server_of, settings, read_only, tls, require_tls, max_clients, memory_budget, handshake_timeout
            )
            self._workers = Workers(places, ours)
        self._budget = MemoryBudget(memory_budget)
        self._handshake_timeout = handshake_timeout
        self._shutdown = Shutdown()
        # Guards what follows; re-entrant, since a signal handler that stops the server may interrupt a thread that holds it.
        self._lock = threading.RLock()
        self._started = self._abandoned = self._finished = False
        self._listeners: list[Listener] = []
        self._acceptors: set[threading.Thread] = set()
        self._clients = Clients(self._lock, max_clients)

    # ------------------------------------------------------------------------------------------ life

    def listen(self, transport: str, **address: object) -> Listener:
        """Listen on a loaded transport at the address that its parts name: `listen("tcp", host="127.0.0.1", port=0)`.

        Parts left out have the transport's defaults for listening. Returns the listener; its `address` is the one in effect, and
        `server.uri(listener, export)` what clients connect to. Clients are accepted once the server is started; until then they
        queue.

        Raises TransportUnavailable for a transport that is not loaded, TransportError where listening fails, UsageError for a
        wrong address or a stopped server.
        """
        from nbdcore.plugins.registry import registry  # the scan for plugins is costly, and serve_stream() needs none

        chosen = registry.get(transport)
        return self._listen(chosen, chosen.listening_address(**address))

    def listen_uri(self, uri: str, **more: object) -> Listener:
        """Listen at the address that an NBD URI names, on the transport of its scheme; what export it names does not matter.

        `more` are parts of the address that no URI can say, as `listen` takes them: `keepalive=False` for TCP.

        Returns and raises what `listen` does; UsageError also for a URI that demands TLS of a server that does not require it,
        and for parts that the transport does not have.
        """
        from nbdcore.plugins.registry import registry

        where = parse_uri(uri)
        if where.tls and not self._offer.forced:
            raise UsageError(
                errno.EINVAL, f"{where.scheme} demands TLS, which this server does not require; use {where.transport_scheme}"
            )
        chosen = registry.for_uri(where)
        address: Any = chosen.parse(where)  # a dataclass, which a protocol cannot say
        try:
            address = replace(address, **more)
        except TypeError as problem:
            raise UsageError(errno.EINVAL, f"{address} has no part called {', '.join(more)}") from problem
        return self._listen(chosen, address)

    def uri(self, listener: Listener, export: str = "") -> str:
        """Return the URI that leads clients to an export: `listener.address.uri(export)`, demanding TLS where there is TLS."""
        plain = listener.address.uri(export)
        where = parse_uri(plain)
        family, plus, rest = where.scheme.partition("+")
        if self._offer.start_tls is None or family != "nbd":
            return plain
        return str(replace(where, scheme=f"nbds{plus}{rest}"))

    def _listen(self, transport: Transport, address: Address) -> Listener:
        self._refuse_if_stopped()
        listener = transport.listen(address)
        with self._lock:
            if not self._shutdown.requested:
                if self._started:
                    try:
                        self._start_accepting(listener)
                    except TransportError:
                        listener.close()
                        raise
                self._listeners.append(listener)
                return listener
        listener.close()
        self._refuse_if_stopped()
        return listener

    def start(self) -> None:
        """Start accepting clients, in threads of its own. Idempotent.

        Raises UsageError for a stopped server, TransportError (EAGAIN) where the system gives no thread for a listener: the
        server is stopped then, and listens nowhere any more.
        """
        self._refuse_if_stopped()
        try:
            with self._lock:
                if not self._started:
                    self._started = True
                    for listener in self._listeners:
                        self._start_accepting(listener)
        except TransportError:
            self.stop()
            raise

    def serve_stream(self, stream: Stream) -> None:
        """Serve one client that is connected already, in a thread of its own; the server closes the stream.

        Raises UsageError for a stopped server, with the stream closed too.
        """
        if not self._start_client(stream, limited=False):
            self._refuse_if_stopped()

    def serve_guest(self, stream: Stream) -> bool:
        """Serve one client that another process of the server has accepted, as one that came through a listener.

        Returns False where it was turned away; the stream is closed then.
        """
        return self._start_client(stream, limited=True)

    def serve_forever(self) -> None:
        """Start, and return when another thread (or a signal handler) has stopped the server; stop it when interrupted."""
        self.start()
        try:
            while not self._shutdown.requested:
                # In steps of a second, since on Windows a wait without end would not see Ctrl-C.
                wait_any([(self._shutdown.fileno(), Want.READ)], Deadline.after(1.0))
        finally:
            self.stop()

    def stop(self, timeout: float | None = 5.0) -> None:
        """Stop: accept nobody, answer what was begun, disconnect everybody, close the back ends. Idempotent.

        Returns within about `timeout` seconds; with None clients have all the time they need. Only a back end that does not
        return by then leaves a thread behind, until it does; that is logged, and its back ends stay open.
        """
        with self._lock:
            self._shutdown.request(Deadline.after(timeout))
            acceptors, listeners = [*self._acceptors], [*self._listeners]
            clients = [client.thread for client in self._clients]
        latest = moment_after(self._shutdown.deadline, _LAST_MOMENT)
        self._join(acceptors, latest)
        for listener in listeners:
            listener.close()
        if self._workers is not None:
            self._workers.stop(self._shutdown.deadline)
        self._join(clients, latest)
        self._finish()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _join(self, threads: Iterable[threading.Thread], latest: Deadline) -> None:
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(latest.remaining())

    def _finish(self) -> None:
        """Close what the clients used, once the last of them is gone; the last one does it where stop() could not wait."""
        with self._lock:
            stuck = len(self._clients)
            if self._finished or stuck:
                if stuck:
                    self._abandoned = True
                    server_log.warning("%d clients are still inside a back end that does not return", stuck)
                return
            self._finished = True
        self._offer.exports.close()
        self._shutdown.close()

    def _refuse_if_stopped(self) -> None:
        if self._shutdown.requested:
            raise UsageError(errno.EINVAL, "this server was stopped; make a new one")

    # ------------------------------------------------------------------------------------------ accepting

    def _start_accepting(self, listener: Listener) -> None:
        self._acceptors.add(start_accepting(listener, self._shutdown, self._clients, self._welcome))

    def _welcome(self, stream: Stream) -> None:
        """Serve a client that came through a listener, in this process or in another."""
        if self._workers is None or not self._workers.take(stream, len(self._clients)):
            self._start_client(stream, limited=True)

    # ------------------------------------------------------------------------------------------ clients

    def _start_client(self, stream: Stream, *, limited: bool) -> bool:
        """Start a thread for a client; close its stream and return False where that cannot be."""
        client = Client(stream, may_give_way=limited)
        problem = self._admit(client)
        if problem and not self._shutdown.requested:
            leaving = self._clients.send_one_away(problem)
            if leaving is not None:
                leaving.thread.join(PAUSE)
                problem = self._admit(client)
        if problem:
            server_log.warning("%s was disconnected: %s", stream, problem)
            stream.close()
        return not problem

    def _admit(self, client: Client) -> str:
        """Start a client's thread, and return why it could not be; the lock is held, so that stop() joins no half-started one."""
        with self._lock:
            if self._shutdown.requested:
                return "the server was stopped"
            if client.may_give_way and not self._clients.has_place():
                return "every place is taken by a client that has chosen its export (max_clients)"
            try:
                self._clients.start(client, self._serve)
            except (RuntimeError, MemoryError) as failure:  # the system gives no more threads
                return str(failure) or "there is no memory left"
        return ""

    def _serve(self, client: Client) -> None:
        """Serve one client to its end, whatever that is: it must harm no other."""
        stream = client.stream
        try:
            client.channel = Channel(stream, self._shutdown)
            self._converse(client, client.channel)
        except ConnectionOver as end:
            server_log.log(logging.WARNING if end.violation else logging.DEBUG, "%s was disconnected: %s", stream, end)
        except TLSError as problem:
            server_log.warning("%s", problem.message)  # which names the client
        except OSError as problem:
            server_log.debug("%s was lost: %s", stream, problem)
        except Exception:  # noqa: BLE001  # a fault of ours costs this client, and must be seen, but not the others
            server_log.exception("%s was disconnected by a fault of the server", stream)
        finally:
            (client.channel or stream).close()
            with self._lock:
                self._clients.ended(client)
                last = self._abandoned and not self._clients
            if self.on_end is not None:
                self.on_end()
            if last:
                self._finish()

    def _converse(self, client: Client, channel: Channel) -> None:
        channel.deadline = Deadline.after(self._handshake_timeout)
        terms = negotiate(channel, self._offer, self._shutdown, lambda: self._clients.keep(client))
        if terms is not None:
            channel.deadline = NEVER
            server_log.info("%s has chosen its export, %s TLS", client.stream, "with" if channel.secure else "without")
            transmit(channel, terms, self._shutdown, self._budget)
            server_log.info("%s has left", client.stream)
        channel.finish()


def _server_of(settings: ServerSettings) -> Server:
    """Make a server of another process's, which listens nowhere."""
    return Server(
        settings.exports,
        read_only=settings.read_only,
        tls=settings.tls,
        require_tls=settings.require_tls,
        max_clients=settings.max_clients,
        memory_budget=settings.memory_budget,
        handshake_timeout=settings.handshake_timeout,
    )

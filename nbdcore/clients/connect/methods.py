"""The `connect` calls of every client, once: their signatures, what they mean, and what all of them do.

What a call returns is for the front end to say: a blocking client returns itself, an asyncio one a coroutine, a polled one
nothing. Each call only says how its target is found. `_establish` does the rest, as a generator that the front end drives. Each
attempt to connect has an engine of its own; the client keeps the one that it was made with until a session is open.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Generic, TypeVar

from nbdcore.clients.connect import target as targets
from nbdcore.clients.connect.establish import closed_meanwhile, establish, given_up
from nbdcore.clients.connect.steps import Steps
from nbdcore.clients.connect.target import ConnectCall, Find, OpenStream, Target
from nbdcore.clients.connect.tls import Encryption, Permissions
from nbdcore.clients.requests.arguments import Socket, StrPath, deadline_after
from nbdcore.clients.session.info import Info
from nbdcore.clients.session.session import Session
from nbdcore.errors import UsageError
from nbdcore.protocol.engine import Engine
from nbdcore.protocol.state import Phase
from nbdcore.streams.base import Stream
from nbdcore.uri import DEFAULT_PORT, VSOCK_HOST, parse_uri

# The defaults of the connect calls, for those who write them out again.
__all__ = ["DEFAULT_PORT", "VSOCK_HOST", "ConnectMethods", "Connected"]

#: What a connect call returns.
Connected = TypeVar("Connected")


class ConnectMethods(Info, Generic[Connected]):
    """The `connect` calls, legal in a newly created client, once.

    By default the export is open when a call has succeeded. Raises UsageError, with nothing opened and the client as it was, for
    what is wrong in the call, and TransportUnavailable; TransportError, NegotiationError, ProtocolViolation, Disconnected,
    TLSError, DeadlineExceeded, after which, as after Ctrl-C or a task's cancellation, the client is dead.

    `timeout`: seconds for an attempt in all. `wait`: seconds for which attempts are made again while the server is not up:
    nothing listens yet, its machine does not answer, it hangs up without a word. No attempt lasts longer than that. When they
    have passed, DeadlineExceeded is raised, with the last attempt's error as its cause. Every other error is raised at once.
    """

    _shown_as = "nbdcore.Client"
    #: how many connections to open
    _connections = 1

    def __init__(self, engine: Engine, encryption: Encryption, permissions: Permissions) -> None:
        super().__init__(engine)
        self._encryption = encryption
        self._permissions = permissions
        self._target: Target | None = None

    # ------------------------------------------------------------------------------------------ by a transport

    def connect(self, uri: str, *, timeout: float | None = None, wait: float | None = None) -> Connected:
        """Connect to the server and export that an NBD URI names, such as "nbd://host/export" or "nbd+vsock://2:10809".

        `nbds` and its kind require TLS. What else a URI may do is limited by the client's `allow_` options: a UsageError (EPERM).
        """
        return self._connect("connect", partial(targets.by_uri, uri), timeout, wait)

    def connect_tcp(
        self,
        host: str = "localhost",
        port: int = DEFAULT_PORT,
        *,
        keepalive: bool = False,
        timeout: float | None = None,
        wait: float | None = None,
    ) -> Connected:
        """Connect over TCP. `keepalive` lets the system notice a peer that vanished.

        Where `host` has several addresses, the next is tried when the one before has not answered for a moment, and the first
        that answers is taken (RFC 8305).
        """
        parts = {"host": host, "port": port, "keepalive": keepalive}
        return self._connect("connect_tcp", partial(targets.by_name, "tcp", parts), timeout, wait)

    def connect_unix(self, path: StrPath | bytes, *, timeout: float | None = None, wait: float | None = None) -> Connected:
        """Connect to a unix socket: its path (str, bytes or path-like), or NUL and a Linux abstract name."""
        return self._connect("connect_unix", partial(targets.by_name, "unix", {"path": path}), timeout, wait)

    def connect_vsock(
        self, cid: int = VSOCK_HOST, port: int = DEFAULT_PORT, *, timeout: float | None = None, wait: float | None = None
    ) -> Connected:
        """Connect over vsock; the default is the host of this virtual machine, NBD's port."""
        return self._connect("connect_vsock", partial(targets.by_name, "vsock", {"cid": cid, "port": port}), timeout, wait)

    def connect_ssh(
        self,
        host: str,
        *,
        socket: str | None = None,
        port: int | None = None,
        user: str | None = None,
        ssh_port: int | None = None,
        timeout: float | None = None,
        wait: float | None = None,
    ) -> Connected:
        """Connect with the program `ssh` to `host`, and from there with `nc` to the server's unix socket, or to its TCP port.

        Without either, to NBD's port of `host` itself. Logging in is ssh's business: its configuration, keys and agent.
        """
        parts = {"host": host, "socket": socket, "port": port, "user": user, "ssh_port": ssh_port}
        return self._connect("connect_ssh", partial(targets.by_name, "ssh", parts), timeout, wait)

    def connect_transport(
        self, name: str, /, *, timeout: float | None = None, wait: float | None = None, **address: object
    ) -> Connected:
        """Connect over any transport by its name; the address parts are the transport's own."""
        return self._connect("connect_transport", partial(targets.by_name, name, address), timeout, wait)

    # ------------------------------------------------------------------------------------------ by a program

    def connect_command(self, argv: Iterable[str], *, timeout: float | None = None, wait: float | None = None) -> Connected:
        """Run a server that talks on its standard input and output, such as `["nbdkit", "-s", "memory", "1G"]`.

        No shell reads the arguments. The program ends when the connection does. If it fails, the end of what it wrote to its
        standard error is in the error.
        """
        return self._connect("connect_command", partial(targets.by_name, "command", {"argv": argv}), timeout, wait)

    def connect_socket_activation(
        self, argv: Iterable[str], *, name: str = "unknown", timeout: float | None = None, wait: float | None = None
    ) -> Connected:
        """Run a server that takes a listening socket over by systemd's protocol (sd_listen_fds(3)), such as `["nbdkit", ...]`.

        The socket is a unix one in a folder of its own; the server is told that it is for `name`. Otherwise as `connect_command`.
        """
        parts = {"argv": argv, "activation": name}
        return self._connect("connect_socket_activation", partial(targets.by_name, "command", parts), timeout, wait)

    # ------------------------------------------------------------------------------------------ over what is open

    def connect_socket(self, socket: Socket | int, *, timeout: float | None = None) -> Connected:
        """Connect over a connected stream socket, or its descriptor; it belongs to the client from here on.

        After a UsageError it is still the caller's. No host is known by which a server's certificate could be checked.
        """
        return self._connect("connect_socket", partial(targets.over_socket, socket), timeout, None)

    def connect_stream(self, stream: Stream, *, timeout: float | None = None) -> Connected:
        """Connect over a stream that is open already, and belongs to the client from here on.

        After a UsageError it is still the caller's. No host is known by which a server's certificate could be checked.
        """
        return self._connect("connect_stream", partial(targets.over_stream, stream), timeout, None)

    # ------------------------------------------------------------------------------------------ what they share

    @abstractmethod
    def _connect(self, call: str, find: Find, timeout: float | None, wait: float | None) -> Connected:
        """Connect to what `find` finds; `call` is how messages name the call."""

    def _establish(
        self, call: str, find: Find, timeout: float | None, wait: float | None, use: Callable[[list[Session]], None]
    ) -> Steps[None]:
        """Find the target, go from newly created to connecting, open the sessions and give them to `use`."""
        deadline_after(timeout), deadline_after(wait)  # wrong ones show now, before a socket changes hands
        target = yield from self._find(call, find)
        settings = self._begin_connecting(call, target).settings
        try:
            use((yield from establish(target, settings, timeout=timeout, wait=wait, connections=self._connections)))
        except BaseException as exc:
            self._engine.fail(given_up(self.peer, exc))
            raise

    def _find(self, call: str, find: Find) -> Steps[Target]:
        self._legal(call)
        by_hand = self._engine.settings.opt_mode
        check = partial(self._legal, call)
        return (yield from find(ConnectCall(call, check, self._encryption, self._permissions, by_hand, self._connections)))

    def _begin_connecting(self, call: str, target: Target) -> Engine:
        """Go from newly created to connecting, which a client does once. Returns the engine."""
        self._legal(call)
        engine = self._engine
        if target.export:
            engine.choose_export(target.export)
        engine.settings = replace(engine.settings, tls=target.tls)
        self._target = target
        engine.connecting()
        return engine

    def _check_wanted(self) -> None:
        """Raise Disconnected when the client was closed while it connects."""
        if self._engine.phase is not Phase.CONNECTING:
            raise closed_meanwhile()

    # ------------------------------------------------------------------------------------------ what can be asked at any time

    @property
    def closed(self) -> bool:
        """Whether the connection has ended, whoever ended it. False while newly created, too."""
        return self._engine.phase in (Phase.CLOSED, Phase.DEAD)

    @property
    def uri(self) -> str | None:
        """The NBD URI that leads to this server and export.

        None before connecting, and where there is none: a program that this one runs, a socket or stream that was open already.
        """
        if self._target is None or isinstance(self._target.endpoint, OpenStream):
            return None
        export = self._engine.agreement.export
        try:
            uri = parse_uri(self._target.endpoint.address.uri(self._engine.settings.export if export is None else export.name))
        except UsageError:  # a URI must not name a program to run
            return None
        return str(uri.with_tls if self._engine.agreement.tls else uri)

    @property
    def peer(self) -> str:
        """What this was connected to, in words, such as "the command nbdkit", where there is no URI; "" before connecting."""
        return "" if self._target is None else str(self._target.endpoint)

    def __repr__(self) -> str:
        parts = [f"<{self._shown_as} {self.phase.value}", *filter(None, [self._connected_to()])]
        export = self._engine.agreement.export
        if self.phase is Phase.CONNECTED and export is not None:
            parts += [f"export {export.name!r}", f"{export.size} bytes"]
        return f"{', '.join(parts)}>"

    def _connected_to(self) -> str:
        return self.peer

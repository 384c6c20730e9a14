"""Every way to connect, for event loops that are somebody else's: the blocking client's calls, of which none waits.

Each finds the way, takes the one step from newly created to connecting, and lets the transport begin; the rest happens as the
loop lets the client advance. An attempt is made once: when to make another, and how long one may take, is for the loop to say.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Generator, Iterable
from dataclasses import replace
from typing import Any

from nbdcore.clients.connect.target import Way, adopt, route_by_name, route_by_uri
from nbdcore.clients.connect.tls import Encryption, Permissions
from nbdcore.clients.requests.arguments import text
from nbdcore.clients.session.info import Knowledge
from nbdcore.clients.session.session import StartTLS
from nbdcore.errors import ArgumentTypeError
from nbdcore.protocol.constants import DEFAULT_PORT
from nbdcore.protocol.engine import Engine
from nbdcore.protocol.handshake.agreement import TLSPolicy
from nbdcore.streams.base import Stream, Want
from nbdcore.uri import parse_uri

VSOCK_HOST = 2  # VMADDR_CID_HOST: seen from a virtual machine, the machine that runs it

#: A connection being opened, as transports do it: yields what to wait for, returns the stream.
Connecting = Generator[tuple[int, Want], None, Stream]


class PolledConnectCalls(Knowledge):
    """The `connect` calls, legal in a newly created client, once.

    Each raises UsageError, with nothing opened and the client as it was, for what is wrong in the call, and TransportUnavailable.
    Looking up a host's name, reading certificates and starting a program take the time that they take; nothing else waits.
    """

    def __init__(self, engine: Engine, encryption: Encryption, permissions: Permissions) -> None:
        super().__init__(engine)
        self._encryption = encryption
        self._permissions = permissions

    # ------------------------------------------------------------------------------------------ by a transport

    def connect(self, uri: str) -> None:
        """Start connecting to the server and export that an NBD URI names. What a URI may do is limited by the permissions."""
        self._legal("connect")
        parsed = parse_uri(text("a URI", uri))
        encryption = self._encryption.with_uri(parsed, self._permissions)
        route = route_by_uri(parsed, self._permissions)
        way = Way(route, encryption.settled, encryption.starter(route.server_name, by_hand=self._engine.settings.opt_mode))
        if parsed.export:
            self._engine.choose_export(parsed.export)
        self._go(way)

    def connect_tcp(self, host: str = "localhost", port: int = DEFAULT_PORT, *, keepalive: bool = False) -> None:
        """Start connecting over TCP, trying each address of `host` in turn."""
        self._go_by_name("connect_tcp", "tcp", {"host": host, "port": port, "keepalive": keepalive})

    def connect_unix(self, path: Any) -> None:
        """Start connecting to a unix socket: its path (str, bytes or path-like), or NUL and a Linux abstract name."""
        self._go_by_name("connect_unix", "unix", {"path": path})

    def connect_vsock(self, cid: int = VSOCK_HOST, port: int = DEFAULT_PORT) -> None:
        """Start connecting over vsock; the default is the host of this virtual machine, NBD's port."""
        self._go_by_name("connect_vsock", "vsock", {"cid": cid, "port": port})

    def connect_ssh(
        self,
        host: str,
        *,
        socket: str | None = None,
        port: int | None = None,
        user: str | None = None,
        ssh_port: int | None = None,
    ) -> None:
        """Start the program `ssh`, to get to `host`, and from there with `nc` to the server's unix socket, or to its TCP port."""
        parts = {"host": host, "socket": socket, "port": port, "user": user, "ssh_port": ssh_port}
        self._go_by_name("connect_ssh", "ssh", parts)

    def connect_transport(self, name: str, /, **address: Any) -> None:
        """Start connecting over any transport by its name; the address parts are the transport's own."""
        self._go_by_name("connect_transport", text("a transport's name", name), address)

    # ------------------------------------------------------------------------------------------ by a program

    def connect_command(self, argv: Iterable[str]) -> None:
        """Run a server that talks on its standard input and output. No shell reads the arguments."""
        self._go_by_name("connect_command", "command", {"argv": argv})

    def connect_socket_activation(self, argv: Iterable[str], *, name: str = "unknown") -> None:
        """Run a server that takes a listening socket over by systemd's protocol (sd_listen_fds(3)); it is told `name`."""
        self._go_by_name("connect_socket_activation", "command", {"argv": argv, "activation": name})

    # ------------------------------------------------------------------------------------------ over what is open

    def connect_socket(self, socket: Any) -> None:
        """Start the handshake over a connected stream socket, or its descriptor; it belongs to the client from here on.

        After a UsageError it is still the caller's.
        """
        self._legal("connect_socket")
        start_tls = self._starter(None)
        self._begin_over(adopt(socket), start_tls)

    def connect_stream(self, stream: Stream) -> None:
        """Start the handshake over a stream that is open already; it belongs to the client from here on.

        After a UsageError it is still the caller's.
        """
        self._legal("connect_stream")
        if not isinstance(stream, Stream):
            hint = ": connect_socket takes one" if hasattr(stream, "recv_into") else ""
            raise ArgumentTypeError(errno.EINVAL, f"connect_stream: a Stream is needed, not {type(stream).__name__}{hint}")
        self._begin_over(stream, self._starter(None))

    # ------------------------------------------------------------------------------------------ what they share

    @abstractmethod
    def _begin(self, steps: Connecting, start_tls: StartTLS | None) -> None:
        """Start connecting by a transport's steps."""

    def _starter(self, server_name: str | None) -> StartTLS | None:
        return self._encryption.starter(server_name, by_hand=self._engine.settings.opt_mode)

    def _go_by_name(self, call: str, name: str, parts: dict[str, Any]) -> None:
        self._legal(call)
        route = route_by_name(name, parts)
        self._go(Way(route, self._encryption.settled, self._starter(route.server_name)))

    def _go(self, way: Way) -> None:
        self._settle(way.tls)
        self._begin(way.route.transport.connect(way.route.address), way.start_tls)

    def _begin_over(self, stream: Stream, start_tls: StartTLS | None) -> None:
        self._settle(self._encryption.settled)
        self._begin(_open(stream), start_tls)

    def _settle(self, tls: TLSPolicy) -> None:
        self._engine.settings = replace(self._engine.settings, tls=tls)


def _open(stream: Stream) -> Connecting:
    """Connect by doing nothing: the stream is open."""
    yield from ()
    return stream

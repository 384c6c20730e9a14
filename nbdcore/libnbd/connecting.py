"""Calls that connect. Each has two forms: `aio_connect_...` starts, `connect_...` also waits until the server is reached.

A connect call makes a client of the handle's settings and a transport's steps. One that fails leaves the handle dead; only where
no TCP address answered is the handle newly created again, as in libnbd, so that another may be tried.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from nbdcore.clients.connect.target import Endpoint, OpenStream, adopt, endpoint_by_name
from nbdcore.clients.polled import PolledClient
from nbdcore.errors import Error as CoreError
from nbdcore.errors import TransportError, UsageError
from nbdcore.libnbd import arguments, uris
from nbdcore.libnbd.calls import ADDRESSED, CREATED, call
from nbdcore.libnbd.constants import TLS_REQUIRE
from nbdcore.libnbd.core import Core, Reached
from nbdcore.libnbd.security import start_tls
from nbdcore.libnbd.settings import HandleSettings
from nbdcore.protocol.engine import Engine
from nbdcore.protocol.state import Phase
from nbdcore.streams.base import Opening, Stream
from nbdcore.streams.process import ProcessStream, run_activated, run_command
from nbdcore.uri import parse_uri

#: A socket option to set: level, option, value.
_Option = tuple[int, int, int]


class ConnectCalls(Core):
    """Every connect call."""

    # ------------------------------------------------------------------------------------------ by transport

    @call("1.0", CREATED, moves_bytes=True)
    def connect_uri(self, uri: str) -> None:
        """Connect to the server and export that an NBD URI names."""
        self._reach_uri(uri)
        self._wait_until_open()

    @call("1.0", CREATED, moves_bytes=True)
    def aio_connect_uri(self, uri: str) -> None:
        """Start what `connect_uri` does."""
        self._reach_uri(uri)

    def _reach_uri(self, uri: str) -> None:
        route, settings = uris.resolve(arguments.text(uri, "uri"), self._settings)
        self._reach(route, settings)

    @call("1.0", CREATED, moves_bytes=True)
    def connect_unix(self, unixsocket: Any) -> None:
        """Connect to a unix socket."""
        self._reach_named("unix", path=arguments.path(unixsocket))
        self._wait_until_open()

    @call("1.0", CREATED, moves_bytes=True)
    def aio_connect_unix(self, unixsocket: Any) -> None:
        """Start what `connect_unix` does."""
        self._reach_named("unix", path=arguments.path(unixsocket))

    @call("1.0", CREATED, moves_bytes=True)
    def aio_connect(self, addr: str) -> None:
        """Start connecting to a unix socket; libnbd's Python module takes no other address here."""
        if not isinstance(addr, str):
            raise TypeError("get_sockaddr: unknown address type")
        self._reach_named("unix", path=arguments.path(addr))

    @call("1.2", CREATED, moves_bytes=True)
    def connect_vsock(self, cid: int, port: int) -> None:
        """Connect over vsock."""
        self._reach_vsock(cid, port)
        self._wait_until_open()

    @call("1.2", CREATED, moves_bytes=True)
    def aio_connect_vsock(self, cid: int, port: int) -> None:
        """Start what `connect_vsock` does."""
        self._reach_vsock(cid, port)

    def _reach_vsock(self, cid: int, port: int) -> None:
        self._reach_named("vsock", cid=arguments.unsigned_32(cid, "cid"), port=arguments.unsigned_32(port, "port"))

    @call("1.0", CREATED, moves_bytes=True)
    def connect_tcp(self, hostname: str, port: str) -> None:
        """Connect over TCP; `port` is a number or the name of a service, as a string."""
        self._reach_tcp(hostname, port)
        self._wait_until_open()

    @call("1.0", CREATED, moves_bytes=True)
    def aio_connect_tcp(self, hostname: str, port: str) -> None:
        """Start what `connect_tcp` does."""
        self._reach_tcp(hostname, port)

    def _reach_tcp(self, hostname: str, port: str) -> None:
        host = arguments.text(hostname, "hostname")
        self._reach_named("tcp", host=host, port=_port(arguments.text(port, "port"), host))

    def _reach_named(self, transport: str, **parts: Any) -> None:
        self._reach(endpoint_by_name(transport, parts), self._settings)

    # ------------------------------------------------------------------------------------------ by descriptor, by command

    @call("1.2", CREATED, moves_bytes=True)
    def connect_socket(self, sock: int) -> None:
        """Connect over a connected stream socket, by its descriptor, which belongs to the handle from here on."""
        self._reach_socket(sock)
        self._wait_until_open()

    @call("1.2", CREATED, moves_bytes=True)
    def aio_connect_socket(self, sock: int) -> None:
        """Start what `connect_socket` does."""
        self._reach_socket(sock)

    def _reach_socket(self, sock: int) -> None:
        self._begin(OpenStream(_adopted(arguments.c_int(sock, "sock"))).open(None), self._settings)

    @call("1.0", CREATED, moves_bytes=True)
    def connect_command(self, argv: list[str]) -> None:
        """Run a server that talks on its standard input and output, and connect to it."""
        self._reach_command(argv)
        self._wait_until_open()

    @call("1.0", CREATED, moves_bytes=True)
    def aio_connect_command(self, argv: list[str]) -> None:
        """Start what `connect_command` does."""
        self._reach_command(argv)

    def _reach_command(self, argv: list[str]) -> None:
        self._begin(_started(_command(argv)), self._settings)

    @call("1.2", CREATED, moves_bytes=True)
    def connect_systemd_socket_activation(self, argv: list[str]) -> None:
        """Run a server that takes a listening socket over by systemd's socket activation, and connect to it."""
        self._reach_activated(argv)
        self._wait_until_open()

    @call("1.2", CREATED, moves_bytes=True)
    def aio_connect_systemd_socket_activation(self, argv: list[str]) -> None:
        """Start what `connect_systemd_socket_activation` does."""
        self._reach_activated(argv)

    def _reach_activated(self, argv: list[str]) -> None:
        command = _command(argv)
        name = self._settings.socket_activation_name or "unknown"
        self._begin(run_activated(command, name=name), self._settings)

    # ------------------------------------------------------------------------------------------ what they share

    def _reach(self, route: Endpoint, settings: HandleSettings) -> None:
        """Start connecting to a transport's address, as `settings` say; they become the handle's own."""
        address = route.address
        host = getattr(address, "host", None) if route.transport.name == "tcp" else None
        steps = _tuned(route.transport.connect(address), _socket_options(settings)) if host else route.transport.connect(address)
        self._begin(steps, settings, Reached(host, route))

    def _begin(self, steps: Opening[Stream], settings: HandleSettings, reached: Reached | None = None) -> None:
        reached = reached or Reached()
        client = PolledClient(settings.for_handshake(), strict=settings.strict_mode, start_tls=start_tls(settings, reached.host))
        self._settings, self._client, self._reached = settings, client, reached
        self._process = os.getpid()
        client.connect_steps(_noted(steps, reached, client.engine))
        self._see_failure()

    def _wait_until_open(self) -> None:
        client = self._connection
        while client.phase is Phase.CONNECTING:
            self._refuse_if_closing()
            with contextlib.suppress(CoreError):
                self._poll_once()
        self._see_failure()

    def _see_failure(self) -> None:
        """Raise why connecting failed, if it did."""
        client = self._connection
        self._back_to_created()
        if client.phase is Phase.DEAD and client.error is not None:
            raise client.error

    @call("1.8", ADDRESSED)
    def get_uri(self) -> str:
        """Return a URI that leads to this server and export. Raises Error where there is none, as for a command."""
        route = self._reached.route
        if route is None:
            raise UsageError(errno.EINVAL, "cannot construct a URI for this connection type")
        settings = self._settings
        uri = parse_uri(route.address.uri(settings.export_name))
        encrypted = settings.tls == TLS_REQUIRE or self._connection.engine.agreement.tls
        more = [
            ("tls-certificates", settings.tls_certificates),
            ("tls-psk-file", settings.tls_psk_file),
            ("tls-hostname", settings.tls_hostname),
            ("tls-verify-peer", None if settings.tls_verify_peer else "false"),
        ]
        query = [*uri.query, *((name, value) for name, value in more if value is not None)]
        return str(replace(uri.with_tls if encrypted else uri, user=settings.tls_username, query=tuple(query)))


def _port(text: str, host: str) -> int:
    """Return the number of a TCP port. Raises TransportError for a service that this machine does not know."""
    if text.isascii() and text.isdecimal():
        return int(text)
    try:
        return socket.getservbyname(text, "tcp")
    except OSError as exc:
        raise TransportError(0, f"getaddrinfo: hostname {host!r} port {text!r}: {exc}") from exc


def _command(argv: object) -> list[str]:
    command = arguments.strings(argv, "argv")
    if not command:
        raise UsageError(errno.EINVAL, "missing command name in argv list")
    return command


def _adopted(fd: int) -> Stream:
    """Return a stream over a descriptor, which is closed where that cannot be. Raises UsageError for what is no such socket."""
    try:
        return adopt(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(fd)
        raise


def _noted(steps: Opening[Stream], reached: Reached, engine: Engine) -> Opening[Stream]:
    """Connect, and note in `reached` what was reached."""
    reached.stream = stream = yield from steps
    if isinstance(stream, ProcessStream):
        reached.child = stream.child
        # To libnbd a server that hangs up once an export is open has hung up, whatever became of it.
        stream.explains_end = lambda: engine.phase is not Phase.CONNECTED
        if stream.path is not None:
            reached.route = endpoint_by_name("unix", {"path": stream.path})
    return stream


def _started(command: list[str]) -> Opening[Stream]:
    yield from ()
    return run_command(command)


def _socket_options(settings: HandleSettings) -> list[_Option]:
    keepalive = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] if settings.keepalive else []
    return keepalive + [(socket.IPPROTO_TCP, option, value) for option, value in settings.tcp_options.items()]


def _tuned(steps: Opening[Stream], options: Iterable[_Option]) -> Opening[Stream]:
    """Connect, then set socket options."""
    stream = yield from steps
    try:
        for level, option, value in options:
            with socket.socket(fileno=os.dup(stream.fileno())) as sock:
                sock.setsockopt(level, option, value)
    except BaseException:
        stream.close()
        raise
    return stream

"""Functions that make a client, or a pool, and connect it in one go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Unpack

from nbdcore.clients.blocking.client import Client
from nbdcore.clients.blocking.pool import Pool
from nbdcore.clients.connect.methods import DEFAULT_PORT, VSOCK_HOST
from nbdcore.clients.connect.options import CONNECTIONS, ClientOptions
from nbdcore.clients.requests.arguments import Socket, StrPath, deadline_after
from nbdcore.protocol.handshake.agreement import Export
from nbdcore.streams.base import Stream


def connect(
    uri: str,
    *,
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Client:
    """Connect to the server and export that an NBD URI names. See `Client` for options, and `Client.connect` for errors."""
    return Client(**options).connect(uri, timeout=timeout, wait=wait)


def create_pool(
    uri: str,
    *,
    connections: int = CONNECTIONS,
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Pool:
    """Connect to the server and export that an NBD URI names, with up to so many connections. See `Pool`.

    By another way than a URI: `Pool(connections=4).connect_tcp("host")`.
    """
    return Pool(connections=connections, **options).connect(uri, timeout=timeout, wait=wait)


def connect_tcp(
    host: str = "localhost",
    port: int = DEFAULT_PORT,
    *,
    keepalive: bool = False,
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Client:
    """Connect over TCP. See `Client` for options, and `Client.connect` for errors."""
    return Client(**options).connect_tcp(host, port, keepalive=keepalive, timeout=timeout, wait=wait)


def connect_unix(
    path: StrPath | bytes,
    *,
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Client:
    """Connect to a unix socket. See `Client` for options, and `Client.connect` for errors."""
    return Client(**options).connect_unix(path, timeout=timeout, wait=wait)


def connect_vsock(
    cid: int = VSOCK_HOST,
    port: int = DEFAULT_PORT,
    *,
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Client:
    """Connect over vsock; the default is the host of this virtual machine, NBD's port. See `Client` for options."""
    return Client(**options).connect_vsock(cid, port, timeout=timeout, wait=wait)


def connect_ssh(
    host: str,
    *,
    socket: str | None = None,
    port: int | None = None,
    user: str | None = None,
    ssh_port: int | None = None,
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Client:
    """Connect through ssh to a server on another machine. See `Client.connect_ssh`, and `Client` for options."""
    client = Client(**options)
    return client.connect_ssh(host, socket=socket, port=port, user=user, ssh_port=ssh_port, timeout=timeout, wait=wait)


def connect_command(
    argv: Iterable[str], *, timeout: float | None = None, wait: float | None = None, **options: Unpack[ClientOptions]
) -> Client:
    """Run a server that talks on its standard input and output. See `Client.connect_command`, and `Client` for options."""
    return Client(**options).connect_command(argv, timeout=timeout, wait=wait)


def connect_socket_activation(
    argv: Iterable[str],
    *,
    name: str = "unknown",
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Client:
    """Run a server that takes a listening socket over. See `Client.connect_socket_activation`, and `Client` for options."""
    client = Client(**options)
    return client.connect_socket_activation(argv, name=name, timeout=timeout, wait=wait)


def connect_socket(socket: Socket | int, *, timeout: float | None = None, **options: Unpack[ClientOptions]) -> Client:
    """Connect over a connected stream socket, or its descriptor. See `Client.connect_socket`, and `Client` for options."""
    return Client(**options).connect_socket(socket, timeout=timeout)


def connect_stream(stream: Stream, *, timeout: float | None = None, **options: Unpack[ClientOptions]) -> Client:
    """Connect over a stream that is open already, and belongs to the client from then on. See `Client.connect_stream`."""
    return Client(**options).connect_stream(stream, timeout=timeout)


def list_exports(
    uri: str, *, timeout: float | None = None, wait: float | None = None, **options: Unpack[ClientOptions]
) -> list[Export]:
    """Ask the server that an NBD URI names which exports it has; the one in the URI does not matter. See `Client` for options."""
    deadline = deadline_after(timeout)
    options["opt_mode"] = True
    with Client(**options) as client:
        client.connect(uri, timeout=timeout, wait=wait)
        return client.opt_list(timeout=timeout if wait else deadline.remaining())

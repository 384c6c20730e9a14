"""Functions that make a client and connect it in one go: one connection, or, where the caller says how many, a pool of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack, overload

from nbdcore.clients.blocking.client import Client
from nbdcore.clients.blocking.methods import VSOCK_HOST
from nbdcore.clients.blocking.pool import Pool, refuse_pool
from nbdcore.clients.connect.options import ClientOptions
from nbdcore.clients.requests.arguments import deadline_after
from nbdcore.protocol.constants import DEFAULT_PORT
from nbdcore.protocol.handshake.agreement import Export


@overload
def connect(
    uri: str, *, connections: None = ..., timeout: float | None = ..., wait: float | None = ..., **options: Unpack[ClientOptions]
) -> Client: ...


@overload
def connect(
    uri: str, *, connections: int, timeout: float | None = ..., wait: float | None = ..., **options: Unpack[ClientOptions]
) -> Pool: ...


def connect(
    uri: str,
    *,
    connections: int | None = None,
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Client | Pool:
    """Connect to the server and export that an NBD URI names. See `Client` for options, and `Client.connect` for errors.

    With `connections` it returns a `Pool` of up to so many.
    """
    return _new(connections, options).connect(uri, timeout=timeout, wait=wait)


@overload
def connect_tcp(
    host: str = ...,
    port: int = ...,
    *,
    keepalive: bool = ...,
    connections: None = ...,
    timeout: float | None = ...,
    wait: float | None = ...,
    **options: Unpack[ClientOptions],
) -> Client: ...


@overload
def connect_tcp(
    host: str = ...,
    port: int = ...,
    *,
    keepalive: bool = ...,
    connections: int,
    timeout: float | None = ...,
    wait: float | None = ...,
    **options: Unpack[ClientOptions],
) -> Pool: ...


def connect_tcp(
    host: str = "localhost",
    port: int = DEFAULT_PORT,
    *,
    keepalive: bool = False,
    connections: int | None = None,
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Client | Pool:
    """Connect over TCP. See `Client` for options; with `connections` it returns a `Pool` of up to so many."""
    return _new(connections, options).connect_tcp(host, port, keepalive=keepalive, timeout=timeout, wait=wait)


@overload
def connect_unix(
    path: Any, *, connections: None = ..., timeout: float | None = ..., wait: float | None = ..., **options: Unpack[ClientOptions]
) -> Client: ...


@overload
def connect_unix(
    path: Any, *, connections: int, timeout: float | None = ..., wait: float | None = ..., **options: Unpack[ClientOptions]
) -> Pool: ...


def connect_unix(
    path: Any,
    *,
    connections: int | None = None,
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Client | Pool:
    """Connect to a unix socket. See `Client` for options; with `connections` it returns a `Pool` of up to so many."""
    return _new(connections, options).connect_unix(path, timeout=timeout, wait=wait)


@overload
def connect_vsock(
    cid: int = ...,
    port: int = ...,
    *,
    connections: None = ...,
    timeout: float | None = ...,
    wait: float | None = ...,
    **options: Unpack[ClientOptions],
) -> Client: ...


@overload
def connect_vsock(
    cid: int = ...,
    port: int = ...,
    *,
    connections: int,
    timeout: float | None = ...,
    wait: float | None = ...,
    **options: Unpack[ClientOptions],
) -> Pool: ...


def connect_vsock(
    cid: int = VSOCK_HOST,
    port: int = DEFAULT_PORT,
    *,
    connections: int | None = None,
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Client | Pool:
    """Connect over vsock; the default is the host of this virtual machine, NBD's port. See `Client` for options.

    With `connections` it returns a `Pool` of up to so many.
    """
    return _new(connections, options).connect_vsock(cid, port, timeout=timeout, wait=wait)


@overload
def connect_ssh(
    host: str,
    *,
    socket: str | None = ...,
    port: int | None = ...,
    user: str | None = ...,
    ssh_port: int | None = ...,
    connections: None = ...,
    timeout: float | None = ...,
    wait: float | None = ...,
    **options: Unpack[ClientOptions],
) -> Client: ...


@overload
def connect_ssh(
    host: str,
    *,
    socket: str | None = ...,
    port: int | None = ...,
    user: str | None = ...,
    ssh_port: int | None = ...,
    connections: int,
    timeout: float | None = ...,
    wait: float | None = ...,
    **options: Unpack[ClientOptions],
) -> Pool: ...


def connect_ssh(
    host: str,
    *,
    socket: str | None = None,
    port: int | None = None,
    user: str | None = None,
    ssh_port: int | None = None,
    connections: int | None = None,
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Client | Pool:
    """Connect through ssh to a server on another machine. See `Client.connect_ssh`, and `Client` for options.

    With `connections` it returns a `Pool` of up to so many, each through an ssh of its own.
    """
    client = _new(connections, options)
    return client.connect_ssh(host, socket=socket, port=port, user=user, ssh_port=ssh_port, timeout=timeout, wait=wait)


def connect_command(
    argv: Iterable[str], *, timeout: float | None = None, wait: float | None = None, **options: Unpack[ClientOptions]
) -> Client:
    """Run a server that talks on its standard input and output. See `Client.connect_command`, and `Client` for options."""
    return _single("connect_command", options).connect_command(argv, timeout=timeout, wait=wait)


def connect_socket_activation(
    argv: Iterable[str],
    *,
    name: str = "unknown",
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Client:
    """Run a server that takes a listening socket over. See `Client.connect_socket_activation`, and `Client` for options."""
    client = _single("connect_socket_activation", options)
    return client.connect_socket_activation(argv, name=name, timeout=timeout, wait=wait)


def connect_socket(socket: Any, *, timeout: float | None = None, **options: Unpack[ClientOptions]) -> Client:
    """Connect over a connected stream socket, or its descriptor. See `Client.connect_socket`, and `Client` for options."""
    return _single("connect_socket", options).connect_socket(socket, timeout=timeout)


def list_exports(
    uri: str, *, timeout: float | None = None, wait: float | None = None, **options: Unpack[ClientOptions]
) -> list[Export]:
    """Ask the server that an NBD URI names which exports it has; the one in the URI does not matter. See `Client` for options."""
    deadline = deadline_after(timeout)
    options["opt_mode"] = True
    with Client(**options) as client:
        client.connect(uri, timeout=timeout, wait=wait)
        return client.opt_list(timeout=timeout if wait else deadline.remaining())


def _new(connections: int | None, options: ClientOptions) -> Client | Pool:
    return Client(**options) if connections is None else Pool(connections=connections, **options)


def _single(call: str, options: ClientOptions) -> Client:
    refuse_pool(call, options)
    return Client(**options)

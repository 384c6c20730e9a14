"""NBD for asyncio, with the names of `nbdcore` as far as they wait.

    import nbdcore.aio

    async with nbdcore.aio.connect("nbd://localhost/disk") as disk:
        blocks = await asyncio.gather(*(disk.pread(4096, offset) for offset in range(0, disk.size, 4096)))

Imported by its own name only: `import nbdcore` does not bring asyncio. Values and errors are those of `nbdcore`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypeVar, Unpack

from nbdcore.clients.asyncio.client import AsyncClient
from nbdcore.clients.asyncio.pool import AsyncPool
from nbdcore.clients.connect.methods import DEFAULT_PORT, VSOCK_HOST
from nbdcore.clients.connect.options import CONNECTIONS, ClientOptions
from nbdcore.clients.requests.arguments import Socket, StrPath, deadline_after
from nbdcore.protocol.handshake.agreement import Export
from nbdcore.streams.base import Stream

if TYPE_CHECKING:
    from nbdcore.disk.awaited import checksum, compare
    from nbdcore.disk.copying.asynchronous import copy

__all__ = [
    "AsyncClient",
    "AsyncPool",
    "Connecting",
    "checksum",
    "compare",
    "connect",
    "connect_command",
    "connect_socket",
    "connect_socket_activation",
    "connect_ssh",
    "connect_stream",
    "connect_tcp",
    "connect_unix",
    "connect_vsock",
    "copy",
    "create_pool",
    "list_exports",
]

# What is done with whole disks, imported when it is first used: clients alone need nothing of it.
_OF_WHOLE_DISKS = {
    "checksum": "nbdcore.disk.awaited",
    "compare": "nbdcore.disk.awaited",
    "copy": "nbdcore.disk.copying.asynchronous",
}


def __getattr__(name: str) -> object:
    module = _OF_WHOLE_DISKS.get(name)
    if module is None:
        raise AttributeError(f"module 'nbdcore.aio' has no attribute {name!r}")
    value: object = getattr(import_module(module), name)
    globals()[name] = value
    return value


AnyClient = TypeVar("AnyClient", bound=AsyncClient | AsyncPool)


class Connecting(Generic[AnyClient]):
    """What the `connect` functions return: await it for the client, or open an `async with` block with it."""

    def __init__(self, client: AnyClient, connect: Callable[[AnyClient], Awaitable[AnyClient]]) -> None:
        self._client = client
        self._connect = connect

    def __await__(self) -> Generator[Any, None, AnyClient]:
        return self._connect(self._client).__await__()

    async def __aenter__(self) -> AnyClient:
        return await self._connect(self._client)

    async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        await self._client.__aexit__(kind, *rest)


def connect(
    uri: str,
    *,
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Connecting[AsyncClient]:
    """Connect to the server and export that an NBD URI names. See `nbdcore.Client` for options."""
    return Connecting(AsyncClient(**options), lambda client: client.connect(uri, timeout=timeout, wait=wait))


def create_pool(
    uri: str,
    *,
    connections: int = CONNECTIONS,
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Connecting[AsyncPool]:
    """Connect to the server and export that an NBD URI names, with up to so many connections. See `AsyncPool`.

    By another way than a URI: `await AsyncPool(connections=4).connect_tcp("host")`.
    """
    pool = AsyncPool(connections=connections, **options)
    return Connecting(pool, lambda pool: pool.connect(uri, timeout=timeout, wait=wait))


def connect_tcp(
    host: str = "localhost",
    port: int = DEFAULT_PORT,
    *,
    keepalive: bool = False,
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Connecting[AsyncClient]:
    """Connect over TCP. See `nbdcore.Client` for options."""
    return Connecting(
        AsyncClient(**options), lambda client: client.connect_tcp(host, port, keepalive=keepalive, timeout=timeout, wait=wait)
    )


def connect_unix(
    path: StrPath | bytes,
    *,
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Connecting[AsyncClient]:
    """Connect to a unix socket. See `nbdcore.Client` for options."""
    return Connecting(AsyncClient(**options), lambda client: client.connect_unix(path, timeout=timeout, wait=wait))


def connect_vsock(
    cid: int = VSOCK_HOST,
    port: int = DEFAULT_PORT,
    *,
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Connecting[AsyncClient]:
    """Connect over vsock; the default is the host of this virtual machine, NBD's port. See `nbdcore.Client` for options."""
    return Connecting(AsyncClient(**options), lambda client: client.connect_vsock(cid, port, timeout=timeout, wait=wait))


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
) -> Connecting[AsyncClient]:
    """Connect through ssh to a server on another machine. See `AsyncClient.connect_ssh`, and `nbdcore.Client` for options."""
    return Connecting(
        AsyncClient(**options),
        lambda client: client.connect_ssh(
            host, socket=socket, port=port, user=user, ssh_port=ssh_port, timeout=timeout, wait=wait
        ),
    )


def connect_command(
    argv: Iterable[str], *, timeout: float | None = None, wait: float | None = None, **options: Unpack[ClientOptions]
) -> Connecting[AsyncClient]:
    """Run a server that talks on its standard input and output. See `nbdcore.Client` for options."""
    return Connecting(AsyncClient(**options), lambda client: client.connect_command(argv, timeout=timeout, wait=wait))


def connect_socket_activation(
    argv: Iterable[str],
    *,
    name: str = "unknown",
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Connecting[AsyncClient]:
    """Run a server that takes a listening socket over. See `nbdcore.Client` for options."""
    return Connecting(
        AsyncClient(**options),
        lambda client: client.connect_socket_activation(argv, name=name, timeout=timeout, wait=wait),
    )


def connect_socket(
    socket: Socket | int, *, timeout: float | None = None, **options: Unpack[ClientOptions]
) -> Connecting[AsyncClient]:
    """Connect over a connected stream socket, or its descriptor. See `nbdcore.Client` for options."""
    return Connecting(AsyncClient(**options), lambda client: client.connect_socket(socket, timeout=timeout))


def connect_stream(stream: Stream, *, timeout: float | None = None, **options: Unpack[ClientOptions]) -> Connecting[AsyncClient]:
    """Connect over a stream that is open already, and belongs to the client from then on. See `nbdcore.Client` for options."""
    return Connecting(AsyncClient(**options), lambda client: client.connect_stream(stream, timeout=timeout))


async def list_exports(
    uri: str, *, timeout: float | None = None, wait: float | None = None, **options: Unpack[ClientOptions]
) -> list[Export]:
    """Ask the server that an NBD URI names which exports it has; the one in the URI does not matter. See `nbdcore.Client`."""
    deadline = deadline_after(timeout)
    options["opt_mode"] = True
    async with connect(uri, timeout=timeout, wait=wait, **options) as client:
        return await client.opt_list(timeout=timeout if wait else deadline.remaining())

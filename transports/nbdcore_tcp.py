"""The TCP transport: `nbd://HOST:PORT/EXPORT`.

A host name may have several addresses. They are tried in the resolver's order, IPv6 and IPv4 by turns: the next when the one
before has failed or has not answered for a quarter of a second. The first that answers is taken (RFC 8305, "happy eyeballs").
Names are looked up in a thread, so that connecting never blocks whoever drives it. Nagle's algorithm is off: a small request must
not wait for the answer to the one before it.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any, ClassVar

from nbdcore.errors import TransportError, UsageError, printable
from nbdcore.plugins.spec import Connecting, Listener, Transport, Waiting, hookimpl
from nbdcore.streams.base import Opening, Stream
from nbdcore.streams.connecting import connect_socket, first_of, in_thread
from nbdcore.streams.sockets import SocketListener, SocketStream, transport_errors
from nbdcore.uri import DEFAULT_PORT, URI, format_uri

DEFAULT_HOST = "localhost"

_LAST_PORT = 65535
_HINTS = {errno.ECONNREFUSED: "nothing listens there, or a firewall refuses"}
_LISTEN_HINTS = {
    errno.EACCES: "ports below 1024 need privileges; choose a higher one",
    errno.EADDRINUSE: "another server listens there; stop that one, or choose another port",
    errno.EADDRNOTAVAIL: "that address is not this machine's own; 0.0.0.0 and :: stand for all that are",
}

# A server's client is given up after five minutes of silence to eight probes: two minutes idle, then a probe each 22 seconds. The
# kernel's own two hours would keep the places of dead clients for too long. macOS names the first option TCP_KEEPALIVE.
_PROBES = tuple(
    (getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 120), ("TCP_KEEPALIVE", 120), ("TCP_KEEPINTVL", 22), ("TCP_KEEPCNT", 8))
    if hasattr(socket, name)
)

#: One of what getaddrinfo returns: family, type, protocol, canonical name, socket name.
_One = tuple[int, int, int, str, Any]
_Found = Sequence[_One]


@dataclass(frozen=True, slots=True)
class TCPAddress:
    """Where a server is on the internet.

    Attributes:
        host: name, or IPv4 or IPv6 address without brackets.
        port: 1 to 65535; 0 lets the kernel choose where it is listened on.
        keepalive: have the kernel probe an idle connection, so that a dead peer is noticed. Not part of the URI. None: a server's
            clients are probed, other connections are not.
    """

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    keepalive: bool | None = None

    def __post_init__(self) -> None:
        _check_host(self.host)
        _check_port(self.port)

    def __str__(self) -> str:
        return f"TCP {self.host} port {self.port}"

    def uri(self, export: str = "") -> str:
        """Return `nbd://HOST:PORT/EXPORT`."""
        return format_uri("nbd", host=self.host, port=self.port, export=export)


class TCPTransport(Transport):
    """NBD over TCP, where it was born."""

    name: ClassVar[str] = "tcp"
    schemes: ClassVar[tuple[str, ...]] = ("nbd",)

    def address(self, **parts: Any) -> TCPAddress:
        """Return the address of `host`, `port` and `keepalive`, each optional."""
        try:
            return TCPAddress(**parts)
        except TypeError as exc:
            raise UsageError(
                errno.EINVAL, f"a TCP address may have host, port and keepalive, and nothing else; given: {', '.join(parts)}"
            ) from exc

    def parse(self, uri: URI) -> TCPAddress:
        """Return the address of the URI's host and port, localhost and 10809 where it has none."""
        host = DEFAULT_HOST if uri.host is None else uri.host
        return TCPAddress(host, DEFAULT_PORT if uri.port is None else uri.port)

    def server_name(self, address: TCPAddress) -> str:
        """Return the host."""
        return address.host

    def connect(self, address: TCPAddress, *, timeout: float | None = None) -> Connecting:  # noqa: ARG002 (the kernel has no limit)
        """Try the host's addresses; where none answers, the first one's error counts and all are listed."""
        if not address.port:
            raise UsageError(errno.EINVAL, f"port 0 can be listened on, but not connected to (asked for {address})")
        found = yield from _look_up(address, f"connect to {address}")
        sock = yield from first_of([_connect(address, one) for one in _by_turns(found)])
        return _stream(sock, str(address), keepalive=bool(address.keepalive))

    def listen(self, address: TCPAddress) -> Listener:
        """Listen on the first of the host's addresses: "0.0.0.0" and "::" stand for all of this machine's."""
        doing = f"listen on {address}"
        with transport_errors(doing, _LISTEN_HINTS):
            try:
                family, kind, protocol, _, name = _resolve(address, socket.AI_PASSIVE)[0]
            except socket.gaierror as exc:
                hint = "give a name or an address that this machine has, or 0.0.0.0 for all of them"
                raise TransportError(0, f"cannot {doing}: {exc.strerror}; {hint}") from exc
            sock = socket.socket(family, kind, protocol)
            try:
                # A server that starts again must not wait for its old connections to time out. On Windows the option means
                # something else: that strangers may take the port over.
                if os.name == "posix":
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(name)
                sock.listen()
                return _TCPListener(sock, replace(address, port=sock.getsockname()[1]), keepalive=address.keepalive is not False)
            except BaseException:
                sock.close()
                raise


class _TCPListener(SocketListener):
    def __init__(self, sock: socket.socket, address: TCPAddress, *, keepalive: bool) -> None:
        super().__init__(sock, address)
        # A client whose machine died says nothing, and would keep its place in a server for ever.
        self._keepalive = keepalive

    def stream(self, sock: socket.socket, name: Any) -> Stream:
        stream = _stream(sock, f"TCP client {name[0]} port {name[1]}", keepalive=self._keepalive)
        for option, seconds in _PROBES if self._keepalive else ():
            sock.setsockopt(socket.IPPROTO_TCP, option, seconds)
        return stream


def _stream(sock: socket.socket, peer: str, *, keepalive: bool) -> SocketStream:
    try:
        with transport_errors(f"set up the connection to {peer}"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, keepalive)
            return SocketStream(sock, peer=peer)
    except BaseException:
        sock.close()
        raise


# --- names ---


def _check_host(host: object) -> None:
    """Refuse what is no host name, so that the error names the argument and not the resolver."""
    if not isinstance(host, str) or not host:
        raise UsageError(errno.EINVAL, f"a host is a name or an address such as {DEFAULT_HOST!r}, not {host!r}")
    if host.startswith("-") or not host.isprintable() or any(char in " []/" for char in host):
        raise UsageError(errno.EINVAL, f"{printable(host)!r} is no host name: give a name, or an address without brackets")
    try:
        _encoded(host)
    except UnicodeError as exc:
        raise UsageError(errno.EINVAL, f"{printable(host)!r} is no host name: {exc}") from exc


def _check_port(port: object) -> None:
    if not isinstance(port, int) or not 0 <= port <= _LAST_PORT:
        raise UsageError(errno.EINVAL, f"a TCP port is a number from 0 to {_LAST_PORT}, not {port!r}")


def _encoded(host: str) -> bytes:
    """Return the name as DNS knows it. Python's IDNA tables are loaded only for a name that needs them."""
    return host.encode("ascii" if host.isascii() else "idna")


def _resolve(address: TCPAddress, flags: int = 0) -> _Found:
    return socket.getaddrinfo(_encoded(address.host), address.port, type=socket.SOCK_STREAM, flags=flags)


def _look_up(address: TCPAddress, doing: str) -> Generator[Waiting, None, _Found]:
    with transport_errors(doing):
        try:
            return _resolve(address, socket.AI_NUMERICHOST)
        except socket.gaierror:
            # A name, then. Asking for it may take as long as a name server does.
            return (yield from in_thread(partial(_resolve, address)))


def _by_turns(found: _Found) -> list[_One]:
    """Return the addresses with their families by turns, that of the first one first (RFC 8305, section 4)."""
    first = [one for one in found if one[0] == found[0][0]]
    others = [one for one in found if one[0] != found[0][0]]
    return [one for pair in zip_longest(first, others) for one in pair if one is not None]


def _connect(address: TCPAddress, one: _One) -> Opening[socket.socket]:
    family, kind, protocol, _, name = one
    what = str(address) if name[0] == address.host else f"{address} at {name[0]}"
    with transport_errors(f"connect to {what}"):
        sock = socket.socket(family, kind, protocol)
    return (yield from connect_socket(sock, name, what, _HINTS))


@hookimpl
def nbdcore_transports() -> Iterable[Transport]:
    """Return the one transport of this plugin."""
    return (TCPTransport(),)

"""NBD through an HTTP proxy: `nbd+proxy://HOST:PORT/EXPORT?proxy=PROXYHOST:PORT`.

The proxy is asked to CONNECT (RFC 9110 section 9.3.6). Its answer ends with an empty line, and what follows is the NBD server's:
it speaks first, and the proxy may deliver both in one packet. So the answer is read a byte at a time, and never one more.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from nbdcore.errors import TransportError, UsageError, printable
from nbdcore.plugins.spec import Connecting, Transport, Waiting, hookimpl
from nbdcore.streams.base import Stream, Want
from nbdcore.streams.connecting import connect_socket, in_thread
from nbdcore.streams.sockets import SocketStream, transport_errors
from nbdcore.uri import URI, format_uri

# Proxies say more than a line, but not a book.
LONGEST_ANSWER = 16 * 1024


@dataclass(frozen=True, slots=True)
class ProxyAddress:
    """A server, and the proxy in front of it."""

    host: str
    port: int
    proxy_host: str
    proxy_port: int

    def __str__(self) -> str:
        return f"{self.host} port {self.port} through proxy {self.proxy_host} port {self.proxy_port}"

    def uri(self, export: str = "") -> str:
        proxy = f"{self.proxy_host}:{self.proxy_port}"
        return format_uri("nbd+proxy", host=self.host, port=self.port, export=export, query=[("proxy", proxy)])


class ProxyTransport(Transport):
    """Connects through a proxy; cannot listen."""

    name: ClassVar[str] = "proxy"
    schemes: ClassVar[tuple[str, ...]] = ("nbd+proxy",)
    parameters: ClassVar[tuple[str, ...]] = ("proxy",)

    def address(self, **parts: Any) -> ProxyAddress:
        return ProxyAddress(**parts)

    def parse(self, uri: URI) -> ProxyAddress:
        proxy_host, _, proxy_port = (uri.parameter("proxy") or "").rpartition(":")
        if not uri.host or not proxy_host or not proxy_port.isdecimal():
            raise UsageError(errno.EINVAL, "write nbd+proxy://HOST:PORT/EXPORT?proxy=PROXYHOST:PORT")
        return ProxyAddress(uri.host, 10809 if uri.port is None else uri.port, proxy_host, int(proxy_port))

    def connect(self, address: ProxyAddress, *, timeout: float | None = None) -> Connecting:  # noqa: ARG002 (proxies have no limit)
        what = f"proxy {address.proxy_host} port {address.proxy_port}"
        with transport_errors(f"find {what}"):
            look_up = partial(socket.getaddrinfo, address.proxy_host, address.proxy_port, type=socket.SOCK_STREAM)
            family, kind, protocol, _, name = (yield from in_thread(look_up))[0]
            sock = socket.socket(family, kind, protocol)
        stream = SocketStream((yield from connect_socket(sock, name, what)), peer=str(address))
        try:
            target = f"{address.host}:{address.port}".encode("idna")
            yield from _send(stream, b"CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n" % (target, target))
            _check((yield from _receive_answer(stream)), what)
        except BaseException:
            stream.close()
            raise
        return stream


def _send(stream: Stream, request: bytes) -> Generator[Waiting, None, None]:
    rest = memoryview(request)
    while rest:
        sent = stream.send([rest])
        if sent is None:
            yield stream.fileno(), Want.WRITE
        else:
            rest = rest[sent:]


def _receive_answer(stream: Stream) -> Generator[Waiting, None, bytes]:
    answer = bytearray()
    byte = bytearray(1)
    while not answer.endswith(b"\r\n\r\n"):
        count = stream.recv_into(memoryview(byte))
        if count is None:
            yield stream.fileno(), Want.READ
            continue
        answer += byte[:count]
        if not count or len(answer) > LONGEST_ANSWER:
            raise TransportError(errno.EPROTO, f"no HTTP proxy answers there: {stream}")
    return bytes(answer)


def _check(answer: bytes, what: str) -> None:
    first_line = answer.partition(b"\r\n")[0].decode("latin-1")
    if first_line.split()[1:2] != ["200"]:
        raise TransportError(errno.ECONNREFUSED, f"{what} refused: {printable(first_line)}")


@hookimpl
def nbdcore_transports() -> Iterable[Transport]:
    """Return the transport of this plugin."""
    return [ProxyTransport()]

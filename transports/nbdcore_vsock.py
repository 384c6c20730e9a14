"""The vsock transport: `nbd+vsock://CID:PORT/EXPORT`, between a virtual machine and its host or within one machine.

A context identifier (CID) names a machine: 2 is the host, 1 this machine itself, guests have 3 and more. CIDs and ports have 32
bits (vsock(7)). That this transport loads says that Python can open such sockets, not that a hypervisor is there: the kernel says
that when it connects, in errno numbers that mean something else here than elsewhere, hence the words in `_CONNECT_HINTS`.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from nbdcore.errors import TransportUnavailable, UsageError, printable
from nbdcore.plugins.spec import Connecting, Listener, Transport, hookimpl
from nbdcore.streams.base import from_signal_handler
from nbdcore.streams.connecting import connect_socket
from nbdcore.streams.sockets import SocketListener, SocketStream, transport_errors
from nbdcore.uri import DEFAULT_PORT, URI, VSOCK_HOST, format_uri

if not hasattr(socket, "AF_VSOCK"):
    raise TransportUnavailable("this Python has no vsock sockets (socket.AF_VSOCK): they are Linux's")

#: CIDs with a meaning of their own (vsock(7)), beside the host's; not all Pythons have all of them.
VMADDR_CID_ANY = 2**32 - 1
VMADDR_CID_LOCAL = 1
#: Listening on this port lets the kernel choose one.
VMADDR_PORT_ANY = 2**32 - 1

#: Seconds that the kernel may take to connect when the caller names no timeout. Its own default, 2, is less than a busy guest may
#: need.
DEFAULT_CONNECT_TIMEOUT = 10.0
#: Seconds by which the kernel's limit outlasts the caller's own timeout, so that it is always the caller's that is reported.
_MARGIN = 1.0
#: The longest limit that kernels of 32 bits take too (seconds): a day.
_LONGEST_TIMEOUT = 86400.0
#: From linux/vm_sockets.h: an option of level AF_VSOCK that takes a struct timeval. Python does not have it.
_SO_VM_SOCKETS_CONNECT_TIMEOUT = 6

_NO_VSOCK = "this kernel has no vsock: its module vsock is not loaded"
_CONNECT_HINTS = {
    errno.ECONNRESET: "nothing listens on that port",
    errno.ENODEV: "there is no vsock device, or no vsock transport, that leads to that CID",
    errno.ETIMEDOUT: "that machine is not up, or there is none (CID 1 needs the kernel module vsock_loopback)",
    errno.EAFNOSUPPORT: _NO_VSOCK,
}
_LISTEN_HINTS = {
    errno.EACCES: "ports below 1024 need privileges; choose a higher one",
    errno.EADDRINUSE: "another server listens on that port; stop that one, or choose another port",
    errno.EADDRNOTAVAIL: "that CID is not this machine's own; without one it is all that are",
    errno.EAFNOSUPPORT: _NO_VSOCK,
}


@dataclass(frozen=True, slots=True)
class VsockAddress:
    """Where a server is among this machine, its host and its guests.

    Attributes:
        cid: context identifier of the machine, 32 bits.
        port: 32 bits. Where it is listened on, 0 and VMADDR_PORT_ANY let the kernel choose.
    """

    cid: int = VSOCK_HOST
    port: int = DEFAULT_PORT

    def __post_init__(self) -> None:
        _check_number("CID", self.cid)
        _check_number("port", self.port)

    def __str__(self) -> str:
        return f"vsock CID {'any' if self.cid == VMADDR_CID_ANY else self.cid}, port {self.port}"

    def uri(self, export: str = "") -> str:
        """Return `nbd+vsock://CID:PORT/EXPORT`."""
        return format_uri("nbd+vsock", host=str(self.cid), port=self.port, export=export)


class VsockTransport(Transport):
    """NBD over vsock, with no network in between."""

    name: ClassVar[str] = "vsock"
    schemes: ClassVar[tuple[str, ...]] = ("nbd+vsock",)

    def address(self, **parts: Any) -> VsockAddress:
        """Return the address of `cid` and `port`, each optional: the host, and 10809."""
        try:
            return VsockAddress(**parts)
        except TypeError as exc:
            raise UsageError(
                errno.EINVAL, f"a vsock address may have cid and port, and nothing else; given: {', '.join(parts)}"
            ) from exc

    def listening_address(self, **parts: Any) -> VsockAddress:
        """Return the address of `cid` and `port`, each optional: any CID, and 10809."""
        return self.address(**{"cid": VMADDR_CID_ANY, **parts})

    def parse(self, uri: URI) -> VsockAddress:
        """Return the address of `nbd+vsock://`, `nbd+vsock://CID` or `nbd+vsock://CID:PORT`; a CID is a decimal number."""
        port = DEFAULT_PORT if uri.port is None else uri.port
        return VsockAddress(VSOCK_HOST if uri.host is None else _cid(uri.host), port)

    def connect(self, address: VsockAddress, *, timeout: float | None = None) -> Connecting:
        """Connect. The kernel gives up by itself: some time after `timeout`, or after 10 seconds where there is none."""
        if address.cid == VMADDR_CID_ANY or address.port == VMADDR_PORT_ANY:
            raise UsageError(errno.EINVAL, f"{address} can be listened on, but not connected to")
        sock = _socket(f"connect to {address}")
        try:
            _limit_connecting(sock, DEFAULT_CONNECT_TIMEOUT if timeout is None else timeout + _MARGIN)
        except BaseException:
            sock.close()
            raise
        yield from connect_socket(sock, (address.cid, address.port), str(address), _CONNECT_HINTS)
        return SocketStream(sock, peer=str(address))

    def listen(self, address: VsockAddress) -> Listener:
        """Listen on `address`: VMADDR_CID_ANY takes callers on every CID that this machine has."""
        doing = f"listen on {address}"
        sock = _socket(doing)
        try:
            with transport_errors(doing, _LISTEN_HINTS):
                # To the kernel 0 is a port like any other; as everywhere else, here it asks for one.
                sock.bind((address.cid, address.port or VMADDR_PORT_ANY))
                sock.listen()
                return _VsockListener(sock, replace(address, port=sock.getsockname()[1]))
        except BaseException:
            sock.close()
            raise


class _VsockListener(SocketListener):
    def stream(self, sock: socket.socket, name: Any) -> SocketStream:
        return SocketStream(sock, peer=f"vsock client CID {name[0]}, port {name[1]}")


def _check_number(what: str, number: object) -> None:
    if not isinstance(number, int) or not 0 <= number < 2**32:
        raise UsageError(errno.EINVAL, f"a vsock {what} is a number from 0 to {2**32 - 1}, not {number!r}")


def _cid(host: str) -> int:
    if not (host.isascii() and host.isdigit()):
        raise UsageError(errno.EINVAL, f"a vsock CID is a number, such as 2 for the host, not {printable(host)!r}")
    # int() refuses thousands of digits in words of its own; ten are enough for 32 bits.
    digits = host.lstrip("0") or "0"
    return int(digits) if len(digits) <= 10 else 2**32


def _socket(doing: str) -> socket.socket:
    with transport_errors(doing, _CONNECT_HINTS):
        return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)


def _limit_connecting(sock: socket.socket, seconds: float) -> None:
    """Have the kernel give up connecting after `seconds`, in place of its own 2."""
    whole, fraction = divmod(min(seconds, _LONGEST_TIMEOUT), 1)
    timeval = struct.pack("@ll", int(whole), int(fraction * 1_000_000))
    # Python takes only integers as options of an AF_VSOCK socket. A second object over the same descriptor, made as of another
    # family, lets the bytes through.
    other = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=sock.fileno())
    try:
        other.setsockopt(socket.AF_VSOCK, _SO_VM_SOCKETS_CONNECT_TIMEOUT, timeval)
    except OSError as exc:
        # A kernel that does not know the option keeps its own limit: no reason not to connect.
        if from_signal_handler(exc):
            raise
    finally:
        other.detach()


@hookimpl
def nbdcore_transports() -> Iterable[Transport]:
    """Return the one transport of this plugin."""
    return (VsockTransport(),)

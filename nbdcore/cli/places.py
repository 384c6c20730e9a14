"""Where `nbdcore serve` listens: what its options say, and the URIs that clients connect to. Transports know how."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from nbdcore import URI, UsageError, parse_uri
from nbdcore.server import Server
from nbdcore.streams.base import Listener

__all__ = ["LOOPBACK", "Place", "for_clients", "is_loopback", "tcp_place", "unix_place", "uri_place", "vsock_place"]

#: The address that only this machine reaches.
LOOPBACK = "127.0.0.1"
# What a place of TCP has as its transport: the name of it, or the scheme of its URI.
_TCP = frozenset({"tcp", "nbd"})
# Addresses that only a listener can have, and what a client puts in their place: "every address" of TCP, every CID of vsock
# (VMADDR_CID_ANY), for which a virtual machine says 2, its host.
_INSTEAD = {"0.0.0.0": LOOPBACK, "::": "::1", str(2**32 - 1): "2"}
_NOTES = {
    "0.0.0.0": "  (elsewhere: this machine's name or address in place of 127.0.0.1)",
    "::": "  (elsewhere: this machine's name or address in place of [::1])",
    str(2**32 - 1): "  (for virtual machines of this host; elsewhere: this machine's CID in place of 2)",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where to listen: a transport and the parts of its address, or a URI."""

    transport: str
    parts: dict[str, Any]
    uri: str = ""

    def listen(self, server: Server, *, keepalive: bool = True) -> Listener:
        """Start listening. Without `keepalive` clients of TCP are not probed."""
        more = {"keepalive": False} if not keepalive and self.transport in _TCP else {}
        return server.listen_uri(self.uri, **more) if self.uri else server.listen(self.transport, **self.parts, **more)


def tcp_place(text: str) -> Place:
    """Return the place that `[HOST:]PORT` names: without a host on this machine alone. Raises click.BadParameter."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise click.BadParameter(f"write an IPv6 address in brackets, as in [{host}]:{port}")
    if not _is_number(port) or (colon and not host):
        raise click.BadParameter(f"{text!r} is not PORT or HOST:PORT, such as 10809 or 0.0.0.0:10809")
    return Place("tcp", {"host": host or LOOPBACK, "port": int(port)})


def vsock_place(text: str) -> Place:
    """Return the place that `[CID:]PORT` names. Raises click.BadParameter."""
    cid, colon, port = text.rpartition(":")
    if not _is_number(port) or (colon and not _is_number(cid)):
        raise click.BadParameter(f"{text!r} is not PORT or CID:PORT, such as 10809 or 1:10809")
    return Place("vsock", {"port": int(port)} | ({"cid": int(cid)} if colon else {}))


def unix_place(text: str) -> Place:
    """Return the place of a unix socket's path."""
    # Its URI must hold wherever a client is started.
    return Place("unix", {"path": Path(text).absolute() if text else ""})


def uri_place(text: str) -> Place:
    """Return the place that an NBD URI names. Raises click.BadParameter."""
    try:
        return Place(parse_uri(text).transport_scheme, {}, uri=text)
    except UsageError as error:
        raise click.BadParameter(error.message) from error


def _is_number(text: str) -> bool:
    """Whether it can be a port or a CID, of 32 bits; the transport knows the limits."""
    return re.fullmatch("[0-9]{1,10}", text) is not None


def for_clients(listening_at: URI) -> tuple[str, str]:
    """Return the URI that a client connects to, and where that one does not lead from everywhere, a note about it."""
    host = listening_at.host or ""
    return str(replace(listening_at, host=_INSTEAD.get(host, listening_at.host))), _NOTES.get(host, "")


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a host of this name or address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

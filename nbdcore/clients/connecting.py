"""From "where" to an open stream: finds the transport, lets it make an address of the caller's words, and drives its connect.

The one place of the clients that knows the registry, so that the front ends name transports and never import one.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbdcore.errors import TLSError
from nbdcore.plugins.registry import registry
from nbdcore.streams.base import Address, Stream
from nbdcore.streams.waiting import Deadline, drive
from nbdcore.uri import parse_uri

if TYPE_CHECKING:
    from nbdcore.plugins.spec import Transport


@dataclass(frozen=True, slots=True)
class Route:
    """A transport, and an address in its terms."""

    transport: Transport
    address: Address

    def open(self, *, timeout: float | None, deadline: Deadline) -> Stream:
        """Open a stream. Raises TransportError, or DeadlineExceeded; nothing is left open then."""
        connecting = self.transport.connect(self.address, timeout=timeout)
        return drive(connecting, deadline, f"connecting to {self.address} took too long")


def route_by_name(name: str, parts: dict[str, Any]) -> Route:
    """Return the way to the address that `parts` name. Raises TransportUnavailable, or UsageError for wrong parts."""
    transport = registry.get(name)
    return Route(transport, transport.address(**parts))


def route_by_uri(text: str) -> tuple[Route, str]:
    """Return the way to a URI's server, and the export it names. Raises UsageError or TransportUnavailable."""
    uri = parse_uri(text)
    if uri.tls:
        raise TLSError(errno.ENOTSUP, f"{uri.scheme} demands TLS, which this release does not bring; use {uri.transport_scheme}")
    transport = registry.for_uri(uri)
    return Route(transport, transport.parse(uri)), uri.export

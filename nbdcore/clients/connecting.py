"""From "where" to an open stream: finds the transport, lets it make an address of the caller's words, and drives its connect.

The one place of the clients that knows the registry, so that the front ends name transports and never import one.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbdcore.errors import DeadlineExceeded, Disconnected, Error, TLSError, TransportError
from nbdcore.plugins.registry import registry
from nbdcore.streams.base import Address, Stream, Want
from nbdcore.streams.waiting import Deadline, wait
from nbdcore.uri import parse_uri

if TYPE_CHECKING:
    from nbdcore.plugins.spec import Transport

# Seconds after which a connect looks up whether it is still wanted: a person closing a program does not notice.
_LOOK_UP = 0.1


@dataclass(frozen=True, slots=True)
class Route:
    """A transport, and an address in its terms."""

    transport: Transport
    address: Address

    def open(self, *, timeout: float | None, deadline: Deadline, wanted: Callable[[], bool]) -> Stream:
        """Open a stream, as long as it is `wanted`. Raises TransportError, DeadlineExceeded, or Disconnected when it is no more.

        Nothing is left open then.
        """
        connecting = self.transport.connect(self.address, timeout=timeout)
        try:
            while True:
                try:
                    fd, want = next(connecting)
                except StopIteration as end:
                    stream: Stream = end.value
                    return stream
                self._wait(fd, want, deadline, wanted)
        except Error:
            raise
        except OSError as exc:
            raise TransportError(exc.errno or 0, f"cannot connect to {self.address}: {exc.strerror or exc}") from exc
        finally:
            connecting.close()

    def _wait(self, fd: int, want: Want, deadline: Deadline, wanted: Callable[[], bool]) -> None:
        """Wait, looking up now and then: there is nothing yet whose end would tell that another thread closed the client."""
        while True:
            remaining = deadline.remaining()
            look_up = Deadline.after(_LOOK_UP if remaining is None else min(remaining, _LOOK_UP))
            try:
                wait(fd, want, look_up, f"connecting to {self.address} took too long")
                ready = True
            except DeadlineExceeded:
                if deadline.expired:
                    raise
                ready = False
            if not wanted():
                raise Disconnected(errno.ENOTCONN, "the connection was closed by this program while connecting")
            if ready:
                return


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

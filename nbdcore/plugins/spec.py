"""What a transport plugin is: the contract between nbdcore and anyone who can carry bytes to an NBD server.

A plugin is a module named by an entry point of the group `nbdcore.transports`; the entry point's name is what the user says
(`vsock`). The module has one hook, `nbdcore_transports`, that returns its transports. A module that cannot work on this platform
raises TransportUnavailable at import, with the reason: that is quiet, and kept. This module imports pluggy, so that only plugins
and the registry's scan pay for it, never `import nbdcore`.

A transport knows addresses and descriptors, never NBD: an address says where, `connect` opens a Stream to it, and `listen`, where
the transport can, a Listener.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import pluggy

from nbdcore.errors import Error, TransportUnavailable, UsageError
from nbdcore.streams.base import Address, Listener, Opening, Stream, Waiting

if TYPE_CHECKING:
    from nbdcore.uri import URI

__all__ = ["Address", "Connecting", "Listener", "Transport", "TransportUnavailable", "Waiting", "hookimpl", "hookspec"]

#: The entry-point group, and pluggy's project name.
GROUP = "nbdcore.transports"
PROJECT = "nbdcore"

hookspec: pluggy.HookspecMarker = pluggy.HookspecMarker(PROJECT)
hookimpl: pluggy.HookimplMarker = pluggy.HookimplMarker(PROJECT)

#: A connection being opened.
Connecting = Opening[Stream]


class Transport(ABC):
    """One way to carry bytes to a server.

    Attributes:
        name: what the user says, and the entry point's name: "vsock".
        schemes: the URI schemes without TLS that it answers to, such as ("nbd+vsock",). Their `nbds` twins follow by themselves.
        parameters: the query parameters that its URIs may have, in lower case, such as ("socket",). Those about TLS need not be
            named; a URI with any other is refused before `parse` sees it.
        runs_programs: connecting starts a program of this machine. A client then obeys a URI only where its caller has allowed
            this transport by its name, since URIs may come from anywhere.
        starts_servers: connecting starts a server of its own, so that two connections lead to two exports. There is no pool of
            such connections.
    """

    name: ClassVar[str]
    schemes: ClassVar[tuple[str, ...]]
    parameters: ClassVar[tuple[str, ...]] = ()
    runs_programs: ClassVar[bool] = False
    starts_servers: ClassVar[bool] = False

    @abstractmethod
    def address(self, **parts: Any) -> Address:
        """Return the address that these parts name (host and port, path, cid and port), each checked.

        Raises UsageError for a part that is missing, unknown or out of range.
        """

    @abstractmethod
    def parse(self, uri: URI) -> Address:
        """Return the address that a URI of one of `schemes` names, with defaults. Raises UsageError where it does not fit."""

    @abstractmethod
    def connect(self, address: Any, *, timeout: float | None = None) -> Connecting:
        """Open a stream to `address`.

        A generator: it yields `(descriptor, Want)` whenever it must wait, and returns the stream. It must read nothing of what
        the server says: an NBD server speaks first. `timeout` (seconds) is what the caller will wait in all; the caller enforces
        it, a transport needs it only where a kernel has a limit of its own. Raises TransportError, with the operating system's
        error as its cause and its errno.
        """

    def server_name(self, address: Any) -> str | None:  # noqa: ARG002 (for those that know one)
        """Return the host name or address that the server's certificate must be for (TLS); None where none is known."""
        return None

    def is_retryable(self, error: Error) -> bool:  # noqa: ARG002 (for those that can tell)
        """Tell whether an attempt that ended like this, without a word of the server, may succeed a little later.

        For transports whose own programs say that it is not: `error.server_text` is the end of what they wrote.
        """
        return True

    def listening_address(self, **parts: Any) -> Address:
        """Return the address to listen at that these parts name: as `address` does, where other defaults do not make more sense.

        Connecting to a vsock port without a CID goes to the host; listening without one takes callers on every CID.
        """
        return self.address(**parts)

    def listen(self, address: Any) -> Listener:
        """Open a listening endpoint at `address`. Raises TransportError where that fails, UsageError where it cannot listen."""
        raise UsageError(0, f"transport {self.name} can connect, but it cannot listen (asked for {address})")


class TransportHooks:
    """The hooks of the `nbdcore` plugin project."""

    @hookspec
    def nbdcore_transports(self) -> Iterable[Transport]:  # type: ignore[empty-body]  # pluggy calls the plugins', never this one
        """Return the transports of this plugin."""

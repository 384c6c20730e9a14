"""From "where" to an open stream: finds the transport, lets it make an address of the caller's words, and drives its connect.

The one place of the clients that knows the registry, so that the front ends name transports and never import one. What may heal
by itself, when a server is waited for, is decided here too.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbdcore.clients.connect.tls import Permissions
from nbdcore.clients.session.session import StartTLS
from nbdcore.errors import (
    ArgumentTypeError,
    DeadlineExceeded,
    Disconnected,
    Error,
    TransportError,
    TransportUnavailable,
    UsageError,
    printable,
)
from nbdcore.plugins.registry import registry
from nbdcore.protocol.handshake.agreement import TLSPolicy
from nbdcore.protocol.state import Phase
from nbdcore.streams.base import Address, Stream, Want
from nbdcore.streams.sockets import SocketStream
from nbdcore.streams.waiting import Deadline, wait, wait_any
from nbdcore.uri import URI

if TYPE_CHECKING:
    from nbdcore.plugins.spec import Transport

# Seconds after which a connect looks up whether it is still wanted: a person closing a program does not notice.
_LOOK_UP = 0.1

#: What a server that is not up yet looks like. ENOENT: its socket is not there; ENODEV: a virtual machine that vsock leads to has
#: not been started; the last three: its machine is not on the network.
_HEALING = frozenset(
    getattr(errno, name)
    for name in (
        "ECONNREFUSED",
        "ENOENT",
        "ETIMEDOUT",
        "ECONNRESET",
        "ECONNABORTED",
        "EPIPE",
        "EAGAIN",
        "ENODEV",
        "EHOSTUNREACH",
        "EHOSTDOWN",
        "ENETUNREACH",
    )
    if hasattr(errno, name)
)


@dataclass(frozen=True, slots=True)
class Route:
    """A transport, and an address in its terms."""

    transport: Transport
    address: Address

    @property
    def server_name(self) -> str | None:
        """The host that the server's certificate must be for; None where none is known."""
        return self.transport.server_name(self.address)

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
            try:
                wait(fd, want, look_up(deadline), f"connecting to {self.address} took too long")
                ready = True
            except DeadlineExceeded:
                if deadline.expired:
                    raise
                ready = False
            check_wanted(wanted)
            if ready:
                return

    def may_heal(self, error: Error, *, heard: bool) -> bool:
        """Tell whether the same attempt may succeed a little later: the server was not there, or had not said anything yet.

        `heard`: the server has said something.
        """
        if isinstance(error, TransportUnavailable):
            return False
        if isinstance(error, TransportError):
            # A program that cannot be started has an errno of the same kind.
            return not self.transport.runs_programs and (error.errno in _HEALING or _no_name_server(error))
        return isinstance(error, Disconnected | DeadlineExceeded) and not heard and self.transport.may_heal(error)

    def never_up(self, wait: float, last: Error) -> DeadlineExceeded:
        """Return what to raise when the server was waited for in vain, `wait` seconds long; `last` ended the last attempt."""
        said = f": {printable(last.server_text)}" if last.server_text else ""
        return DeadlineExceeded(f"no server at {self.address} within {wait:g} s ({last.message}{said})")


@dataclass(frozen=True, slots=True)
class Way:
    """A route, and whether and how to encrypt on it."""

    route: Route
    tls: TLSPolicy
    start_tls: StartTLS | None


def route_by_name(name: str, parts: dict[str, Any]) -> Route:
    """Return the way to the address that `parts` name. Raises TransportUnavailable, or UsageError for wrong parts."""
    transport = registry.get(name)
    return Route(transport, transport.address(**parts))


def route_by_uri(uri: URI, permissions: Permissions) -> Route:
    """Return the way to a URI's server. Raises UsageError (EPERM where it is not permitted) or TransportUnavailable."""
    transport = registry.for_uri(uri)
    allowed = permissions.transports
    if allowed is None and transport.runs_programs:
        raise UsageError(
            errno.EPERM,
            f"{uri.scheme} starts a program of this machine, which a URI may do only where the caller says "
            f"allow_transports=[{transport.name!r}]",
        )
    if allowed is not None and transport.name not in allowed:
        listed = ", ".join(sorted(allowed)) or "none"
        raise UsageError(errno.EPERM, f"{uri.scheme} needs the transport {transport.name}, and allow_transports names {listed}")
    return Route(transport, transport.parse(uri))


def adopt(sock: Any) -> Stream:
    """Return a stream over a connected socket or its descriptor. Raises UsageError, and then it is still the caller's."""
    if isinstance(sock, bool) or not isinstance(sock, int | socket.socket):
        raise ArgumentTypeError(errno.EINVAL, f"connect_socket: a socket or its descriptor is needed, not {type(sock).__name__}")
    if hasattr(sock, "getpeercert"):
        raise UsageError(errno.EINVAL, "connect_socket: an SSLSocket is encrypted already; NBD starts TLS by itself, with tls=")
    if isinstance(sock, socket.socket):
        return SocketStream(sock)
    try:
        adopted = socket.socket(fileno=sock)
    except (OSError, ValueError) as exc:
        raise UsageError(getattr(exc, "errno", 0) or errno.EBADF, f"connect_socket: {sock} is no descriptor of a socket") from exc
    try:
        stream = SocketStream(adopted)
    except BaseException:
        adopted.detach()
        raise
    adopted.set_inheritable(False)  # Python opens none that programs it starts would inherit
    return stream


def sooner(one: Deadline, other: Deadline) -> Deadline:
    """Return the deadline that comes first."""
    if one.at is None or other.at is None:
        return other if one.at is None else one
    return one if one.at <= other.at else other


def pause(seconds: float, wanted: Callable[[], bool]) -> None:
    """Do nothing for a while, as long as the connection is still `wanted`. Raises Disconnected when it is no more."""
    end = Deadline.after(seconds)
    while not end.expired:
        wait_any((), look_up(end))
        check_wanted(wanted)


def check_wanted(wanted: Callable[[], bool]) -> None:
    """Raise Disconnected when the connection is not wanted any more."""
    if not wanted():
        raise Disconnected(errno.ENOTCONN, "the connection was closed by this program while connecting")


def given_up(where: str, exc: BaseException) -> Error:
    """Return what ends a connection whose connecting was broken off by `exc`: an error of ours, or Ctrl-C and the like."""
    return exc if isinstance(exc, Error) else TransportError(0, f"connecting to {where} was given up ({exc!r})")


def way_to_another(way: Way | None, phase: Phase) -> Way:
    """Return the way on which one more connection can be opened, to ask for exports. Raises UsageError where there is none."""
    if way is not None:
        return way
    if phase is Phase.CREATED:
        raise UsageError(errno.ENOTCONN, "list_exports: the connection is newly created, so there is no server to ask")
    raise UsageError(
        errno.EINVAL,
        "list_exports: the client was connected over a stream, and cannot open another; ask with a client in opt mode",
    )


def look_up(deadline: Deadline) -> Deadline:
    """Return when to look up next: at the deadline, or a little later than now."""
    return sooner(deadline, Deadline.after(_LOOK_UP))


def _no_name_server(error: TransportError) -> bool:
    """Whether a host's name could not be looked up just now, as while a machine is starting."""
    cause = error.__cause__
    return isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_AGAIN

"""From what the caller says to a target: an endpoint, and whether and how to encrypt there.

A target is found by a URI, by a transport's name, or in a stream that is open already. This is the one module of the clients
that knows the registry of transports, so the front ends name transports and never import one. Finding is a generator, as
`establish` drives it: looking for plugins and reading certificates take time, and an event loop leaves them to a thread.

It also decides after which errors an attempt may be made again, while a server is waited for.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from nbdcore.clients.connect.steps import Blocking, Steps
from nbdcore.clients.connect.tls import Encryption, Permissions
from nbdcore.clients.requests.arguments import text
from nbdcore.clients.session.session import StartTLS
from nbdcore.errors import (
    ArgumentTypeError,
    DeadlineExceeded,
    Disconnected,
    Error,
    TransportError,
    TransportUnavailable,
    UsageError,
)
from nbdcore.plugins.registry import registry
from nbdcore.protocol.handshake.agreement import TLSPolicy
from nbdcore.streams.base import Address, Stream
from nbdcore.streams.sockets import SocketStream
from nbdcore.uri import URI, parse_uri

if TYPE_CHECKING:
    from nbdcore.plugins.spec import Connecting, Transport

#: What a server that is not up yet looks like. ENOENT: its socket is not there; ENODEV: a virtual machine that vsock leads to has
#: not been started; the last three: its machine is not on the network.
_RETRYABLE = frozenset(
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
class Endpoint:
    """A transport, and an address in its terms."""

    transport: Transport
    address: Address

    def __str__(self) -> str:
        return str(self.address)

    @property
    def server_name(self) -> str | None:
        """The host that the server's certificate must be for; None where none is known."""
        return self.transport.server_name(self.address)

    @property
    def only_once(self) -> str:
        """Why a second connection would lead to another server; "" where it leads to the same."""
        return "each connection would start a server of its own" if self.transport.starts_servers else ""

    @property
    def may_be_silent(self) -> bool:
        """Whether opening a stream may take long since nobody is there. A program that is run may ask for a password first."""
        return not self.transport.runs_programs

    def open(self, timeout: float | None) -> Connecting:
        """Open a stream, as a transport's `connect` does. `timeout` is for kernels that have a limit of their own."""
        return self.transport.connect(self.address, timeout=timeout)

    def is_retryable(self, error: Error, *, heard: bool) -> bool:
        """Tell whether the same attempt may succeed a little later: the server was not there, or had not said anything yet.

        `heard`: the server has said something.
        """
        if isinstance(error, TransportUnavailable):
            return False
        if isinstance(error, TransportError):
            # A program that cannot be started has an errno of the same kind.
            failures = error.failures or (error,)
            return not self.transport.runs_programs and any(
                failure.errno in _RETRYABLE or _no_name_server(failure) for failure in failures
            )
        return isinstance(error, Disconnected | DeadlineExceeded) and not heard and self.transport.is_retryable(error)


@dataclass(frozen=True, slots=True)
class OpenStream:
    """A stream that is open already, in the place of an endpoint.

    Attributes:
        stream: open.
    """

    stream: Stream
    may_be_silent = False

    def __str__(self) -> str:
        return str(self.stream)

    def open(self, timeout: float | None) -> Connecting:  # noqa: ARG002 (nothing takes time)
        """Return the stream."""
        yield from ()
        return self.stream

    def is_retryable(self, error: Error, *, heard: bool) -> bool:  # noqa: ARG002 (there is no second attempt)
        """Return False."""
        return False


@dataclass(frozen=True, slots=True)
class Target:
    """Where to connect to, and whether and how to encrypt there.

    Attributes:
        endpoint: where.
        tls: whether to ask for TLS.
        start_tls: makes an encrypted stream out of a plain one; None where nobody will ask for it.
        export: the export that the URI names, "" where it names none.
    """

    endpoint: Endpoint | OpenStream
    tls: TLSPolicy
    start_tls: StartTLS | None
    export: str = ""


@dataclass(frozen=True, slots=True)
class ConnectCall:
    """One connect call: its name, and what its client was made with.

    Attributes:
        name: how messages name it.
        check: raises UsageError where the call is not legal any more.
        encryption: whether and how to encrypt, as far as the caller has said.
        permissions: what a URI may do.
        by_hand: the caller may ask for TLS later, in opt mode.
        connections: how many are to be opened.
    """

    name: str
    check: Callable[[], object]
    encryption: Encryption
    permissions: Permissions
    by_hand: bool = False
    connections: int = 1

    def check_only_once(self, why: str) -> None:
        """Raise UsageError where several connections were asked for, and `why` says that there is but one."""
        if self.connections > 1 and why:
            raise UsageError(
                errno.EINVAL,
                f"{self.name}: {why}, and a pool of {self.connections} was asked for; use a client, or connections=1",
            )


#: Finds the target of a connect call. Raises UsageError for what is wrong in the call, and TransportUnavailable; nothing has been
#: opened then.
Find = Callable[[ConnectCall], Steps[Target]]


# ---------------------------------------------------------------------------------------------- finding


def by_uri(uri: Any, call: ConnectCall) -> Steps[Target]:
    """Find what an NBD URI names. Raises UsageError: EPERM for what a URI may not do, EINVAL for what is wrong in it."""
    parsed = parse_uri(text("a URI", uri))
    encryption = call.encryption.with_uri(parsed, call.permissions)
    yield from _plugins()
    endpoint = endpoint_by_uri(parsed, call.permissions)
    call.check_only_once(endpoint.only_once)
    return (yield from _target(endpoint, encryption, call, endpoint.server_name, parsed.export))


def by_name(name: Any, parts: dict[str, Any], call: ConnectCall) -> Steps[Target]:
    """Find the address that `parts` name in the terms of the transport `name`."""
    name = text("a transport's name", name)
    yield from _plugins()
    endpoint = endpoint_by_name(name, parts)
    call.check_only_once(endpoint.only_once)
    return (yield from _target(endpoint, call.encryption, call, endpoint.server_name))


def over_socket(sock: Any, call: ConnectCall) -> Steps[Target]:
    """Find the server at the other end of a connected socket, or of its descriptor."""
    call.check_only_once("a socket is one connection")
    start_tls = yield from _starter(call.encryption, call, None)
    call.check()  # reading certificates takes a while
    stream = adopt(sock)  # the last thing that is done: after a UsageError the socket is still the caller's
    return Target(OpenStream(stream), call.encryption.settled, start_tls)


def over_stream(stream: Any, call: ConnectCall) -> Steps[Target]:
    """Find the server at the other end of an open stream."""
    call.check_only_once("a stream is one connection")
    if not isinstance(stream, Stream):
        hint = ": connect_socket takes one" if hasattr(stream, "recv_into") else ""
        raise ArgumentTypeError(errno.EINVAL, f"connect_stream: a Stream is needed, not {type(stream).__name__}{hint}")
    return (yield from _target(OpenStream(stream), call.encryption, call, None))


def already_found(target: Target, call: ConnectCall) -> Steps[Target]:  # noqa: ARG001 (as all of these take)
    """Return a target that another client has found."""
    yield from ()
    return target


def endpoint_by_name(name: str, parts: dict[str, Any]) -> Endpoint:
    """Return the endpoint that `parts` name. Raises TransportUnavailable, or UsageError for wrong parts."""
    transport = registry.get(name)
    return Endpoint(transport, transport.address(**parts))


def endpoint_by_uri(uri: URI, permissions: Permissions) -> Endpoint:
    """Return the endpoint that a URI names. Raises UsageError (EPERM where it is not permitted) or TransportUnavailable."""
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
    return Endpoint(transport, transport.parse(uri))


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
        raise UsageError(getattr(exc, "errno", 0) or errno.EBADF, f"{sock} is no descriptor of a socket") from exc
    try:
        stream = SocketStream(adopted)
    except BaseException:
        adopted.detach()
        raise
    adopted.set_inheritable(False)  # Python opens none that programs it starts would inherit
    return stream


def target_of_another(target: Target | None) -> Target:
    """Return where one more connection can be opened, to ask for exports. Raises UsageError where there is no such place."""
    if target is None:
        raise UsageError(errno.ENOTCONN, "list_exports: the connection is newly created, so there is no server to ask")
    if isinstance(target.endpoint, OpenStream):
        raise UsageError(
            errno.EINVAL,
            "list_exports: the client was connected over a stream, and cannot open another; ask with a client in opt mode",
        )
    return target


def _plugins() -> Steps[None]:
    """Look for transports, which takes some tens of milliseconds the first time in a process."""
    if not registry.scanned:
        yield Blocking(registry.statuses)


def _target(
    endpoint: Endpoint | OpenStream, encryption: Encryption, call: ConnectCall, server_name: str | None, export: str = ""
) -> Steps[Target]:
    start_tls = yield from _starter(encryption, call, server_name)
    return Target(endpoint, encryption.settled, start_tls, export)


def _starter(encryption: Encryption, call: ConnectCall, server_name: str | None) -> Steps[StartTLS | None]:
    find = partial(encryption.starter, server_name, by_hand=call.by_hand)
    if not encryption.reads_files(by_hand=call.by_hand):
        return find()
    start_tls: StartTLS | None = yield Blocking(find)
    return start_tls


def _no_name_server(error: Error) -> bool:
    """Whether a host's name could not be looked up just now, as while a machine is starting."""
    cause = error.__cause__
    return isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_AGAIN

"""Every way to connect, for blocking callers: by a URI, a transport, a program, a socket, a stream; and waiting for a server.

Each call is: find the way, take the one step from newly created to connecting, open a stream, shake hands. What can be wrong on
this machine (a URI, an address, a certificate's file) is a UsageError before that step. An attempt that failed is made again,
with a new engine, only where the caller waits for a server and the failure may heal by itself.
"""

from __future__ import annotations

import errno
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Self

from nbdcore.clients.blocking.threads import SharedSession
from nbdcore.clients.connect.options import ClientOptions, checked_encryption, checked_permissions, checked_settings
from nbdcore.clients.connect.target import Way, adopt, check_wanted, given_up, pause, route_by_name, route_by_uri, sooner
from nbdcore.clients.requests.arguments import deadline_after, text
from nbdcore.clients.session.info import Knowledge
from nbdcore.clients.session.session import Session, StartTLS
from nbdcore.errors import ArgumentTypeError, DeadlineExceeded, Error
from nbdcore.protocol.constants import DEFAULT_PORT
from nbdcore.protocol.engine import Engine, Exchange
from nbdcore.protocol.handshake.agreement import TLSPolicy
from nbdcore.protocol.state import Phase
from nbdcore.streams.base import Stream
from nbdcore.streams.waiting import NEVER, Deadline
from nbdcore.uri import parse_uri

VSOCK_HOST = 2  # VMADDR_CID_HOST: seen from a virtual machine, the machine that runs it

#: Seconds between attempts while a server is waited for: short first, since it may be about to listen; the longest costs a
#: machine nothing, and a person does not notice it.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5


class ConnectCalls(Knowledge):
    """The `connect` calls, legal in a newly created client, once.

    Each returns the client, by default with the export open. Raises UsageError, with nothing opened and the client as it was, for
    what is wrong in the call, and TransportUnavailable; TransportError, NegotiationError, ProtocolViolation, Disconnected,
    TLSError, DeadlineExceeded, after which the client is dead.

    `timeout`: seconds for an attempt in all. `wait`: seconds for which attempts are made again while the server is not up:
    nothing listens yet, its machine does not answer, it hangs up without a word. No attempt lasts longer than that. When they
    have passed, DeadlineExceeded is raised, with the last attempt's error as its cause. Every other error is raised at once.
    """

    def __init__(self, options: ClientOptions) -> None:
        super().__init__(Engine(checked_settings(options)))
        self._encryption = checked_encryption(options)
        self._permissions = checked_permissions(options)
        self._shared: SharedSession | None = None
        self._way: Way | None = None
        self._where = ""
        self._closed = False
        # Held while the client changes hands: newly created, connecting, with a session, or closed before it had one.
        # A signal handler may close the client meanwhile, in the same thread.
        self._changing = threading.RLock()

    # ------------------------------------------------------------------------------------------ by a transport

    def connect(self, uri: str, *, timeout: float | None = None, wait: float | None = None) -> Self:
        """Connect to the server and export that an NBD URI names, such as "nbd://host/export" or "nbd+vsock://2:10809".

        `nbds` and its kind require TLS. What else a URI may do is limited by the client's `allow_` options: a UsageError (EPERM).
        """
        self._legal("connect")
        parsed = parse_uri(text("a URI", uri))
        encryption = self._encryption.with_uri(parsed, self._permissions)
        route = route_by_uri(parsed, self._permissions)
        start_tls = encryption.starter(route.server_name, by_hand=self._engine.settings.opt_mode)
        way = Way(route, encryption.settled, start_tls)
        return self._connect("connect", way, timeout=timeout, wait=wait, export=parsed.export)

    def connect_tcp(
        self,
        host: str = "localhost",
        port: int = DEFAULT_PORT,
        *,
        keepalive: bool = False,
        timeout: float | None = None,
        wait: float | None = None,
    ) -> Self:
        """Connect over TCP, trying each address of `host` in turn. `keepalive` lets the system notice a peer that vanished."""
        parts = {"host": host, "port": port, "keepalive": keepalive}
        return self._connect_transport("connect_tcp", "tcp", parts, timeout, wait)

    def connect_unix(self, path: Any, *, timeout: float | None = None, wait: float | None = None) -> Self:
        """Connect to a unix socket: its path (str, bytes or path-like), or NUL and a Linux abstract name."""
        return self._connect_transport("connect_unix", "unix", {"path": path}, timeout, wait)

    def connect_vsock(
        self, cid: int = VSOCK_HOST, port: int = DEFAULT_PORT, *, timeout: float | None = None, wait: float | None = None
    ) -> Self:
        """Connect over vsock; the default is the host of this virtual machine, NBD's port."""
        return self._connect_transport("connect_vsock", "vsock", {"cid": cid, "port": port}, timeout, wait)

    def connect_ssh(
        self,
        host: str,
        *,
        socket: str | None = None,
        port: int | None = None,
        user: str | None = None,
        ssh_port: int | None = None,
        timeout: float | None = None,
        wait: float | None = None,
    ) -> Self:
        """Connect with the program `ssh` to `host`, and from there with `nc` to the server's unix socket, or to its TCP port.

        Without either, to NBD's port of `host` itself. Logging in is ssh's business: its configuration, keys and agent.
        """
        parts = {"host": host, "socket": socket, "port": port, "user": user, "ssh_port": ssh_port}
        return self._connect_transport("connect_ssh", "ssh", parts, timeout, wait)

    def connect_transport(self, name: str, /, *, timeout: float | None = None, wait: float | None = None, **address: Any) -> Self:
        """Connect over any transport by its name; the address parts are the transport's own."""
        return self._connect_transport("connect_transport", text("a transport's name", name), address, timeout, wait)

    # ------------------------------------------------------------------------------------------ by a program

    def connect_command(self, argv: Iterable[str], *, timeout: float | None = None, wait: float | None = None) -> Self:
        """Run a server that talks on its standard input and output, such as `["nbdkit", "-s", "memory", "1G"]`.

        No shell reads the arguments. The program ends when the connection does. If it fails, the end of what it wrote to its
        standard error is in the error.
        """
        return self._connect_transport("connect_command", "command", {"argv": argv}, timeout, wait)

    def connect_socket_activation(
        self, argv: Iterable[str], *, name: str = "unknown", timeout: float | None = None, wait: float | None = None
    ) -> Self:
        """Run a server that takes a listening socket over by systemd's protocol (sd_listen_fds(3)), such as `["nbdkit", ...]`.

        The socket is a unix one in a folder of its own; the server is told that it is for `name`. Otherwise as `connect_command`.
        """
        parts = {"argv": argv, "activation": name}
        return self._connect_transport("connect_socket_activation", "command", parts, timeout, wait)

    # ------------------------------------------------------------------------------------------ over what is open

    def connect_socket(self, socket: Any, *, timeout: float | None = None) -> Self:
        """Connect over a connected stream socket, or its descriptor; it belongs to the client from here on.

        After a UsageError it is still the caller's. No host is known by which a server's certificate could be checked.
        """
        deadline = deadline_after(timeout)
        self._legal("connect_socket")
        start_tls = self._starter(None)
        return self._connect_open("connect_socket", adopt(socket), start_tls, deadline)

    def connect_stream(self, stream: Stream, *, timeout: float | None = None) -> Self:
        """Connect over a stream that is open already, and belongs to the client from here on.

        After a UsageError it is still the caller's. No host is known by which a server's certificate could be checked.
        """
        deadline = deadline_after(timeout)
        self._legal("connect_stream")
        if not isinstance(stream, Stream):
            hint = ": connect_socket takes one" if hasattr(stream, "recv_into") else ""
            raise ArgumentTypeError(errno.EINVAL, f"connect_stream: a Stream is needed, not {type(stream).__name__}{hint}")
        return self._connect_open("connect_stream", stream, self._starter(None), deadline)

    # ------------------------------------------------------------------------------------------ what they share

    @abstractmethod
    def close(self) -> None:
        """Close the connection now."""

    @abstractmethod
    def _exchange(self, start: Callable[[Engine], Exchange], deadline: Deadline, what: str) -> Any:
        """Run one conversation with the server and return its result; `what` is how messages name it."""

    def _starter(self, server_name: str | None) -> StartTLS | None:
        return self._encryption.starter(server_name, by_hand=self._engine.settings.opt_mode)

    def _connect_transport(self, call: str, name: str, parts: dict[str, Any], timeout: float | None, wait: float | None) -> Self:
        self._legal(call)
        route = route_by_name(name, parts)
        way = Way(route, self._encryption.settled, self._starter(route.server_name))
        return self._connect(call, way, timeout=timeout, wait=wait)

    def _connect_open(self, call: str, stream: Stream, start_tls: StartTLS | None, deadline: Deadline) -> Self:
        self._begin_connecting(call, str(stream), self._encryption.settled)
        self._shake_hands(stream, start_tls, deadline)
        return self

    def _connect(self, call: str, way: Way, *, timeout: float | None, wait: float | None = None, export: str = "") -> Self:
        deadline_after(timeout)  # a wrong one shows now
        until = deadline_after(wait) if wait else NEVER
        self._begin_connecting(call, str(way.route.address), way.tls, way=way, export=export)
        if not wait:
            self._attempt(way, deadline_after(timeout))
            return self
        self._wait_for_server(way, timeout, wait, until)
        return self

    def _wait_for_server(self, way: Way, timeout: float | None, wait: float, until: Deadline) -> None:
        last: Error | None = None
        seconds = _FIRST_PAUSE
        while True:
            engine = self._engine
            try:
                self._attempt(way, sooner(deadline_after(timeout), until))
            except Error as exc:
                if not way.route.may_heal(exc, heard=engine.traffic.bytes_received > 0):
                    raise
                # An attempt that was cut off because the time is up says less than the one before it.
                last = last if last is not None and until.expired and isinstance(exc, DeadlineExceeded) else exc
            else:
                return
            if until.expired:
                raise way.route.never_up(wait, last) from last
            self._begin_anew()
            remaining = until.remaining()
            self._pause(seconds if remaining is None else min(seconds, remaining))
            seconds = min(seconds * 2, _LONGEST_PAUSE)

    def _pause(self, seconds: float) -> None:
        try:
            pause(seconds, self._is_connecting)
        except BaseException as exc:
            self._give_up(exc)
            raise

    def _attempt(self, way: Way, deadline: Deadline) -> None:
        try:
            stream = way.route.open(timeout=deadline.remaining(), deadline=deadline, wanted=self._is_connecting)
        except BaseException as exc:
            self._give_up(exc)
            raise
        self._shake_hands(stream, way.start_tls, deadline)

    def _give_up(self, exc: BaseException) -> None:
        self._engine.fail(given_up(self._where, exc))

    def _is_connecting(self) -> bool:
        return self._engine.phase is Phase.CONNECTING

    def _begin_connecting(self, call: str, where: str, tls: TLSPolicy, *, way: Way | None = None, export: str = "") -> None:
        """Take the one step from newly created to connecting that a client has."""
        with self._changing:
            self._legal(call)
            if export:
                self._engine.choose_export(export)
            self._engine.settings = replace(self._engine.settings, tls=tls)
            self._way, self._where = way, where
            self._engine.connecting()

    def _begin_anew(self) -> None:
        """An attempt has failed: forget what came of it, unless another thread has closed the client."""
        with self._changing:
            check_wanted(lambda: not self._closed)
            self._shared = None
            self._engine = Engine(self._engine.settings)
            self._engine.connecting()

    def _shake_hands(self, stream: Stream, start_tls: StartTLS | None, deadline: Deadline) -> None:
        with self._changing:
            self._shared = SharedSession(Session(self._engine, stream, start_tls=start_tls))
            closed = self.phase is not Phase.CONNECTING
        if closed:  # by another thread, while the stream was being opened
            self._shared.close()
        self._exchange(Engine.handshake, deadline, "the handshake")

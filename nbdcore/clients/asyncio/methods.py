"""Every way to connect, in an event loop: by a URI, a transport, a program, a socket, a stream; and waiting for a server.

As for blocking callers (see `ways`), whose decisions are shared; here each step that could keep the loop from running is waited
for, or done in a thread of the loop's own: finding the plugins, once a process, and reading the files that TLS needs. What is
opened belongs to one event loop from then on.
"""

from __future__ import annotations

import asyncio
import errno
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Self

from nbdcore.clients.asyncio.loop import LoopSession, LoopSessions, check_runs, close_in_loop
from nbdcore.clients.asyncio.waiting import LoopWait, check_loop
from nbdcore.clients.connect.options import ClientOptions, checked_encryption, checked_permissions, checked_settings
from nbdcore.clients.connect.target import Route, Way, adopt, given_up, route_by_name, route_by_uri, sooner
from nbdcore.clients.connect.tls import Encryption
from nbdcore.clients.requests.arguments import deadline_after, text
from nbdcore.clients.session.info import Knowledge
from nbdcore.clients.session.session import Session, StartTLS
from nbdcore.errors import ArgumentTypeError, DeadlineExceeded, Disconnected, Error, UsageError
from nbdcore.plugins.registry import registry
from nbdcore.protocol.constants import DEFAULT_PORT
from nbdcore.protocol.engine import Engine, Exchange
from nbdcore.protocol.handshake.agreement import Settings, TLSPolicy
from nbdcore.protocol.state import Phase
from nbdcore.streams.base import Stream
from nbdcore.streams.sockets import transport_errors
from nbdcore.streams.waiting import NEVER, Deadline
from nbdcore.uri import parse_uri

VSOCK_HOST = 2  # VMADDR_CID_HOST: seen from a virtual machine, the machine that runs it

#: Seconds between attempts while a server is waited for: short first, since it may be about to listen; the longest costs a
#: machine nothing, and a person does not notice it.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5


class AsyncConnectCalls(Knowledge):
    """The `connect` calls, legal in a newly created client, once.

    Each returns the client, by default with the export open. Raises UsageError, with nothing opened and the client as it was, for
    what is wrong in the call, and TransportUnavailable; TransportError, NegotiationError, ProtocolViolation, Disconnected,
    TLSError, DeadlineExceeded, after which, as after a cancellation, the client is dead.

    `timeout`: seconds for an attempt in all. `wait`: seconds for which attempts are made again while the server is not up:
    nothing listens yet, its machine does not answer, it hangs up without a word. No attempt lasts longer than that. When they
    have passed, DeadlineExceeded is raised, with the last attempt's error as its cause. Every other error is raised at once.
    """

    def __init__(self, options: ClientOptions) -> None:
        super().__init__(Engine(checked_settings(options)))
        self._encryption = checked_encryption(options)
        self._permissions = checked_permissions(options)
        self._live: LoopSessions | None = None
        self._waiting: LoopWait | None = None
        self._way: Way | None = None
        self._where = ""
        self._closed = False
        self._lost: weakref.finalize[..., Any] | None = None

    # ------------------------------------------------------------------------------------------ by a transport

    async def connect(self, uri: str, *, timeout: float | None = None, wait: float | None = None) -> Self:
        """Connect to the server and export that an NBD URI names, such as "nbd://host/export" or "nbd+vsock://2:10809".

        `nbds` and its kind require TLS. What else a URI may do is limited by the client's `allow_` options: a UsageError (EPERM).
        """
        self._legal("connect")
        parsed = parse_uri(text("a URI", uri))
        encryption = self._encryption.with_uri(parsed, self._permissions)
        find = lambda: route_by_uri(parsed, self._permissions)  # noqa: E731 (called in a thread)
        return await self._connect("connect", find, encryption, timeout, wait, export=parsed.export)

    async def connect_tcp(
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
        return await self._connect_transport("connect_tcp", "tcp", parts, timeout, wait)

    async def connect_unix(self, path: Any, *, timeout: float | None = None, wait: float | None = None) -> Self:
        """Connect to a unix socket: its path (str, bytes or path-like), or NUL and a Linux abstract name."""
        return await self._connect_transport("connect_unix", "unix", {"path": path}, timeout, wait)

    async def connect_vsock(
        self, cid: int = VSOCK_HOST, port: int = DEFAULT_PORT, *, timeout: float | None = None, wait: float | None = None
    ) -> Self:
        """Connect over vsock; the default is the host of this virtual machine, NBD's port."""
        return await self._connect_transport("connect_vsock", "vsock", {"cid": cid, "port": port}, timeout, wait)

    async def connect_ssh(
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
        return await self._connect_transport("connect_ssh", "ssh", parts, timeout, wait)

    async def connect_transport(
        self, name: str, /, *, timeout: float | None = None, wait: float | None = None, **address: Any
    ) -> Self:
        """Connect over any transport by its name; the address parts are the transport's own."""
        return await self._connect_transport("connect_transport", text("a transport's name", name), address, timeout, wait)

    # ------------------------------------------------------------------------------------------ by a program

    async def connect_command(self, argv: Iterable[str], *, timeout: float | None = None, wait: float | None = None) -> Self:
        """Run a server that talks on its standard input and output, such as `["nbdkit", "-s", "memory", "1G"]`.

        No shell reads the arguments. The program ends when the connection does. If it fails, the end of what it wrote to its
        standard error is in the error.
        """
        return await self._connect_transport("connect_command", "command", {"argv": argv}, timeout, wait)

    async def connect_socket_activation(
        self, argv: Iterable[str], *, name: str = "unknown", timeout: float | None = None, wait: float | None = None
    ) -> Self:
        """Run a server that takes a listening socket over by systemd's protocol (sd_listen_fds(3)), such as `["nbdkit", ...]`.

        The socket is a unix one in a folder of its own; the server is told that it is for `name`. Otherwise as `connect_command`.
        """
        parts = {"argv": argv, "activation": name}
        return await self._connect_transport("connect_socket_activation", "command", parts, timeout, wait)

    # ------------------------------------------------------------------------------------------ over what is open

    async def connect_socket(self, socket: Any, *, timeout: float | None = None) -> Self:
        """Connect over a connected stream socket, or its descriptor; it belongs to the client from here on.

        After a UsageError it is still the caller's. No host is known by which a server's certificate could be checked.
        """
        return await self._connect_open("connect_socket", lambda: adopt(socket), deadline_after(timeout))

    async def connect_stream(self, stream: Stream, *, timeout: float | None = None) -> Self:
        """Connect over a stream that is open already, and belongs to the client from here on.

        After a UsageError it is still the caller's. No host is known by which a server's certificate could be checked.
        """
        if not isinstance(stream, Stream):
            hint = ": connect_socket takes one" if hasattr(stream, "recv_into") else ""
            raise ArgumentTypeError(errno.EINVAL, f"connect_stream: a Stream is needed, not {type(stream).__name__}{hint}")
        return await self._connect_open("connect_stream", lambda: stream, deadline_after(timeout))

    # ------------------------------------------------------------------------------------------ what they share

    async def _connect_transport(
        self, call: str, name: str, parts: dict[str, Any], timeout: float | None, wait: float | None
    ) -> Self:
        self._legal(call)
        return await self._connect(call, lambda: route_by_name(name, parts), self._encryption, timeout, wait)

    async def _connect_open(self, call: str, adopt_stream: Callable[[], Stream], deadline: Deadline) -> Self:
        self._legal(call)
        loop = asyncio.get_running_loop()
        check_loop(loop)
        start_tls = await self._starter(self._encryption, None)
        self._legal(call)
        stream = adopt_stream()
        self._begin_connecting(call, str(stream), self._encryption.settled)
        await self._shake_hands(stream, start_tls, deadline, loop)
        return self

    async def _connect(
        self,
        call: str,
        find: Callable[[], Route],
        encryption: Encryption,
        timeout: float | None,
        wait: float | None,
        *,
        export: str = "",
    ) -> Self:
        deadline = deadline_after(timeout)
        until = deadline_after(wait) if wait else NEVER
        check_loop(asyncio.get_running_loop())
        await _find_plugins()
        route = find()
        way = Way(route, encryption.settled, await self._starter(encryption, route.server_name))
        return await self._go(call, way, timeout=timeout, deadline=deadline, wait=wait, until=until, export=export)

    async def _go(
        self,
        call: str,
        way: Way,
        *,
        timeout: float | None,
        deadline: Deadline,
        wait: float | None = None,
        until: Deadline = NEVER,
        export: str = "",
    ) -> Self:
        self._begin_connecting(call, str(way.route.address), way.tls, way=way, export=export)
        if wait:
            await self._wait_for_server(way, timeout, wait, until)
        else:
            await self._attempt(way, deadline)
        return self

    async def _connect_alike(self, way: Way, settings: Settings, deadline: Deadline) -> None:
        """Connect by the way, and with the settings, of another client."""
        self._engine = Engine(settings)
        self._begin_connecting("connect", str(way.route.address), way.tls, way=way)
        await self._attempt(way, deadline)

    def _release(self) -> LoopSession:
        """Give the open connection to somebody else, who closes it; this client has none from here on."""
        live = self._live
        assert isinstance(live, LoopSession), "what connecting leaves"
        assert self._lost is not None, "what connecting leaves"
        self._lost.detach()
        self._live = self._lost = None
        self._engine = Engine(self._engine.settings)
        self._engine.end("the connection was given to somebody else")
        return live

    async def _starter(self, encryption: Encryption, server_name: str | None) -> StartTLS | None:
        by_hand = self._engine.settings.opt_mode
        if encryption.settled is TLSPolicy.DISABLE and not by_hand:
            return encryption.starter(server_name, by_hand=False)
        return await asyncio.to_thread(encryption.starter, server_name, by_hand=by_hand)

    async def _wait_for_server(self, way: Way, timeout: float | None, wait: float, until: Deadline) -> None:
        last: Error | None = None
        seconds = _FIRST_PAUSE
        while True:
            engine = self._engine
            try:
                await self._attempt(way, sooner(deadline_after(timeout), until))
            except Error as exc:
                if self._closed or not way.route.may_heal(exc, heard=engine.traffic.bytes_received > 0):
                    raise
                # An attempt that was cut off because the time is up says less than the one before it.
                last = last if last is not None and until.expired and isinstance(exc, DeadlineExceeded) else exc
            else:
                return
            if until.expired:
                raise way.route.never_up(wait, last) from last
            self._begin_anew()
            remaining = until.remaining()
            pause = seconds if remaining is None else min(seconds, remaining)
            await self._patiently(partial(LoopWait.pause, seconds=pause))
            seconds = min(seconds * 2, _LONGEST_PAUSE)

    async def _attempt(self, way: Way, deadline: Deadline) -> None:
        address = way.route.address
        with transport_errors(f"connect to {address}"):
            steps = way.route.transport.connect(address, timeout=deadline.remaining())
            stream = await self._patiently(
                lambda waiting: waiting.drive(steps, deadline, f"connecting to {address} took too long")
            )
        await self._shake_hands(stream, way.start_tls, deadline, asyncio.get_running_loop())

    async def _patiently(self, wait: Callable[[LoopWait], Any]) -> Any:
        """Wait as long as the client is not closed by another task; whatever ends the wait early ends the client."""
        self._waiting = LoopWait(asyncio.get_running_loop())
        try:
            return await wait(self._waiting)
        except BaseException as exc:
            self._give_up(exc)
            raise
        finally:
            self._waiting = None

    def _give_up(self, exc: BaseException) -> None:
        self._engine.fail(given_up(self._where, exc))

    def _begin_connecting(self, call: str, where: str, tls: TLSPolicy, *, way: Way | None = None, export: str = "") -> None:
        """Take the one step from newly created to connecting that a client has."""
        self._legal(call)
        if export:
            self._engine.choose_export(export)
        self._engine.settings = replace(self._engine.settings, tls=tls)
        self._way, self._where = way, where
        self._engine.connecting()

    def _begin_anew(self) -> None:
        """An attempt has failed: forget what came of it."""
        if self._lost is not None:
            self._lost.detach()
        self._live = self._lost = None
        self._engine = Engine(self._engine.settings)
        self._engine.connecting()

    async def _shake_hands(
        self, stream: Stream, start_tls: StartTLS | None, deadline: Deadline, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._live = live = LoopSession(Session(self._engine, stream, start_tls=start_tls), loop)
        # A client that nobody knows any more is closed by this, not by a __del__: in a cycle (asyncio makes them, of cancelled
        # tasks) its socket could go before it, with a warning.
        self._lost = weakref.finalize(self, close_in_loop, live)
        if self._engine.phase is not Phase.CONNECTING:  # closed by another task, while the stream was being opened
            live.close()
        await self._exchange(Engine.handshake, deadline, "the handshake")

    async def _exchange(self, start: Callable[[Engine], Exchange], deadline: Deadline, what: str) -> Any:
        return await self._session().exchange(start, deadline, what)

    def _session(self) -> LoopSessions:
        """Return the session. Raises UsageError in any loop but its own, whose thread alone may touch it."""
        live = self._live
        if live is None:
            raise UsageError(errno.ENOTCONN, "not connected")
        check_runs(live.loop)
        return live

    def _close(self) -> None:
        """End the connection now, from wherever this is called."""
        self._closed = True
        if self._live is not None:
            close_in_loop(self._live)
            return
        self._engine.end()
        if self._waiting is not None:
            closed = "the connection was closed by this program while connecting"
            self._waiting.break_off(Disconnected(errno.ENOTCONN, closed))


async def _find_plugins() -> None:
    """Look for transports, which takes some tens of milliseconds the first time."""
    global _found  # noqa: PLW0603 (once a process)
    if not _found:
        await asyncio.to_thread(registry.statuses)
        _found = True


_found = False

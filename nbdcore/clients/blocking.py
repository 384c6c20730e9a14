"""The blocking client: every call waits for its outcome. Safe to use from several threads at once.

A thin skin: commands and their checks come from the protocol core, waiting from `sharing`, arithmetic from `splitting` and
`extents`. What is left here is the shape of the calls.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, Literal, Self, Unpack, overload

from nbdcore.clients import requests
from nbdcore.clients.arguments import deadline_after, texts, whole_numbers
from nbdcore.clients.columns import CombinedExtentColumns, ExtentColumns
from nbdcore.clients.extents import CombinedExtent, Extent, ExtentWalk, extents_by_context
from nbdcore.clients.many import ManyCalls
from nbdcore.clients.requests import PIECES_AT_A_TIME, Request
from nbdcore.clients.settings import ClientOptions
from nbdcore.clients.sharing import SharedSession
from nbdcore.clients.splitting import data_limit
from nbdcore.clients.ways import VSOCK_HOST, ConnectCalls
from nbdcore.errors import DeadlineExceeded, Error, UsageError
from nbdcore.protocol import commands
from nbdcore.protocol.agreement import Export
from nbdcore.protocol.commands import Command
from nbdcore.protocol.constants import BASE_ALLOCATION, DEFAULT_PORT, CommandFlag
from nbdcore.protocol.engine import Engine, Exchange
from nbdcore.protocol.state import Phase
from nbdcore.streams.base import Stream
from nbdcore.streams.waiting import Deadline

# Seconds that leaving a `with` block waits for the server to hang up after the goodbye; what was written is not at stake.
_GOODBYE = 5.0

Buffer = bytes | bytearray | memoryview


class Client(ManyCalls, ConnectCalls):
    """A connection to one export of an NBD server.

    Newly created it is not connected: call one of its `connect` methods once, or use the functions `nbdcore.connect` and its
    kind, which do both. As a context manager it says goodbye and closes at the end.

    Every call that waits takes a `timeout` in seconds (None: for ever) and raises DeadlineExceeded when it runs out; a command is
    then abandoned and the connection stays usable. Any command raises UsageError for arguments that are wrong (nothing is sent),
    CommandError when the server refuses it (the connection lives), Disconnected or ProtocolViolation when the connection ended.
    Offsets and counts are bytes. May be used from several threads at once.

    Ctrl-C, or whatever else a signal handler raises, while a command waits costs that command only; if it hits in the few
    microseconds in which bytes are moved, the connection ends, since nobody knows how many of them have been.

    Args:
        stream: connect over this open stream at once, as `connect_stream` does.
        export: name of the export; "" is the server's default one. A name in a URI goes first.
        contexts: metadata contexts for `extents` and `block_status`, such as "base:allocation" or "qemu:dirty-bitmap:NAME".
        opt_mode: stop before the export is opened, for the `opt_` calls.
        structured_replies: ask for structured replies; without them there is no block status.
        extended_headers: ask for extended headers, with lengths of 64 bits.
        block_size: ask for block size constraints, and promise to obey them.
        full_info: ask for the export's own name and description.
        tls: how to do TLS: a `TLS` value, or True for the system's CAs; then it is required. False forbids it. By default only
            an `nbds` URI asks for it.
        tls_policy: whether to ask for TLS, if not as `tls` says: ALLOW takes it from a server that has it, and goes on in the
            clear with any other, which a man in the middle can be; DISABLE leaves it to `opt_starttls`.
        start_tls: makes an encrypted stream out of a plain one, in place of `tls`.
        allow_transports: names of the transports that a URI may use; None: all but those that run programs (ssh).
        allow_local_files: whether a URI may name files of this machine (tls-certificates, tls-psk-file).
        allow_unverified: whether a URI may switch the verification of the server's certificate off (tls-verify-peer=0).
        allow_priority: whether a URI may choose TLS versions and ciphers (tls-priority).
        timeout: for `stream` only.
    """

    def __init__(
        self,
        stream: Stream | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[ClientOptions],
    ) -> None:
        super().__init__(options)
        if stream is not None:
            self.connect_stream(stream, timeout=timeout)

    def __repr__(self) -> str:
        return f"<nbdcore.Client {self.phase.value}{self._where and ', '}{self._where}>"

    # ------------------------------------------------------------------------------------------ ending

    def disconnect(self, *, timeout: float | None = None) -> None:
        """Say goodbye (NBD_CMD_DISC, or NBD_OPT_ABORT in opt mode), wait until the server has hung up, and close.

        It does not wait for commands of other threads, and it does not flush. Does nothing on a connection that has ended.
        """
        deadline = deadline_after(timeout)
        try:
            if self._shared is not None and self.phase is Phase.CONNECTED:
                self._shared.take_leave(deadline)
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection now. Never raises; may be called twice, and from any thread: waiting calls of others end."""
        with self._changing:
            self._closed = True
            shared = self._shared
            if shared is None:
                self._engine.end()
        if shared is not None:
            shared.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.close()
            return
        try:
            self.disconnect(timeout=_GOODBYE)
        except Error:
            # The server did not take leave in time, or broke off: every call before this one has had its own outcome.
            self.close()

    def __del__(self) -> None:
        if getattr(self, "_shared", None) is not None:
            self.close()

    # ------------------------------------------------------------------------------------------ reading and writing

    def pread(self, count: int, offset: int, *, df: bool = False, timeout: float | None = None) -> bytes:
        """Read `count` bytes at `offset` (section NBD_CMD_READ).

        A count larger than the server's maximum is split, unless `df` asks for an answer in one piece.
        """
        limits = self._connected("pread")
        count, offset = whole_numbers("pread", count, offset)
        if count <= data_limit(limits) or df:
            command = commands.read(limits, count, offset, flags=CommandFlag.DF if df else 0)
            self._run(command, timeout)
            return command.result()
        data = requests.memory_for(limits, count, offset)
        self.pread_into(data, offset, timeout=timeout)
        return bytes(data)

    def pread_into(
        self, buffer: bytearray | memoryview | Any, offset: int, *, df: bool = False, timeout: float | None = None
    ) -> int:
        """Read into a writable, contiguous buffer, as much as it holds, without a copy. Returns the number of bytes.

        After an error the buffer's contents are undefined; nothing is written to it once the call has ended.
        """
        count, request = requests.read_into(self._connected("pread_into"), buffer, offset, df=df)
        self._run(request, timeout)
        return count

    def pwrite(self, data: Buffer | Any, offset: int, *, fua: bool = False, timeout: float | None = None) -> None:
        """Write any bytes-like object at `offset` (section NBD_CMD_WRITE). `fua`: return once it is on stable storage.

        Data larger than the server's maximum are split. Do not change them from another thread before the call has ended.
        """
        self._run(requests.write(self._connected("pwrite"), data, offset, fua=fua), timeout)

    def flush(self, *, timeout: float | None = None) -> None:
        """Wait until every write that was answered before is on stable storage (section NBD_CMD_FLUSH)."""
        self._run(commands.flush(self._connected("flush")), timeout)

    def trim(self, count: int, offset: int, *, fua: bool = False, timeout: float | None = None) -> None:
        """Tell the server that a range is no longer needed (section NBD_CMD_TRIM); what it reads as afterwards is undefined."""
        self._run(requests.trim(self._connected("trim"), count, offset, fua=fua), timeout)

    def zero(
        self,
        count: int,
        offset: int,
        *,
        fua: bool = False,
        no_hole: bool = False,
        fast_zero: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Write zeroes without sending them (section NBD_CMD_WRITE_ZEROES).

        `no_hole`: storage must stay allocated. `fast_zero`: fail with CommandError (ENOTSUP) where it would be no faster than
        writing.
        """
        limits = self._connected("zero")
        request = requests.zero(limits, count, offset, fua=fua, no_hole=no_hole, fast_zero=fast_zero)
        self._run(request, timeout)

    def cache(self, count: int, offset: int, *, timeout: float | None = None) -> None:
        """Tell the server that a range will be needed soon (section NBD_CMD_CACHE)."""
        self._run(requests.cache(self._connected("cache"), count, offset), timeout)

    # ------------------------------------------------------------------------------------------ block status

    def block_status(
        self,
        count: int,
        offset: int,
        *,
        contexts: Iterable[str] | None = None,
        req_one: bool = False,
        timeout: float | None = None,
    ) -> dict[str, list[Extent]]:
        """Ask once what the metadata contexts say of a range (section NBD_CMD_BLOCK_STATUS). Returns extents by context.

        The server may describe less than was asked, or, at its end, more; contexts need not cover the same range. `extents`
        hides all that. `contexts` limits the answer to some of the selected ones; `req_one` to one extent a context. A count too
        large for one request is cut down to what fits, as if the server had described less.
        """
        limits = self._connected("block_status")
        wanted = None if contexts is None else requests.selected(self._engine.agreement, texts("contexts", contexts))
        command = requests.block_status(limits, count, offset, wanted=wanted, req_one=req_one)
        self._run(command, timeout)
        found = extents_by_context(command)
        return found if wanted is None else {name: found[name] for name in wanted.values() if name in found}

    @overload
    def extents(
        self,
        context: str = ...,
        /,
        *,
        offset: int = ...,
        count: int | None = ...,
        columns: Literal[False] = ...,
        timeout: float | None = ...,
    ) -> Iterator[Extent]: ...

    @overload
    def extents(
        self,
        context: str,
        /,
        *more: str,
        offset: int = ...,
        count: int | None = ...,
        columns: Literal[False] = ...,
        timeout: float | None = ...,
    ) -> Iterator[CombinedExtent]: ...

    @overload
    def extents(
        self,
        context: str = ...,
        /,
        *,
        offset: int = ...,
        count: int | None = ...,
        columns: Literal[True],
        timeout: float | None = ...,
    ) -> ExtentColumns: ...

    @overload
    def extents(
        self,
        context: str,
        /,
        *more: str,
        offset: int = ...,
        count: int | None = ...,
        columns: Literal[True],
        timeout: float | None = ...,
    ) -> CombinedExtentColumns: ...

    def extents(
        self,
        context: str = BASE_ALLOCATION,
        /,
        *more: str,
        offset: int = 0,
        count: int | None = None,
        columns: bool = False,
        timeout: float | None = None,
    ) -> Iterator[Extent | CombinedExtent] | ExtentColumns | CombinedExtentColumns:
        """Walk the extents of a range, by default of the whole export.

        Asks the server as often as needed, clips to the range, and merges neighbours of equal status. With several contexts the
        extents end wherever any of them changes, and have one status for each. `timeout` is for each request.

        With `columns` it returns all of them at once as `ExtentColumns` (`CombinedExtentColumns` for several contexts): arrays of
        offsets, lengths and flags, numpy's where numpy is installed. That takes 24 bytes an extent, and 8 for each more context,
        where objects take about 170; a server decides how many there are, so bound an untrusted one by `count`.
        """
        limits = self._connected("extents")
        deadline_after(timeout)  # a wrong one shows now, not at the first step
        walk = requests.walk(limits, self._engine.agreement, (context, *more), offset, count, columns=columns)
        return self._columns(walk, timeout) if columns else chain.from_iterable(self._walk(walk, timeout))

    def _walk(self, walk: ExtentWalk, timeout: float | None) -> Iterator[Iterator[Extent | CombinedExtent]]:
        while walk.position < walk.end:
            command = requests.next_of_walk(self._connected("extents"), walk)
            self._run(command, timeout)
            yield walk.feed(command)

    def _columns(self, walk: ExtentWalk, timeout: float | None) -> ExtentColumns | CombinedExtentColumns:
        while walk.position < walk.end:
            command = requests.next_of_walk(self._connected("extents"), walk)
            self._run(command, timeout)
            walk.take_in(command)
        return walk.columns()

    # ------------------------------------------------------------------------------------------ what else the server has

    def list_exports(self, *, timeout: float | None = None) -> list[Export]:
        """Ask which exports the server has (section NBD_OPT_LIST).

        In opt mode on this connection; otherwise on one more connection to the same server, opened for the question. Raises
        UsageError where no other can be opened: before connecting, and after `connect_stream` and `connect_socket`.
        """
        if self.phase is Phase.NEGOTIATING:
            return self.opt_list(timeout=timeout)
        if self._way is None and self.phase is Phase.CREATED:
            raise UsageError(errno.ENOTCONN, "list_exports: the connection is newly created, so there is no server to ask")
        if self._way is None:
            raise UsageError(
                errno.EINVAL,
                "list_exports: the client was connected over a stream, and cannot open another; ask with a client in opt mode",
            )
        deadline = deadline_after(timeout)
        with Client(opt_mode=True) as other:
            other._connect("connect", self._way, timeout=timeout)
            return other.opt_list(timeout=deadline.remaining())

    # ------------------------------------------------------------------------------------------ running

    def _connected(self, call: str) -> commands.Limits:
        if self._engine.phase is not Phase.CONNECTED:
            self._legal(call)
        return self._engine.limits

    def _run(self, request: Request, timeout: float | None) -> None:
        """Run a request, in as many pieces as it takes."""
        deadline = deadline_after(timeout)
        if isinstance(request, Command):
            self._session().run_command(request, deadline)
        else:
            self._session().run_all(request, deadline, depth=PIECES_AT_A_TIME)

    def _session(self) -> SharedSession:
        if self._shared is None:
            raise UsageError(errno.ENOTCONN, "not connected")
        return self._shared

    def _exchange(self, start: Callable[[Engine], Exchange], deadline: Deadline, what: str) -> Any:
        """Run one conversation with the server. At the deadline the connection is dead."""
        shared = self._session()
        try:
            exchange = shared.run(start, deadline, what)
        except UsageError:
            raise
        except BaseException as exc:
            shared.close(exc if isinstance(exc, Error) else DeadlineExceeded(f"{what} was given up ({exc!r})"))
            raise
        if exchange.error is not None:
            raise exchange.error
        return exchange.result


# ---------------------------------------------------------------------------------------------- functions


def connect(uri: str, *, timeout: float | None = None, wait: float | None = None, **options: Unpack[ClientOptions]) -> Client:
    """Connect to the server and export that an NBD URI names. See `Client` for options, and `Client.connect` for errors."""
    return Client(**options).connect(uri, timeout=timeout, wait=wait)


def connect_tcp(
    host: str = "localhost",
    port: int = DEFAULT_PORT,
    *,
    keepalive: bool = False,
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Client:
    """Connect over TCP. See `Client` for options."""
    return Client(**options).connect_tcp(host, port, keepalive=keepalive, timeout=timeout, wait=wait)


def connect_unix(
    path: Any, *, timeout: float | None = None, wait: float | None = None, **options: Unpack[ClientOptions]
) -> Client:
    """Connect to a unix socket. See `Client` for options."""
    return Client(**options).connect_unix(path, timeout=timeout, wait=wait)


def connect_vsock(
    cid: int = VSOCK_HOST,
    port: int = DEFAULT_PORT,
    *,
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Client:
    """Connect over vsock; the default is the host of this virtual machine, NBD's port. See `Client` for options."""
    return Client(**options).connect_vsock(cid, port, timeout=timeout, wait=wait)


def connect_ssh(
    host: str,
    *,
    socket: str | None = None,
    port: int | None = None,
    user: str | None = None,
    ssh_port: int | None = None,
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Client:
    """Connect through ssh to a server on another machine. See `Client.connect_ssh`, and `Client` for options."""
    client = Client(**options)
    return client.connect_ssh(host, socket=socket, port=port, user=user, ssh_port=ssh_port, timeout=timeout, wait=wait)


def connect_command(
    argv: Iterable[str], *, timeout: float | None = None, wait: float | None = None, **options: Unpack[ClientOptions]
) -> Client:
    """Run a server that talks on its standard input and output. See `Client.connect_command`, and `Client` for options."""
    return Client(**options).connect_command(argv, timeout=timeout, wait=wait)


def connect_socket_activation(
    argv: Iterable[str],
    *,
    name: str = "unknown",
    timeout: float | None = None,
    wait: float | None = None,
    **options: Unpack[ClientOptions],
) -> Client:
    """Run a server that takes a listening socket over. See `Client.connect_socket_activation`, and `Client` for options."""
    return Client(**options).connect_socket_activation(argv, name=name, timeout=timeout, wait=wait)


def connect_socket(socket: Any, *, timeout: float | None = None, **options: Unpack[ClientOptions]) -> Client:
    """Connect over a connected stream socket, or its descriptor. See `Client.connect_socket`, and `Client` for options."""
    return Client(**options).connect_socket(socket, timeout=timeout)


def list_exports(
    uri: str, *, timeout: float | None = None, wait: float | None = None, **options: Unpack[ClientOptions]
) -> list[Export]:
    """Ask the server that an NBD URI names which exports it has; the one in the URI does not matter. See `Client` for options."""
    deadline = deadline_after(timeout)
    options["opt_mode"] = True
    with Client(**options) as client:
        client.connect(uri, timeout=timeout, wait=wait)
        return client.opt_list(timeout=timeout if wait else deadline.remaining())

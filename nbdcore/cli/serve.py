"""`nbdcore serve`: a file, a block device or memory as a disk for others, on any number of transports at once.

Listens to this machine alone unless told otherwise: NBD has no passwords. What the user gives is turned into the server's own
terms here; serving is `nbdcore.server`'s business. Standard output gets one block of lines when all is ready, nothing after it.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import re
import shlex
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import click

from nbdcore import DEFAULT_PORT, URI, UsageError, parse_uri
from nbdcore.cli.output import escaped, say, warn
from nbdcore.cli.sizes import parsed, rounded
from nbdcore.server import Backend, ExportSettings, FileDisk, MemoryDisk, Server
from nbdcore.streams.base import Listener, Want
from nbdcore.streams.sockets import connected_pair
from nbdcore.streams.waiting import NEVER, wait

__all__ = ["serve"]

_LOOPBACK = "127.0.0.1"
# Addresses that only a listener can have, and what a client puts in their place: "every address" of TCP, every CID of vsock
# (VMADDR_CID_ANY), for which a virtual machine says 2, its host.
_INSTEAD = {"0.0.0.0": _LOOPBACK, "::": "::1", str(2**32 - 1): "2"}
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

    def listen(self, server: Server) -> Listener:
        """Start listening."""
        return server.listen_uri(self.uri) if self.uri else server.listen(self.transport, **self.parts)


def _tcp(text: str) -> Place:
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise click.BadParameter(f"write an IPv6 address in brackets, as in [{host}]:{port}")
    if not _is_number(port) or (colon and not host):
        raise click.BadParameter(f"{text!r} is not PORT or HOST:PORT, such as 10809 or 0.0.0.0:10809")
    return Place("tcp", {"host": host or _LOOPBACK, "port": int(port)})


def _vsock(text: str) -> Place:
    cid, colon, port = text.rpartition(":")
    if not _is_number(port) or (colon and not _is_number(cid)):
        raise click.BadParameter(f"{text!r} is not PORT or CID:PORT, such as 10809 or 1:10809")
    return Place("vsock", {"port": int(port)} | ({"cid": int(cid)} if colon else {}))


def _unix(text: str) -> Place:
    # Its URI must hold wherever a client is started.
    return Place("unix", {"path": Path(text).absolute() if text else ""})


def _uri(text: str) -> Place:
    try:
        return Place(parse_uri(text).transport_scheme, {}, uri=text)
    except UsageError as error:
        raise click.BadParameter(error.message) from error


def _is_number(text: str) -> bool:
    """Whether it can be a port or a CID, of 32 bits; the transport knows the limits."""
    return re.fullmatch("[0-9]{1,10}", text) is not None


@click.command(short_help="Serve a file or memory as a disk.")
@click.argument("file", required=False)
@click.option(
    "--memory", type=parsed, metavar="SIZE", help="Serve memory in place of a file: 512M, 1G. Only what is written takes room."
)
@click.option("--tcp", type=_tcp, multiple=True, metavar="[HOST:]PORT", help="Listen on TCP; without HOST for this machine only.")
@click.option("--unix", type=_unix, multiple=True, metavar="PATH", help="Listen on a unix socket.")
@click.option(
    "--vsock",
    type=_vsock,
    multiple=True,
    metavar="[CID:]PORT",
    help="Listen on vsock, for virtual machines; without CID on all of this machine's.",
)
@click.option(
    "--listen", type=_uri, multiple=True, metavar="URI", help="Listen at an NBD URI, on whichever transport has its scheme."
)
@click.option("--read-only", is_flag=True, help="Let nobody write.")
@click.option("--export", default="", metavar="NAME", help="Name of the export; clients find it without a name too.")
@click.option("--description", default="", metavar="TEXT", help="A line about the export, for lists.")
@click.option(
    "--max-clients", type=click.IntRange(min=1), default=128, show_default=True, metavar="N", help="Refuse more at the same time."
)
def serve(  # noqa: PLR0913 (click hands each option over by its name)
    file: str | None,
    *,
    memory: int | None,
    tcp: Sequence[Place],
    unix: Sequence[Place],
    vsock: Sequence[Place],
    listen: Sequence[Place],
    read_only: bool,
    export: str,
    description: str,
    max_clients: int,
) -> None:
    """Serve FILE, or memory, as a disk over NBD, until Ctrl-C.

    FILE is a raw disk image or a block device: its bytes are the disk's. Give as many places to listen at as you like. Without
    any it is TCP on 127.0.0.1 port 10809, which only this machine can reach.

    \b
    nbdcore serve disk.img --vsock 10809
    nbdcore serve --memory 1G --unix /run/disk.sock --tcp 0.0.0.0:10809
    """  # noqa: D301 (a real backspace is how click is told not to wrap)
    if (file is None) == (memory is None):
        raise click.UsageError("Name a FILE to serve, or give --memory SIZE; not both.")
    places = [*tcp, *unix, *vsock, *listen] or [Place("tcp", {"host": _LOOPBACK, "port": DEFAULT_PORT})]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_log_on_stderr())
        wait_for_signal = stack.enter_context(_stopped_by_signals())
        disk, what = _opened(file, memory or 0, read_only=read_only)
        if isinstance(disk, FileDisk):
            stack.callback(disk.close)
        settings = ExportSettings(disk, description=description, read_only=read_only)
        server = Server({export: settings}, max_clients=max_clients)
        stack.callback(server.stop)
        listeners = [place.listen(server) for place in places]
        server.start()
        _announce(what, export, list(zip(places, listeners, strict=True)), read_only=read_only)
        wait_for_signal()


def _opened(file: str | None, memory: int, *, read_only: bool) -> tuple[Backend, str]:
    """Open what is to be served. Returns it, and words for it."""
    if file is None:
        return MemoryDisk(memory), f"{rounded(memory)} of memory, gone when the server stops"
    try:
        disk = FileDisk(file, read_only=read_only)
    except PermissionError as error:
        hint = "" if read_only or not os.access(file, os.R_OK) else "; --read-only serves it for reading"
        raise UsageError(errno.EACCES, f"{file}: {error.strerror}{hint}") from error
    return disk, f"{escaped(file)}, {rounded(disk.size)}"


def _announce(what: str, export: str, listeners: Sequence[tuple[Place, Listener]], *, read_only: bool) -> None:
    """Print where the disk is: a line for each place, its second word the URI. In one piece: a script sees all or nothing."""
    lines = [f"Serving {what}{', read-only' if read_only else ''}."]
    uris = []
    for place, listener in listeners:
        listening_at = parse_uri(listener.address.uri(export))
        uri, note = for_clients(listening_at)
        uris.append(uri)
        lines.append(f"{place.transport}: {uri}{note}")
        if listening_at.transport_scheme == "nbd" and not _is_loopback(listening_at.host or ""):
            warn(f"warning: whoever can reach {listener.address} can {'read' if read_only else 'read and write'} this disk")
    say("\n".join([*lines, f"Ready, until Ctrl-C. To look at it: nbdcore info {shlex.quote(uris[0])}"]))


def for_clients(listening_at: URI) -> tuple[str, str]:
    """Return the URI that a client connects to, and where that one does not lead from everywhere, a note about it."""
    host = listening_at.host or ""
    return str(replace(listening_at, host=_INSTEAD.get(host, listening_at.host))), _NOTES.get(host, "")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# ---------------------------------------------------------------------------------------------- signals and the log


class _Stop(BaseException):
    """A signal asks the server to stop."""


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[Callable[[], None]]:
    """Gives a function that waits for SIGINT or SIGTERM. The first ends this context in order, a second the process at once."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (the interpreter's own signature)
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        raise _Stop

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        with _signalled() as signalled, contextlib.suppress(_Stop):
            yield lambda: _sleep(signalled)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _signalled() -> Iterator[socket.socket]:
    """Give a socket to which every signal that has a handler sends a byte.

    Sleeping is not enough: a signal that another thread takes, or that comes just before the sleep, interrupts nothing, and its
    handler would run when the sleep is over.
    """
    reader, writer = connected_pair()
    with reader, writer:
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(before)


def _sleep(signalled: socket.socket) -> None:
    """Sleep until the handler of a signal raises."""
    while True:
        wait(signalled.fileno(), Want.READ, NEVER, "")
        signalled.recv(64)


class _OneLine(logging.Handler):
    """Prints what the server has to say, as this command prints everything."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage() + (f" ({record.exc_info[1]!r})" if record.exc_info else ""))


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    log = logging.getLogger("nbdcore")
    handler = _OneLine(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)

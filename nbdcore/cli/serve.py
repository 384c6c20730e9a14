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
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import click

from nbdcore import DEFAULT_PORT, UsageError, parse_uri
from nbdcore.cli.output import escaped, say, warn
from nbdcore.cli.sizes import SIZE, rounded
from nbdcore.server import Backend, ExportSettings, FileDisk, MemoryDisk, Server
from nbdcore.streams.base import Listener

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


class _TCP(click.ParamType[Place]):
    name = "[HOST:]PORT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Place:
        host, colon, port = value.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            self.fail(f"write an IPv6 address in brackets, as in [{host}]:{port}", param, ctx)
        if not port.isdecimal() or (colon and not host):
            self.fail(f"{value!r} is not PORT or HOST:PORT, such as 10809 or 0.0.0.0:10809", param, ctx)
        return Place("tcp", {"host": host or _LOOPBACK, "port": int(port)})


class _Vsock(click.ParamType[Place]):
    name = "[CID:]PORT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Place:
        cid, colon, port = value.rpartition(":")
        if not port.isdecimal() or (colon and not cid.isdecimal()):
            self.fail(f"{value!r} is not PORT or CID:PORT, such as 10809 or 1:10809", param, ctx)
        return Place("vsock", {"port": int(port)} | ({"cid": int(cid)} if colon else {}))


class _Unix(click.ParamType[Place]):
    name = "PATH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Place:  # noqa: ARG002 (click's)
        return Place("unix", {"path": value})


class _URI(click.ParamType[Place]):
    name = "URI"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Place:  # noqa: ARG002 (click's)
        return Place(parse_uri(value).transport_scheme, {}, uri=value)


@click.command()
@click.argument("file", required=False)
@click.option(
    "--memory", type=SIZE, metavar="SIZE", help="Serve memory in place of a file: 512M, 1G. Only what is written takes room."
)
@click.option("--tcp", type=_TCP(), multiple=True, help="Listen on TCP; without HOST for this machine only.")
@click.option("--unix", type=_Unix(), multiple=True, help="Listen on a unix socket.")
@click.option(
    "--vsock", type=_Vsock(), multiple=True, help="Listen on vsock, for virtual machines; without CID on all of this machine's."
)
@click.option("--listen", type=_URI(), multiple=True, help="Listen at an NBD URI, on whichever transport has its scheme.")
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
        uri = parse_uri(listener.address.uri(export))
        host = uri.host or ""
        uris.append(str(replace(uri, host=_INSTEAD.get(host, uri.host))))
        lines.append(f"{place.transport}: {uris[-1]}{_NOTES.get(host, '')}")
        if place.transport == "tcp" and not _is_loopback(host):
            warn(f"warning: whoever can reach {listener.address} can {'read' if read_only else 'read and write'} this disk")
    say("\n".join([*lines, f"Ready. To look at it: nbdcore info {shlex.quote(uris[0])}. To stop: Ctrl-C."]))


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
        with contextlib.suppress(_Stop):
            yield _sleep
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _sleep() -> None:
    while True:
        time.sleep(24 * 3600)


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

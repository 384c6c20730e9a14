"""`nbdcore serve`: a file, a block device or memory as a disk for others, on any number of transports at once.

Listens to this machine alone unless told otherwise: NBD has no passwords, and without TLS it keeps no secrets. What the user
gives is turned into the server's own terms here; serving is `nbdcore.server`'s business. Standard output gets one block of lines
when all is ready, nothing after it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from nbdcore import DEFAULT_PORT, UsageError, parse_uri
from nbdcore.cli.output import escaped, say, warn
from nbdcore.cli.places import LOOPBACK, Place, for_clients, is_loopback, tcp_place, unix_place, uri_place, vsock_place
from nbdcore.cli.signals import until_signalled
from nbdcore.cli.sizes import parsed, rounded
from nbdcore.logs import client_log, in_one_line
from nbdcore.processes import available_processors
from nbdcore.server import Backend, ExportSettings, FileDisk, MemoryDisk, Server, ServerTLS, SharedMemoryDisk
from nbdcore.streams.base import Listener

__all__ = ["serve"]


@dataclass(frozen=True, slots=True)
class Encryption:
    """What the options say about TLS."""

    tls: ServerTLS | None = None
    required: bool = False

    @property
    def words(self) -> str:
        """How a disk is served, for a sentence."""
        if self.tls is None:
            return ""
        return ", encrypted" if self.required else ", encrypted for clients that ask for it"

    @property
    def client_options(self) -> str:
        """What `nbdcore info` is told on this machine, where it must encrypt."""
        if self.tls is None or not self.required:
            return ""
        certificates, keys = self.tls.certificates, self.tls.psk_file
        named = ("--tls-certificates", certificates) if certificates is not None else ("--tls-psk", keys)
        return f" {named[0]} {shlex.quote(str(named[1]))}"

    @property
    def admits_anybody(self) -> bool:
        """Whether clients need nothing that only they have."""
        return self.tls is None or not self.required or not (self.tls.verify_clients or self.tls.psk_file)


def _encryption(certificates: str | None, psk: str | None, *, verify_clients: bool, tls: str | None) -> Encryption:
    if certificates is not None and psk is not None:
        raise click.UsageError("--tls-certificates and --tls-psk are two ways to encrypt: use one of them.")
    if verify_clients and certificates is None:
        raise click.UsageError("--tls-verify-clients is about certificates: give --tls-certificates DIR.")
    if certificates is None and psk is None:
        if tls is not None:
            raise click.UsageError("--tls needs something to encrypt with: give --tls-certificates DIR or --tls-psk FILE.")
        return Encryption()
    return Encryption(ServerTLS(certificates=certificates, psk_file=psk, verify_clients=verify_clients), tls != "allow")


@click.command(short_help="Serve a file or memory as a disk.")
@click.argument("file", required=False)
@click.option(
    "--memory", type=parsed, metavar="SIZE", help="Serve memory in place of a file: 512M, 1G. Only what is written takes room."
)
@click.option(
    "--tcp", type=tcp_place, multiple=True, metavar="[HOST:]PORT", help="Listen on TCP; without HOST for this machine only."
)
@click.option("--unix", type=unix_place, multiple=True, metavar="PATH", help="Listen on a unix socket.")
@click.option(
    "--vsock",
    type=vsock_place,
    multiple=True,
    metavar="[CID:]PORT",
    help="Listen on vsock, for virtual machines; without CID on all of this machine's.",
)
@click.option(
    "--listen", type=uri_place, multiple=True, metavar="URI", help="Listen at an NBD URI, on whichever transport has its scheme."
)
@click.option("--read-only", is_flag=True, help="Let nobody write.")
@click.option("--export", default="", metavar="NAME", help="Name of the export; clients find it without a name too.")
@click.option("--description", default="", metavar="TEXT", help="A line about the export, for lists.")
@click.option(
    "--tls-certificates", metavar="DIR", help="Encrypt, with the certificate in DIR: server-cert.pem and server-key.pem."
)
@click.option(
    "--tls-verify-clients", is_flag=True, help="Turn clients away that have no certificate of a CA in DIR's ca-cert.pem."
)
@click.option(
    "--tls-psk", metavar="FILE", help="Encrypt, with keys that only this server and its clients know: lines of USER:HEXKEY."
)
@click.option(
    "--tls",
    type=click.Choice(["require", "allow"]),
    help="What clients without encryption get: nothing (require, the default with a DIR or FILE), or all the same (allow).",
)
@click.option(
    "--max-clients", type=click.IntRange(min=1), default=128, show_default=True, metavar="N", help="Refuse more at the same time."
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Serve from up to N processes, started as clients come. [default: the processors that there are]",
)
@click.option(
    "--keepalive/--no-keepalive",
    default=True,
    help="Have the system ask silent TCP clients whether they are still there, and give up those that are not, or not.",
)
@click.option(
    "--memory-budget",
    type=parsed,
    default="128M",
    show_default=True,
    metavar="SIZE",
    help="Memory for data on their way, all clients together; what does not fit goes in pieces.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print no warnings on standard error; errors all the same.")
@click.option("-v", "--verbose", is_flag=True, help="Print there which clients come and go, and why, too.")
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
    tls_certificates: str | None,
    tls_verify_clients: bool,
    tls_psk: str | None,
    tls: str | None,
    max_clients: int,
    workers: int | None,
    keepalive: bool,
    memory_budget: int,
    quiet: bool,
    verbose: bool,
) -> None:
    """Serve FILE, or memory, as a disk over NBD, until Ctrl-C.

    FILE is a raw disk image or a block device: its bytes are the disk's. Give as many places to listen at as you like. Without
    any it is TCP on 127.0.0.1 port 10809, which only this machine can reach.

    \b
    nbdcore serve disk.img --vsock 10809
    nbdcore serve --memory 1G --unix /run/disk.sock --tcp 0.0.0.0:10809
    nbdcore serve disk.img --tcp 0.0.0.0:10809 --tls-certificates pki
    """  # noqa: D301 (a real backspace is how click is told not to wrap)
    if (file is None) == (memory is None):
        raise click.UsageError("Name a FILE to serve, or give --memory SIZE; not both.")
    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose contradict each other: use one of them.")
    encryption = _encryption(tls_certificates, tls_psk, verify_clients=tls_verify_clients, tls=tls)
    places = [*tcp, *unix, *vsock, *listen] or [Place("tcp", {"host": LOOPBACK, "port": DEFAULT_PORT})]

    def run(wait_for_signal: Callable[[], None]) -> None:
        with contextlib.ExitStack() as stack:
            disk, what = _opened(file, memory or 0, read_only=read_only)
            if isinstance(disk, FileDisk):
                stack.callback(disk.close)
            settings = ExportSettings(disk, description=description, read_only=read_only)
            server = Server(
                {export: settings},
                tls=encryption.tls,
                require_tls=encryption.required,
                max_clients=max_clients,
                memory_budget=memory_budget,
                workers=(workers or available_processors()) if getattr(disk, "shareable", False) else 1,
            )
            stack.callback(server.stop)
            listeners = [place.listen(server, keepalive=keepalive) for place in places]
            server.start()
            if encryption.admits_anybody and not quiet:
                _warn_of_strangers(listeners, read_only=read_only)
            uris = [for_clients(parse_uri(server.uri(listener, export))) for listener in listeners]
            what += f"{', read-only' if read_only else ''}{encryption.words}"
            _announce(what, list(zip(places, uris, strict=True)), encryption.client_options)
            wait_for_signal()

    with _log_on_stderr(logging.ERROR if quiet else logging.DEBUG if verbose else logging.WARNING):
        until_signalled(run)


def _opened(file: str | None, memory: int, *, read_only: bool) -> tuple[Backend, str]:
    """Open what is to be served, so that several processes can have it, where that can be. Returns it, and words for it."""
    if file is None:
        # Quicker or slower by no more than noise, and what a client sees must not depend on the number of processors.
        in_memory = SharedMemoryDisk if hasattr(os, "memfd_create") else MemoryDisk
        return in_memory(memory), f"{rounded(memory)} of memory, gone when the server stops"
    try:
        disk = FileDisk(file, read_only=read_only)
    except FileNotFoundError as error:
        folder, hint = Path(file).absolute().parent, f"look at the name, or make a disk: truncate -s 1G {shlex.quote(file)}"
        if not folder.is_dir():
            hint = f"look at the name: there is no folder {folder}"
        raise UsageError(errno.ENOENT, f"{file}: {error.strerror}; {hint}") from error
    except PermissionError as error:
        readable = not read_only and os.access(file, os.R_OK)
        hint = "--read-only serves it for reading" if readable else "give this user permission for it, and for its folders"
        raise UsageError(errno.EACCES, f"{file}: {error.strerror}; {hint}") from error
    return disk, f"{escaped(file)}, {rounded(disk.size)}"


def _announce(what: str, places: Sequence[tuple[Place, tuple[str, str]]], client_options: str) -> None:
    """Print where the disk is: a line for each place, its second word the URI. In one piece: a script sees all or nothing."""
    lines = [f"Serving {what}."]
    lines += [f"{place.transport}: {uri}{note}" for place, (uri, note) in places]
    _, (first, _) = places[0]
    say("\n".join([*lines, f"Ready, until Ctrl-C. To look at it: nbdcore info {shlex.quote(first)}{client_options}"]))


def _warn_of_strangers(listeners: Sequence[Listener], *, read_only: bool) -> None:
    for listener in listeners:
        where = parse_uri(listener.address.uri())
        if where.transport_scheme == "nbd" and not is_loopback(where.host or ""):
            warn(f"warning: whoever can reach {listener.address} can {'read' if read_only else 'read and write'} this disk")


# ---------------------------------------------------------------------------------------------- the log


class _OneLine(logging.Handler):
    """Prints what the server has to say, as this command prints everything."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(in_one_line(record))


@contextlib.contextmanager
def _log_on_stderr(level: int) -> Iterator[None]:
    before, handler = client_log.level, _OneLine()
    client_log.setLevel(level)  # of which the server's further processes are told
    client_log.addHandler(handler)
    try:
        yield
    finally:
        client_log.removeHandler(handler)
        client_log.setLevel(before)

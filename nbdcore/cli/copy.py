"""`nbdcore copy`: a disk, a file or a pipe to another one, with nbdcopy's options. The work is done by `nbdcore.disk.copy`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from nbdcore.cli.access import Access, Bracketed, connections_option, with_access
from nbdcore.cli.hashes import BlockHashType
from nbdcore.cli.options import GetoptCommand
from nbdcore.cli.output import say, warn
from nbdcore.cli.progress import BAR, shown
from nbdcore.cli.sizes import parsed, rounded
from nbdcore.disk.blockhash import BlockHash

if TYPE_CHECKING:
    from nbdcore.disk.copying.opening import Place
    from nbdcore.disk.copying.result import CopySettings

__all__ = ["copy"]

# What nbdcopy takes for a request.
_SMALLEST_REQUEST, _LARGEST_REQUEST = 4 << 10, 32 << 20


if TYPE_CHECKING:
    _EndType = click.ParamType[Place]
else:
    _EndType = click.ParamType


class EndType(_EndType):
    """An end of a copy, as a click argument's type."""

    name = "disk"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Place:  # noqa: ARG002 (click's)
        """Return what the library takes: the command line of a server, or the word as it is."""
        return list(value.argv) if isinstance(value, Bracketed) else value


def _request_size(text: str) -> int:
    size = parsed(text)
    if not _SMALLEST_REQUEST <= size <= _LARGEST_REQUEST or size & (size - 1):
        raise click.BadParameter(f"{text!r} is no size for requests: they have a power of two from 4K to 32M")
    return size


def _granule(text: str) -> int:
    size = parsed(text)
    if size and (size < 512 or size & (size - 1)):
        raise click.BadParameter(f"{text!r}: write 0 for not at all, or a power of two of 512 or more")
    return size


@click.command(cls=GetoptCommand, short_help="Copy a disk to another one, a file or a pipe.")
@click.argument("source", type=EndType())
@click.argument("destination", type=EndType())
@click.option("--allocated", is_flag=True, help="Have zeroes take up room at the destination, in place of holes.")
@connections_option("Connections to each server, if it can do with several.")
@click.option(
    "--destination-is-zero",
    "--target-is-zero",
    is_flag=True,
    help="Write no zeroes, since all of the destination reads as zeroes already.",
)
@click.option("--verify", is_flag=True, help="Read the destination back, and compare it with the source, when all is written.")
@click.option(
    "--checksum",
    "--blkhash",
    type=BlockHashType(),
    is_flag=False,
    flag_value="sha256/64k",
    metavar="[=NAME[/SIZE]]",
    help="Print the checksum of what was copied, as nbdcore checksum does. [default: sha256/64k]",
)
@click.option("--checksum-file", "--blkhash-file", metavar="FILE", help="Write the checksum to FILE, and do not print it.")
@click.option(
    "--resume",
    metavar="MANIFEST",
    help="Keep in the file MANIFEST what is finished, and go on from there if it is the same copy's. A complete copy removes it.",
)
@click.option(
    "--bitmap", default="", metavar="NAME", help="Copy only what this dirty bitmap of the source names, onto a full copy."
)
@click.option(
    "--changes",
    metavar="MAP",
    help="With --bitmap: make DESTINATION a file of changes, and write which those are to the file MAP.",
)
@click.option("--apply", metavar="MAP", help="SOURCE is a file of changes: copy what the file MAP names, onto a full copy.")
@click.option("--flush", is_flag=True, help="End when the destination has put all on permanent storage.")
@click.option("--extents/--no-extents", default=True, help="Ask the source which parts are zero, or read all of it.")
@click.option("-p", "bar", is_flag=True, help="Show how far it is, though standard error is no terminal.")
@click.option(
    "--progress",
    is_flag=False,
    flag_value=BAR,
    metavar="[=FD]",
    help="As -p; with =FD, write lines such as 50/100 to that file descriptor.",
)
@click.option(
    "--queue-size",
    type=parsed,
    default="32M",
    show_default=True,
    metavar="SIZE",
    help="The most bytes under way, all connections together.",
)
@click.option(
    "--request-size", type=_request_size, default="1M", show_default=True, metavar="SIZE", help="Bytes of a read or write."
)
@click.option(
    "-R",
    "--requests",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="The most requests under way on a connection.",
)
@click.option(
    "-S",
    "--sparse",
    type=_granule,
    default="4K",
    show_default=True,
    metavar="SIZE",
    help="Look for zeroes among data in steps of this size, and write none; 0: do not look.",
)
@click.option("--synchronous", is_flag=True, help="Copy in order, one request at a time.")
@click.option(
    "-T",
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="The most threads that copy. [default: as many as help]",
)
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@click.option("-v", "--verbose", is_flag=True, help="Say on standard error what both sides are, and how they are copied.")
@with_access
def copy(  # noqa: PLR0913 (click hands each option over by its name)
    source: Place,
    destination: Place,
    *,
    access: Access,
    bar: bool,
    progress: str | None,
    quiet: bool,
    verbose: bool,
    checksum: BlockHash | None,
    checksum_file: str | None,
    **settings: Any,
) -> None:
    """Copy SOURCE to DESTINATION.

    Each is a file, a block device, an NBD URI, "-" for standard input or output, or [ COMMAND ARGS ], a server to start.
    A destination may also be null:, which keeps nothing.

    A file is made if it is not there, and has the source's size at the end. Any other destination must be as large as the source.

    \b
    nbdcore copy nbd://localhost/ disk.img
    nbdcore copy disk.img nbd://localhost/
    nbdcore copy nbd://one/ nbd://two/ --flush
    nbdcore copy -- [ nbdkit memory 1G ] null:
    nbdcore copy nbd://localhost/ disk.img --verify --resume disk.manifest
    nbdcore copy nbd://localhost/ disk.img --bitmap since-monday
    """  # noqa: D301 (a real backspace is how click is told not to wrap)
    from nbdcore.disk import copy as copied

    if checksum_file is not None and checksum is None:
        checksum = BlockHash()
    if checksum is not None and checksum_file is None and destination == "-":
        raise click.UsageError("standard output gets the disk: use --checksum-file for its checksum.")
    if bar and progress is None:
        progress = BAR
    with shown(progress, quiet=quiet) as telling, _interruption_told():
        result = copied(
            source,
            destination,
            **settings,
            checksum=checksum,
            started=_describe if verbose else None,
            progress=telling,
            timeout=access.timeout,
            **access.options(),
        )
    if checksum_file is not None:
        from pathlib import Path

        Path(checksum_file).write_text(f"{result.digest}\n", encoding="ascii")
    elif checksum is not None:
        say(result.digest)


@contextlib.contextmanager
def _interruption_told() -> Iterator[None]:
    """Say what Ctrl-C left, which the copy notes on it."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        for note in getattr(interruption, "__notes__", ()):
            warn(f"interrupted: {note}")
        raise


def _describe(settings: CopySettings) -> None:
    """Print what is about to happen, in nbdcopy's form."""
    for side, end in (("src", settings.source), ("dst", settings.destination)):
        warn(f"{side}: {end.kind} {end.name}")
        size = "unknown" if end.size is None else f"{end.size} ({rounded(end.size)})"
        warn(f"{side}: size={size}, preferred block size={end.preferred}")
    warn(
        f"connections={settings.connections} requests={settings.requests} threads={settings.threads} "
        f"synchronous={str(settings.in_order).lower()}"
    )

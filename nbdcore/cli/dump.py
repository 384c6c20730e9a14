"""`nbdcore dump`: what is on a disk, byte by byte. The lines are `nbdcore.disk.dumping`'s."""

from __future__ import annotations

import os
import sys

import click

from nbdcore import BASE_ALLOCATION, UsageError
from nbdcore.cli.access import Access, DiskCommand, DiskType, Place, with_access
from nbdcore.cli.output import say
from nbdcore.cli.sizes import parsed
from nbdcore.cli.spellings import SpelledOption
from nbdcore.disk.dumping import dump as dump_of

__all__ = ["dump"]


@click.command(cls=DiskCommand, short_help="Show the bytes of a disk in hexadecimal.")
@click.argument("disk", type=DiskType())
@click.option(
    "-o",
    "--offset",
    cls=SpelledOption,
    spellings=["--skip"],
    type=parsed,
    default="0",
    show_default=True,
    metavar="SIZE",
    help="Begin so far into the disk: 512, 1M.",
)
@click.option(
    "-n",
    "--length",
    cls=SpelledOption,
    spellings=["--limit"],
    type=parsed,
    metavar="SIZE",
    help="Show so many bytes. [default: all to the end]",
)
@click.option(
    "--color/--no-color",
    cls=SpelledOption,
    spellings=["--colors/--no-colors", "--colour/--no-colour", "--colours/--no-colours"],
    default=None,
    help="Use colors, or none. [default: colors on a terminal, unless the variable NO_COLOR is set]",
)
@with_access
def dump(disk: Place, *, access: Access, offset: int, length: int | None, color: bool | None) -> None:
    """Show the bytes of the disk that DISK names, sixteen a line: offset, hexadecimal digits, letters.

    Lines like the one before are left out, and "*" stands for them. What the server says is zero is not read. The lines are
    those of the program nbddump.

    \b
    nbdcore dump nbd://localhost/ --length 512
    nbdcore dump nbd://localhost/ --offset 1M --length 4K
    nbdcore dump [ qemu-nbd -r -f qcow2 disk.qcow2 ]
    """  # noqa: D301 (a real backspace is how click is told not to wrap)
    colored = _is_colored() if color is None else color
    click.get_current_context().color = True  # what `say` prints is taken as it is, into a pipe too
    with access.client(disk, contexts=[BASE_ALLOCATION]) as client:
        if offset > client.size:
            raise UsageError(0, f"--offset {offset} is beyond the end of the disk, which has {client.size} bytes")
        for text in dump_of(client, offset=offset, count=length, color=colored):
            say(text, newline=False)


def _is_colored() -> bool:
    """Whether colors, and the symbols that go with them, can be shown where the output goes, and are wanted."""
    if sys.stdout is None or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return False
    return sys.stdout.encoding.lower() in ("utf-8", "utf8")

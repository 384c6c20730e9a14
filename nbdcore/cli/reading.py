"""The disks of commands that only read them: what a server has, or a local file, or standard input, and how to open each."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from nbdcore import Client, Pool, is_uri
from nbdcore.cli.access import Access, Bracketed, Place

__all__ = ["ReadType", "connections_option", "is_read_once", "read_once", "source"]

#: A word that is no file's name: for that one, write ./-
_STANDARD_INPUT = Path("-")

# Generic for type checkers only.
if TYPE_CHECKING:
    _ReadType = click.ParamType[Place | Path]
else:
    _ReadType = click.ParamType


class ReadType(_ReadType):
    """A disk to read, as a click argument's type: a `Place`, or a local file's `Path`."""

    name = "disk"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Place | Path:  # noqa: ARG002 (click's)
        """Return what a word names: as libnbd's tools have it, all that is no URI is a local file."""
        if isinstance(value, Place | Path):
            return value
        if isinstance(value, Bracketed):
            return Place(argv=value.argv)
        if is_uri(value):
            return Place(value)
        path = Path(value)
        return path.absolute() if path == _STANDARD_INPUT and value != str(path) else path


connections_option = click.option(
    "-C",
    "--connections",
    type=click.IntRange(1, 128),
    default=4,
    show_default=True,
    metavar="N",
    help="How many connections to open to a server, if it allows several. As many threads work.",
)


def source(access: Access, disk: Place | Path, connections: int) -> Path | Callable[[], Client | Pool]:
    """Return what the library reads: a file, or what connects to a server."""
    if isinstance(disk, Path):
        return disk
    return partial(access.pool, disk, connections) if disk.uri else partial(access.client, disk)


def is_read_once(disk: Place | Path) -> bool:
    """Return whether it is a pipe, or whatever standard input is."""
    return isinstance(disk, Path) and (disk == _STANDARD_INPUT or disk.is_fifo())


def read_once(disk: Place | Path) -> BinaryIO | None:
    """Open what can only be read from its beginning; None for all else."""
    if not isinstance(disk, Path) or not is_read_once(disk):
        return None
    if disk == _STANDARD_INPUT:
        return os.fdopen(0, "rb", buffering=0, closefd=False)
    return disk.open("rb", buffering=0)

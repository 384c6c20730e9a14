"""The disks of commands that only read them: what a server has, or a local file, or standard input, and how to open each."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import click

from nbdcore import Client, Pool, is_uri
from nbdcore.cli.access import Access, Bracketed, Place, connections_option, with_access
from nbdcore.cli.output import Failure

__all__ = ["ReadType", "Reading", "is_read_once", "read_once", "with_reading"]

#: What a command takes as its function.
_Function = TypeVar("_Function", bound=Callable[..., Any])

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
        if not value:  # which a path takes for the current folder
            raise Failure("'' is no disk: write an NBD URI, a file, - or [ COMMAND ARGS ... ]")
        path = Path(value)
        return path.absolute() if path == _STANDARD_INPUT and value != str(path) else path


def with_reading(function: _Function) -> _Function:
    """Give a command the options of all that read, and its function one argument for them: `reading`."""

    @functools.wraps(function)
    def wrapper(*arguments: Any, access: Access, connections: int, no_extents: bool, **others: Any) -> Any:
        reading = Reading(access, connections, extents=not no_extents)
        return function(*arguments, reading=reading, **others)

    decorated: Any = with_access(wrapper)
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    typed: _Function = decorated
    return typed


_OPTIONS = (
    click.option("--no-extents", is_flag=True, help="Read all, in place of taking a server's word for what is zero."),
    connections_option("How many connections to open to a server, if it allows several. As many threads work."),
)


@dataclass(frozen=True, slots=True)
class Reading:
    """How disks are read: what the commands' common options say.

    Attributes:
        access: how to get to them.
        connections: to each server, and how many threads work.
        extents: whether servers are asked what is zero.
    """

    access: Access
    connections: int
    extents: bool

    def source(self, disk: Place | Path) -> Path | Callable[[], Client | Pool]:
        """Return what the library reads: a file, or what connects to a server."""
        if isinstance(disk, Path):
            return disk
        contexts = {} if self.extents else {"contexts": ()}
        if disk.uri:
            return functools.partial(self.access.pool, disk, self.connections, **contexts)
        return functools.partial(self.access.client, disk, **contexts)


def is_read_once(disk: Place | Path) -> bool:
    """Return whether it is a pipe, or whatever standard input is."""
    return isinstance(disk, Path) and (disk == _STANDARD_INPUT or disk.is_fifo())


def read_once(disk: Place | Path) -> BinaryIO | None:
    """Open what can only be read from its beginning; None for all else."""
    if not isinstance(disk, Path) or not is_read_once(disk):
        return None
    if disk == _STANDARD_INPUT:
        from nbdcore.disk.copying.streams import standard_input  # no other disk needs it

        return os.fdopen(standard_input(), "rb", buffering=0, closefd=False)
    return disk.open("rb", buffering=0)

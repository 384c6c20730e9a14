"""`nbdcore compare`: whether two disks have the same contents, and where not. Exit statuses are those of cmp and diff."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nbdcore import Error
from nbdcore.cli.access import DiskCommand, Place
from nbdcore.cli.output import Failure, described, pour, say, warn
from nbdcore.cli.progress import bar
from nbdcore.cli.reading import Reading, ReadType, is_read_once, with_reading
from nbdcore.cli.sizes import parsed

if TYPE_CHECKING:
    from nbdcore.disk.comparing import Comparison

__all__ = ["compare"]

_DIFFERENT, _TROUBLE = 1, 2
# A range as json.dumps() would have it there, and how many are printed at once.
_OBJECT = '\n    {\n      "offset": %d,\n      "length": %d\n    }'
_TOGETHER = 4096


class CompareCommand(DiskCommand):
    """A command for which 1 says something else than that it failed."""

    usage_status = _TROUBLE

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line; where a word is no disk, the exit status is 2."""
        with _trouble():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; whatever it fails of, its exit status is 2."""
        with _trouble():
            return super().invoke(ctx)


@contextlib.contextmanager
def _trouble() -> Iterator[None]:
    try:
        yield
    except (OSError, Error) as error:
        raise _Trouble(described(error)) from error
    except Failure as failure:
        raise _Trouble(failure.message) from failure


class _Trouble(Failure):
    """It could not be found out."""

    exit_code = _TROUBLE


@click.command(cls=CompareCommand, short_help="Say whether two disks have the same contents, and where not.")
@click.argument("first", metavar="A", type=ReadType())
@click.argument("second", metavar="B", type=ReadType())
@click.option("-s", "--strict", is_flag=True, help="Disks of different sizes differ, even where the rest of one is zero.")
@click.option("--offset", type=parsed, default="0", metavar="SIZE", help="Begin there, in both: 512, 1M.")
@click.option("--length", type=parsed, metavar="SIZE", help="Compare so many bytes, in place of all up to the end.")
@click.option("--map", "all_differences", is_flag=True, help="Print each range that differs: its offset and length in bytes.")
@click.option(
    "--granularity",
    type=parsed,
    default="4K",
    show_default=True,
    metavar="SIZE",
    help="With --map: the blocks that ranges are made of, counted from --offset; a power of two up to 1M.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; the ranges are in there with --map.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing: the exit status says all.")
@with_reading
def compare(
    first: Place | Path,
    second: Place | Path,
    *,
    reading: Reading,
    as_json: bool,
    quiet: bool,
    **wanted: Any,
) -> None:
    """Compare A with B, each a URI, [ COMMAND ], a file or a block device. It stops at the first difference.

    The exit status is 0 where they have the same contents, 1 where they differ, and 2 where that could not be found out. What
    both know to be zero is not read. A larger disk counts as the same where its rest reads as zeroes, as for "qemu-img compare".

    \b
    nbdcore compare disk.img nbd://localhost/
    nbdcore compare --map nbd://one.example/disk nbd://other.example/disk
    nbdcore compare disk.img [ qemu-nbd -r -f qcow2 disk.qcow2 ]
    """  # noqa: D301 (a real backspace is how click is told not to wrap)
    result = _compare((first, second), reading, quiet=quiet, **wanted)
    ranges, whole = wanted["all_differences"], (wanted["offset"], wanted["length"]) == (0, None)
    if not quiet:
        _show(result, as_json=as_json, ranges=ranges, whole=whole)
    if not result.same:
        raise click.exceptions.Exit(_DIFFERENT)


def _compare(disks: tuple[Place | Path, Place | Path], reading: Reading, *, quiet: bool, **wanted: Any) -> Comparison:
    from nbdcore.disk import comparing

    for disk in disks:
        if is_read_once(disk):
            raise Failure(f"{disk}: what comes through a pipe cannot be compared; its checksum can: nbdcore checksum")
    first, second = map(reading.source, disks)
    with bar("compare", quiet=quiet) as progress:
        return comparing.compare(first, second, connections=reading.connections, progress=progress, **wanted)


def _show(result: Comparison, *, as_json: bool, ranges: bool, whole: bool) -> None:
    if as_json:
        pour(_document(result, ranges=ranges))
    elif result.differences:
        pour(_joined((f"{one.offset:>12} {one.length:>12}" for one in result.differences), "\n"))
    elif not ranges:
        say(_sentence(result, whole=whole))
    elif not result.same:
        warn(_sentence(result, whole=whole))  # no line among ranges


def _sentence(result: Comparison, *, whole: bool) -> str:
    smaller, larger = sorted(result.sizes)
    if result.first_difference is not None:
        return f"The disks differ, first at byte {result.first_difference}."
    if not result.same:
        return f"The disks differ in size: {result.sizes[0]} and {result.sizes[1]} bytes."
    rest = f", and the last {larger - smaller} bytes of the larger one are zero" if whole and larger > smaller else ""
    return f"The disks have the same contents{'' if whole else ' there'}{rest}."


def _document(result: Comparison, *, ranges: bool) -> Iterator[str]:
    import json

    facts: dict[str, Any] = {"same": result.same, "first-difference": result.first_difference, "sizes": list(result.sizes)}
    if ranges:
        facts["differences"] = []
    text = json.dumps(facts, indent=2)
    if not ranges or not result.differences:
        yield text
        return
    yield text.removesuffix("]\n}")
    yield from _joined((_OBJECT % (one.offset, one.length) for one in result.differences), ",")
    yield "\n  ]\n}"


def _joined(words: Iterator[str], between: str) -> Iterator[str]:
    """Join words, some thousand at a time: there may be a great many."""
    before = ""
    while some := [*islice(words, _TOGETHER)]:
        yield before + between.join(some)
        before = between

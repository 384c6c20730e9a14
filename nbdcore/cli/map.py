"""`nbdcore map`: where a disk has data, holes and changes, for a person to look at, and as JSON and CSV for programs."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

import nbdcore
from nbdcore.cli.access import Access, DiskType, Place, with_access
from nbdcore.cli.options import GetoptCommand, in_color, with_color
from nbdcore.cli.output import Failure, canvas, draw, pour, say
from nbdcore.cli.sizes import parsed

if TYPE_CHECKING:
    from nbdcore.disk.maps import DiskMap

__all__ = ["map"]

# Errors after which a part of a file has been written.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


@click.command(cls=GetoptCommand, short_help="Draw where a disk has data, holes and changes.")
@click.argument("disk", type=DiskType())
@click.option(
    "--context", "contexts", multiple=True, default=(nbdcore.BASE_ALLOCATION,), show_default=True, metavar="NAME",
    help="What to ask about: qemu:allocation-depth; 'qemu:dirty-bitmap:*' for all whose names begin so. Can be given repeatedly.",
)  # fmt: skip
@click.option("--offset", type=parsed, default="0", metavar="SIZE", help="Where the map begins: 512M, 1G.")
@click.option("--length", type=parsed, metavar="SIZE", help="How much of the disk the map covers.")
@click.option("--json", "as_json", is_flag=True, help="Print a list of JSON objects, as nbdcore info --map --json does.")
@click.option("--csv", "as_csv", is_flag=True, help="Print lines of values with commas between, the first one of names.")
@click.option("--svg", metavar="FILE", help="Write a picture for a browser to FILE, and print nothing; - is standard output.")
@with_color
@with_access
def map(  # noqa: A001 (the command's name)
    disk: Place,
    *,
    access: Access,
    contexts: tuple[str, ...],
    offset: int,
    length: int | None,
    as_json: bool,
    as_csv: bool,
    svg: str | None,
) -> None:
    """Draw what the server says of each part of DISK: where there is data, and where nothing is stored.

    \b
    nbdcore map nbd://localhost/
    nbdcore map nbd://localhost/ --context 'qemu:dirty-bitmap:*' --svg changes.svg
    nbdcore map --offset 1G --csv [ qemu-nbd -r -f qcow2 disk.qcow2 ]
    """  # noqa: D301 (a real backspace is how click is told not to wrap)
    if as_json + as_csv + (svg is not None) > 1:
        raise click.UsageError("--json, --csv and --svg say how the map is given: use one of them.")
    from nbdcore.cli import parts

    if as_json or as_csv:
        words = parts.as_json if as_json else parts.as_csv
        take = partial(_all_of, words)
        pour(parts.read(access, disk, contexts, take, option="--context", offset=offset, count=length))
        return
    found = parts.read_whole(access, disk, contexts, option="--context", offset=offset, count=length)
    if svg is None:
        _draw(found)
    else:
        _write_picture(found, disk, svg)


def _all_of(words: Callable[[Iterator[DiskMap]], Iterator[str]], pieces: Iterator[DiskMap]) -> list[str]:
    """Have all that is to be printed before any of it is."""
    return list(words(pieces))


def _draw(found: DiskMap) -> None:
    from nbdcore.cli.drawing import drawn

    width, encoding = canvas()
    draw(drawn(found, width=width, encoding=encoding), color=in_color())


def _write_picture(found: DiskMap, disk: Place, path: str) -> None:
    from nbdcore.disk.pictures import svg

    picture = svg(found, title=str(disk))
    if path == "-":
        say(picture.removesuffix("\n"))
        return
    file = Path(path)
    try:
        file.write_text(picture, encoding="utf-8")
    except OSError as error:
        if file.is_file() and error.errno in _NO_ROOM:  # half a picture is of no use, and may look like a whole one
            file.unlink()
        raise Failure(f"cannot write {path}: {error.strerror}") from error

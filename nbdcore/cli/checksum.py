"""`nbdcore checksum`: one word that says whether two disks are equal, computed without reading zeroes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nbdcore.cli.access import DiskCommand, Place
from nbdcore.cli.hashes import BlockHashType
from nbdcore.cli.output import say
from nbdcore.cli.progress import bar
from nbdcore.cli.reading import Reading, ReadType, read_once, with_reading
from nbdcore.cli.sizes import parsed

if TYPE_CHECKING:
    from nbdcore.disk.blockhash import BlockHash
    from nbdcore.disk.checksums import Checksum

__all__ = ["checksum"]


@click.command(cls=DiskCommand, short_help="Print a checksum of a disk, or of a part of it.")
@click.argument("disk", type=ReadType())
@click.option(
    "--algorithm",
    "--blkhash",
    "block_hash",
    type=BlockHashType(),
    default="sha256/64k",
    show_default=True,
    metavar="NAME[/SIZE]",
    help="What blocks are hashed with, and their size. There are md5, sha1, sha512, blake2b and all that Python's hashlib has.",
)
@click.option("--offset", type=parsed, default="0", metavar="SIZE", help="Begin there.")
@click.option("--length", type=parsed, metavar="SIZE", help="Take so many bytes, in place of all up to the end.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--range-size", type=parsed, metavar="SIZE", help="With --json: the checksum of each part of that size too.")
@click.option("-q", "--quiet", is_flag=True, help="Draw no progress bar.")
@with_reading
def checksum(
    disk: Place | Path,
    *,
    reading: Reading,
    block_hash: BlockHash,
    as_json: bool,
    quiet: bool,
    **part: int | None,
) -> None:
    """Print the checksum of DISK: a URI, [ COMMAND ], a file, a block device, or - for what comes through a pipe.

    It is the one that nbdcopy prints for --blkhash, which is not that of sha256sum. Disks with the same checksum have the same
    contents, however they are stored. What is known to be zero is not read.

    \b
    nbdcore checksum nbd://localhost/
    nbdcore checksum disk.img
    nbdcore checksum [ qemu-nbd -r -f qcow2 disk.qcow2 ]
    xzcat disk.img.xz | nbdcore checksum -
    nbdcore checksum nbd://localhost/ --algorithm sha512/1M --json --range-size 1G
    """  # noqa: D301 (a real backspace is how click is told not to wrap)
    if part["range_size"] is not None and not as_json:
        raise click.UsageError("--range-size is for --json: the checksums of parts are in there.")
    result = _checksum(disk, reading, quiet=quiet, block_hash=block_hash, **part)
    say(_document(result, ranges=part["range_size"] is not None) if as_json else result.digest.hex())


def _checksum(disk: Place | Path, reading: Reading, *, quiet: bool, **wanted: Any) -> Checksum:
    from nbdcore.disk import checksums

    if (stream := read_once(disk)) is not None:
        with stream:
            return checksums.checksum_of_stream(stream, **wanted)
    with bar("checksum", quiet=quiet) as progress:
        return checksums.checksum(reading.source(disk), connections=reading.connections, progress=progress, **wanted)


def _document(result: Checksum, *, ranges: bool) -> str:
    import json

    facts: dict[str, Any] = {
        "digest": result.digest.hex(),
        "algorithm": result.algorithm,
        "block-size": result.block_size,
        "offset": result.offset,
        "length": result.length,
        "zeroes": result.zeroes,
    }
    if ranges:
        facts["ranges"] = [{"offset": one.offset, "length": one.length, "digest": one.digest.hex()} for one in result.ranges]
    return json.dumps(facts, indent=2)

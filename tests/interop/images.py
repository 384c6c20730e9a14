"""Disk images with known contents: raw ones with holes where a test wants them, qcow2 ones with a dirty bitmap."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.interop.programs import run


def pattern(length: int, *, seed: int = 0) -> bytes:
    """Return `length` bytes that look random, are the same each time, and differ in every place and from seed to seed."""
    return hashlib.shake_128(seed.to_bytes(8, "big")).digest(length)


def raw_image(path: Path, size: int, data: Mapping[int, bytes] | None = None) -> Path:
    """Make a sparse raw image of `size` bytes: `data` at its offsets, holes between (as far as the file system has them)."""
    with path.open("wb") as image:
        image.truncate(size)
        for offset, contents in (data or {}).items():
            image.seek(offset)
            image.write(contents)
    if path.stat().st_size != size:
        raise ValueError("the data does not fit in the image")
    return path


def contents(size: int, data: Mapping[int, bytes]) -> bytes:
    """Return all the bytes of the image that `raw_image` makes of the same arguments."""
    whole = bytearray(size)
    for offset, part in data.items():
        whole[offset : offset + len(part)] = part
    if len(whole) != size:
        raise ValueError("the data does not fit in the image")
    return bytes(whole)


def qcow2_image(path: Path, size: int, data: Mapping[int, bytes] | None = None) -> Path:
    """Make a qcow2 image of `size` bytes with `data` at its offsets."""
    raw = raw_image(path.with_name(f"{path.name}.raw"), size, data)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
    raw.unlink()
    return path


def add_dirty_bitmap(path: Path, bitmap: str, dirty: Iterable[tuple[int, int]], *, granularity: int = 65536) -> None:
    """Add a persistent dirty bitmap to a qcow2 image, then write (with the byte 0xd1) each (offset, length) of `dirty`.

    The bitmap is disabled at the end: qemu-nbd exports it to readers then, and it stays as it is.
    """
    run("qemu-img", "bitmap", "--add", "-g", str(granularity), path, bitmap)
    writes = [word for offset, length in dirty for word in ("-c", f"write -P 0xd1 {offset} {length}")]
    if writes:
        run("qemu-io", "-f", "qcow2", *writes, path)
    run("qemu-img", "bitmap", "--disable", path, bitmap)

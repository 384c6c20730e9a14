"""The map of a file of changes: which ranges of the disk it has, as JSON.

A file of changes is a sparse file as large as the disk, with data where the disk had changed. The map names the ranges; what is
not in it had not changed, whatever the file has there. A range that is `zero` reads as zeroes now, which is a change too.

    {"format": "nbdcore changes 1", "size": 1073741824, "bitmap": "qemu:dirty-bitmap:since-monday", "ranges": [
      {"offset": 1048576, "length": 65536, "zero": false},
      ...
    ]}

The map is written when the file is complete: without it, a file of changes is worth nothing.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nbdcore.disk.copying.ends import Range
from nbdcore.disk.copying.files import FileSource
from nbdcore.errors import UsageError

__all__ = ["ChangesSource", "read_map", "write_map"]

_FORMAT = "nbdcore changes 1"


def write_map(path: str | os.PathLike[str], *, size: int, bitmap: str, ranges: Iterable[Range]) -> None:
    """Write the map of a file of changes. Raises OSError."""
    listed = [json.dumps({"offset": one.offset, "length": one.count, "zero": one.zero}) for one in ranges]
    head = json.dumps({"format": _FORMAT, "size": size, "bitmap": bitmap, "ranges": []}).removesuffix("]}")
    body = ",\n".join(f"  {line}" for line in listed)  # a range a line, for people and their tools
    Path(path).write_text(f"{head}\n{body}\n]}}\n", encoding="utf-8")


def read_map(path: str | os.PathLike[str], size: int) -> list[Range]:
    """Return the ranges of a map for a file of so many bytes. Raises OSError, UsageError for what is none, or of another size."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        known: dict[str, Any] = json.loads(text)
        ranges = [Range(int(one["offset"]), int(one["length"]), bool(one["zero"])) for one in known["ranges"]]
        right = known["format"] == _FORMAT
    except (ValueError, TypeError, KeyError) as problem:
        raise UsageError(errno.EINVAL, f"{path} is no map of changes: {problem!r}") from problem
    ends = [0, *(one.end for one in ranges)]
    ordered = all(one.count > 0 and one.offset >= before for one, before in zip(ranges, ends, strict=False))
    if not right or not ordered:
        raise UsageError(errno.EINVAL, f"{path} is no map of changes")
    if known["size"] != size or ends[-1] > size:
        raise UsageError(errno.EINVAL, f"{path} is the map of a disk of {known['size']} bytes, and not of one of {size}")
    return ranges


class ChangesSource(FileSource):
    """A file of changes that is open; it belongs to this. Only what its map names is part of the copy."""

    def __init__(self, name: str, fd: int, path: str | os.PathLike[str]) -> None:
        super().__init__(name, fd)
        self._ranges = read_map(path, self.size)
        # What is around a range is no part of the disk: a block that it has a part of cannot be taken in whole.
        self.edges: int = math.gcd(*(edge for one in self._ranges for edge in (one.offset, one.end) if edge < self.size))

    def extents(self) -> Iterator[Range]:
        """Yield the ranges of the map."""
        yield from self._ranges

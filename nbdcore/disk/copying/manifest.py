"""The manifest of a copy that can be interrupted: which ranges are finished, in a file that is true at any moment.

A range is listed when the destination had flushed it: so whatever happens to this process, to the server or to the machine, what
the manifest lists is there. The file is written beside itself, put on permanent storage, and takes the other's place in one step.
It says of which source and destination it is, and is refused for any other. When the copy is complete it is removed.
"""

from __future__ import annotations

import errno
import json
import os
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nbdcore.disk.copying.ends import Destination, End, Range, Source
from nbdcore.errors import UsageError

__all__ = ["Finished", "Manifest"]

_FORMAT = "nbdcore copy manifest 1"
# What each one begins with.
_BEGINNING = json.dumps({"format": _FORMAT}).encode().removesuffix(b"}")
# Seconds between two flushes, at least, and in times of what the last one took: so they take a tenth of the time at most.
_INTERVAL, _SHARE = 2.0, 10


class Finished:
    """Ranges of a disk that are finished; neighbours are one."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        for begin, end in ranges:
            self.add(begin, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._begins, self._ends, strict=True)

    def add(self, begin: int, end: int) -> None:
        """Add the bytes from `begin` to `end`."""
        first = bisect_left(self._ends, begin)  # the first range that touches it, or lies behind it
        last = first
        while last < len(self._begins) and self._begins[last] <= end:
            last += 1
        if first < last:
            begin, end = min(begin, self._begins[first]), max(end, self._ends[last - 1])
        self._begins[first:last] = [begin]
        self._ends[first:last] = [end]

    def total(self) -> int:
        """Return how many bytes are finished."""
        return sum(end - begin for begin, end in self)

    def left_of(self, ranges: Iterable[Range]) -> Iterator[Range]:
        """Yield what of the ranges, which are in order, is not finished."""
        finished = iter([*self])
        begin, end = next(finished, (0, 0))
        for one in ranges:
            at = one.offset
            while at < one.end:
                while end <= at and (following := next(finished, None)) is not None:
                    begin, end = following
                if begin <= at < end:
                    at = end
                    continue
                edge = min(begin, one.end) if begin > at else one.end
                yield Range(at, edge - at, one.zero)
                at = edge


class Manifest:
    """The manifest of one copy.

    Args:
        path: the file; there need not be one.

    Attributes:
        found: whether there was one, so that a copy goes on.
        finished: what it lists.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = Path(path)
        self.found: bool = True
        self.finished: Finished = Finished()
        self._last = time.monotonic()
        self._interval = _INTERVAL
        self._known: dict[str, Any] = {}
        self._failed = False
        try:
            with self.path.open("rb") as file:
                self._read(file)
            self.found = True
        except FileNotFoundError:
            self.found = False
        except (ValueError, TypeError, KeyError) as problem:
            raise UsageError(errno.EINVAL, f"{self.path} is no manifest of a copy: name another file") from problem

    def _read(self, file: BinaryIO) -> None:
        if file.read(len(_BEGINNING)) != _BEGINNING:  # perhaps a whole disk, which is not to be read
            raise ValueError("it does not begin as one")
        self._known = json.loads(_BEGINNING + file.read())
        for begin, end in self._known["finished"]:
            if not 0 <= int(begin) <= int(end):
                raise ValueError(f"it lists a range from {begin} to {end}")
            self.finished.add(int(begin), int(end))

    def check(self, source: Source, destination: Destination, part: str) -> None:
        """Raise UsageError where nothing can be resumed, or where it is the manifest of another copy.

        `part` says which part of the disk is copied, "" for all of it: what a part lacks must not be taken for finished.
        """
        if source.size is None or destination.kind in ("stream", "null") or not destination.can_flush:
            reason = f"{source.name if source.size is None else destination.name} does not keep what was copied"
            raise UsageError(errno.EINVAL, f"a copy between {source.name} and {destination.name} cannot be resumed: {reason}")
        if not self.path.parent.is_dir():  # said before the destination is changed
            raise UsageError(errno.ENOENT, f"there is no folder {self.path.parent}: name a manifest in one that exists")
        described = {"source": _identity(source), "destination": _identity(destination), "part": part}
        if self.found:
            for side, now in described.items():
                if self._known.get(side) != now:
                    raise UsageError(
                        errno.EINVAL,
                        f"{self.path} is of another copy: its {side} was {self._known.get(side)}, and this one's is {now}; "
                        "name another file, or remove that one to begin from the start",
                    )
            if destination.length() < self._known.get("length", 0):
                raise UsageError(
                    errno.EINVAL,
                    f"{destination.name} has {destination.length()} bytes, fewer than when {self.path} was written: "
                    "what that lists is lost; remove that file to begin from the start",
                )
        self._known = {"format": _FORMAT, **described}

    def due(self) -> bool:
        """Return whether it is time to write it again."""
        return time.monotonic() - self._last >= self._interval

    def write(self, pieces: Iterable[tuple[int, int]], destination: Destination) -> None:
        """Flush the destination, then list these pieces, (offset, count), that were written before. Raises OSError, Error.

        After a flush that failed nothing more is listed: an operating system says once that it lost data, and then forgets them.
        """
        if self._failed:
            return
        begun = time.monotonic()
        length = destination.length()
        self._failed = True
        destination.flush()
        self._failed = False
        for offset, count in pieces:
            self.finished.add(offset, offset + count)
        self._replace(json.dumps({**self._known, "length": length, "finished": [*self.finished]}))
        self._last = time.monotonic()
        self._interval = max(_INTERVAL, _SHARE * (self._last - begun))

    def _replace(self, text: str) -> None:
        beside = self.path.with_name(f"{self.path.name}.new")
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)
        if os.name != "posix":  # Windows opens no folders
            return
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def remove(self) -> None:
        """Remove the file: the copy is complete, or what is listed turned out not to be there."""
        self.path.unlink(missing_ok=True)


def _identity(end: End) -> dict[str, Any]:
    return {"name": end.identity or end.name, "size": end.size}

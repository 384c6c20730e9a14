"""Regular files and block devices as the ends of a copy.

Reads and writes name their offset, so threads use one descriptor side by side, and the interpreter's lock is free meanwhile.

A regular file that is copied to grows with what is written, and has the size of the source only when all else is there: the copy
writes its last range last. So a copy that was killed leaves a file that is too short, and nobody takes it for a disk.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from nbdcore import holes
from nbdcore.disk.copying.ends import Destination, Range, Source
from nbdcore.disk.offsets import FLAGS, PositionedFile

__all__ = ["FileDestination", "FileSource", "number_of", "open_source_file"]


def _kind(fd: int) -> str:
    return "device" if stat.S_ISBLK(os.fstat(fd).st_mode) else "file"


def open_source_file(path: str) -> tuple[int, int]:
    """Open a local file to read. Returns the descriptor and its mode. Raises OSError, with the path."""
    fd = os.open(path, os.O_RDONLY | FLAGS)
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        os.close(fd)
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    return fd, mode


def number_of(fd: int) -> tuple[int, int] | None:
    """Return by what the system knows a regular file or block device; None for all else."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return (0, status.st_rdev)
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


class FileSource(Source):
    """A regular file or block device that is open; it belongs to this.

    Args:
        name: its path.
        fd: the descriptor.
        use_extents: whether to ask the file system for holes.
    """

    def __init__(self, name: str, fd: int, *, use_extents: bool = True) -> None:
        self.kind: str = _kind(fd)
        self.number: tuple[int, int] | None = number_of(fd)
        self.name = name
        self.identity: str = str(Path(name).absolute())
        self.readable: Path = Path(name)
        self._fd = fd
        self._use_extents = use_extents
        self._file = PositionedFile(fd)
        self.size: int = self._file.length()

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill the view. Raises OSError, EIO where the file has become shorter."""
        count = len(view)
        got = self._file.read_some(view, offset)
        while got < count:
            more = self._file.read_some(view[got:], offset + got)
            if not more:
                raise OSError(errno.EIO, f"it ends at {offset + got}, though it had {self.size} bytes")
            got += more
        return count

    def extents(self) -> Iterator[Range]:
        """Yield data and holes, as the file system tells them."""
        if not self._use_extents:
            yield from super().extents()
            return
        offset = 0
        while offset < self.size:
            data = holes.next_data(self._fd, offset)
            data = self.size if data is None else min(data, self.size)
            if data > offset:
                yield Range(offset, data - offset, zero=True)
                offset = data
                continue
            hole = holes.next_hole(self._fd, offset)
            end = self.size if hole is None else min(hole, self.size)
            if end > offset:  # else a hole appeared here between the two questions: ask again
                yield Range(offset, end - offset, zero=False)
                offset = end

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class FileDestination(Destination):
    """A regular file or block device that is open for reading and writing; it belongs to this.

    Args:
        name: its path.
        fd: the descriptor.
        created: whether the file did not exist before.
        keep: whether what is in a regular file stays, since only parts of it will be written.

    Attributes:
        found: bytes that the file had before.
    """

    def __init__(self, name: str, fd: int, *, created: bool = False, keep: bool = False) -> None:
        self.name = name
        self.created = created
        self._fd = fd
        self._keep = keep
        self._file = PositionedFile(fd)
        self.found: int = self._file.length()
        self.kind: str = _kind(fd)
        self.number: tuple[int, int] | None = number_of(fd)
        self.grows: bool = self.kind == "file"
        self.size: int | None = None if self.grows else self.found
        # Of a file by its number too: another one of the same name is no copy that was begun.
        self.identity: str = f"{Path(name).absolute()}, inode {os.fstat(fd).st_ino}" if self.grows else str(Path(name).absolute())
        self.readable: Path = Path(name)
        self._cannot: set[Callable[[int, int, int], None]] = set()  # ways to zero that were tried in vain

    def length(self) -> int:
        """Return how many bytes it has now. Raises OSError."""
        return self._file.length()

    def begin(self) -> None:
        """Empty a regular file, unless what is in it stays: then its size is the last thing to change."""
        if self.grows and not self._keep:
            os.ftruncate(self._fd, 0)
            self.blank = True

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of the view. Raises OSError."""
        count = len(view)
        written = self._file.write_some(view, offset)
        while written < count:  # Linux writes at most 2^31 - 4096 bytes at once, a file system that fills up what fits
            written += self._file.write_some(view[written:], offset + written)

    def zero(self, count: int, offset: int, *, allocated: bool) -> bool:
        """Punch a hole, or zero the range and keep it allocated. Raises OSError."""
        if not allocated:
            ways = [holes.punch_hole, holes.zero_range]
        else:
            ways = [holes.allocate, holes.zero_range] if self.blank else [holes.zero_range]
        return any(self._done(way, count, offset) for way in ways)

    def _done(self, way: Callable[[int, int, int], None], count: int, offset: int) -> bool:
        """Zero a range in one way, and return whether this file or device can do that."""
        if way in self._cannot:
            return False
        try:
            way(self._fd, count, offset)
        except OSError as problem:
            if problem.errno != errno.ENOTSUP:
                raise
            self._cannot.add(way)
            return False
        return True

    def flush(self) -> None:
        """Return when all that was written is on permanent storage. Raises OSError."""
        self._file.flush()

    def finish(self, size: int) -> None:
        """Give a regular file its size. Raises OSError."""
        if self.grows:
            os.ftruncate(self._fd, size)

    def discard(self) -> None:
        """Remove the file. Raises OSError."""
        Path(self.name).unlink()

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

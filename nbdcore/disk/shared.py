"""Memory that two processes have: a file that nobody else sees, mapped into both.

The file has a name only until the other process has it open: so nothing is left behind, however the two end.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from contextlib import suppress
from pathlib import Path

__all__ = ["SharedMemory", "mapped"]

# Where files are memory, on Linux. Elsewhere a file may get to a disk, which costs time and changes nothing.
_MEMORY = Path("/dev/shm")  # noqa: S108 (the file's name is mkstemp's)


class SharedMemory:
    """So many bytes, all zero, that another process can have as well.

    Raises OSError where there is not enough of it: ENOSPC, where others have it all.

    Args:
        size: bytes; at least one.

    Attributes:
        path: for the other process, until `forget_name`.
    """

    def __init__(self, size: int) -> None:
        fd, path = tempfile.mkstemp(prefix="nbdcore-", dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None)
        self.path: str = path
        try:
            _give_room(fd, size)
            self._map = mmap.mmap(fd, size)
        except BaseException:
            self.forget_name()
            raise
        finally:
            os.close(fd)

    def view(self, begin: int, end: int) -> memoryview:
        """Return a view of some of it."""
        return memoryview(self._map)[begin:end]

    def forget_name(self) -> None:
        """Take the file's name away: the other process has it open, or never will. Idempotent."""
        with suppress(OSError):  # Windows keeps the name as long as the file is open
            Path(self.path).unlink()

    def close(self) -> None:
        """Let go of the memory; where the caller has kept a view, it goes with that."""
        with suppress(BufferError):
            self._map.close()
        self.forget_name()


def _give_room(fd: int, size: int) -> None:
    """Make the file so long, and have the system keep room for it: without, a full file system kills who writes to the map."""
    os.truncate(fd, size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot
                raise


def mapped(path: str) -> mmap.mmap:
    """Return the memory that another process has made."""
    with open(path, "r+b") as file:  # noqa: PTH123 (a name, as it came)
        return mmap.mmap(file.fileno(), 0)

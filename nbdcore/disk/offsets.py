"""Reading and writing a descriptor at an offset, from several threads.

Where the system can do it in one call, the threads do so side by side. Elsewhere, as on Windows, each moves the descriptor's
position under a lock.
"""

from __future__ import annotations

import os
import threading

__all__ = ["FLAGS", "PositionedFile"]

#: Flags of os.open() for a disk's file, besides its mode of access, where the platform has them.
FLAGS: int = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

_AT_ONCE = all(hasattr(os, name) for name in ("preadv", "pwrite"))


class PositionedFile:
    """A descriptor that is open, and stays its owner's to close."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._moving = threading.Lock()

    def read_some(self, view: memoryview, offset: int) -> int:
        """Read into the view. Returns how many bytes; 0 at the end. Raises OSError."""
        if _AT_ONCE:
            return os.preadv(self._fd, (view,), offset)
        with self._moving:
            os.lseek(self._fd, offset, os.SEEK_SET)
            data = os.read(self._fd, len(view))
        view[: len(data)] = data
        return len(data)

    def write_some(self, view: memoryview, offset: int) -> int:
        """Write of the view what the system takes. Returns how many bytes. Raises OSError."""
        if _AT_ONCE:
            return os.pwrite(self._fd, view, offset)
        with self._moving:
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.write(self._fd, view)

    def length(self) -> int:
        """Return the size in bytes, of a block device too. Raises OSError."""
        with self._moving:
            return os.lseek(self._fd, 0, os.SEEK_END)

    def flush(self) -> None:
        """Return when all that was written is on permanent storage. Raises OSError."""
        if hasattr(os, "fdatasync"):
            os.fdatasync(self._fd)
        else:  # macOS, Windows
            os.fsync(self._fd)

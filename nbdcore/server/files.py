"""A disk in a file or on a block device.

Positioned reads and writes go straight to the operating system, so clients do not wait for each other. What a platform lacks is
done without: no pread/pwrite (Windows): one lock around seeking; no SEEK_DATA: all is data; no fallocate: the server writes
zeroes. Holes are looked up when they are asked for, never remembered, since others may write to the file too.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbdcore import holes
from nbdcore.errors import UsageError
from nbdcore.protocol.constants import MAX_SIZE, AllocationFlag
from nbdcore.server.backend import Bytes

__all__ = ["FileDisk", "SharedMemoryDisk"]

_HOLE = AllocationFlag.HOLE | AllocationFlag.ZERO
_DATA = AllocationFlag(0)
# Attributes that each process has of its own.
_OWN = frozenset({"_fd", "_seeking", "_flushing", "_tickets", "_flushed", "_failed"})
# A flush that fails with these may succeed when there is room again.
_NO_ROOM = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})


class FileDisk:
    """A regular file or block device as a disk; its size is what it is when it is opened.

    Attributes:
        name: the path, for messages.
        read_only: whether it was opened for reading only.
        size: size in bytes.
    """

    name: str

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False) -> None:
        """Open `path`. Raises OSError where that fails, UsageError for what is neither a regular file nor a block device."""
        mode = Path(path).stat().st_mode  # asked first: opening a named pipe would wait for its other end
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            kind, advice = ("a folder", "a file in it") if stat.S_ISDIR(mode) else ("something else", "one of these")
            said = f"{os.fsdecode(path)}: a disk is a regular file or a block device, and this is {kind}; name {advice}"
            raise UsageError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, said)
        self.name = os.fsdecode(path)
        access = os.O_RDONLY if read_only else os.O_RDWR
        self._use(os.open(path, access | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)), read_only=read_only)

    def _use(self, fd: int, *, read_only: bool) -> None:
        self._fd = fd
        self.read_only: bool = read_only
        self._seeking = threading.Lock()
        self.size: int = self._end()
        self._flushing = threading.RLock()  # re-entrant, since a signal handler that flushes may interrupt whoever holds it
        self._tickets = itertools.count()  # one for each flush that is asked for, and for each that begins
        self._flushed = 0  # flushes with lower tickets are done
        self._failed: tuple[int, tuple[object, object]] = (0, (0, ""))  # flushes with lower tickets failed, with this error
        self._lost: tuple[object, object] | None = None  # number and text of the error by which data were lost
        self._positioned = hasattr(os, "pread") and hasattr(os, "pwrite")

    @property
    def shareable(self) -> bool:
        """Whether several processes can have the disk.

        It is pickled, for a process that is being started, as its open file and its attributes, those of a subclass too.
        """
        return self._positioned and os.name == "posix"

    def __reduce__(self) -> tuple[object, ...]:
        from multiprocessing import reduction  # it brings much, and few disks go to another process

        state = {name: value for name, value in vars(self).items() if name not in _OWN}
        try:  # by itself, so that a subclass's attribute that cannot be pickled costs a server that process, and no more
            pickled = bytes(reduction.ForkingPickler.dumps(state))
        except Exception as problem:
            raise OSError(errno.ENOTSUP, f"{self.name} cannot be had by another process: {problem}") from problem
        return _in_another_process, (type(self), reduction.DupFd(self._fd), pickled)

    def pread(self, count: int, offset: int) -> bytes:
        """Return `count` bytes from `offset` on. Raises OSError, EIO where the file has become shorter."""
        # Said once more here, since a call of a function costs a tenth of a small read.
        data = os.pread(self._fd, count, offset) if self._positioned else self._read(count, offset)
        if len(data) == count:
            return data
        parts = [data]
        got = len(data)
        while got < count:  # Linux returns at most 2^31 - 4096 bytes at once, network file systems less
            data = self._read(count - got, offset + got)
            if not data:
                raise OSError(errno.EIO, f"the file ends at {offset + got}, though it had {self.size} bytes")
            parts.append(data)
            got += len(data)
        return b"".join(parts)

    def pwrite(self, data: Bytes, offset: int) -> None:
        """Write all of `data` at `offset`. Raises OSError."""
        written = os.pwrite(self._fd, data, offset) if self._positioned else self._write(data, offset)
        rest = memoryview(data)
        while written < rest.nbytes:  # Linux writes at most 2^31 - 4096 bytes at once, a file system that fills up what fits
            rest, offset = rest.cast("B")[written:], offset + written
            written = self._write(rest, offset)

    def flush(self) -> None:
        """Return when everything written is on permanent storage.

        Raises OSError, and the same one ever after: an operating system tells once that data were lost, and counts them as
        written from then on. Only after a lack of room (ENOSPC, EDQUOT) another flush can succeed.
        """
        asked = next(self._tickets)
        with self._flushing:  # two at once could not tell whose data an error is about; those that wait share the next
            if self._lost is not None:
                raise OSError(*self._lost)
            failed_at, failure = self._failed
            if asked < failed_at:  # and that error was told once, about whose data nobody knows
                raise OSError(*failure)
            if asked < self._flushed:
                return
            begun = next(self._tickets)
            try:
                self._sync()
            except OSError as problem:
                if problem.errno not in _NO_ROOM:
                    self._lost = problem.errno, problem.strerror
                self._failed = next(self._tickets), (problem.errno, problem.strerror)
                raise
            self._flushed = begun

    def trim(self, count: int, offset: int) -> None:
        """Turn the range into a hole where that can be done; else do nothing. Raises OSError for other failures."""
        try:
            holes.punch_hole(self._fd, count, offset)
        except OSError as problem:
            if problem.errno != errno.ENOTSUP:
                raise

    def zero(self, count: int, offset: int, *, may_trim: bool) -> None:
        """Make the range read as zeroes without writing them. Raises OSError, ENOTSUP where that cannot be done."""
        if may_trim:
            try:
                holes.punch_hole(self._fd, count, offset)
            except OSError as problem:
                if problem.errno != errno.ENOTSUP:
                    raise
            else:
                return
        holes.zero_range(self._fd, count, offset)

    def cache(self, count: int, offset: int) -> None:
        """Ask the operating system to read ahead, where it can be asked."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, count, os.POSIX_FADV_WILLNEED)

    def extents(self, count: int, offset: int) -> Iterator[tuple[int, AllocationFlag]]:
        """Yield length and flags of each extent of the range, holes where the file system tells them.

        What lies beyond the end of a file that has become shorter is no hole, so that whoever reads it hears of that.
        """
        end = offset + count
        while offset < end:
            data = holes.next_data(self._fd, offset)
            if data is None:  # all is a hole from here to the file's end, which others may have moved
                data = max(offset, self._end())
            if data > offset:
                stop, flags = min(data, end), _HOLE
            else:
                hole = holes.next_hole(self._fd, offset)
                stop, flags = end if hole is None else min(hole, end), _DATA
            if stop > offset:  # else a hole appeared here between the two questions: ask again
                yield stop - offset, flags
            offset = stop

    def close(self) -> None:
        """Close the file. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _sync(self) -> None:
        if hasattr(os, "fdatasync"):
            os.fdatasync(self._fd)
        else:
            os.fsync(self._fd)

    def _end(self) -> int:
        with self._seeking:
            return os.lseek(self._fd, 0, os.SEEK_END)  # a block device's st_size is 0

    def _read(self, count: int, offset: int) -> bytes:
        if self._positioned:
            return os.pread(self._fd, count, offset)
        with self._seeking:
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.read(self._fd, count)

    def _write(self, data: Bytes, offset: int) -> int:
        if self._positioned:
            return os.pwrite(self._fd, data, offset)
        with self._seeking:
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.write(self._fd, data)


class SharedMemoryDisk(FileDisk):
    """A sparse disk in memory that the processes of one server can share, empty at first.

    `MemoryDisk` is for one process, and quicker there. This one is a file without a name, where the system has files in memory
    (Linux); elsewhere it is in the folder for temporary files. Flushing does nothing.
    """

    def __init__(self, size: int) -> None:
        """Make a disk of `size` bytes that reads as zeroes. Raises UsageError for a size that cannot be, and OSError."""
        if not 0 <= size <= MAX_SIZE:
            raise UsageError(errno.EINVAL, f"a disk of {size} bytes: the size must be from 0 to {MAX_SIZE}")
        self.name = "memory"
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("nbdcore")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        try:
            os.truncate(fd, size)
            self._use(fd, read_only=False)
        except BaseException:
            os.close(fd)
            raise

    def flush(self) -> None:
        """Return at once: the memory is all the permanence there is."""

    def zero(self, count: int, offset: int, *, may_trim: bool) -> None:
        """Make the range read as zeroes by freeing it. Raises OSError, ENOTSUP unless `may_trim`."""
        if not may_trim:
            raise OSError(errno.ENOTSUP, "allocated zeroes are not faster than writing them")
        super().zero(count, offset, may_trim=True)


def _in_another_process(kind: type[FileDisk], duplicate: Any, pickled: bytes) -> FileDisk:
    from multiprocessing import reduction

    state = reduction.ForkingPickler.loads(pickled)
    disk = kind.__new__(kind)
    disk._use(own_description(duplicate.detach()), read_only=state["read_only"])  # noqa: SLF001 (of this module)
    vars(disk).update(state)  # the size too: the file may have another by now
    return disk


def own_description(fd: int) -> int:
    """Return a descriptor of the same file, and close `fd`; or return `fd` where the file cannot be opened again.

    Descriptors that were duplicated are one "open file description" to Linux, which tells each of these once that data were lost:
    to the process alone that happens to flush first.
    """
    import fcntl  # which only systems have where processes can share a file

    try:
        again = os.open(f"/proc/self/fd/{fd}", fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_CLOEXEC)
    except OSError:  # not Linux, no /proc, or no right to open it any more
        return fd
    os.close(fd)
    return again

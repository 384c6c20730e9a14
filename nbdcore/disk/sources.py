"""A disk that is only read: over NBD, or a local file. What checksums and comparisons stand on.

A source tells its size, which parts of it may hold data, and reads into the caller's memory, for several threads at once. What it
does not name as data reads as zeroes, without reading it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol, Self, TypeAlias, Unpack

from nbdcore.clients.blocking.client import Client
from nbdcore.clients.blocking.functions import create_pool
from nbdcore.clients.blocking.pool import Pool
from nbdcore.clients.connect.options import ClientOptions
from nbdcore.disk.naming import disk_named, name_of
from nbdcore.disk.offsets import FLAGS, PositionedFile
from nbdcore.errors import CommandError, UsageError
from nbdcore.protocol.constants import BASE_ALLOCATION
from nbdcore.uri import is_uri

__all__ = ["AnySource", "NBDSource", "Source", "checked_range", "open_source"]

#: What callers name a disk by: an NBD URI, a local file's path, a client that is connected, which stays theirs, or a function
#: that connects one, which is closed in the end.
AnySource: TypeAlias = str | os.PathLike[str] | Client | Pool | Callable[[], Client | Pool]


class Source(Protocol):
    """What there is to read.

    Attributes:
        size: bytes.
        name: what errors call it.
    """

    size: int
    name: str

    def data(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (begin, end) of what may hold data, in order. All else between the two offsets is zero."""

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Read as much as the memory holds. Raises OSError."""

    def interrupt(self) -> None:
        """End the calls of other threads that may take long, and those that come. What they raise says nothing of the disk."""

    def __enter__(self) -> Self:
        """Give it to a `with` block, at whose end it is closed."""

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Let go of it. No other thread may read any more."""


def open_source(
    source: AnySource, *, connections: int, timeout: float | None = None, **options: Unpack[ClientOptions]
) -> NBDSource | FileSource:
    """Open what a caller names. Raises what connecting raises, or OSError for a file.

    Args:
        source: a string is a URI, or else the path of a file.
        connections: for a URI.
        timeout: seconds for connecting.
        options: for a URI.
    """
    if isinstance(source, Client | Pool):
        return NBDSource(source, owned=False)
    if isinstance(source, str) and is_uri(source):
        return _owned(create_pool(source, connections=connections, timeout=timeout, **options))
    return _owned(source()) if callable(source) else FileSource(Path(source))


def _owned(client: Client | Pool) -> NBDSource:
    try:
        return NBDSource(client, owned=True)
    except BaseException:
        client.close()
        raise


def checked_range(size: int, offset: int, length: int | None) -> tuple[int, int]:
    """Return where a range begins and ends; without a length at the end of the disk. Raises UsageError for one beyond it."""
    end = size if length is None else offset + length
    if not 0 <= offset <= end <= size:
        missing = f"offset {offset}" if length is None else f"{length} bytes at offset {offset}"
        raise UsageError(errno.EINVAL, f"the disk has {size} bytes, and no {missing}")
    return offset, end


class NBDSource:
    """An export, read over a client.

    Args:
        client: connected.
        owned: whether closing this closes the client.
        timeout: seconds for each request; None stands for the client's `command_timeout`.
    """

    def __init__(self, client: Client | Pool, *, owned: bool, timeout: float | None = None) -> None:
        self._client = client
        self._owned = owned
        self._timeout = timeout
        self.name: str = name_of(client)
        self.size: int = client.size
        self._multiple = client.block_size.minimum

    def data(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield what the server does not know to be zero: all of it, where it can tell nothing."""
        at = begin
        if BASE_ALLOCATION in self._client.contexts and begin < end:
            first = begin - begin % self._multiple
            last = min(self.size, end + -end % self._multiple)
            # A server that fails to tell is still read. What ends the connection ends the reading too.
            with suppress(CommandError), disk_named("asking about", last - first, first, self.name):
                for extent in self._client.extents(offset=first, count=last - first, timeout=self._timeout):
                    low, at = at, max(at, min(extent.end, end))
                    if not extent.zero and low < at:
                        yield low, at
        if at < end:
            yield at, end

    def read(self, count: int, offset: int) -> bytes:
        """Read; beyond what was asked for, where the server wants multiples of its minimum block size."""
        end = offset + count
        first = offset - offset % self._multiple
        last = min(self.size, end + -end % self._multiple)
        with disk_named("reading", last - first, first, self.name):
            data = self._client.pread(last - first, first, timeout=self._timeout)
        return data if last - first == count else data[offset - first : end - first]

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Read as much as the memory holds; where that is no multiple of the server's, it is copied once more."""
        end = offset + len(memory)
        if offset % self._multiple or (end % self._multiple and end != self.size):
            memory[:] = self.read(len(memory), offset)
        else:
            with disk_named("reading", len(memory), offset, self.name):
                self._client.pread_into(memory, offset, timeout=self._timeout)

    def interrupt(self) -> None:
        """Close the client, if it is owned. One of the caller's goes on: a call ends when it is answered, or in its own time."""
        if self._owned:
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._owned:
            self._client.__exit__(kind, *rest)


class FileSource:
    """A regular file, or a block device. Raises OSError where it cannot be opened, UsageError for what has no size."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name: str = str(path)
        # Not blocking: a named pipe that nobody writes to is refused too.
        self._fd = os.open(path, os.O_RDONLY | FLAGS | getattr(os, "O_NONBLOCK", 0))
        self._file = PositionedFile(self._fd)
        try:
            _check_has_a_size(self._fd, path)
            self.size: int = self._file.length()
        except BaseException:
            os.close(self._fd)
            raise

    def data(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield what is no hole: all of it, where the system cannot tell."""
        at = begin
        while at < end:
            first, last = self._next_data(at, end)
            if first < last:
                yield first, last
            at = last

    def _next_data(self, at: int, end: int) -> tuple[int, int]:
        """Return the next range with data; an empty one at the end."""
        if not hasattr(os, "SEEK_DATA"):
            return at, end
        try:
            # It moves the descriptor's position, which nobody needs: systems that know of holes read at an offset in one call.
            first = os.lseek(self._fd, at, os.SEEK_DATA)
            return min(first, end), min(os.lseek(self._fd, first, os.SEEK_HOLE), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole is left
                return end, end
            return at, end  # it is a device, or on a file system, that cannot tell

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Read. A file that has become shorter meanwhile is an error."""
        while memory:
            try:
                count = self._file.read_some(memory, offset)
            except OSError as error:
                if error.errno is None:  # a signal handler's: the system's have a number
                    raise
                raise OSError(error.errno, error.strerror, str(self._path)) from error
            if not count:
                raise OSError(errno.EIO, f"became shorter while it was read: nothing is left at {offset}", str(self._path))
            memory, offset = memory[count:], offset + count

    def interrupt(self) -> None:
        """Do nothing: reading a file does not wait for anybody."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        os.close(self._fd)


def _check_has_a_size(fd: int, path: Path) -> None:
    kind = os.fstat(fd).st_mode
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
        raise UsageError(errno.ESPIPE, f"{path} is no file or block device, and can only be read from its beginning")

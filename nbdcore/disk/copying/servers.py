"""NBD servers as the ends of a copy, over a client or a pool of connections."""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Iterator

from nbdcore.clients.blocking.client import Client
from nbdcore.clients.blocking.pool import Pool
from nbdcore.disk.copying.ends import Destination, End, Range, Source
from nbdcore.errors import Error, UsageError
from nbdcore.protocol.constants import BASE_ALLOCATION, AllocationFlag

__all__ = ["Disk", "ServerDestination", "ServerSource"]

#: A connection to a server, or several.
Disk = Client | Pool

# Of the flags of a dirty bitmap: the range has changed.
_DIRTY = 1
# Of a large disk, so many bytes are asked about at once, by so many threads. A span of which each second block of 64 KiB is data
# takes 8 MiB of memory for each of them.
_SPAN, _SCOUTS = 4 << 30, 3
# Seconds that the server has to hang up after the goodbye.
_GOODBYE = 5.0


class _Server(End):
    """What both ends share.

    Args:
        disk: connected.
        name: what messages call it.
        owned: whether to close it at the end.
    """

    kind = "server"

    def __init__(self, disk: Disk, name: str, *, owned: bool) -> None:
        self._disk = disk
        self._owned = owned
        self.name = name
        self.readable: Disk = disk
        self.size: int = disk.size
        block = disk.block_size
        self.minimum: int = block.minimum
        self.preferred: int = max(block.preferred, block.minimum)
        self.maximum: int = max(min(block.maximum, block.payload), block.minimum)
        self.connections: int = disk.connections if isinstance(disk, Pool) else 1

    def cancel(self) -> None:
        """Have calls that wait in other threads fail now. A client that the caller brought is left as it is."""
        if self._owned:
            self._disk.close()

    def close(self) -> None:
        """Say goodbye, and close what the copy opened."""
        if self._owned:
            try:
                self._disk.disconnect(timeout=_GOODBYE)
            except Error:  # the server did not take leave: every request before had its own outcome
                self._disk.close()


class ServerSource(_Server, Source):
    """An export that is copied from.

    Args:
        use_extents: whether to ask which parts of it are zero.
        bitmap: the metadata context of a dirty bitmap; then only what that names is part of the copy. Raises UsageError where the
            server does not have it.
    """

    def __init__(self, disk: Disk, name: str, *, owned: bool, use_extents: bool, bitmap: str = "") -> None:
        super().__init__(disk, name, owned=owned)
        self._use_extents = use_extents and BASE_ALLOCATION in disk.contexts
        self._bitmap = bitmap
        if bitmap and bitmap not in disk.contexts:
            said = f"{name} has no metadata context {bitmap}"
            raise UsageError(errno.ENOENT, f"{said}: serve it with its bitmap, as qemu-nbd --bitmap=NAME does")

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill the view. Raises Error."""
        return self._disk.pread_into(view, offset)

    def extents(self) -> Iterator[Range]:
        """Yield what base:allocation says, of all or of what the bitmap names. Raises Error where the server cannot answer.

        On a large disk several parts are asked about at a time, since some servers take long to find out.
        """
        if not self.size or not (self._use_extents or self._bitmap):
            yield from Source.extents(self)
        elif self.size <= _SPAN:
            yield from self._described(0, self.size)
        else:
            yield from self._surveyed()

    def _surveyed(self) -> Iterator[Range]:
        from concurrent.futures import Future, ThreadPoolExecutor

        waiting: deque[Future[list[Range]]] = deque()
        with ThreadPoolExecutor(_SCOUTS, thread_name_prefix="nbdcore-copy") as scouts:
            try:
                for begin in range(0, self.size, _SPAN):
                    count = min(_SPAN, self.size - begin)
                    waiting.append(scouts.submit(lambda *part: [*self._described(*part)], begin, count))
                    if len(waiting) > _SCOUTS:
                        yield from waiting.popleft().result()
                while waiting:
                    yield from waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _described(self, begin: int, count: int) -> Iterator[Range]:
        """Yield the ranges of a part of the disk."""
        if not self._bitmap:
            for extent in self._disk.extents(BASE_ALLOCATION, offset=begin, count=count):
                yield Range(extent.offset, extent.length, zero=extent.zero)
        elif not self._use_extents:
            for extent in self._disk.extents(self._bitmap, offset=begin, count=count):
                if extent.flags & _DIRTY:
                    yield Range(extent.offset, extent.length, zero=False)
        else:
            for both in self._disk.extents(self._bitmap, BASE_ALLOCATION, offset=begin, count=count):
                dirty, allocation = both.flags
                if dirty & _DIRTY:
                    yield Range(both.offset, both.length, zero=bool(allocation & AllocationFlag.ZERO))


class ServerDestination(_Server, Destination):
    """An export that is copied to."""

    def __init__(self, disk: Disk, name: str, *, owned: bool) -> None:
        super().__init__(disk, name, owned=owned)
        self.read_only: bool = disk.read_only
        self.can_flush: bool = disk.can_flush
        self._edge = threading.Lock()

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of the view. Raises Error."""
        beyond = len(view) % self.minimum
        if not beyond:
            self._disk.pwrite(view, offset)
            return
        whole = len(view) - beyond
        if whole:
            self._disk.pwrite(view[:whole], offset)
        self._write_edge(view[whole:], offset + whole)

    def _write_edge(self, rest: memoryview, offset: int) -> None:
        """Write the end of a source that ends within a block of this: the rest of the block stays what it is."""
        with self._edge:
            block = bytearray(self._disk.pread(self.minimum, offset))
            block[: len(rest)] = rest
            self._disk.pwrite(block, offset)

    def zero(self, count: int, offset: int, *, allocated: bool) -> bool:
        """Write zeroes without sending them, where the server can do that. Raises Error."""
        if not self._disk.can_zero:
            return False
        self._disk.zero(count, offset, no_hole=allocated)
        return True

    def flush(self) -> None:
        """Wait until the server has put all on permanent storage, if it can. Raises Error."""
        if self._disk.can_flush:
            self._disk.flush()

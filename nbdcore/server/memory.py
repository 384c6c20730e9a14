"""A disk in memory: sparse, so that its size costs nothing, only what is written does.

Memory comes in pages, allocated by the first write that touches them and freed by trimming and zeroing whole ones. A sorted list
of the allocated pages makes extents and the freeing of ranges cost what is allocated there, not what the range spans: 1 TiB of
nothing is one extent, found by bisection. One lock guards both; it is held for the copying of one request.
"""

from __future__ import annotations

import errno
import threading
from bisect import bisect_left, insort
from collections.abc import Iterator

from nbdcore.errors import UsageError
from nbdcore.protocol.constants import MAX_SIZE, AllocationFlag
from nbdcore.server.backend import Bytes

__all__ = ["MemoryDisk"]

# Large enough that copying, not looking up, is the cost of a large request; small enough that scattered 4 KiB writes waste
# sixteenfold at worst.
_PAGE = 64 << 10
_ZEROES = bytes(_PAGE)
_HOLE = AllocationFlag.HOLE | AllocationFlag.ZERO
_DATA = AllocationFlag(0)


class MemoryDisk:
    """A sparse disk in memory, empty at first, safe from several threads.

    Flushing and caching succeed at once: the memory is all the permanence there is. Ranges outside the disk raise UsageError
    (EINVAL), with nothing changed.
    """

    def __init__(self, size: int) -> None:
        """Make a disk of `size` bytes that reads as zeroes. Raises UsageError unless 0 <= size < 2^63."""
        if not 0 <= size <= MAX_SIZE:
            raise UsageError(errno.EINVAL, f"a disk of {size} bytes: the size must be from 0 to {MAX_SIZE}")
        self._size = size
        self._pages: dict[int, memoryview] = {}
        self._order: list[int] = []
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._size

    @property
    def allocated(self) -> int:
        """Bytes of memory that hold data."""
        return len(self._order) * _PAGE

    def pread(self, count: int, offset: int) -> bytes:
        """Return `count` bytes from `offset` on."""
        self._check(count, offset)
        index, start = divmod(offset, _PAGE)
        with self._lock:
            if start + count <= _PAGE:
                page = self._pages.get(index)
                return bytes(count) if page is None else bytes(page[start : start + count])
            return b"".join(self._pages.get(index, _ZEROES)[start:stop] for index, start, stop in _spans(count, offset))

    def pwrite(self, data: Bytes, offset: int) -> None:
        """Write all of `data` at `offset`."""
        source = memoryview(data).cast("B")
        self._check(len(source), offset)
        done = 0
        with self._lock:
            for index, start, stop in _spans(len(source), offset):
                part = source[done : done + stop - start]
                page = self._pages.get(index)
                if page is None:
                    page = self._pages[index] = memoryview(bytearray(_PAGE))
                    insort(self._order, index)
                page[start:stop] = part
                done += stop - start

    def flush(self) -> None:
        """Return at once."""

    def cache(self, count: int, offset: int) -> None:
        """Return at once: everything is in memory."""
        self._check(count, offset)

    def trim(self, count: int, offset: int) -> None:
        """Free what whole pages of the range hold; all of the range reads as zeroes afterwards."""
        self._check(count, offset)
        end = offset + count
        first, last = -(-offset // _PAGE), end // _PAGE
        with self._lock:
            if first > last:  # inside one page
                self._clear(first - 1, offset % _PAGE, end % _PAGE)
                return
            self._clear(first - 1, offset - (first - 1) * _PAGE, _PAGE)
            self._clear(last, 0, end % _PAGE)
            low, high = bisect_left(self._order, first), bisect_left(self._order, last)
            for index in self._order[low:high]:
                del self._pages[index]
            del self._order[low:high]

    def zero(self, count: int, offset: int, *, may_trim: bool) -> None:
        """Make the range read as zeroes by freeing it.

        Raises OSError (ENOTSUP) unless `may_trim`: zeroes that must be allocated cost as much as writing them.
        """
        if not may_trim:
            raise OSError(errno.ENOTSUP, "allocated zeroes are not faster than writing them")
        self.trim(count, offset)

    def extents(self, count: int, offset: int) -> Iterator[tuple[int, AllocationFlag]]:
        """Yield length and flags of each extent of the range: allocated pages are data, the rest are holes."""
        self._check(count, offset)
        end = offset + count
        while offset < end:
            with self._lock:
                stop, flags = self._run(offset // _PAGE)
            stop = end if stop is None else min(stop * _PAGE, end)
            yield stop - offset, flags
            offset = stop

    def _run(self, index: int) -> tuple[int | None, AllocationFlag]:
        """Return the first page after the run that page `index` is in (None: it goes to the end), and the run's flags."""
        order = self._order
        at = bisect_left(order, index)
        if at == len(order):
            return None, _HOLE
        if order[at] > index:
            return order[at], _HOLE
        # Along a run without gaps page numbers and positions rise together; the first place where they do not ends it.
        after = bisect_left(range(at, len(order)), True, key=lambda place: order[place] - index != place - at)
        return index + after, _DATA

    def _clear(self, index: int, start: int, stop: int) -> None:
        page = self._pages.get(index)
        if page is not None and start < stop:
            page[start:stop] = _ZEROES[start:stop]

    def _check(self, count: int, offset: int) -> None:
        if count < 0 or offset < 0 or offset + count > self._size:
            raise UsageError(errno.EINVAL, f"{count} bytes at offset {offset} are not inside a disk of {self._size} bytes")


def _spans(count: int, offset: int) -> Iterator[tuple[int, int, int]]:
    """Yield page, start and stop inside it for each page that a range touches."""
    index, start = divmod(offset, _PAGE)
    while count:
        stop = min(start + count, _PAGE)
        yield index, start, stop
        count -= stop - start
        index, start = index + 1, 0

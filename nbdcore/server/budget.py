"""The memory that all clients of a server share, so that many of them cannot use up what the machine has.

Every client has a small, fixed share of its own: the channel's scratch buffer for what comes, and its queue for what goes. For
what is larger, memory is taken from the budget first. Nobody waits for the budget, since whoever holds it may be slow: what does
not fit is carried out in pieces, of 1 MiB where that much is left, else of a size that the fixed share covers.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator

__all__ = ["PIECE", "MemoryBudget", "PayloadBuffer"]

#: Bytes of a piece: large enough that the work for each does not count beside the copying.
PIECE = 1 << 20


class MemoryBudget:
    """So many bytes for all clients together. Safe from several threads."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = 0
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """Bytes that are taken now."""
        return self._taken

    @property
    def scarce(self) -> bool:
        """Whether more than half is taken: nobody should keep what can be made again."""
        return self._taken > self._size // 2

    def take(self, count: int) -> bool:
        """Take bytes, which `give_back` returns. Takes none, and returns False, where they are not left."""
        with self._lock:
            if count > self._size - self._taken:
                return False
            self._taken += count
            return True

    def give_back(self, count: int) -> None:
        """Return bytes that were taken."""
        with self._lock:
            self._taken -= count

    @contextlib.contextmanager
    def share(self, wanted: int, free: int) -> Iterator[int]:
        """Give how many of `wanted` bytes may be used inside: all of them where they can be taken, else `free` at most."""
        taken = wanted > free and self.take(wanted)
        try:
            yield wanted if taken else min(wanted, free)
        finally:
            if taken:
                self.give_back(wanted)


class PayloadBuffer:
    """One client's buffer for payloads, kept from one request to the next while memory is not scarce. For one thread."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._buffer: mmap.mmap | bytes = b""

    def take(self, count: int) -> memoryview | None:
        """Return room for `count` bytes, until the next call; None where the budget, or the machine, has not as many left."""
        if count > len(self._buffer):
            self.close()
            if not self._budget.take(count):
                return None
            try:
                self._buffer = _pages(count)
            except (OSError, MemoryError):
                self._budget.give_back(count)
                return None
        return memoryview(self._buffer)[:count]

    def done(self) -> None:
        """Say that what was taken is not needed any more. Its view must be gone."""
        if len(self._buffer) > PIECE or self._budget.scarce:
            self.close()

    def close(self) -> None:
        """Give everything back. Idempotent."""
        # Freed when the last view of it is gone: not closed, since a back end may have kept one against the rules.
        size, self._buffer = len(self._buffer), b""
        self._budget.give_back(size)


def _pages(count: int) -> mmap.mmap:
    """Return memory straight from the system, where it goes back to.

    The allocator of the C library would keep what one thread has freed from all others: three times the budget, after a hundred
    clients.
    """
    return mmap.mmap(-1, count) if os.name == "nt" else mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE)

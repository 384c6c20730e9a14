"""The block hash of what is copied, computed in the same pass. Pieces come in any order; a digest waits until its turn."""

from __future__ import annotations

import threading

from nbdcore.disk.blockhash import BlockHash, Combination

__all__ = ["Digests"]


class Digests:
    """Takes pieces of a disk from several threads, each beginning where a block does, and each part of the disk once."""

    def __init__(self, block_hash: BlockHash) -> None:
        self._hash = block_hash
        self._combination = Combination(block_hash.algorithm)
        self._lock = threading.Lock()
        self._end = 0  # of what has been combined
        self._waiting: dict[int, tuple[int, bytes | None]] = {}  # by offset: the bytes of a piece, and its digests

    def add(self, offset: int, count: int, data: memoryview | None) -> None:
        """Add a piece; None stands for zeroes."""
        digests = None if data is None else self._hash.digests_of(data)
        with self._lock:
            self._waiting[offset] = (count, digests)
            while self._end in self._waiting:
                count, digests = self._waiting.pop(self._end)
                self._end += count
                if digests is not None:
                    self._combination.add(digests)
                else:
                    for many, _ in self._hash.zero_digests(count):
                        self._combination.add(many)

    def checksum(self) -> str:
        """Return the block hash of everything, in hexadecimal."""
        assert not self._waiting, "each part of the disk was added"
        return self._combination.checksum(self._end).hex()

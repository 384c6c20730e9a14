"""Disks for tests of what reads them: with chosen extents, which remember what was read; and an independent block hash."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from nbdcore.protocol.constants import AllocationFlag
from nbdcore.server import ExportSettings, Server

DATA, ZERO = AllocationFlag(0), AllocationFlag.HOLE | AllocationFlag.ZERO


def block_hash(data: bytes, algorithm: str = "sha256", size: int = 65536) -> bytes:
    """The algorithm in one line."""
    blocks = b"".join(hashlib.new(algorithm, data[at : at + size]).digest() for at in range(0, len(data), size))
    return hashlib.new(algorithm, blocks + len(data).to_bytes(8, "little")).digest()


class ToldDisk:
    """A disk of given bytes that tells of given zeroes."""

    def __init__(self, contents: bytes, zeroes: list[tuple[int, int]]) -> None:
        self.contents = contents
        self.size = len(contents)
        self.zeroes = zeroes
        self.read: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def pread(self, count: int, offset: int) -> bytes:
        with self._lock:
            self.read.append((offset, offset + count))
        return self.contents[offset : offset + count]

    def extents(self, count: int, offset: int) -> Iterator[tuple[int, AllocationFlag]]:
        end = offset + count
        borders = {offset, end, *(border for zero in self.zeroes for border in zero if offset < border < end)}
        for begin, stop in pairwise(sorted(borders)):
            zero = any(low <= begin and stop <= high for low, high in self.zeroes)
            yield stop - begin, ZERO if zero else DATA


class SilentDisk(ToldDisk):
    """One that tells nothing."""

    extents = None


def random_disk(seed: int, size: int, *, smallest: int = 1) -> ToldDisk:
    """A disk with data and zeroes in odd places, of which it tells some."""
    numbers = random.Random(seed)
    contents = bytearray(size)
    zeroes = []
    at = 0
    while at < size:
        count = min(size - at, smallest * numbers.choice([1, 3, 100, 16384, 65536, 100_000, 300_000, 2_000_000]))
        kind = numbers.choice(["data", "told", "untold"])
        if kind == "data":
            contents[at : at + count] = numbers.randbytes(count)
        elif kind == "told":
            zeroes.append((at, at + count))
        at += count
    return ToldDisk(bytes(contents), zeroes)


@contextmanager
def served(disk, path, **settings) -> Iterator[str]:
    """Serve a disk on a unix socket; gives its URI."""
    with Server(ExportSettings(disk, **settings)) as server:
        yield server.listen("unix", path=str(path)).address.uri("")

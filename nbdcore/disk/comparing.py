"""Two disks compared: what both know to be zero is not read, what one knows to be zero is read from the other only.

Threads read the same piece of both, and compare it in one call, at the speed of memory. Only in a piece that differs is it looked
for what does. The shorter disk counts as if it went on with zeroes, unless sizes matter, as `qemu-img compare` has it.
"""

from __future__ import annotations

import errno
import threading
from array import array
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Unpack

from nbdcore.clients.connect.options import CONNECTIONS, ClientOptions
from nbdcore.disk.checksums import Progress
from nbdcore.disk.differences import Difference, Differences, differing
from nbdcore.disk.runs import Piece, in_order, pieces
from nbdcore.disk.sources import AnySource, Source, checked_range, open_source
from nbdcore.errors import UsageError

__all__ = ["GRANULARITY", "Comparison", "compare"]

# Bytes of each disk that a thread reads at once: as for a checksum.
_PIECE = 2 << 20
# The largest granularity: a piece is made of whole blocks.
_COARSEST = 1 << 20
# Zeroes up to so many are read, in bytes, where data are beside them: one more request would take as long.
_UNIT = 64 << 10
#: A block of most file systems: what a difference is made of, where the caller does not say.
GRANULARITY = 4096


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of comparing two disks.

    Attributes:
        same: whether they have the same contents: bytes beyond the shorter one's end are zero, or with `strict` there are none.
        first_difference: offset of the first byte that differs; None where none does.
        differences: the ranges that differ, in order, where `all_differences` was asked for. They are kept in 16 bytes each.
        sizes: of the two disks, in bytes.
    """

    same: bool
    first_difference: int | None
    differences: Sequence[Difference]
    sizes: tuple[int, int]


def compare(  # noqa: PLR0913 (each says something of its own, by name)
    first: AnySource,
    second: AnySource,
    *,
    offset: int = 0,
    length: int | None = None,
    strict: bool = False,
    all_differences: bool = False,
    granularity: int = GRANULARITY,
    connections: int = CONNECTIONS,
    progress: Progress | None = None,
    timeout: float | None = None,
    **options: Unpack[ClientOptions],
) -> Comparison:
    """Compare two disks, or a range of them, up to the first difference or as a whole.

    Args:
        first: an NBD URI, a local file or block device, a connected `Client` or `Pool`, or a function that returns one of
            those, which is closed in the end.
        second: likewise.
        offset: where the range begins, in bytes. Blocks are counted from there.
        length: bytes of the range; None: up to the end of the larger disk.
        strict: disks of different sizes differ, and nothing is read of them; of a range, both must have all.
        all_differences: go on behind the first difference, and list all.
        granularity: bytes of a block, of which those that differ are made; a power of two up to 1 MiB.
        connections: opened for each URI, as far as its server allows several; as many threads work, and two at least.
        progress: called with the bytes that are done, and all of them, now and then; what it raises ends the work.
        timeout: seconds for connecting.
        options: those of `Client`, for URIs. With `contexts=()` nothing is asked about zeroes, and all is read.

    Raises UsageError for wrong arguments, what connecting and reading raise, and OSError for a file. A client of the caller's
    goes on, unless its connection was lost.
    """
    if not 0 < granularity <= _COARSEST or granularity & (granularity - 1):
        raise UsageError(errno.EINVAL, f"granularity is a power of two up to {_COARSEST} bytes, not {granularity}")
    with (
        open_source(first, connections=connections, timeout=timeout, **options) as one,
        open_source(second, connections=connections, timeout=timeout, **options) as other,
    ):
        if one.name == other.name:  # two programs that were started, say
            one.name, other.name = f"{one.name} (the first disk)", f"{other.name} (the second disk)"
        sizes = (one.size, other.size)
        begin, end = checked_range(max(sizes), offset, length)
        if strict and min(one.size, end) != min(other.size, end):
            return Comparison(same=False, first_difference=None, differences=Differences(), sizes=sizes)
        first_difference: int | None = None
        differences = Differences()
        pair = _Pair(one, other, granularity)
        with closing(pair.outcomes(begin, end, threads=max(2, connections))) as outcomes:
            for piece, different in outcomes:
                if different is not None:
                    if first_difference is None:
                        first_difference = piece.begin + different.first
                    if not all_differences:
                        break
                    differences.add(different.borders, piece.begin)
                if progress is not None:
                    progress(piece.end - begin, end - begin)
        return Comparison(first_difference is None, first_difference, differences, sizes)


# ---------------------------------------------------------------------------------------------- reading and comparing


@dataclass(frozen=True, slots=True)
class _PairPiece(Piece):
    """A piece of two disks, of which one at least holds data, where `data` says so."""

    of_first: bool
    of_second: bool


@dataclass(frozen=True, slots=True)
class _Different:
    """Where two disks differ in a piece, counted from its beginning: the first byte that does, and ranges; see `differing`."""

    first: int
    borders: array[int]


class _Pair:
    """Two disks that are read side by side."""

    def __init__(self, first: Source, second: Source, granularity: int) -> None:
        self._first = first
        self._second = second
        self._granularity = granularity
        self._zeroes = bytes(_PIECE)
        self._own = threading.local()

    def outcomes(self, begin: int, end: int, *, threads: int) -> Generator[tuple[_PairPiece, _Different | None]]:
        """Compare all pieces of a range, in threads, and yield them in order, each with what is different in it."""
        unit = max(_UNIT, self._granularity)
        data = (one.data(begin, min(end, one.size)) for one in (self._first, self._second))
        todo = _overlaid(*(pieces(of_one, begin, end, unit=unit, most=_PIECE) for of_one in data))
        return in_order(self._work, todo, threads=threads, give_up=self._give_up)

    def _give_up(self) -> None:
        self._first.interrupt()
        self._second.interrupt()

    def _work(self, piece: _PairPiece) -> _Different | None:
        if not hasattr(self._own, "memory"):
            self._own.memory = (bytearray(_PIECE), bytearray(_PIECE))
        mine, others = self._own.memory
        first = self._contents(self._first, piece, mine) if piece.of_first else self._zeroes
        second = self._contents(self._second, piece, others) if piece.of_second else self._zeroes
        # One call of the C library's. Comparing two memoryviews takes a hundred times as long, and bytes would be copied.
        with memoryview(second)[: piece.length] as view:
            if first.startswith(view):
                return None
        with memoryview(first)[: piece.length] as left, memoryview(second)[: piece.length] as right:
            return _Different(*differing(left, right, self._granularity))

    def _contents(self, source: Source, piece: _PairPiece, memory: bytearray) -> bytearray:
        """Read a piece; beyond the end of the disk are zeroes."""
        count = min(source.size, piece.end) - piece.begin
        with memoryview(memory)[:count] as view:
            source.read_into(view, piece.begin)
        if count < piece.length:
            memory[count : piece.length] = self._zeroes[: piece.length - count]
        return memory


def _overlaid(first: Iterator[Piece], second: Iterator[Piece]) -> Iterator[_PairPiece]:
    """Yield the pieces of two disks: each begins and ends where those of one do."""
    one, other = next(first, None), next(second, None)
    while one is not None and other is not None:
        end = min(one.end, other.end)
        yield _PairPiece(max(one.begin, other.begin), end, one.data or other.data, of_first=one.data, of_second=other.data)
        if one.end == end:
            one = next(first, None)
        if other.end == end:
            other = next(second, None)

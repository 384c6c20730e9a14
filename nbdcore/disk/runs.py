"""A range of a disk in pieces to work on, by several threads, with outcomes in order.

Each piece either holds data or is zero as a whole. Pieces of data are short, so that many threads have something to do and memory
is bounded; a run of zeroes is one piece, however long. Borders stand at multiples of a unit, counted from the range's beginning:
a unit that is zero only in part is data.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["Piece", "in_order", "pieces"]

# Pieces that each thread may be ahead of the one that is waited for: enough that no thread waits for another that has a slow one.
_AHEAD = 4

Value = TypeVar("Value")
AnyPiece = TypeVar("AnyPiece", bound="Piece")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a disk.

    Attributes:
        begin, end: offsets in bytes.
        data: whether it must be read; else all of it is zero.
    """

    begin: int
    end: int
    data: bool

    @property
    def length(self) -> int:
        """How many bytes it has."""
        return self.end - self.begin


def pieces(data: Iterable[tuple[int, int]], begin: int, end: int, *, unit: int, most: int) -> Iterator[Piece]:
    """Yield the pieces of a range, as soon as they are known.

    Args:
        data: (begin, end) of what may hold data, in order, within the range.
        begin: where the range begins.
        end: and where it ends.
        unit: bytes; pieces begin at multiples of it, counted from `begin`.
        most: bytes of a piece of data, a multiple of the unit: one ends at each multiple of it, counted from `begin`.
    """
    first = last = begin  # of the data that have not been yielded
    for low, high in data:
        start = low - (low - begin) % unit
        if start > last:
            yield from _cut(first, last, begin, most)
            yield Piece(last, start, data=False)
            first = start
        last = max(last, min(high + -(high - begin) % unit, end))
        whole = last - (last - begin) % most
        if first < whole:
            yield from _cut(first, whole, begin, most)
            first = whole
    yield from _cut(first, last, begin, most)
    if last < end:
        yield Piece(last, end, data=False)


def _cut(first: int, last: int, begin: int, most: int) -> Iterator[Piece]:
    while first < last:
        end = min(last, first + most - (first - begin) % most)
        yield Piece(first, end, data=True)
        first = end


def in_order(
    work: Callable[[AnyPiece], Value], todo: Iterable[AnyPiece], *, threads: int, give_up: Callable[[], None]
) -> Generator[tuple[AnyPiece, Value | None]]:
    """Call `work` for each piece that holds data, in threads, and yield all pieces in order, each with what that returned.

    Pieces are consumed only a few ahead of the loop. What is raised anywhere ends the rest: `give_up` is called, which must end
    calls under way, and the threads are waited for. So it is when the generator is closed.
    """
    from concurrent.futures import ThreadPoolExecutor

    under_way: deque[tuple[AnyPiece, Future[Value] | None]] = deque()
    executor = ThreadPoolExecutor(threads, thread_name_prefix="nbdcore-disk")
    try:
        for piece in todo:
            under_way.append((piece, executor.submit(work, piece) if piece.data else None))
            if len(under_way) > _AHEAD * threads:
                yield _first_of(under_way)
        while under_way:
            yield _first_of(under_way)
    except BaseException:
        give_up()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _first_of(under_way: deque[tuple[AnyPiece, Future[Any] | None]]) -> tuple[AnyPiece, Any]:
    piece, future = under_way.popleft()
    return piece, None if future is None else future.result()

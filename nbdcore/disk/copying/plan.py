"""What is to be copied, cut into pieces that both ends can take. Pure arithmetic.

The source says where it holds data and where it is zero. Both ends have blocks, and a piece begins and ends where a block does,
but for the end of the disk: a block that is zero in part is data. Data come in pieces of the request size, which begin at
multiples of it. Zeroes come in pieces that are large, and not endless, so that a copy can stop between two.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from itertools import chain

from nbdcore.disk.copying.ends import Range

__all__ = ["aligned", "but_last", "cut"]

# The most bytes of one piece of zeroes: a server that writes them one by one does it within a few seconds.
_MOST_ZEROES = 1 << 30


def aligned(ranges: Iterable[Range], block: int, size: int) -> Iterator[Range]:
    """Yield ranges that begin and end at multiples of `block`, or at the disk's end: only whole blocks of zeroes are zero.

    The ranges are in order, and may leave parts of the disk out; a block that one of them has a part of is taken in whole.
    """
    begin = end = 0  # what is known, and not yielded yet
    zero_from: int | None = None
    for one in chain(ranges, (None,)):
        goes_on = one is not None and one.offset == end
        if zero_from is not None and not (goes_on and one is not None and one.zero):
            first, last = zero_from + -zero_from % block, end if end == size else end - end % block
            if last > first:
                if first > begin:
                    yield Range(begin, first - begin, zero=False)
                yield Range(first, last - first, zero=True)
                begin = last
            zero_from = None
        if not goes_on:
            edge = min(end + -end % block, size)
            if edge > begin:
                yield Range(begin, edge - begin, zero=False)
                begin = edge
        if one is None:
            return
        begin = begin if goes_on else max(begin, one.offset - one.offset % block)
        end = one.end
        if one.zero:
            zero_from = one.offset if zero_from is None else zero_from
        elif end - end % block > begin:
            yield Range(begin, end - end % block - begin, zero=False)
            begin = end - end % block


def cut(ranges: Iterable[Range], size: int) -> Iterator[Range]:
    """Yield the ranges in pieces: data of at most `size` bytes, cut at multiples of it; zeroes larger."""
    for one in ranges:
        most = _MOST_ZEROES if one.zero else size
        at = one.offset
        while at < one.end:
            edge = min(at - at % most + most, one.end)
            yield Range(at, edge - at, one.zero)
            at = edge


def but_last(pieces: Iterable[Range], last: list[Range]) -> Generator[Range]:
    """Yield all but the last piece, which is put into `last`."""
    held: Range | None = None
    for one in pieces:
        if held is not None:
            yield held
        held = one
    if held is not None:
        last.append(held)

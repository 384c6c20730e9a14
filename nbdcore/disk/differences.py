"""Where two disks differ: found in a piece of both at once, and kept as numbers, 16 bytes for each range.

Of two pieces the exclusive or is taken, in which all bytes but zeroes are differences. Neither that nor finding runs in it is
done by the interpreter, which takes one step for each range, not for each block.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import eq
from typing import overload

__all__ = ["Difference", "Differences", "differing"]

_ANYTHING = re.compile(rb"[^\0]+")


@dataclass(frozen=True, slots=True)
class Difference:
    """A range in which two disks differ: in each of its blocks at least one byte does.

    Attributes:
        offset: where it begins, in bytes.
        length: bytes; beyond the end of the shorter disk as well.
    """

    offset: int
    length: int


class Differences(Sequence[Difference]):
    """Ranges in which two disks differ, in order, none beside the next. Each becomes an object when it is asked for.

    Equal to a tuple of the same ranges.
    """

    __slots__ = ("_borders",)

    def __init__(self) -> None:
        self._borders = array("Q")  # where each range begins and ends

    def add(self, borders: array[int], base: int) -> None:
        """Add what `differing` found in the next piece of the disks, which begins at offset `base`."""
        mine = self._borders
        if mine and borders and mine[-1] == base + borders[0]:
            mine[-1] = base + borders[1]
            borders = borders[2:]
        mine.extend(border + base for border in borders)

    def __len__(self) -> int:
        return len(self._borders) // 2

    @overload
    def __getitem__(self, index: int) -> Difference: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Difference, ...]: ...

    def __getitem__(self, index: int | slice) -> Difference | tuple[Difference, ...]:
        """Return a range by its number, or some of them."""
        numbers = range(len(self))[index]
        return tuple(map(self._at, numbers)) if isinstance(numbers, range) else self._at(numbers)

    def __iter__(self) -> Iterator[Difference]:
        return map(self._at, range(len(self)))

    def _at(self, number: int) -> Difference:
        begin, end = self._borders[2 * number : 2 * number + 2]
        return Difference(begin, end - begin)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Differences):
            return self._borders == other._borders
        return len(self) == len(other) and all(map(eq, self, other)) if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))  # it is equal to that

    def __repr__(self) -> str:
        return f"<{len(self)} differences>"


def differing(first: memoryview, second: memoryview, granularity: int) -> tuple[int, array[int]]:
    """Return the first byte that differs in two pieces that are not equal, and the borders of each range of blocks that do.

    Args:
        first: bytes of one disk, less than 4 GiB.
        second: as many of the other one.
        granularity: bytes of a block; the first begins where the pieces do.
    """
    size = len(first)
    changed = (int.from_bytes(first, "little") ^ int.from_bytes(second, "little")).to_bytes(size, "little")
    borders = array("I")
    at, least = 0, -1
    while found := _ANYTHING.search(changed, at):
        if least < 0:
            least = found.start()
        begin = found.start() - found.start() % granularity
        at = min(found.end() + -found.end() % granularity, size)
        if borders and borders[-1] == begin:
            borders[-1] = at
        else:
            borders.extend((begin, at))
    return least, borders

"""A map made small: so many cells, each with how many bytes it has of each kind. What pictures of a disk are drawn from.

A disk of terabytes and a million parts fits on a screen that way, and no part is lost in a cell: a picture can show that there is
something in it, however little. What is worth being seen depends on the context: data among holes, dirty among clean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nbdcore.disk.maps import DiskMap, describe
from nbdcore.protocol.constants import BASE_ALLOCATION

__all__ = ["Cell", "Sketch", "sketched"]

# No disk is divided finer than by its sectors.
_SECTOR = 512

#: Bytes of each kind in a cell, by the number of the context.
Cell = dict[int, int]


@dataclass(frozen=True, slots=True)
class Sketch:
    """What one context says of a range of a disk, cell by cell.

    Attributes:
        context: its name.
        begin: where the range begins, in bytes.
        end: the offset behind its last byte.
        step: bytes of a cell; the last one may have fewer.
        cells: what is in each.
    """

    context: str
    begin: int
    end: int
    step: int
    cells: list[Cell]

    def share(self, number: int) -> float:
        """Return how much of a cell is worth being seen, from 0 to 1."""
        cell = self.cells[number]
        return sum(size for kind, size in cell.items() if self.stands_out(kind)) / sum(cell.values())

    def main(self, number: int, *, standing_out: bool) -> int:
        """Return what most of a cell is, of what stands out or of the rest; of nothing there, of all."""
        cell = self.cells[number]
        kinds = [kind for kind in cell if self.stands_out(kind) is standing_out] or list(cell)
        return max(kinds, key=cell.__getitem__)

    def totals(self) -> Cell:
        """Return how many bytes of each kind there are in all, in the order of their numbers."""
        found: Cell = {}
        for cell in self.cells:
            for kind, size in cell.items():
                found[kind] = found.get(kind, 0) + size
        return dict(sorted(found.items()))

    def percent(self, size: int) -> str:
        """Return how much of the range so many bytes are, and never nothing where there is something."""
        percent = 100 * size / (self.end - self.begin)
        return "<0.1%" if 0 < percent < 0.1 else ">99.9%" if 99.9 < percent < 100 else f"{percent:.1f}%"

    def stands_out(self, kind: int) -> bool:
        """Tell whether a kind is worth being seen among others: data, what is dirty, what some layer has."""
        return kind == 0 if self.context == BASE_ALLOCATION else kind != 0

    def word(self, kind: int) -> str:
        """Return what a kind is called; its number where that is not known."""
        return describe(self.context, kind) or f"type {kind}"

    def add(self, offsets: Sequence[int], lengths: Sequence[int], kinds: Sequence[int]) -> None:
        """Count parts of the disk in the cells that they lie in. Of many parts most lie in one, for which this is quick."""
        cells, begin, step = self.cells, self.begin, self.step
        for offset, length, kind in zip(offsets, lengths, kinds, strict=True):
            at = offset - begin
            number = at // step
            if at + length <= (number + 1) * step:
                cell = cells[number]
                cell[kind] = cell.get(kind, 0) + length
            else:
                self._spread(offset, length, kind)

    def _spread(self, offset: int, length: int, kind: int) -> None:
        at, end, step = offset - self.begin, offset + length - self.begin, self.step
        while at < end:
            number = at // step
            stop = min((number + 1) * step, end)
            cell = self.cells[number]
            cell[kind] = cell.get(kind, 0) + stop - at
            at = stop


def sketched(found: DiskMap, cells: int) -> list[Sketch]:
    """Return a sketch for each context of a map, of no more cells than wanted; none of a map without parts.

    A cell has a power of two of bytes, so that rows of them begin at offsets that say something.
    """
    if not len(found):
        return []
    step = max(_SECTOR, 1 << (-(-(found.end - found.begin) // cells) - 1).bit_length())
    count = -(-(found.end - found.begin) // step)
    sketches = [Sketch(name, found.begin, found.end, step, [{} for _ in range(count)]) for name in found.contexts]
    for offsets, lengths, *types in found.batches():
        for sketch, kinds in zip(sketches, types, strict=True):
            sketch.add(offsets, lengths, kinds)
    return sketches

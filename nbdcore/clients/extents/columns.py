"""Many extents at once and no object for each: offsets, lengths and flags, collected from one reply after the other in arrays.

Extents of a walk follow each other without a gap, so a reply comes down to offsets at which the status changes. The arithmetic
is written twice: with the standard library's iterators, and with numpy for who wants columns and has it. Both are fed extents
that were checked against the export's size (`protocol.transmission.results`), whose sums therefore fit 64 bits. No I/O; of the
client nothing is known here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from bisect import bisect_left
from collections.abc import Iterable, MutableSequence, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate, chain, compress, islice
from operator import eq, ne, sub
from sys import byteorder
from typing import Any, ClassVar, TypeAlias, cast

from nbdcore.protocol.transmission.commands import Numbers

#: One number an extent: a `numpy.ndarray` of uint64 where numpy is installed, else an `array.array` of type "Q".
Column: TypeAlias = Any

#: What a reply says of one context, from the request's offset on: the length of each extent in bytes, and its flags.
Described = tuple[Numbers, Numbers]

# ---------------------------------------------------------------------------------------------- the outcome


class _Columns(ABC):
    """What both kinds of columns share."""

    __slots__ = ()
    # So Python marks what cannot be hashed: columns belong to the caller, and may change.
    __hash__: ClassVar[None] = None  # type: ignore[assignment]  # object has a method there

    offsets: Column

    def __len__(self) -> int:
        """Return how many extents there are."""
        return len(self.offsets)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self)} extents>"

    @abstractmethod
    def _columns(self) -> list[Column]:
        """Return them one by one."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self) or not isinstance(other, _Columns):
            return NotImplemented
        ours, theirs = self._columns(), other._columns()
        return len(ours) == len(theirs) and all(a.tobytes() == b.tobytes() for a, b in zip(ours, theirs, strict=True))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ExtentColumns(_Columns):
    """Extents as columns: three arrays of unsigned 64-bit numbers, and together 24 bytes an extent.

    The columns are `numpy.ndarray` (uint64) where numpy is installed, else `array.array` ("Q"). What both can: `len`, indexing,
    slices, iteration, `tobytes` and the buffer protocol. They belong to the caller, who may change them. `len()` of the whole is
    the number of extents.

    Attributes:
        offsets: where each extent begins, in bytes, ascending.
        lengths: bytes of each, never 0; extents follow each other without a gap, and neighbours differ in their flags.
        flags: what the metadata context says of each (see `Extent`); numpy wants `int(AllocationFlag.ZERO)` to test for it.
    """

    offsets: Column
    lengths: Column
    flags: Column

    def _columns(self) -> list[Column]:
        return [self.offsets, self.lengths, self.flags]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class CombinedExtentColumns(_Columns):
    """Extents of several metadata contexts as columns; like `ExtentColumns`, with 8 more bytes an extent for each more context.

    Attributes:
        offsets: where each extent begins, in bytes, ascending.
        lengths: bytes of each, never 0; extents follow each other without a gap, and neighbours differ in one context at least.
        flags: a column for each context, in the order in which the contexts were named.
    """

    offsets: Column
    lengths: Column
    flags: tuple[Column, ...]

    def _columns(self) -> list[Column]:
        return [self.offsets, self.lengths, *self.flags]


# ---------------------------------------------------------------------------------------------- with the standard library


class Collection:
    """Extents collected from one reply after the other, merged where the status stays the same.

    Attributes:
        offsets, lengths: of each extent, in bytes.
        flags: of each extent, by context.
    """

    __slots__ = ("flags", "lengths", "offsets")

    def __init__(self, contexts: int) -> None:
        self.offsets: MutableSequence[int] = self._column()
        self.lengths: MutableSequence[int] = self._column()
        self.flags: tuple[MutableSequence[int], ...] = tuple(self._column() for _ in range(contexts))

    def _column(self, numbers: Iterable[int] = ()) -> MutableSequence[int]:
        """Return numbers in a list: what objects are made of needs to be objects."""
        return list(numbers)

    def add(self, described: Sequence[Described], begin: int, end: int) -> int:
        """Go on with a reply that describes the export from `begin` on in each context, up to `end` at most.

        Returns how far all contexts are described.
        """
        edges = [self._column(accumulate(lengths, initial=begin)) for lengths, _ in described]
        end = min(end, *(column[-1] for column in edges))
        if len(described) == 1:
            self._add_one(edges[0], *described[0], end)
        else:
            self._add_in_step(edges, [flags for _, flags in described], end)
        return end

    def _add_one(self, edges: MutableSequence[int], lengths: Numbers, flags: Numbers, end: int) -> None:
        (known,) = self.flags
        before = (known[-1] if known else None,)
        if edges[-1] > end or any(map(eq, flags, chain(before, flags))):
            begin = edges[0]
            changes = bytes(map(ne, islice(flags, bisect_left(edges, end)), chain(before, flags)))
            self._go_on(self._column(compress(edges, changes)), [self._column(compress(flags, changes))], begin, end)
        else:
            # From a server that merges by itself: nothing to be done but to take them over, in half the time.
            edges.pop()
            self.offsets += edges
            self.lengths += self._column(lengths)
            known += self._column(flags)

    def _add_in_step(self, edges: Sequence[Sequence[int]], flags: Sequence[Numbers], end: int) -> None:
        begin = at = edges[0][0]
        index = [0] * len(flags)
        status = [column[-1] for column in self.flags] if self.offsets else None
        offsets = self._column()
        changed = [self._column() for _ in flags]
        while at < end:
            before, status = status, [column[of] for column, of in zip(flags, index, strict=True)]
            if status != before:
                offsets.append(at)
                for column, flag in zip(changed, status, strict=True):
                    column.append(flag)
            at = min(column[of + 1] for column, of in zip(edges, index, strict=True))
            index = [of + (column[of + 1] == at) for column, of in zip(edges, index, strict=True)]
        self._go_on(offsets, changed, begin, end)

    def _go_on(self, offsets: MutableSequence[int], flags: Sequence[MutableSequence[int]], begin: int, end: int) -> None:
        """What is known already goes on from `begin` to the first of these changes of status, and the last change to `end`."""
        if self.lengths:
            self.lengths[-1] += (offsets[0] if offsets else end) - begin
        self.offsets += offsets
        self.lengths += self._column(map(sub, chain(islice(offsets, 1, None), (end,)), offsets))
        for known, new in zip(self.flags, flags, strict=True):
            known.extend(new)

    def take_all_but_last(self) -> Collection:
        """Return all but the last extent, of which nobody knows yet how far it goes, and keep that one."""
        kept = type(self)(len(self.flags))
        for column, last in zip(
            (self.offsets, self.lengths, *self.flags), (kept.offsets, kept.lengths, *kept.flags), strict=True
        ):
            last.append(column.pop())
        taken = copy(self)
        self.offsets, self.lengths, self.flags = kept.offsets, kept.lengths, kept.flags
        return taken


class ArrayCollection(Collection):
    """A collection of whose numbers none is an object."""

    __slots__ = ()

    def _column(self, numbers: Iterable[int] = ()) -> MutableSequence[int]:
        return _in_64_bits(numbers) if isinstance(numbers, array) else array("Q", numbers)

    def columns(self) -> ExtentColumns | CombinedExtentColumns:
        """Return all as columns; nothing may be added after that."""
        offsets, lengths, *flags = map(self._finished, (self.offsets, self.lengths, *self.flags))
        if len(flags) == 1:
            return ExtentColumns(offsets, lengths, flags[0])
        return CombinedExtentColumns(offsets, lengths, tuple(flags))

    def _finished(self, column: Any) -> Column:
        return column


def _in_64_bits(numbers: Numbers) -> Numbers:
    """Return numbers of 32 bits as ones of 64: a million in 5 ms, one by one in 25."""
    if numbers.typecode == "Q":
        return numbers
    wide: Numbers = array("Q", bytes(8 * len(numbers)))
    memoryview(wide).cast("B").cast("I")[byteorder == "big" :: 2] = memoryview(numbers)
    return wide


# ---------------------------------------------------------------------------------------------- with numpy


class NumpyCollection(ArrayCollection):
    """The same with numpy. It grows in arrays too, which numpy then takes over without a copy.

    Raises ImportError where numpy is not installed.
    """

    __slots__ = ("_numpy",)

    def __init__(self, contexts: int) -> None:
        super().__init__(contexts)
        import numpy as np

        self._numpy: Any = np

    def add(self, described: Sequence[Described], begin: int, end: int) -> int:
        """Do as without numpy; several contexts differ from one in that there are more edges to look at."""
        np = self._numpy
        starts = [self._starts(lengths, begin) for lengths, _ in described]
        end = min(end, *(int(column[-1]) for column in starts))
        edges = starts[0] if len(starts) == 1 else np.unique(np.concatenate(starts))
        edges = edges[: np.searchsorted(edges, np.uint64(end))]  # not a plain int, of which older ones make a float
        found = []
        changes = np.zeros(len(edges), bool)
        for known, column, (_, flags) in zip(self.flags, starts, described, strict=True):
            index = slice(len(edges)) if len(starts) == 1 else np.searchsorted(column, edges, side="right") - 1
            status = np.asarray(flags)[index]
            changes[1:] |= status[1:] != status[:-1]
            changes[0] |= not known or known[-1] != int(status[0])
            found.append(status)
        kept = slice(None) if changes.all() else changes  # which saves a copy, where the server merges by itself
        edges = edges[kept]
        if self.lengths:
            self.lengths[-1] += (int(edges[0]) if len(edges) else end) - begin
        ends = np.append(edges, np.uint64(end))
        columns = [edges, ends[1:] - ends[:-1], *(status[kept] for status in found)]
        for known, column in zip((self.offsets, self.lengths, *self.flags), columns, strict=True):
            cast("Numbers", known).frombytes(column.astype(np.uint64, copy=False).view(np.uint8))
        return end

    def _starts(self, lengths: Numbers, begin: int) -> Column:
        np = self._numpy
        starts = np.empty(len(lengths) + 1, np.uint64)
        starts[0] = begin
        starts[1:] = lengths
        return np.cumsum(starts, out=starts)

    def _finished(self, column: Numbers) -> Column:
        return self._numpy.asarray(column)


def collection_for_columns(contexts: int) -> ArrayCollection:
    """Return what collects for so many contexts, and makes columns of the best kind that is installed."""
    try:
        return NumpyCollection(contexts)
    except ImportError:
        return ArrayCollection(contexts)

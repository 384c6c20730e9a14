"""A disk's map: what metadata contexts say of its parts, such as data, hole or dirty, and how many bytes each comes to.

The map is kept in columns, numbers without objects, because a disk may have a million parts: 24 bytes each, 8 more for each
further context. Neighbours of which the server says the same are one part, also where it sent them as two. What a number means is
the context's business; `describe` knows the contexts of the specification and of QEMU, and leaves others to the caller.

    from nbdcore.disk import read_map

    with nbdcore.connect(uri) as disk:
        for part in read_map(disk):
            print(part.offset, part.length, part.description)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from nbdcore.clients.extents.columns import Column, CombinedExtentColumns, ExtentColumns
from nbdcore.disk.naming import disk_named, name_of
from nbdcore.protocol.constants import BASE_ALLOCATION

if TYPE_CHECKING:
    from nbdcore.clients.blocking.client import Client
    from nbdcore.clients.blocking.pool import Pool

__all__ = ["DiskMap", "Part", "Total", "describe", "read_map", "read_map_pieces", "totals"]

#: What each context says of a part, in the map's order of contexts.
Types: TypeAlias = tuple[int, ...]

_ALLOCATION = {0: "data", 1: "hole", 2: "zero", 3: "hole,zero"}
_DIRTY = {0: "clean", 1: "dirty"}
_DEPTH = {0: "absent", 1: "local"}

# Parts that become numbers of Python's at a time: of a whole column of a million they would take 32 MB.
_BATCH = 16384

# Slices of a range that a server is asked about at once, and how many of them there are: so many that the first one is there
# early, so few that a disk without much on it costs few questions. None is smaller than what takes no server any time.
_QUESTIONS = 4
_SLICES = 16
_SMALLEST_SLICE = 64 << 20


def describe(context: str, number: int) -> str:
    """Return what a number means in a metadata context, in nbdinfo's words; "" where that is not known.

    Known are base:allocation, qemu:dirty-bitmap:NAME and qemu:allocation-depth.
    """
    if context == BASE_ALLOCATION:
        return _ALLOCATION.get(number, "")
    if context.startswith("qemu:dirty-bitmap:"):
        return _DIRTY.get(number, "")
    if context == "qemu:allocation-depth":
        return _DEPTH.get(number, f"backing depth {number}")
    return ""


@dataclass(frozen=True, slots=True)
class Part:
    """A range of the disk of which each context says one thing.

    Attributes:
        offset: where it begins, in bytes.
        length: bytes, never 0.
        types: what each context says, as the number that the server sent.
        descriptions: what those numbers mean; "" where that is not known.
    """

    offset: int
    length: int
    types: Types
    descriptions: tuple[str, ...]

    @property
    def type(self) -> int:
        """The number of the first context, which is the only one of most maps."""
        return self.types[0]

    @property
    def description(self) -> str:
        """What the number of the first context means."""
        return self.descriptions[0]


@dataclass(frozen=True, slots=True)
class Total:
    """All parts of a map of which the contexts say the same, taken together.

    Attributes:
        size: bytes.
        share: how much of the range that the map covers, from 0 to 1.
        contexts: the map's.
        types, descriptions: as in `Part`.
    """

    size: int
    share: float
    contexts: tuple[str, ...]
    types: Types
    descriptions: tuple[str, ...]


class DiskMap:
    """The parts of a disk, or of a range of it, in order and without a gap. `len()` is how many; iterate for each as a `Part`.

    Made by `read_map`; or of the columns that `extent_columns` of any client returned, those of asyncio among them.

    Args:
        columns: the parts.
        contexts: the contexts that were asked for, in the order of the columns.

    Attributes:
        contexts: their names.
        offsets, lengths: a column each, in bytes.
        types: a column for each context.
    """

    __slots__ = ("contexts", "lengths", "offsets", "types")

    def __init__(self, columns: ExtentColumns | CombinedExtentColumns, *contexts: str) -> None:
        self.contexts: tuple[str, ...] = contexts or (BASE_ALLOCATION,)
        self.offsets: Column = columns.offsets
        self.lengths: Column = columns.lengths
        self.types: tuple[Column, ...] = (columns.flags,) if isinstance(columns, ExtentColumns) else columns.flags

    def __len__(self) -> int:
        """Return how many parts there are."""
        return len(self.offsets)

    @property
    def begin(self) -> int:
        """Where the first part begins, in bytes; 0 where there is none."""
        return int(self.offsets[0]) if len(self) else 0

    @property
    def end(self) -> int:
        """The offset behind the last byte of the last part; 0 where there is none."""
        return int(self.offsets[-1]) + int(self.lengths[-1]) if len(self) else 0

    def between(self, first: int, behind: int) -> DiskMap:
        """Return a map of some of the parts, by their number."""
        part = slice(first, behind)
        types = tuple(column[part] for column in self.types)
        if len(types) == 1:
            return DiskMap(ExtentColumns(self.offsets[part], self.lengths[part], types[0]), *self.contexts)
        return DiskMap(CombinedExtentColumns(self.offsets[part], self.lengths[part], types), *self.contexts)

    def types_at(self, number: int) -> Types:
        """Return what the contexts say of the part of that number."""
        return tuple(int(column[number]) for column in self.types)

    def begin_at(self, offset: int) -> None:
        """Have the first part begin at another place."""
        self.lengths[0] = int(self.lengths[0]) + self.begin - offset
        self.offsets[0] = offset

    def __iter__(self) -> Iterator[Part]:
        described = _Known(self.describe)
        for offsets, lengths, kinds in self._kinds():
            for offset, length, kind in zip(offsets, lengths, kinds, strict=True):
                types = (kind,) if isinstance(kind, int) else kind
                yield Part(offset, length, types, described[kind])

    def lines(self, template: Callable[[Types], str], *, between: str = "\n") -> Iterator[str]:
        """Yield the map as text, many parts at a time: the quick way to print a million of them.

        `template` is called once for each kind of part; what it returns has `%d` twice, for offset and length, and any other
        percent sign doubled. `between` stands between each two parts.
        """
        templates = _Known(template)
        first = True
        for offsets, lengths, kinds in self._kinds():
            if not first:
                yield between
            first = False
            numbers = [0] * (2 * len(offsets))
            numbers[0::2] = offsets
            numbers[1::2] = lengths
            yield between.join(map(templates.__getitem__, kinds)) % tuple(numbers)

    def batches(self) -> Iterator[list[list[int]]]:
        """Yield the columns in batches of some thousand parts: offsets, lengths, and the numbers of each context, in lists."""
        for begin in range(0, len(self), _BATCH):
            yield [column[begin : begin + _BATCH].tolist() for column in (self.offsets, self.lengths, *self.types)]

    def describe(self, types: Types) -> tuple[str, ...]:
        """Return what the numbers of each context mean; "" where that is not known."""
        return tuple(map(describe, self.contexts, types))

    def totals(self) -> list[Total]:
        """Return how many bytes there are of each kind, in the order of their numbers. Of an empty disk there are none."""
        return totals([self])

    def _sizes(self) -> dict[int | Types, int]:
        """Return how many bytes there are of each kind: by number, or by the numbers of several contexts."""
        sizes: dict[int | Types, int] = defaultdict(int)
        for _, lengths, kinds in self._kinds():
            for length, kind in zip(lengths, kinds, strict=True):
                sizes[kind] += length
        return sizes

    def _kinds(self) -> Iterator[tuple[list[int], list[int], Iterable[int | Types]]]:
        """Yield offsets, lengths, and what the contexts say: of a single one as plain numbers, which are quicker looked up."""
        for offsets, lengths, *types in self.batches():
            yield offsets, lengths, types[0] if len(types) == 1 else zip(*types, strict=True)


class _Known(dict[Any, Any]):
    """What a function says of each kind of part, asked once: of a number, or of the numbers of several contexts."""

    __slots__ = ("_ask",)

    def __init__(self, ask: Callable[[Types], Any]) -> None:
        super().__init__()
        self._ask = ask

    def __missing__(self, kind: int | Types) -> Any:
        self[kind] = answer = self._ask((kind,) if isinstance(kind, int) else kind)
        return answer


def totals(pieces: Iterable[DiskMap]) -> list[Total]:
    """Return the totals of a map that comes in pieces (see `read_map_pieces`), or of several maps of the same contexts."""
    sizes: dict[Types, int] = defaultdict(int)
    contexts: tuple[str, ...] = ()
    for piece in pieces:
        contexts = piece.contexts
        for kind, size in piece._sizes().items():  # noqa: SLF001 (the same module)
            sizes[(kind,) if isinstance(kind, int) else kind] += size
    whole = sum(sizes.values())
    return [
        Total(size, size / whole, contexts, types, tuple(map(describe, contexts, types))) for types, size in sorted(sizes.items())
    ]


def read_map(
    disk: Client | Pool, *contexts: str, offset: int = 0, count: int | None = None, timeout: float | None = None
) -> DiskMap:
    """Ask a server for the map of a disk.

    Args:
        disk: connected, with these metadata contexts (the option `contexts`).
        contexts: what to ask for; base:allocation where none is named. Several are taken in step: a part ends where one of
            them changes.
        offset: where the range begins, in bytes.
        count: how many bytes it has; None: all the rest.
        timeout: seconds for each question to the server.

    Raises UsageError where a context was not agreed on, or for a range that is not the disk's; CommandError where the server
    cannot tell, after which the connection is as usable as before.
    """
    contexts = contexts or (BASE_ALLOCATION,)
    rest = disk.size - offset if count is None and isinstance(offset, int) else count or 0  # they are checked further down
    with disk_named("asking about", rest, offset, name_of(disk)):
        return DiskMap(disk.extent_columns(*contexts, offset=offset, count=count, timeout=timeout), *contexts)


def read_map_pieces(
    disk: Client | Pool, *contexts: str, offset: int = 0, count: int | None = None, timeout: float | None = None
) -> Iterator[DiskMap]:
    """Yield the same map in pieces, in order: a program works on one while the server finds out about the next ones.

    A few questions are under way at once, each about a slice of the range, which helps with servers that take long for each. No
    part is cut at the end of a piece. Arguments and errors are those of `read_map`; what is under way when an error is raised, or
    when nobody wants the rest, ends by itself or with the connection.
    """
    contexts = contexts or (BASE_ALLOCATION,)
    end = disk.size if count is None else offset + count
    step = max(_SMALLEST_SLICE, (end - offset) // _SLICES // _SMALLEST_SLICE * _SMALLEST_SLICE)
    if end - offset < 2 * step or end > disk.size:
        yield read_map(disk, *contexts, offset=offset, count=count, timeout=timeout)
        return
    from concurrent.futures import ThreadPoolExecutor

    def ask(begin: int) -> DiskMap:
        return read_map(disk, *contexts, offset=begin, count=min(step, end - begin), timeout=timeout)

    asking = ThreadPoolExecutor(_QUESTIONS, "nbdcore-map")
    try:
        yield from _joined(asking.map(ask, range(offset, end, step)))
    finally:
        asking.shutdown(wait=False, cancel_futures=True)


def _joined(pieces: Iterable[DiskMap]) -> Iterator[DiskMap]:
    """Yield the pieces with what goes on from one to the next as one part: the last part of each is held back until it ends."""
    held: DiskMap | None = None
    for piece in pieces:
        if held is not None and held.types_at(0) == piece.types_at(0):
            piece.begin_at(held.begin)
        elif held is not None:
            yield held
        if len(piece) > 1:
            yield piece.between(0, len(piece) - 1)
        held = piece.between(len(piece) - 1, len(piece))
    if held is not None:
        yield held

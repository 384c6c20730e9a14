"""From block status replies to extents: clipped to what was asked, merged where nothing changes, several contexts in lock step.

No I/O: a front end asks, and feeds each reply to an ExtentWalk, which says what to ask next. The arithmetic is that of `columns`.
"""

from __future__ import annotations

import errno
import gc
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, repeat
from typing import Any, TypeVar

from nbdcore.clients.extents.columns import (
    Collection,
    CombinedExtentColumns,
    Described,
    ExtentColumns,
    collection_for_columns,
)
from nbdcore.errors import CommandError
from nbdcore.protocol.constants import AllocationFlag
from nbdcore.protocol.transmission.commands import Command, Numbers

AnyExtent = TypeVar("AnyExtent")

# Extents made at once: objects that the caller has not asked for yet cost memory, and a reply may describe a million. 1024 took
# twice the time, because of the garbage collector (see `_new`); 65536 are no faster.
_PIECE = 8192

_COLLECTS_WITHIN = sys.version_info < (3, 12)


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of the export with one status in one metadata context (section NBD_CMD_BLOCK_STATUS).

    Attributes:
        offset: where it begins, in bytes.
        length: bytes, never 0.
        flags: what the context says of it; for base:allocation see `hole` and `zero`.
    """

    offset: int
    length: int
    flags: int

    @property
    def end(self) -> int:
        """The offset behind its last byte."""
        return self.offset + self.length

    @property
    def hole(self) -> bool:
        """In base:allocation: whether no storage is allocated."""
        return bool(self.flags & AllocationFlag.HOLE)

    @property
    def zero(self) -> bool:
        """In base:allocation: whether it is known to read as zeroes."""
        return bool(self.flags & AllocationFlag.ZERO)


@dataclass(frozen=True, slots=True)
class CombinedExtent:
    """A range of the export with one status in each of several metadata contexts.

    Attributes:
        offset: where it begins, in bytes.
        length: bytes, never 0.
        flags: the status in each context, in the order in which the contexts were named.
    """

    offset: int
    length: int
    flags: tuple[int, ...]

    @property
    def end(self) -> int:
        """The offset behind its last byte."""
        return self.offset + self.length


def extents_by_context(command: Command) -> dict[str, list[Extent]]:
    """Return the extents of a finished block status command as the server sent them, by context."""
    found: dict[str, list[Extent]] = {}
    for chunk in command.chunks:
        extents = found.setdefault(chunk.context, [])
        at = extents[-1].end if extents else command.offset
        extents += _made(Extent, accumulate(chunk.lengths, initial=at), chunk.lengths, chunk.flags)
    return found


class ExtentWalk:
    """A walk over the extents of a range, one block status reply at a time.

    `position` is what the next request must ask about, until it reaches `end`; a request may begin before it. Take in the reply
    with `feed` for extents as objects, as they are settled, or with `take_in` for `columns` at the end.

    Args:
        contexts: names of the metadata contexts to report, in order.
        offset, count: the range in bytes.
        columns: whether columns are what is wanted in the end.
    """

    def __init__(self, contexts: Sequence[str], offset: int, count: int, *, columns: bool = False) -> None:
        self._contexts = contexts
        self.position: int = offset
        self.end: int = offset + count
        self._columns = collection_for_columns(len(contexts)) if columns else None
        self._found = self._columns or Collection(len(contexts))

    def take_in(self, command: Command) -> None:
        """Take in the reply to a request that begins at `position`, or before it.

        Raises CommandError (EPROTO) when the server described nothing from there on, so that a walk never stands still.
        """
        described = [self._described(command, context) for context in self._contexts]
        if known := self.position - command.offset:
            described = [_without(known, command, lengths, flags) for lengths, flags in described]
        self.position = self._found.add(described, self.position, self.end)

    def feed(self, command: Command) -> Iterator[Extent | CombinedExtent]:
        """Take in the reply to a request at `position`, and return the extents that are settled.

        Extents of equal status are merged across replies, so the last one of a reply is held back until the next one shows
        whether it goes on. Raises as `take_in` does.
        """
        self.take_in(command)
        return chain.from_iterable(_pieces(self._found.take_all_but_last() if self.position < self.end else self._found))

    def columns(self) -> ExtentColumns | CombinedExtentColumns:
        """Return all extents of a walk that is over as columns."""
        assert self._columns is not None, "the walk was begun for extents as objects"
        return self._columns.columns()

    def _described(self, command: Command, context: str) -> Described:
        """Return what a reply says of a context, which may have come in several chunks."""
        chunks = [chunk for chunk in command.chunks if chunk.context == context]
        if not chunks:
            raise CommandError(errno.EPROTO, f"{command} failed: the server described nothing in context {context!r}")
        if len(chunks) == 1:
            return chunks[0].lengths, chunks[0].flags
        lengths: Numbers = array("Q")
        flags: Numbers = array("Q")
        room = self.end - command.offset
        for chunk in chunks:
            lengths.extend(iter(chunk.lengths))
            flags.extend(iter(chunk.flags))
            room -= sum(chunk.lengths)
            if room <= 0:  # what follows is of no use, and sums past 64 bits must not arise
                break
        return lengths, flags


def _without(known: int, command: Command, lengths: Numbers, flags: Numbers) -> Described:
    """Return what a reply says behind its first `known` bytes, which an earlier one described."""
    left = known
    for index, length in enumerate(lengths):
        if length > left:
            rest = array("Q", lengths[index:])
            rest[0] -= left
            return rest, flags[index:]
        left -= length
    raise CommandError(
        errno.EPROTO,
        f"{command} failed: the server describes less than a block, and cannot be asked about the rest of it",
    )


# ---------------------------------------------------------------------------------------------- many objects at once


def _pieces(found: Collection) -> Iterator[list[Any]]:
    """Yield the extents in lists."""
    for begin in range(0, len(found.offsets), _PIECE):
        piece = slice(begin, begin + _PIECE)
        flags = [column[piece] for column in found.flags]
        kind, status = (Extent, flags[0]) if len(flags) == 1 else (CombinedExtent, zip(*flags, strict=True))
        yield _made(kind, found.offsets[piece], found.lengths[piece], status)


class _Draft:
    """An extent while it is made: of the same shape, but not frozen."""

    __slots__ = ("flags", "length", "offset")


def _made(kind: type[AnyExtent], offsets: Iterable[int], lengths: Sequence[int], flags: Iterable[Any]) -> list[AnyExtent]:
    """Return an extent for each length.

    As if the class was called for each, in a third of the time: a frozen data class's own way sets each attribute by a call.
    """
    drafts = _new(_Draft, len(lengths))
    for draft, offset, length, status in zip(drafts, offsets, lengths, flags):  # noqa: B905 (offsets may go on)
        draft.offset = offset
        draft.length = length
        draft.flags = status
        draft.__class__ = kind
    return drafts


def _new(kind: type[Any], count: int) -> list[Any]:
    """Return so many objects without attributes, made by one loop in C.

    From 3.12 on no garbage is collected meanwhile. Before, Python looks for some after each 700 objects, and finds none: that
    takes longer than all the rest. The loop is not interrupted, so no other thread sees the collector off for long.
    """
    if not _COLLECTS_WITHIN or not gc.isenabled():
        return list(map(object.__new__, repeat(kind, count)))
    gc.disable()
    try:
        return list(map(object.__new__, repeat(kind, count)))
    finally:
        gc.enable()

"""From block status replies to extents: clipped to what was asked, merged where nothing changes, several contexts in lock step.

No I/O: a front end asks, and feeds each reply to an ExtentWalk, which says what to ask next.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nbdcore.errors import CommandError
from nbdcore.protocol.commands import Command
from nbdcore.protocol.constants import AllocationFlag


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
        for length, flags in zip(chunk.lengths, chunk.flags, strict=True):
            extents.append(Extent(at, length, flags))
            at += length
    return found


class ExtentWalk:
    """A walk over the extents of a range, one block status reply at a time.

    `position` is where the next request must begin, until it reaches `end`. Extents of equal status are merged across replies, so
    the last one of a reply is held back until the next one shows whether it goes on.

    Args:
        contexts: names of the metadata contexts to report, in order.
        offset, count: the range in bytes.
    """

    def __init__(self, contexts: Sequence[str], offset: int, count: int) -> None:
        self._contexts = contexts
        self.position = offset
        self.end = offset + count
        self._held: tuple[int, int, tuple[int, ...]] | None = None

    def feed(self, command: Command) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Take in the reply to a request at `position`; yield (offset, length, flags of each context) of what is settled.

        Raises CommandError (EPROTO) when the server described nothing, so that a walk never stands still.
        """
        columns = [self._column(command, context) for context in self._contexts]
        covered = min(*(sum(lengths) for lengths, _ in columns), self.end - self.position)
        at = self.position
        self.position += covered
        for length, flags in _in_step(columns, covered):
            held = self._held
            if held is not None and held[2] == flags:
                self._held = (held[0], held[1] + length, flags)
            else:
                if held is not None:
                    yield held
                self._held = (at, length, flags)
            at += length
        if self.position >= self.end and self._held is not None:
            yield self._held
            self._held = None

    def _column(self, command: Command, context: str) -> tuple[list[int], list[int]]:
        lengths: list[int] = []
        flags: list[int] = []
        for chunk in command.chunks:
            if chunk.context == context:
                lengths += chunk.lengths
                flags += chunk.flags
        if not lengths:
            raise CommandError(errno.EPROTO, f"{command} failed: the server described nothing in context {context!r}")
        return lengths, flags


def _in_step(columns: list[tuple[list[int], list[int]]], covered: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield (length, flags of each column) between all the columns' boundaries, up to `covered` bytes."""
    if len(columns) == 1:
        for length, flags in zip(*columns[0], strict=True):
            if covered <= 0:
                return
            yield min(length, covered), (flags,)
            covered -= length
        return
    rest = [lengths[0] for lengths, _ in columns]
    index = [0] * len(columns)
    while covered > 0:
        step = min(*rest, covered)
        yield step, tuple(flags[at] for (_, flags), at in zip(columns, index, strict=True))
        covered -= step
        for column, (lengths, _) in enumerate(columns):
            rest[column] -= step
            if not rest[column] and covered:
                index[column] += 1
                rest[column] = lengths[index[column]]

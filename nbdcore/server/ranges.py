"""Extents as a back end tells them, made into what may go out: inside the range, cut at blocks, neighbours different.

Pure functions over (length, flags), lazy, so that a back end is not asked for more than one reply holds.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

from nbdcore.protocol.constants import AllocationFlag

__all__ = ["aligned", "clipped", "merged"]

_DEFINED = int(AllocationFlag.HOLE | AllocationFlag.ZERO)

Extent = tuple[int, int]


def clipped(extents: Iterable[Extent], count: int) -> Iterator[Extent]:
    """Yield extents until `count` bytes are covered, with the flags that base:allocation has: the server must send no others.

    Raises ValueError for one that is not longer than nothing, TypeError for one whose length is no integer.
    """
    for told, flags in extents:
        length = operator.index(told)
        if length <= 0:
            raise ValueError(f"an extent of {length} bytes")
        yield min(length, count), int(flags) & _DEFINED
        count -= length
        if count <= 0:
            return


def aligned(extents: Iterable[Extent], block: int, *, minimum: int, start: int = 0) -> Iterator[Extent]:
    """Yield extents, the first of which begins at offset `start`, cut where blocks end.

    A block in several extents has what they have in common. Of the last block there may be less: so much of it as is known, in
    multiples of `minimum`.
    """
    partial, common = 0, ~0  # bytes of an unfinished block, and the flags that all of them have
    room = block - start % block
    for length, flags in extents:
        rest = length
        while rest:
            if not partial and room == block <= rest:
                yield rest - rest % block, flags
                rest %= block
                continue
            used = min(rest, room)
            partial, room, rest, common = partial + used, room - used, rest - used, common & flags
            if not room:
                yield partial, common
                partial, room, common = 0, block, ~0
    if partial >= minimum:
        yield partial - partial % minimum, common


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Yield extents, neighbours with the same flags as one."""
    total, common = 0, 0
    for length, flags in extents:
        if total and flags != common:
            yield total, common
            total = 0
        total += length
        common = flags
    if total:
        yield total, common

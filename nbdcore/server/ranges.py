"""Extents as a back end tells them, made into what may go out: inside the range, on block boundaries, neighbours different.

Pure functions over (length, flags), lazy, so that a back end is not asked for more than one reply holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

__all__ = ["aligned", "clipped", "merged"]

Extent = tuple[int, int]


def clipped(extents: Iterable[Extent], count: int) -> Iterator[Extent]:
    """Yield extents until `count` bytes are covered. Raises ValueError for one that is not longer than nothing."""
    for length, flags in extents:
        if length <= 0:
            raise ValueError(f"an extent of {length} bytes")
        yield min(length, count), int(flags)
        count -= length
        if count <= 0:
            return


def aligned(extents: Iterable[Extent], block: int) -> Iterator[Extent]:
    """Yield extents that begin and end on multiples of `block`; a block in several extents has what they have in common.

    What is left of the last block is dropped, since nobody knows its rest.
    """
    if block == 1:
        yield from extents
        return
    partial = 0  # bytes of an unfinished block, and the flags that all of them have
    common = 0
    for length, flags in extents:
        rest = length
        if partial:
            used = min(rest, block - partial)
            partial += used
            rest -= used
            common &= flags
            if partial < block:
                continue
            yield block, common
        whole = rest - rest % block
        if whole:
            yield whole, flags
        partial, common = rest % block, flags


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

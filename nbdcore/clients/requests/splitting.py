"""A request larger than a server takes, cut into ones that it does. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

from nbdcore.protocol.constants import MAX_COMPACT_LENGTH
from nbdcore.protocol.transmission.commands import Limits

# The alignment of a piece where the server named no minimum block size: servers like whole sectors (section "Block size
# constraints" asks clients for 512).
_SECTOR = 512


def length_limit(limits: Limits, *, bounded: bool) -> int:
    """Return the most bytes that a request without data may cover.

    `bounded`: the specification wants this command to obey the maximum block size too, where lengths have 32 bits (section "Block
    size constraints": cache, and write zeroes unless it is to be fast).
    """
    if limits.extended:
        return (1 << 64) - limits.minimum
    return aligned(limits.maximum if bounded else MAX_COMPACT_LENGTH, max(limits.minimum, _SECTOR if not bounded else 1))


def aligned(count: int, block: int) -> int:
    """Round down to a multiple of the block size."""
    return count - count % block


def pieces(count: int, offset: int, limit: int) -> Iterator[tuple[int, int]]:
    """Yield the (count, offset) pairs that cover a range, none larger than `limit`.

    An empty or negative range is one piece, so that it is judged by the same checks as any other request.
    """
    yield min(count, limit), offset
    for at in range(limit, count, limit):
        yield min(limit, count - at), offset + at

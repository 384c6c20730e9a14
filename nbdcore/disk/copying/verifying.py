"""A copy read back, and compared with the source."""

from __future__ import annotations

import errno

from nbdcore.disk.comparing import compare
from nbdcore.disk.copying.ends import Destination, Source
from nbdcore.disk.copying.errors import CopyError, described
from nbdcore.errors import Error

__all__ = ["verify"]


def verify(source: Source, destination: Destination, connections: int) -> int:
    """Compare the destination with the source, as far as that goes. Returns how many bytes are equal. Raises CopyError."""
    assert source.readable is not None, "checked before"
    assert destination.readable is not None, "likewise"
    assert source.size is not None, "what can be read again has a size"
    try:
        compared = compare(source.readable, destination.readable, connections=connections)
    except (OSError, Error) as problem:
        raise CopyError(problem.errno or 0, f"cannot verify {destination.name}: {described(problem)}") from problem
    first = compared.first_difference
    if first is not None and first < source.size:
        message = f"{destination.name} differs from {source.name}: the first byte that does is at offset {first}"
        raise CopyError(errno.EIO, message, offset=first, count=source.size - first)
    return source.size

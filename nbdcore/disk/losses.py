"""What to say where a connection ends in the middle of work on a whole disk: at which range, of which disk, and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from nbdcore.clients.blocking.client import Client
from nbdcore.clients.blocking.pool import Pool
from nbdcore.errors import Disconnected, ProtocolViolation, copied

__all__ = ["loss_told", "name_of"]

_MIDDLE = ", in the middle of "


def name_of(disk: Client | Pool) -> str:
    """Return what messages call the disk of a client."""
    return disk.uri or "the client's server"


@contextlib.contextmanager
def loss_told(doing: str, count: int, offset: int, name: str) -> Iterator[None]:
    """Add to the error that ends a connection what was going on; the error as it was is its cause.

    Args:
        doing: what was done with a range, such as "reading".
        count: bytes of the range.
        offset: where it begins, in bytes.
        name: what to call the disk.
    """
    try:
        yield
    except (Disconnected, ProtocolViolation) as error:
        if _MIDDLE in error.message:  # what is nearer to the connection has told
            raise
        told = copied(error)
        told.message = f"{error.message}{_MIDDLE}{doing} {count} bytes at offset {offset} of {name}"
        if isinstance(error, Disconnected):
            told.message += "; see why the server ended, and begin again when it runs"
        raise told from error

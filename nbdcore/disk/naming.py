"""What errors call the disk of a client, and the range that was worked on: who works on two disks must know which one it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from nbdcore.clients.blocking.client import Client
from nbdcore.clients.blocking.pool import Pool
from nbdcore.errors import Disconnected, Error, ProtocolViolation, UsageError, copied

__all__ = ["disk_named", "name_of"]


def name_of(disk: Client | Pool) -> str:
    """Return what messages call the disk of a client."""
    return disk.uri or disk.peer or "the client's server"


@contextlib.contextmanager
def disk_named(doing: str, count: int, offset: int, name: str) -> Iterator[None]:
    """Add to an error which disk it is about; the error as it was is its cause. What is wrong usage is left as it is.

    An error of a command says by itself at which range it failed. One that ends the connection does not, and is told what was
    going on.

    Args:
        doing: what was done with a range, such as "reading".
        count: bytes of the range.
        offset: where it begins, in bytes.
        name: what to call the disk.
    """
    try:
        yield
    except UsageError:
        raise
    except Error as error:
        if error.names_disk:  # what is nearer to the connection has told
            raise
        told = copied(error)
        told.names_disk = True
        if isinstance(error, Disconnected | ProtocolViolation):
            told.message = f"{error.message}, in the middle of {doing} {count} bytes at offset {offset} of {name}"
        else:
            told.message = f"{name}: {error.message}"
        if isinstance(error, Disconnected):
            told.message += "; see why the server ended, and begin again when it runs"
        raise told from error

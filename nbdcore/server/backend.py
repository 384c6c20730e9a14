"""What a server exports: the contract of a back end, and the exception by which one request is refused.

A back end knows offsets and bytes, never NBD: any Python object with `size` and `pread` will do. Everything else is optional, and
what is missing decides what the export offers to its clients. The server checks every request against the size before a back
end sees it, and checks what the back end returns: a faulty back end costs a request, not a connection.
"""

from __future__ import annotations

import errno
from typing import Protocol

from nbdcore.protocol.constants import ErrorNumber

__all__ = ["Backend", "Bytes", "Refusal", "error_number"]

#: What carries bytes in and out of a back end.
Bytes = bytes | bytearray | memoryview

# By name, since not every platform has every one.
_NAMES = {
    "EPERM": ErrorNumber.EPERM,
    "EACCES": ErrorNumber.EPERM,
    "EROFS": ErrorNumber.EPERM,
    "EIO": ErrorNumber.EIO,
    "ENOMEM": ErrorNumber.ENOMEM,
    "EINVAL": ErrorNumber.EINVAL,
    "ENOSPC": ErrorNumber.ENOSPC,
    "EFBIG": ErrorNumber.ENOSPC,
    "EDQUOT": ErrorNumber.ENOSPC,
    "EOVERFLOW": ErrorNumber.EINVAL,  # the wire's is for unfragmented reads, and means "ask with fragments"
    "ENOTSUP": ErrorNumber.ENOTSUP,
    "EOPNOTSUPP": ErrorNumber.ENOTSUP,
    "ESHUTDOWN": ErrorNumber.ESHUTDOWN,
}
_NUMBERS = {getattr(errno, name): number for name, number in _NAMES.items() if hasattr(errno, name)}


class Backend(Protocol):
    """Anything that can be exported. Methods are called from one thread per client, so at once when there are several clients.

    Only what stands here is required. These are used where they exist; offsets, counts and sizes are in bytes:

    - `pwrite(data, offset)`: write all of `data`, a memoryview that is valid during the call only. Without it: read-only.
    - `name`: text that says in the log of failures which disk it is, as the path of a file does.
    - `read_only`: True where writing methods exist but must not be used.
    - `flush()`: return when all writes that have returned are on permanent storage. Without it neither NBD_CMD_FLUSH nor
      NBD_CMD_FLAG_FUA is offered.
    - `shareable`: True where several processes can have the disk, each a pickled copy of the object: for `Server(workers=...)`.
    - `trim(count, offset)`: the range is not needed any more; its contents may become anything. Without it no NBD_CMD_TRIM.
    - `zero(count, offset, *, may_trim)`: make the range read as zeroes, quicker than writing them would; it may become a hole
      only where `may_trim`. Where that cannot be done quickly: raise `OSError(errno.ENOTSUP, ...)` with nothing changed, and the
      server writes zeroes in bounded pieces (or tells the client, when it asked for NBD_CMD_FLAG_FAST_ZERO).
    - `cache(count, offset)`: the range will be read soon. Without it no NBD_CMD_CACHE.
    - `extents(count, offset)`: yield `(length, AllocationFlag)` of consecutive extents from `offset` on; it may be lazy, stop
      early, or go past the range. A length must be positive; other bits than AllocationFlag's are left out.
      Without it everything is data.
    - `close()`: called once, when the server that owns the back end has stopped.

    An OSError becomes the wire's error number for it, with its `strerror` as the text. EDQUOT and EFBIG are NBD_ENOSPC.
    EOVERFLOW, and ENOTSUP of anything but `zero`, are NBD_EINVAL, since they mean something else on the wire. One that the wire
    has no number for is NBD_EIO. Any other exception is a fault of the back end: NBD_EIO, and a line in the log.
    """

    @property
    def size(self) -> int:
        """Size in bytes, 0 to 2^63 - 1; read once, when the export is made."""

    def pread(self, count: int, offset: int) -> Bytes:
        """Return exactly `count` bytes from `offset` on. The server never asks beyond `size`."""


class Refusal(Exception):  # an answer to one request, on its way from where it is found to where replies are written
    """One request is refused; the connection lives.

    Attributes:
        number: what goes out as the error.
        text: a sentence for a human; 500 characters of it are sent.
        at: absolute offset in bytes of the failure inside the request, or None.
    """

    def __init__(self, number: ErrorNumber, text: str, *, at: int | None = None) -> None:
        super().__init__(number, text)
        self.number = number
        self.text: str = text
        self.at = at


def error_number(problem: OSError) -> ErrorNumber:
    """Return the wire's number for a back end's error (section "Error values")."""
    number = problem.errno if isinstance(problem.errno, int) else None  # an OSError can be made of anything
    return _NUMBERS.get(number, ErrorNumber.EIO)

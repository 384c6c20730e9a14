"""The two ends of a copy: what is asked of whatever is copied from, and of whatever is copied to.

A copy knows nothing but this. Each end is one kind of thing: a file or a block device (`files`), a pipe (`streams`), an NBD
server (`servers`). Its calls may come from several threads at once, unless it is `in_order`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdcore.disk.sources import AnySource

__all__ = ["NULL", "UNLIMITED", "Destination", "End", "Null", "NullDestination", "Range", "Source"]

#: The maximum block size of an end that has none.
UNLIMITED = 1 << 62
#: The preferred block size of an end that names none.
PREFERRED = 4096


@dataclass(frozen=True, slots=True)
class Range:
    """A part of the source: bytes to move, or zeroes.

    Attributes:
        offset: where it begins, in bytes.
        count: how many bytes it has.
        zero: whether it is known to read as zeroes.
    """

    offset: int
    count: int
    zero: bool

    @property
    def end(self) -> int:
        """The offset behind its last byte."""
        return self.offset + self.count


class End(ABC):
    """One end of a copy.

    Attributes:
        kind: what it is: "file", "device", "stream", "server" or "null".
        name: what messages call it.
        size: in bytes; None where nobody knows before the end.
        minimum: offsets and counts of requests are multiples of this, in bytes.
        preferred: multiples of this are fastest, in bytes.
        maximum: the most bytes of one request.
        connections: how many connections there are to it; of what needs none: 0.
        in_order: whether it can only be used from its beginning to its end.
        identity: by what a later copy knows it again; "": by its name.
        readable: by what it can be read once more; None where it cannot.
        waiting: called several times a second while a pipe has nothing to read or no room, if that can be; what it raises passes.
        number: by what the system knows a file or block device, whatever its name; None for all else.
    """

    kind: str
    name: str = ""
    size: int | None = None
    minimum: int = 1
    preferred: int = PREFERRED
    maximum: int = UNLIMITED
    connections: int = 0
    in_order: bool = False
    identity: str = ""
    readable: AnySource | None = None
    number: tuple[int, int] | None = None
    waiting: Callable[[], object] | None = None

    def cancel(self) -> None:  # noqa: B027 (most ends never wait for long)
        """Have calls that wait in other threads fail now, if that can be done."""

    @abstractmethod
    def close(self) -> None:
        """Free what the copy opened for it. Idempotent; raises nothing."""


class Source(End):
    """What is copied from.

    Attributes:
        edges: where it has parts of a disk only, they begin and end at multiples of so many bytes, or at the disk's end; else 0.
    """

    edges: int = 0

    @abstractmethod
    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill the view, and return its length; less where an end that is `in_order` has ended. Raises OSError or Error."""

    def extents(self) -> Iterator[Range]:
        """Yield the ranges of the whole in order, without gaps; of an end that tells nothing, that is one of data."""
        if self.size:
            yield Range(0, self.size, zero=False)


class Destination(End):
    """What is copied to.

    Attributes:
        read_only: whether it cannot be written to.
        grows: whether it has the size that the copy gives it: a regular file.
        created: whether it did not exist before.
        blank: whether all of it reads as zeroes before the copy.
        can_flush: whether it can be told to put what it has on permanent storage.
    """

    read_only: bool = False
    grows: bool = False
    created: bool = False
    blank: bool = False
    can_flush: bool = True

    def length(self) -> int:
        """Return how many bytes it has now. Raises OSError."""
        return self.size or 0

    def begin(self) -> None:
        """Make it ready to be written to. Until here nothing of it has been changed. Raises OSError."""

    @abstractmethod
    def write(self, view: memoryview, offset: int) -> None:
        """Write all of the view. Raises OSError or Error."""

    @abstractmethod
    def zero(self, count: int, offset: int, *, allocated: bool) -> bool:
        """Make a range read as zeroes without writing them. Returns False where that cannot be done; raises OSError or Error."""

    @abstractmethod
    def flush(self) -> None:
        """Return when all that was written is on permanent storage. Raises OSError or Error."""

    def finish(self, size: int) -> None:
        """All has been written: give it its size. Raises OSError."""

    def discard(self) -> None:
        """Remove what the copy created. Raises OSError."""


class Null:
    """The type of `NULL`."""

    def __repr__(self) -> str:
        return "nbdcore.disk.NULL"


#: A destination that takes everything and keeps nothing; as text it is "null:".
NULL = Null()


class NullDestination(Destination):
    """Takes everything, and keeps nothing."""

    kind = "null"
    name = "null:"
    blank = True

    def write(self, view: memoryview, offset: int) -> None:
        """Do nothing."""

    def zero(self, count: int, offset: int, *, allocated: bool) -> bool:  # noqa: ARG002 (the base's signature)
        """Do nothing."""
        return True

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

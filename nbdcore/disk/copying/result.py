"""What a copy tells its caller: on the way, and at the end."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CopyEnd", "CopyProgress", "CopyResult", "CopySettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyEnd:
    """One end of a copy.

    Attributes:
        kind: "file", "device", "stream", "server" or "null".
        name: its path or URI.
        size: in bytes; None where nobody knows yet.
        preferred: its preferred block size in bytes.
    """

    kind: str
    name: str
    size: int | None
    preferred: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CopySettings:
    """What a copy is about to do, when both ends are open.

    Attributes:
        source, destination: what is copied from and to.
        connections: how many there are, to the end that has more of them.
        requests: how many may be under way, all connections together.
        request_size: the most bytes of a read or write.
        sparse: in granules of so many bytes data are looked at for zeroes; 0: they are not.
        block: pieces begin and end at multiples of so many bytes.
        threads: how many begin.
        in_order: whether the copy goes from the beginning to the end, one request at a time.
    """

    source: CopyEnd
    destination: CopyEnd
    connections: int
    requests: int
    request_size: int
    sparse: int
    block: int
    threads: int
    in_order: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyProgress:
    """How far a copy is.

    Attributes:
        size: bytes to deal with in all; None while nobody knows, as for a pipe.
        done: bytes of them that have been dealt with.
        copied: bytes that were read and written.
        zeroes: bytes that were found to be zero, and so not written as data.
        seconds: since the copy began.
    """

    size: int | None
    done: int
    copied: int
    zeroes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyResult:
    """What a copy that is complete has done.

    Attributes:
        size: bytes of the source.
        copied: bytes that were read from the source, and written to the destination as data.
        zeroes: bytes that are zero, and were made so without writing them as data, or were so before.
        resumed: bytes that an earlier copy had finished, and this one did not touch.
        unchanged: bytes that were left as they are, since the bitmap does not name them.
        seconds: how long it took.
        digest: the block hash of the source in hexadecimal, where it was asked for; else "".
        verified: bytes that were read back from the destination, and are equal.
    """

    size: int
    copied: int
    zeroes: int
    resumed: int = 0
    unchanged: int = 0
    seconds: float = 0.0
    digest: str = ""
    verified: int = 0

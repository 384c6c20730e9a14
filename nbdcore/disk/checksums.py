"""A disk's checksum: its data read and hashed by threads, its zeroes neither read nor hashed.

The interpreter's lock is free while data arrive and while they are hashed, so threads keep all processors busy, and start at
once, where each process would take a tenth of a second. Each reads a piece into memory of its own, and hashes it there while it
is in the processor's cache. What travels are digests, which the caller's thread puts together, in order.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import BinaryIO, Unpack

from nbdcore.clients.connect.options import CONNECTIONS, ClientOptions
from nbdcore.disk.blockhash import BlockHash, Combination
from nbdcore.disk.runs import Piece, in_order, pieces
from nbdcore.disk.sources import AnySource, Source, checked_range, open_source
from nbdcore.errors import UsageError

__all__ = ["Checksum", "Progress", "RangeChecksum", "checksum", "checksum_of_stream"]

# Bytes that a thread reads at once. Pieces of 1 MiB take a tenth more of the processors' time, those of 4 MiB no less.
_PIECE = 2 << 20

#: Told how many bytes are done, and how many there are, in the caller's thread; what it raises ends the work.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class RangeChecksum:
    """The checksum of one part of what was read, as of a disk that has only that.

    Attributes:
        offset: where the part begins, in bytes.
        length: bytes.
        digest: the checksum.
    """

    offset: int
    length: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Checksum:
    """A disk's checksum, or that of a range of it: equal ones mean equal bytes, and equally many.

    Attributes:
        digest: the checksum; as text it is `digest.hex()`.
        algorithm: of `hashlib`.
        block_size: bytes of the blocks that were hashed. The checksum depends on it.
        offset: where what was read begins, in bytes.
        length: bytes that the checksum is of.
        zeroes: bytes of them that were known to be zero, and not read.
        ranges: those of its parts, in order, where `range_size` was asked for.
    """

    digest: bytes
    algorithm: str
    block_size: int
    offset: int
    length: int
    zeroes: int
    ranges: tuple[RangeChecksum, ...] = ()


def checksum(
    source: AnySource,
    *,
    block_hash: BlockHash | None = None,
    offset: int = 0,
    length: int | None = None,
    range_size: int | None = None,
    connections: int = CONNECTIONS,
    progress: Progress | None = None,
    timeout: float | None = None,
    **options: Unpack[ClientOptions],
) -> Checksum:
    """Return the block hash of a disk, which nbdcopy 1.24 has as --blkhash.

    What the server, or the file system, knows to be zero is not read. The checksum is the same however much that is, and however
    many connections there are. Parts have checksums of their own with `range_size`: two disks that differ differ in those parts.

    Args:
        source: an NBD URI, a local file or block device, a connected `Client` or `Pool`, or a function that returns one of
            those, which is closed in the end.
        block_hash: algorithm and block size; None: sha256, and 64 KiB.
        offset: where the range begins, in bytes. Blocks are counted from there.
        length: bytes of the range; None: up to the end.
        range_size: bytes of a part, a multiple of the block size.
        connections: opened for a URI, as far as the server allows several; as many threads work, and two at least.
        progress: called with the bytes that are done, and all of them, now and then; what it raises ends the work.
        timeout: seconds for connecting.
        options: those of `Client`, for a URI. With `contexts=()` nothing is asked about zeroes, and all is read.

    Raises UsageError for wrong arguments, what connecting and reading raise, and OSError for a file. A client of the caller's
    goes on, unless its connection was lost.
    """
    block_hash = block_hash or BlockHash()
    sums = _Sums(block_hash, offset, range_size)
    with open_source(source, connections=connections, timeout=timeout, **options) as opened:
        begin, end = checked_range(opened.size, offset, length)
        most = max(_PIECE, block_hash.block_size)
        todo = pieces(opened.data(begin, end), begin, end, unit=block_hash.block_size, most=most)
        work = _Hashing(opened, block_hash, most).work
        with closing(in_order(work, todo, threads=max(2, connections), give_up=opened.interrupt)) as outcomes:
            for piece, digests in outcomes:
                if digests is None:
                    sums.add_zeroes(piece.length)
                else:
                    sums.add(digests, piece.length)
                if progress is not None:
                    progress(piece.end - begin, end - begin)
        return sums.result()


def checksum_of_stream(
    stream: BinaryIO,
    *,
    block_hash: BlockHash | None = None,
    offset: int = 0,
    length: int | None = None,
    range_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Checksum:
    """Return the block hash of what can be read once, from its beginning, such as a pipe. See `checksum`.

    Args:
        stream: a binary file; it is read to its end, or the range's.
        block_hash: as for `checksum`.
        offset: bytes that are read, and skipped.
        length: as for `checksum`.
        range_size: as for `checksum`.
        progress: called with the bytes that are done.

    Raises UsageError for wrong arguments and for a stream that ends before the range does, OSError where reading fails.
    """
    block_hash = block_hash or BlockHash()
    sums = _Sums(block_hash, offset, range_size)
    if offset < 0 or (length is not None and length < 0):
        raise UsageError(errno.EINVAL, f"offset and length are 0 or more: not {offset} and {length}")
    memory = memoryview(bytearray(max(_PIECE, block_hash.block_size)))
    _skip(stream, offset, memory)
    while length is None or sums.length < length:
        room = memory if length is None else memory[: length - sums.length]
        if count := _fill(stream, room):
            sums.add(block_hash.digests_of(room[:count]), count)
            if progress is not None:
                progress(sums.length)
        if count < len(room):
            break
    if length is not None and sums.length < length:
        raise UsageError(errno.EINVAL, f"the stream ended after {offset + sums.length} bytes: it has no {length} at {offset}")
    return sums.result()


# ---------------------------------------------------------------------------------------------- reading and hashing


class _Hashing:
    """What the threads do."""

    def __init__(self, source: Source, block_hash: BlockHash, most: int) -> None:
        self._source = source
        self._block_hash = block_hash
        self._most = most
        self._own = threading.local()

    def work(self, piece: Piece) -> bytes:
        """Return the digests of a piece."""
        memory: memoryview | None = getattr(self._own, "memory", None)
        if memory is None:
            memory = self._own.memory = memoryview(bytearray(self._most))
        data = memory[: piece.length]
        self._source.read_into(data, piece.begin)
        return self._block_hash.digests_of(data)


def _fill(stream: BinaryIO, memory: memoryview) -> int:
    """Fill memory as far as there is something to read, which comes bit by bit from a pipe. Returns the number of bytes."""
    filled = 0
    while filled < len(memory):
        count = stream.readinto(memory[filled:])  # type: ignore[attr-defined] # every binary file has it
        if count is None:
            _wait_for(stream)
            continue
        if not count:
            break
        filled += count
    return filled


def _wait_for(stream: BinaryIO) -> None:
    """Wait until there is something to read, or the end. Whoever shares a pipe may have set it not to wait by itself."""
    import selectors

    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        selector.select()


def _skip(stream: BinaryIO, count: int, memory: memoryview) -> None:
    left = count
    while left:
        skipped = _fill(stream, memory[:left])
        if not skipped:
            raise UsageError(errno.EINVAL, f"the stream ended after {count - left} bytes: there is nothing at {count}")
        left -= skipped


# ---------------------------------------------------------------------------------------------- putting together


class _Sums:
    """The checksum of all that is added, and those of its parts."""

    def __init__(self, block_hash: BlockHash, offset: int, range_size: int | None) -> None:
        if range_size is not None and (range_size <= 0 or range_size % block_hash.block_size):
            raise UsageError(errno.EINVAL, f"parts have a multiple of {block_hash.block_size} bytes, a block: not {range_size}")
        self._block_hash = block_hash
        self._offset = offset
        self._range_size = range_size
        self._whole = Combination(block_hash.algorithm)
        self._part = Combination(block_hash.algorithm)
        self._part_length = 0
        self._parts: list[RangeChecksum] = []
        self._zeroes = 0
        self.length = 0

    def add(self, digests: bytes, length: int) -> None:
        """Add blocks, of so many bytes together."""
        self._whole.add(digests)
        self.length += length
        if self._range_size is not None:
            self._add_to_parts(memoryview(digests), length, self._range_size)

    def _add_to_parts(self, digests: memoryview, length: int, range_size: int) -> None:
        while length:
            some = min(length, range_size - self._part_length)
            size = -(-some // self._block_hash.block_size) * self._block_hash.digest_size
            self._part.add(digests[:size])
            self._part_length += some
            digests, length = digests[size:], length - some
            if self._part_length == range_size:
                self._end_part()

    def _end_part(self) -> None:
        offset = self._offset + len(self._parts) * (self._range_size or 0)
        self._parts.append(RangeChecksum(offset, self._part_length, self._part.checksum(self._part_length)))
        self._part, self._part_length = Combination(self._block_hash.algorithm), 0

    def add_zeroes(self, length: int) -> None:
        """Add blocks that are zero."""
        self._zeroes += length
        for digests, some in self._block_hash.zero_digests(length):
            self.add(digests, some)

    def result(self) -> Checksum:
        """Return what has come of it."""
        if self._part_length:
            self._end_part()
        checksum = self._whole.checksum(self.length)
        algorithm, block_size = self._block_hash.algorithm, self._block_hash.block_size
        return Checksum(checksum, algorithm, block_size, self._offset, self.length, self._zeroes, tuple(self._parts))

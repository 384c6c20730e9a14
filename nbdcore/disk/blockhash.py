"""The block hash: a checksum of a disk that any number of workers can compute, and for which zeroes need not be read.

It is the one that nbdcopy has as --blkhash. The disk is cut into blocks, of which the last may be shorter. Each has a digest, a
block of zeroes like any other; the checksum is the digest of all those digests, in order, and of the disk's size:

    checksum = H( H(block 0) || H(block 1) || ... || size in bytes, as 64 bits, little-endian )

So what is known to be zero costs no reading and no hashing: its digest is always the same. And a worker that hashes a part of the
disk, beginning where a block begins, hands back the part's digests, not its bytes.

Digests travel joined: a bytes object holds those of blocks that follow each other. A disk of 8 TiB has 134 million blocks of 64
KiB, so nothing here holds the digests of a whole disk.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from nbdcore.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ALGORITHM", "BLOCK_SIZE", "BlockHash", "Combination", "combined"]

#: What nbdcopy takes where nothing is said.
ALGORITHM = "sha256"
BLOCK_SIZE = 65536
# A sector, the smallest block that a disk has; and the most that every server lets a client read at once, since a block is hashed
# in one piece.
_SMALLEST, _LARGEST = 512, 32 << 20
# Digests of zero blocks that are joined at once: hashing them is then one call for each 128 KiB of digests of sha256.
_TOGETHER = 4096


class BlockHash:
    """Computes the digests of blocks. May be used by several threads at once.

    Raises UsageError for an algorithm that this Python does not have or whose digests have no fixed length, and for a block size
    that is no power of two from 512 to 33,554,432 bytes: only such blocks begin where the requests of any reader can.

    Args:
        algorithm: one of `hashlib`, such as "sha256", "md5" or "blake2b".
        block_size: bytes of a block.

    Attributes:
        digest_size: bytes of a digest.
    """

    def __init__(self, algorithm: str = ALGORITHM, block_size: int = BLOCK_SIZE) -> None:
        if not _SMALLEST <= block_size <= _LARGEST or block_size & (block_size - 1):
            sizes = f"a power of two from {_SMALLEST} to {_LARGEST} bytes"
            raise UsageError(errno.EINVAL, f"the blocks of a checksum have {sizes}, not {block_size}")
        self.algorithm: str = algorithm.lower()
        self.block_size: int = block_size
        self._new = _constructor(self.algorithm)
        self.digest_size: int = self._new().digest_size
        self._zeroes = bytes(block_size)
        self._zero_digests: dict[int, bytes] = {}

    def __str__(self) -> str:
        size = self.block_size
        return f"{self.algorithm}/{f'{size >> 10}k' if size % 1024 == 0 else size}"

    def digest_of_block(self, data: Buffer) -> bytes:
        """Return the digest of one block. Data shorter than a block is the last one of its disk."""
        block = memoryview(data)
        # Whether a block is zero is known from its first bytes, for nearly all that are not; of those that are it saves 9/10.
        if self._zeroes.startswith(block):
            return self.zero_digest(len(block))
        digest: bytes = self._new(block).digest()
        return digest

    def digests_of(self, data: Buffer) -> bytes:
        """Return the digests of the blocks in `data`, joined. It begins where a block does."""
        with memoryview(data) as view:
            size = self.block_size
            return b"".join([self.digest_of_block(view[begin : begin + size]) for begin in range(0, len(view), size)])

    def zero_digest(self, length: int) -> bytes:
        """Return the digest of a block of so many zero bytes. It is computed once."""
        digest = self._zero_digests.get(length)
        if digest is None:
            digest = self._zero_digests[length] = self._new(memoryview(self._zeroes)[:length]).digest()
        return digest

    def zero_digests(self, length: int) -> Iterator[tuple[bytes, int]]:
        """Yield the digests of so many zero bytes, many joined at once, each time with the bytes that they are of.

        The zeroes begin where a block does.
        """
        blocks, rest = divmod(length, self.block_size)
        many = self.zero_digest(self.block_size) * min(blocks, _TOGETHER)
        for done in range(0, blocks, _TOGETHER):
            count = min(blocks - done, _TOGETHER)
            yield many[: count * self.digest_size], count * self.block_size
        if rest:
            yield self.zero_digest(rest), rest


class Combination:
    """The checksum of blocks whose digests are added one after the other.

    Args:
        algorithm: that of the digests. Raises UsageError as `BlockHash` does.
    """

    def __init__(self, algorithm: str = ALGORITHM) -> None:
        self._total = _constructor(algorithm.lower())()

    def add(self, digests: Buffer) -> None:
        """Add the digests of the next blocks, joined."""
        self._total.update(digests)

    def checksum(self, length: int) -> bytes:
        """Return the checksum of all blocks that were added, which have so many bytes together."""
        total = self._total.copy()
        total.update(length.to_bytes(8, "little"))
        checksum: bytes = total.digest()
        return checksum


def combined(digests_in_order: Iterable[bytes], total_length: int, algorithm: str = ALGORITHM) -> bytes:
    """Return the checksum of a disk, from the digests of its blocks.

    Args:
        digests_in_order: those of all blocks, from the first to the last; each item has one or several, joined.
        total_length: bytes of the disk.
        algorithm: that of the digests. Raises UsageError as `BlockHash` does.
    """
    combination = Combination(algorithm)
    for digests in digests_in_order:
        combination.add(digests)
    return combination.checksum(total_length)


def _constructor(algorithm: str) -> Callable[..., Any]:
    """Return what makes a hash of an algorithm. Raises UsageError."""
    import hashlib

    # By its own function in a third less time, which counts for small blocks. A checksum of a disk is none for security, so that
    # md5 is there where security rules forbid it.
    known = algorithm in hashlib.algorithms_guaranteed
    function = getattr(hashlib, algorithm) if known else partial(hashlib.new, algorithm)
    new = partial(function, usedforsecurity=False)
    try:
        digest_size = new().digest_size
    except (ValueError, TypeError):  # one that OpenSSL knows by name only, or does not know
        raise UsageError(errno.EINVAL, f"there is no algorithm {algorithm!r} here; there are: {_algorithms()}") from None
    if not digest_size:
        raise UsageError(errno.EINVAL, f"digests of {algorithm} have any length, so none that a checksum is known by")
    return new


def _algorithms() -> str:
    import hashlib

    return ", ".join(sorted(name for name in hashlib.algorithms_guaranteed if not name.startswith("shake_")))

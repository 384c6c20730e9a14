"""The three ways to answer a request: simple replies, structured chunks, extended chunks. Bytes out, nothing else.

The transmission loop decides what to answer; how it looks on the wire depends on what was negotiated, and on nothing else. An
object here is handed a function that takes bytes in order (a channel's queue).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from struct import Struct
from typing import Protocol

from nbdcore.protocol import constants, wire
from nbdcore.protocol.constants import REPLY_FLAG_DONE, Chunk
from nbdcore.server.backend import Refusal

__all__ = ["ChunkedReplies", "ExtendedReplies", "Replies", "SimpleReplies", "StructuredReplies", "encoded_text"]

#: 64 bits offset, after the header of a content chunk
_OFFSET = wire.UINT64
#: 32 bits length, 32 bits flags: a descriptor of BLOCK_STATUS
_COMPACT_EXTENT = Struct(">II")
#: 64 bits length, 64 bits flags: a descriptor of BLOCK_STATUS_EXT
_EXTENDED_EXTENT = Struct(">QQ")

# Plain integers for the hot path: an enum's attribute costs as much as packing the header.
_NONE, _DATA, _HOLE = int(Chunk.NONE), int(Chunk.OFFSET_DATA), int(Chunk.OFFSET_HOLE)


# Longest text of a refusal, in characters. A string has at most 4096 bytes. A sentence of ours is shorter, but a back end's may
# be anything, and so may the name in it that a client sent.
_MAX_TEXT = 500


def encoded_text(text: str) -> bytes:
    """Return a sentence for a human as it is sent: UTF-8 without NUL, cut to what a string may have."""
    return text[:_MAX_TEXT].replace("\0", "\\0").encode("utf-8", "replace")


class Queue(Protocol):
    """Takes bytes to be sent, in order: one part, and perhaps one more behind it."""

    def __call__(self, part: bytes, more: bytes = b"", /) -> None: ...


class Replies(ABC):
    """Answers to requests; `cookie` and `offset` are always the request's own."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    @abstractmethod
    def success(self, cookie: int, offset: int) -> None:
        """Answer that a request without data in its reply was carried out."""

    @abstractmethod
    def error(self, cookie: int, offset: int, refusal: Refusal) -> None:
        """Answer that a request failed; the last that is said about it."""

    @abstractmethod
    def whole(self, cookie: int, offset: int, data: bytes) -> None:
        """Answer a read with all of its data (at least one byte) at once."""

    @abstractmethod
    def begin(self, cookie: int, offset: int, count: int) -> None:
        """Begin to answer a read: its `count` bytes follow, which the caller queues, and then `end`."""

    @abstractmethod
    def end(self, cookie: int, offset: int) -> None:
        """End the answer that was begun."""


class SimpleReplies(Replies):
    """Section "Simple reply message": what every client understands."""

    def success(self, cookie: int, offset: int) -> None:  # noqa: ARG002  # only extended replies name the offset
        """Answer with error 0."""
        self._queue(wire.SIMPLE_REPLY.pack(constants.SIMPLE_REPLY_MAGIC, 0, cookie))

    def error(self, cookie: int, offset: int, refusal: Refusal) -> None:  # noqa: ARG002  # as above
        """Answer with the error's number; there is no place for its text."""
        self._queue(wire.SIMPLE_REPLY.pack(constants.SIMPLE_REPLY_MAGIC, refusal.number, cookie))

    def whole(self, cookie: int, offset: int, data: bytes) -> None:  # noqa: ARG002  # as above
        """Answer with error 0 and the data."""
        self._queue(wire.SIMPLE_REPLY.pack(constants.SIMPLE_REPLY_MAGIC, 0, cookie), data)

    def begin(self, cookie: int, offset: int, count: int) -> None:  # noqa: ARG002  # the client knows the count, and waits for all
        """Answer with error 0: it cannot be taken back."""
        self.success(cookie, offset)

    def end(self, cookie: int, offset: int) -> None:
        """Do nothing: the data end the reply."""


class ChunkedReplies(Replies):
    """Section "Structured reply chunk message": replies in several pieces, holes, and errors with a text."""

    @abstractmethod
    def _head(self, kind: int, cookie: int, offset: int, length: int, flags: int = REPLY_FLAG_DONE) -> bytes:
        """Return a chunk's header."""

    @abstractmethod
    def _data_head(self, cookie: int, offset: int, at: int, count: int, flags: int = REPLY_FLAG_DONE) -> bytes:
        """Return what stands before the `count` bytes of a content chunk, found at offset `at`: header and offset."""

    @abstractmethod
    def status(self, cookie: int, offset: int, context: int, extents: Iterable[tuple[int, int]]) -> None:
        """Answer a block status request for its only context with (length, flags) of consecutive extents."""

    def success(self, cookie: int, offset: int) -> None:
        """Answer with an empty final chunk."""
        self._queue(self._head(_NONE, cookie, offset, 0))

    def error(self, cookie: int, offset: int, refusal: Refusal) -> None:
        """Answer with an error chunk, which says where inside the request it happened when that is known."""
        text = encoded_text(refusal.text)
        payload = wire.CHUNK_ERROR_HEAD.pack(refusal.number, len(text)) + text
        kind = Chunk.ERROR
        if refusal.at is not None:
            kind = Chunk.ERROR_OFFSET
            payload += _OFFSET.pack(refusal.at)
        self._queue(self._head(kind, cookie, offset, len(payload)) + payload)

    def whole(self, cookie: int, offset: int, data: bytes) -> None:
        """Answer with one content chunk."""
        self._queue(self._data_head(cookie, offset, offset, len(data)), data)

    def begin(self, cookie: int, offset: int, count: int) -> None:
        """Send the head of a content chunk that is not the last, since reading its data may still fail."""
        self._queue(self._data_head(cookie, offset, offset, count, 0))

    def end(self, cookie: int, offset: int) -> None:
        """Answer that nothing failed."""
        self.success(cookie, offset)

    def data(self, cookie: int, offset: int, at: int, data: bytes, *, last: bool) -> None:
        """Send a piece of a read's data, found at offset `at`."""
        self._queue(self._data_head(cookie, offset, at, len(data), int(last)), data)

    def hole(self, cookie: int, offset: int, at: int, count: int, *, last: bool) -> None:
        """Send that `count` bytes of a read, at offset `at`, are zeroes."""
        self._queue(self._head(_HOLE, cookie, offset, wire.HOLE.size, int(last)) + wire.HOLE.pack(at, count))


class StructuredReplies(ChunkedReplies):
    """Chunks with compact headers."""

    def _head(self, kind: int, cookie: int, offset: int, length: int, flags: int = REPLY_FLAG_DONE) -> bytes:  # noqa: ARG002
        # (the offset is for extended headers only)
        return wire.STRUCTURED_REPLY.pack(constants.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)

    def _data_head(self, cookie: int, offset: int, at: int, count: int, flags: int = REPLY_FLAG_DONE) -> bytes:  # noqa: ARG002
        # (as above)
        return wire.STRUCTURED_DATA.pack(constants.STRUCTURED_REPLY_MAGIC, flags, _DATA, cookie, count + _OFFSET.size, at)

    def status(self, cookie: int, offset: int, context: int, extents: Iterable[tuple[int, int]]) -> None:
        """Answer with a chunk of type BLOCK_STATUS."""
        payload = wire.UINT32.pack(context) + b"".join(_COMPACT_EXTENT.pack(length, flags) for length, flags in extents)
        self._queue(self._head(Chunk.BLOCK_STATUS, cookie, offset, len(payload)) + payload)


class ExtendedReplies(ChunkedReplies):
    """Chunks with extended headers, which every reply uses once they were negotiated."""

    def _head(self, kind: int, cookie: int, offset: int, length: int, flags: int = REPLY_FLAG_DONE) -> bytes:
        return wire.EXTENDED_REPLY.pack(constants.EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, length)

    def _data_head(self, cookie: int, offset: int, at: int, count: int, flags: int = REPLY_FLAG_DONE) -> bytes:
        return wire.EXTENDED_DATA.pack(constants.EXTENDED_REPLY_MAGIC, flags, _DATA, cookie, offset, count + _OFFSET.size, at)

    def status(self, cookie: int, offset: int, context: int, extents: Iterable[tuple[int, int]]) -> None:
        """Answer with a chunk of type BLOCK_STATUS_EXT."""
        told = [_EXTENDED_EXTENT.pack(length, flags) for length, flags in extents]
        payload = wire.STATUS_EXT_HEAD.pack(context, len(told)) + b"".join(told)
        self._queue(self._head(Chunk.BLOCK_STATUS_EXT, cookie, offset, len(payload)) + payload)

"""What an NBD server says, as bytes; and replies, which become bytes with the request that they answer."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from nbdcore.protocol import constants, wire
from nbdcore.protocol.constants import Chunk, HandshakeFlag, Info, OptionReply, TransmissionFlag
from nbdcore.testing.scripted.connection import Reply, Request

__all__ = [
    "EVERYTHING",
    "chunk",
    "data",
    "error",
    "first",
    "greeting",
    "hole",
    "info_replies",
    "oldstyle_greeting",
    "option_reply",
    "simple",
    "status",
]

#: Transmission flags of an export that can do all that there is.
EVERYTHING = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_DF
    | TransmissionFlag.CAN_MULTI_CONN
    | TransmissionFlag.SEND_CACHE
    | TransmissionFlag.SEND_FAST_ZERO
    | TransmissionFlag.BLOCK_STATUS_PAYLOAD
)

# ---------------------------------------------------------------------------------------------- the handshake


def greeting(flags: int = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES) -> bytes:
    """Build a newstyle server's greeting."""
    return wire.GREETING.pack(constants.NBD_MAGIC, constants.OPTION_MAGIC) + wire.HANDSHAKE_FLAGS.pack(flags)


def oldstyle_greeting(size: int, flags: int = EVERYTHING) -> bytes:
    """Build the greeting of an oldstyle server, which is its whole handshake."""
    head = wire.GREETING.pack(constants.NBD_MAGIC, constants.OLDSTYLE_MAGIC)
    return head + wire.OLDSTYLE.pack(size, flags) + bytes(constants.RESERVED_ZEROES)


def option_reply(option: int, reply: int = OptionReply.ACK, data: bytes = b"") -> bytes:
    """Build one reply to an option."""
    return wire.pack_option_reply(option, reply, data)


def info_replies(
    option: int,
    size: int,
    flags: int = EVERYTHING,
    *,
    block_size: tuple[int, int, int] | None = None,
    name: str | None = None,
    description: str | None = None,
) -> bytes:
    """Build the whole answer to INFO or GO; `block_size` is minimum, preferred and maximum in bytes."""
    pieces = [wire.INFO_EXPORT.pack(Info.EXPORT, size, flags)]
    if block_size is not None:
        pieces.append(wire.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *block_size))
    for kind, text in ((Info.NAME, name), (Info.DESCRIPTION, description)):
        if text is not None:
            pieces.append(wire.UINT16.pack(kind) + text.encode())
    return b"".join(option_reply(option, OptionReply.INFO, piece) for piece in pieces) + option_reply(option)


# ---------------------------------------------------------------------------------------------- replies


def simple(data: bytes = b"", *, error: int = 0) -> Reply:
    """Build a simple reply; `error` is a number of the specification's ErrorNumber."""
    return lambda request: wire.SIMPLE_REPLY.pack(constants.SIMPLE_REPLY_MAGIC, error, request.cookie) + data


def chunk(kind: int, payload: bytes = b"", *, done: bool = True) -> Reply:
    """Build a chunk of a structured reply, or of an extended one where the request is extended."""
    flags = constants.REPLY_FLAG_DONE if done else 0

    def reply(request: Request) -> bytes:
        if request.extended:
            head = (constants.EXTENDED_REPLY_MAGIC, flags, kind, request.cookie, request.offset, len(payload))
            return wire.EXTENDED_REPLY.pack(*head) + payload
        return wire.STRUCTURED_REPLY.pack(constants.STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, len(payload)) + payload

    return reply


def data(contents: bytes, offset: int | None = None, *, done: bool = True) -> Reply:
    """Build a chunk of a read's data, by default at the request's offset."""

    def reply(request: Request) -> bytes:
        at = request.offset if offset is None else offset
        return chunk(Chunk.OFFSET_DATA, wire.UINT64.pack(at) + contents, done=done)(request)

    return reply


def hole(length: int, offset: int | None = None, *, done: bool = True) -> Reply:
    """Build a chunk of zeroes that are not sent, by default at the request's offset."""

    def reply(request: Request) -> bytes:
        return chunk(Chunk.OFFSET_HOLE, wire.HOLE.pack(request.offset if offset is None else offset, length), done=done)(request)

    return reply


def error(number: int, text: str = "", *, offset: int | None = None, done: bool = True) -> Reply:
    """Build an error chunk; with an offset it is NBD_REPLY_TYPE_ERROR_OFFSET."""
    encoded = text.encode()
    payload = wire.CHUNK_ERROR_HEAD.pack(number, len(encoded)) + encoded
    if offset is None:
        return chunk(Chunk.ERROR, payload, done=done)
    return chunk(Chunk.ERROR_OFFSET, payload + wire.UINT64.pack(offset), done=done)


def status(context: int, extents: Iterable[tuple[int, int]], *, done: bool = True) -> Reply:
    """Build the extents, (length, flags) each, of a metadata context by its id, in the form that goes with the request."""
    known = list(extents)

    def reply(request: Request) -> bytes:
        if request.extended:
            pairs = b"".join(struct.pack(">QQ", *extent) for extent in known)
            return chunk(Chunk.BLOCK_STATUS_EXT, wire.STATUS_EXT_HEAD.pack(context, len(known)) + pairs, done=done)(request)
        pairs = b"".join(struct.pack(">II", *extent) for extent in known)
        return chunk(Chunk.BLOCK_STATUS, wire.UINT32.pack(context) + pairs, done=done)(request)

    return reply


def first(count: int, *replies: Reply) -> Reply:
    """Build the first bytes of these replies, for a server that breaks off in the middle."""
    return lambda request: b"".join(reply(request) for reply in replies)[:count]

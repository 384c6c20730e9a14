"""A tiny client of raw bytes: it says what a test tells it to, right or wrong, and takes the server's answers apart.

It shares nothing with nbdcore's own client but the layouts, so that both cannot be wrong in the same way unnoticed.
"""

from __future__ import annotations

import socket
import ssl
import struct
from dataclasses import dataclass, field

from nbdcore.protocol import constants, wire
from nbdcore.protocol.constants import Chunk, CommandFlag, CommandType, Info, Option, OptionReply

#: Seconds for which any one answer is waited for.
PATIENCE = 10.0


@dataclass
class Reply:
    """The answer to one request.

    Attributes:
        error: the error number, 0 for success.
        text: what the server said about an error.
        at: offset of the error, where one was named.
        data: contents of a read by offset.
        holes: (offset, length) of the holes of a read.
        extents: (length, flags) by context id.
        chunks: types of all chunks in order; empty for a simple reply.
        offset: the request's offset, which extended headers repeat.
    """

    cookie: int = 0
    error: int = 0
    text: str = ""
    at: int | None = None
    data: dict[int, bytes] = field(default_factory=dict)
    holes: list[tuple[int, int]] = field(default_factory=list)
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    chunks: list[int] = field(default_factory=list)
    offset: int | None = None

    def contents(self) -> bytes:
        """Put a read's pieces in order."""
        pieces = {**self.data, **{offset: bytes(length) for offset, length in self.holes}}
        return b"".join(pieces[offset] for offset in sorted(pieces))


class RawClient:
    """One connection to a server."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        self.sock = sock
        self.structured = self.extended = False
        self.size = self.flags = -1
        self.cookie = 0

    def close(self) -> None:
        self.sock.close()

    # ------------------------------------------------------------------------------------------ bytes

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self.sock.recv(min(count - len(data), 1 << 20))
            assert piece, f"the server hung up after {len(data)} of {count} bytes"
            data += piece
        return bytes(data)

    def unpack(self, layout: struct.Struct) -> tuple:
        return layout.unpack(self.exactly(layout.size))

    def hung_up(self) -> bool:
        """Whether the server ends the connection with nothing more to say."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    # ------------------------------------------------------------------------------------------ handshake

    def greet(self, flags: int = 3) -> int:
        """Exchange greeting and flags; return the server's."""
        assert self.unpack(wire.GREETING) == (constants.NBD_MAGIC, constants.OPTION_MAGIC)
        (offered,) = self.unpack(wire.HANDSHAKE_FLAGS)
        self.send(wire.CLIENT_FLAGS.pack(flags))
        return offered

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; return all replies to it, the last of which is ACK or an error."""
        self.send(wire.pack_option(option, data))
        return self.option_replies(option)

    def option_replies(self, option: int) -> list[tuple[int, bytes]]:
        replies = []
        while True:
            magic, about, kind, length = self.unpack(wire.OPTION_REPLY)
            assert (magic, about) == (constants.OPTION_REPLY_MAGIC, option)
            replies.append((kind, self.exactly(length)))
            if kind == OptionReply.ACK or kind & constants.OPTION_REPLY_ERROR:
                return replies

    def start_tls(self, context: ssl.SSLContext) -> None:
        """Ask for TLS, and start it; from then on an end without the server's goodbye is an error."""
        assert self.option(Option.STARTTLS) == [(OptionReply.ACK, b"")]
        self.wrap(context)

    def wrap(self, context: ssl.SSLContext) -> None:
        """Do the client's part of TLS's handshake."""
        self.sock = context.wrap_socket(self.sock, server_hostname="localhost", suppress_ragged_eofs=False)

    def agree(self, *, structured: bool = True, extended: bool = False, allocation: bool = True, name: str = "") -> None:
        """Negotiate replies and base:allocation."""
        if structured:
            assert self.option(Option.STRUCTURED_REPLY) == [(OptionReply.ACK, b"")]
        if extended:
            assert self.option(Option.EXTENDED_HEADERS) == [(OptionReply.ACK, b"")]
        self.structured, self.extended = structured or extended, extended
        if allocation and self.structured:
            replies = self.option(Option.SET_META_CONTEXT, wire.pack_meta_context_request(name, ["base:allocation"]))
            assert replies[-1][0] == OptionReply.ACK

    def go(self, name: str = "", items: tuple[int, ...] = (Info.BLOCK_SIZE,)) -> None:
        """Enter transmission with NBD_OPT_GO."""
        replies = self.option(Option.GO, wire.pack_info_request(name, items))
        assert replies[-1] == (OptionReply.ACK, b""), replies
        for kind, data in replies[:-1]:
            assert kind == OptionReply.INFO
            if wire.UINT16.unpack_from(data)[0] == Info.EXPORT:
                _, self.size, self.flags = wire.INFO_EXPORT.unpack(data)

    # ------------------------------------------------------------------------------------------ transmission

    def pack(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> bytes:
        """Return a request with the next cookie."""
        self.cookie += 1
        layout, magic = wire.REQUEST, constants.REQUEST_MAGIC
        if self.extended:
            layout, magic = wire.EXTENDED_REQUEST, constants.EXTENDED_REQUEST_MAGIC
        return layout.pack(magic, flags, command, self.cookie, offset, length) + payload

    def ask(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> Reply:
        """Send a request and return the answer to it."""
        self.send(self.pack(command, offset, length, flags, payload))
        reply = self.reply(length if command == CommandType.READ else 0)
        assert reply.cookie == self.cookie
        if self.extended:
            assert reply.offset == offset
        return reply

    def read(self, offset: int, length: int, flags: int = 0) -> Reply:
        return self.ask(CommandType.READ, offset, length, flags)

    def write(self, offset: int, data: bytes, flags: int = 0) -> Reply:
        flags |= CommandFlag.PAYLOAD_LEN if self.extended else 0
        return self.ask(CommandType.WRITE, offset, len(data), flags, data)

    def reply(self, expected: int = 0) -> Reply:
        """Return the next reply; a simple one with `expected` bytes of data."""
        if not self.structured:
            magic, error, cookie = self.unpack(wire.SIMPLE_REPLY)
            assert magic == constants.SIMPLE_REPLY_MAGIC
            data = {0: self.exactly(expected)} if expected and not error else {}
            return Reply(cookie, error, data=data)
        reply = Reply()
        while not self._chunk(reply):
            pass
        return reply

    def _chunk(self, reply: Reply) -> bool:
        """Add the next chunk to a reply; return whether it was the last."""
        if self.extended:
            magic, flags, kind, reply.cookie, reply.offset, length = self.unpack(wire.EXTENDED_REPLY)
            assert magic == constants.EXTENDED_REPLY_MAGIC
        else:
            magic, flags, kind, reply.cookie, length = self.unpack(wire.STRUCTURED_REPLY)
            assert magic == constants.STRUCTURED_REPLY_MAGIC
        payload = self.exactly(length)
        reply.chunks.append(kind)
        _take_apart(reply, kind, payload)
        return bool(flags & constants.REPLY_FLAG_DONE)


def _take_apart(reply: Reply, kind: int, payload: bytes) -> None:
    if kind == Chunk.OFFSET_DATA:
        reply.data[wire.UINT64.unpack_from(payload)[0]] = payload[8:]
    elif kind == Chunk.OFFSET_HOLE:
        reply.holes.append(wire.HOLE.unpack(payload))
    elif kind == Chunk.BLOCK_STATUS:
        reply.extents[wire.UINT32.unpack_from(payload)[0]] = list(struct.iter_unpack(">II", payload[4:]))
    elif kind == Chunk.BLOCK_STATUS_EXT:
        context, count = wire.STATUS_EXT_HEAD.unpack_from(payload)
        reply.extents[context] = list(struct.iter_unpack(">QQ", payload[8:]))
        assert count == len(reply.extents[context])
    elif kind & constants.CHUNK_ERROR:
        reply.error, length = wire.CHUNK_ERROR_HEAD.unpack_from(payload)
        reply.text = payload[6 : 6 + length].decode()
        if kind == Chunk.ERROR_OFFSET:
            (reply.at,) = wire.UINT64.unpack(payload[6 + length :])
    else:
        assert (kind, payload) == (Chunk.NONE, b"")

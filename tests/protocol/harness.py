"""What the tests of the protocol core stand on: builders of a server's messages, and a client that is fed bytes, cut anywhere.

A server's side of a whole conversation can be written down in advance, since the engine never takes more than it asked for. So
every scenario is one string of bytes, and `everywhere` delivers it whole, byte by byte, and in two pieces cut at each position:
the outcome must be the same each time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nbdcore.errors import Error
from nbdcore.protocol import constants, wire
from nbdcore.protocol.constants import Chunk, Info, Option, OptionReply
from nbdcore.protocol.engine import Engine, Exchange
from nbdcore.protocol.handshake.agreement import Settings
from nbdcore.protocol.transmission.commands import Command

SIZE = 1 << 20
#: Every transmission flag but READ_ONLY.
FLAGS = 0x1FFD
MODES = ("simple", "structured", "extended")

# ---------------------------------------------------------------------------------------------- the handshake


def greeting(flags: int = 3) -> bytes:
    return wire.GREETING.pack(constants.NBD_MAGIC, constants.OPTION_MAGIC) + wire.HANDSHAKE_FLAGS.pack(flags)


def oldstyle(size: int = SIZE, flags: int = 1) -> bytes:
    return wire.GREETING.pack(constants.NBD_MAGIC, constants.OLDSTYLE_MAGIC) + wire.OLDSTYLE.pack(size, flags) + bytes(124)


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return wire.pack_option_reply(option, kind, data)


def ack(*options: int) -> bytes:
    return b"".join(reply(option, OptionReply.ACK) for option in options)


def refused(option: int, kind: int = OptionReply.ERR_UNSUP, text: bytes = b"") -> bytes:
    return reply(option, kind, text)


def server(name: bytes, description: bytes = b"") -> bytes:
    return reply(Option.LIST, OptionReply.SERVER, struct.pack(">I", len(name)) + name + description)


def context(number: int, name: bytes, option: int = Option.SET_META_CONTEXT) -> bytes:
    return reply(option, OptionReply.META_CONTEXT, struct.pack(">I", number) + name)


def info(data: bytes, option: int = Option.GO) -> bytes:
    return reply(option, OptionReply.INFO, data)


def export(size: int = SIZE, flags: int = FLAGS, option: int = Option.GO) -> bytes:
    return info(wire.INFO_EXPORT.pack(Info.EXPORT, size, flags), option)


def block_size(minimum: int, preferred: int, maximum: int, option: int = Option.GO) -> bytes:
    return info(wire.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, minimum, preferred, maximum), option)


def export_name_reply(size: int = SIZE, flags: int = FLAGS, *, zeroes: bool = False) -> bytes:
    return wire.EXPORT_NAME_REPLY.pack(size, flags) + bytes(124 if zeroes else 0)


# ---------------------------------------------------------------------------------------------- the transmission phase


def simple(command: Command | int, error: int = 0, data: bytes = b"") -> bytes:
    cookie = command if isinstance(command, int) else command.cookie
    return wire.SIMPLE_REPLY.pack(constants.SIMPLE_REPLY_MAGIC, error, cookie) + data


def chunk(
    mode: str, command: Command | int, kind: int, payload: bytes = b"", *, done: bool = False, length: int | None = None
) -> bytes:
    """One chunk in the header format of `mode`; `length` lies about the payload."""
    cookie, offset = (command, 0) if isinstance(command, int) else (command.cookie, command.offset)
    length = len(payload) if length is None else length
    if mode == "extended":
        header = wire.EXTENDED_REPLY.pack(constants.EXTENDED_REPLY_MAGIC, int(done), kind, cookie, offset, length)
    else:
        header = wire.STRUCTURED_REPLY.pack(constants.STRUCTURED_REPLY_MAGIC, int(done), kind, cookie, length)
    return header + payload


def none(mode: str, command: Command | int) -> bytes:
    return chunk(mode, command, Chunk.NONE, done=True)


def data_chunk(mode: str, command: Command | int, offset: int, data: bytes, *, done: bool = False) -> bytes:
    return chunk(mode, command, Chunk.OFFSET_DATA, struct.pack(">Q", offset) + data, done=done)


def hole_chunk(mode: str, command: Command | int, offset: int, length: int, *, done: bool = False) -> bytes:
    return chunk(mode, command, Chunk.OFFSET_HOLE, struct.pack(">QI", offset, length), done=done)


def error_chunk(mode: str, command: Command | int, number: int, text: bytes = b"", *, done: bool = False) -> bytes:
    return chunk(mode, command, Chunk.ERROR, struct.pack(">IH", number, len(text)) + text, done=done)


def error_offset_chunk(
    mode: str, command: Command | int, number: int, offset: int, text: bytes = b"", *, done: bool = False
) -> bytes:
    payload = struct.pack(">IH", number, len(text)) + text + struct.pack(">Q", offset)
    return chunk(mode, command, Chunk.ERROR_OFFSET, payload, done=done)


def status_chunk(
    mode: str, command: Command | int, number: int, extents: Iterable[tuple[int, int]], *, done: bool = False
) -> bytes:
    """Block status of the width that goes with `mode`."""
    extents = list(extents)
    if mode == "extended":
        payload = struct.pack(">II", number, len(extents)) + b"".join(struct.pack(">QQ", *extent) for extent in extents)
        return chunk(mode, command, Chunk.BLOCK_STATUS_EXT, payload, done=done)
    payload = struct.pack(">I", number) + b"".join(struct.pack(">II", *extent) for extent in extents)
    return chunk(mode, command, Chunk.BLOCK_STATUS, payload, done=done)


def success(mode: str, command: Command, data: bytes = b"") -> bytes:
    """The plainest good answer to a command."""
    if mode == "simple":
        return simple(command, data=data)
    return data_chunk(mode, command, command.offset, data, done=True) if data else none(mode, command)


def broken_off(mode: str, command: Command, number: int) -> bytes:
    """The plainest refusal of a command."""
    return simple(command, number) if mode == "simple" else error_chunk(mode, command, number, done=True)


# ---------------------------------------------------------------------------------------------- the client


def feed(engine: Engine, data: bytes, then: Callable[[], object] = int) -> int:
    """Give the engine bytes as a stream would, as far as it wants them, calling `then` each time. Returns how many it took."""
    taken = 0
    while taken < len(data):
        room = engine.room()
        if not len(room):
            break
        count = min(len(room), len(data) - taken)
        room[:count] = data[taken : taken + count]
        engine.received(count)
        taken += count
        then()
    return taken


def said(engine: Engine) -> bytes:
    """Take everything that the engine wants to send."""
    sent = bytearray()
    while parts := engine.outgoing():
        data = b"".join(parts)
        sent += data
        engine.sent(len(data))
    return bytes(sent)


class Client:
    """An engine under test, and everything it has said."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.said = bytearray()
        self.taken = 0
        self.exchange: Exchange | None = None
        self.exchanges: list[Exchange] = []
        self.commands: list[Command] = []
        #: how often each command and exchange completed
        self.completions: dict[int, int] = {}

    def hear(self, *pieces: bytes) -> Client:
        """Receive bytes, piece by piece, and send whatever that leads to."""
        for piece in pieces:
            self.taken += feed(self.engine, piece, self.speak)
        return self

    def speak(self) -> bytes:
        """Send what is to be sent; returns it."""
        now = said(self.engine)
        self.said += now
        return now

    def follow(self, exchange: Exchange) -> Exchange:
        """Take note of a conversation just begun."""
        self.exchange = exchange
        self.exchanges.append(exchange)
        exchange.completion = self._completed
        self.speak()
        return exchange

    def submit(self, *commands: Command) -> Client:
        """Queue commands and send them."""
        for command in commands:
            self.queue(command)
        self.speak()
        return self

    def queue(self, command: Command) -> Command:
        command.completion = self._completed
        self.engine.submit(command)
        self.commands.append(command)
        return command

    def _completed(self, subject: Any) -> None:
        assert subject.done
        self.completions[id(subject)] = self.completions.get(id(subject), 0) + 1

    def completed_once(self, subject: Any) -> bool:
        return self.completions.get(id(subject)) == 1

    def outcome(self) -> dict[str, Any]:
        """Everything that a caller can see, for comparing."""
        engine = self.engine
        return {
            "phase": engine.phase,
            "error": described(engine.error),
            "said": bytes(self.said),
            # In the transmission phase one receive may well bring bytes that follow the end of the connection.
            "taken": None if self.commands else self.taken,
            "agreement": engine.agreement,
            "wants_tls": engine.wants_tls,
            "exchanges": [(e.done, described(e.error), e.result, self.completions.get(id(e))) for e in self.exchanges],
            "commands": [(c.done, described(c.error), result(c), c.chunks, self.completions.get(id(c))) for c in self.commands],
        }


def result(command: Command) -> bytes | None:
    """The data of a successful read."""
    if command.type != constants.CommandType.READ or not command.done or command.error is not None:
        return None
    return command.result()


def described(error: BaseException | None) -> tuple[Any, ...] | None:
    """An error as something that can be compared."""
    if error is None:
        return None
    assert isinstance(error, Error)
    extra = getattr(error, "offset", None), getattr(error, "reply", None)
    return type(error), error.errno, error.message, error.server_text, *extra


def newborn(**settings: Any) -> Client:
    """A client whose handshake has begun."""
    client = Client(Engine(Settings(**settings)))
    client.follow(client.engine.handshake())
    return client


def connected(
    mode: str = "structured",
    *,
    size: int = SIZE,
    flags: int = FLAGS,
    contexts: Iterable[tuple[int, bytes]] = (),
    sizes: tuple[int, int, int] | None = None,
    strict: int | None = None,
) -> Client:
    """A client in the transmission phase, brought there by a handshake; what it said so far is forgotten."""
    contexts = tuple(contexts)
    settings = Settings(
        contexts=tuple(name.decode() for _, name in contexts),
        structured_replies=mode != "simple",
        extended_headers=mode == "extended",
    )
    client = Client(Engine(settings) if strict is None else Engine(settings, strict=strict))
    client.follow(client.engine.handshake())
    script = greeting()
    if mode != "simple":
        script += ack(Option.EXTENDED_HEADERS if mode == "extended" else Option.STRUCTURED_REPLY)
        if contexts:
            script += b"".join(context(*one) for one in contexts) + ack(Option.SET_META_CONTEXT)
    script += export(size, flags) + (block_size(*sizes) if sizes else b"") + ack(Option.GO)
    client.hear(script)
    assert client.engine.phase.value == "connected", client.engine.error
    client.said.clear()
    client.exchanges.clear()
    client.taken = 0
    return client


# ---------------------------------------------------------------------------------------------- cutting


# Bytes at each end of a script that come one by one, and the pieces between: of no round number, and within a header's size.
_SINGLY = 2000
_PIECE = 37


def deliveries(data: bytes, *, most: int = 400) -> Iterator[list[bytes]]:
    """Yield the ways to deliver bytes: whole, one at a time, and in two pieces cut at each position.

    Of more than `most` positions, those at both ends and evenly spaced ones between are taken. Of a long payload, what is neither
    near its beginning nor near its end comes in larger pieces: one at a time they would all meet the same state.
    """
    yield [data]
    yield list(_one_at_a_time(data))
    positions = range(1, len(data))
    if len(positions) > most:
        ends = [*positions[: most // 3], *positions[-(most // 3) :]]
        positions = sorted({*ends, *positions[:: len(positions) // (most // 3)]})
    for at in positions:
        yield [data[:at], data[at:]]


def _one_at_a_time(data: bytes) -> Iterator[bytes]:
    middle = range(_SINGLY, len(data) - _SINGLY)
    at = 0
    while at < len(data):
        end = min(at + _PIECE, middle.stop) if at in middle else at + 1
        yield data[at:end]
        at = end


def everywhere(build: Callable[[], tuple[Client, bytes]], *, eof: bool = False, most: int = 400) -> Client:
    """Build a scenario afresh for each way to deliver its bytes, and check that all end alike. Returns the first one's client."""
    first, script = build()
    ways = deliveries(script, most=most)
    first.hear(*next(ways))
    if eof:
        first.engine.received_eof()
    expected = first.outcome()
    for pieces in ways:
        client, again = build()
        assert again == script, "a scenario must be the same each time"
        client.hear(*pieces)
        if eof:
            client.engine.received_eof()
        got = client.outcome()
        assert got == expected, f"cut after {len(pieces[0])} bytes"
    return first

"""Clients and scripted servers in conversation, as most tests of this folder begin, and the table of calls that they try."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nbdcore import Client
from nbdcore.protocol import wire
from nbdcore.protocol.constants import Chunk, CommandType, Option, OptionReply
from nbdcore.testing.scripted import (
    EVERYTHING,
    Connection,
    Negotiation,
    Reply,
    Request,
    ScriptedServer,
    Step,
    chunk,
    data,
    greeting,
    info_replies,
    oldstyle_greeting,
    option_reply,
    simple,
    status,
    wait_for,
)

#: Seconds that any one wait may take. No test takes so long unless it fails.
PATIENCE = 10.0
#: Seconds of a deadline that a test wants to pass.
SHORT = 0.05
CONTEXTS = {1: "base:allocation"}
DISK = 1 << 20


def script(*steps: Step, **offer: Any) -> list[Step]:
    """Return a script that opens an export, then goes on with `steps`."""
    return [greeting(), Negotiation(**{"size": DISK, "contexts": CONTEXTS, **offer}), *steps]


@contextlib.contextmanager
def talk(*steps: Step, options: dict[str, Any] | None = None, **offer: Any) -> Iterator[tuple[Client, Connection]]:
    """Connect a client to a server that plays `steps` once the export is open. Leaving does not say goodbye."""
    with ScriptedServer(script(*steps, **offer), patience=PATIENCE) as server:
        client = Client(server.stream(), timeout=PATIENCE, **(options or {}))
        with contextlib.closing(client):
            yield client, server.connections[0]


@contextlib.contextmanager
def in_background(call: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run a call in a thread of its own; the list gets its result, or what it raised, by the end of the block."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as exc:  # noqa: BLE001 (the test looks at it)
            outcome.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield outcome
    finally:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the call hangs"


def together(count: int, work: Any) -> list[Any]:
    """Run `work(number)` in so many threads at once; returns what they returned or raised."""
    outcomes: list[Any] = [None] * count
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait(PATIENCE)
        try:
            outcomes[number] = work(number)
        except BaseException as exc:  # noqa: BLE001 (the test looks at it)
            outcomes[number] = exc

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a call hangs"
    return outcomes


def held(buffer: bytearray) -> bool:
    """Return whether anybody has a view of the buffer."""
    try:
        buffer.append(0)
    except BufferError:
        return True
    buffer.pop()
    return False


# ---------------------------------------------------------------------------------------------- a server that does its work

DONE = chunk(Chunk.NONE)


def good(request: Request) -> bytes:
    """Answer a read with its offset over and over, block status with all data, and anything else with success."""
    if request.kind == CommandType.READ:
        return data(expected(request.offset, request.count))(request)
    if request.kind == CommandType.BLOCK_STATUS:
        return status(1, [(request.count, 0)])(request)
    return DONE(request)


def expected(offset: int, count: int) -> bytes:
    """Return what is read from a good server."""
    return bytes([offset % 251]) * count


# ---------------------------------------------------------------------------------------------- servers that take their time


def late(event: threading.Event, *replies: Reply) -> Step:
    """Receive a request, and answer it when the event has happened."""

    def step(connection: Connection) -> None:
        request = connection.receive_request()
        wait_for(event)(connection)
        for reply in replies:
            connection.send(reply(request))

    return step


def in_two_parts(reply: Reply, part: int, event: threading.Event) -> Step:
    """Answer a request with so many bytes of a reply, and with the rest when the event has happened."""

    def step(connection: Connection) -> None:
        whole = reply(connection.receive_request())
        connection.send(whole[:part])
        wait_for(event)(connection)
        connection.send(whole[part:])

    return step


def odd_ones_first(event: threading.Event) -> Step:
    """Receive eight reads. When the event has happened, answer those at odd offsets, each with its digit, then the others."""

    def step(connection: Connection) -> None:
        requests = [connection.receive_request() for _ in range(8)]
        odd = [request for request in requests if request.offset % 2]
        wait_for(event)(connection)
        for request in odd:
            connection.send(data(b"%d" % (request.offset % 10))(request))
        connection.send(b"".join(data(b"-")(request) for request in requests if request not in odd))

    return step


def slow_to_receive(event: threading.Event, payloads: list[bytes]) -> Step:
    """Receive a write when the event has happened, append its payload, and answer it."""

    def step(connection: Connection) -> None:
        wait_for(event)(connection)
        request = connection.receive_request()
        payloads.append(request.payload)
        connection.send(DONE(request))

    return step


# ---------------------------------------------------------------------------------------------- every call that waits


@dataclass(frozen=True)
class Call:
    """A call of the transmission phase: how to make it, and what a server answers it with."""

    kind: CommandType
    make: Callable[..., Any]
    chunks: Reply
    simple: Reply | None


_EIGHT = b"12345678"

CALLS: dict[str, Call] = {
    "pread": Call(CommandType.READ, lambda c, **o: c.pread(8, 0, **o), data(_EIGHT), simple(_EIGHT)),
    "pread_into": Call(CommandType.READ, lambda c, **o: c.pread_into(bytearray(8), 0, **o), data(_EIGHT), simple(_EIGHT)),
    "pwrite": Call(CommandType.WRITE, lambda c, **o: c.pwrite(_EIGHT, 0, **o), DONE, simple()),
    "flush": Call(CommandType.FLUSH, lambda c, **o: c.flush(**o), DONE, simple()),
    "trim": Call(CommandType.TRIM, lambda c, **o: c.trim(8, 0, **o), DONE, simple()),
    "zero": Call(CommandType.WRITE_ZEROES, lambda c, **o: c.zero(8, 0, **o), DONE, simple()),
    "cache": Call(CommandType.CACHE, lambda c, **o: c.cache(8, 0, **o), DONE, simple()),
    "block_status": Call(CommandType.BLOCK_STATUS, lambda c, **o: c.block_status(8, 0, **o), status(1, [(8, 0)]), None),
    "extents": Call(CommandType.BLOCK_STATUS, lambda c, **o: list(c.extents(count=8, **o)), status(1, [(8, 0)]), None),
}

#: Name -> the call, and the server's whole answer.
OPTION_CALLS: dict[str, tuple[Callable[..., Any], bytes]] = {
    "opt_list": (
        lambda c, **o: c.opt_list(**o),
        option_reply(Option.LIST, OptionReply.SERVER, b"\0\0\0\1a") + option_reply(Option.LIST),
    ),
    "opt_info": (lambda c, **o: c.opt_info(**o), info_replies(Option.INFO, DISK, block_size=(1, 512, 1 << 16), name="n")),
    "opt_go": (lambda c, **o: c.opt_go(**o), info_replies(Option.GO, DISK, description="d")),
    "opt_structured_reply": (lambda c, **o: c.opt_structured_reply(**o), option_reply(Option.STRUCTURED_REPLY)),
    "opt_extended_headers": (lambda c, **o: c.opt_extended_headers(**o), option_reply(Option.EXTENDED_HEADERS)),
    "opt_list_meta_context": (
        lambda c, **o: c.opt_list_meta_context(**o),
        option_reply(Option.LIST_META_CONTEXT, OptionReply.META_CONTEXT, b"\0\0\0\1a:b") + option_reply(Option.LIST_META_CONTEXT),
    ),
    "opt_set_meta_context": (
        lambda c, **o: c.opt_set_meta_context(["a:b"], **o),
        option_reply(Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, b"\0\0\0\1a:b") + option_reply(Option.SET_META_CONTEXT),
    ),
    "opt_starttls": (lambda c, **o: c.opt_starttls(**o), option_reply(Option.STARTTLS)),
}


def greeted(connection: Connection) -> None:
    """Greet a client that asks for nothing by itself (`SILENT_OPTION_MODE`)."""
    connection.send(greeting())
    connection.receive(4)


#: Options of a client that pauses right after the greeting.
SILENT_OPTION_MODE: dict[str, Any] = {"opt_mode": True, "structured_replies": False, "contexts": ()}


def ready_for_options(connection: Connection) -> None:
    """Greet a client, and agree on structured replies, so that it may ask for any option (`OPTION_MODE`)."""
    greeted(connection)
    connection.receive_option()
    connection.send(option_reply(Option.STRUCTURED_REPLY))


#: Options of a client that pauses once it has structured replies.
OPTION_MODE: dict[str, Any] = {"opt_mode": True, "extended_headers": False, "contexts": ()}


# ---------------------------------------------------------------------------------------------- the handshake as bytes


def newstyle() -> bytes:
    """Return all that a server says to a client of today until the export is open."""
    return b"".join(
        [
            greeting(),
            option_reply(Option.EXTENDED_HEADERS, OptionReply.ERR_UNSUP, b"no"),
            option_reply(Option.STRUCTURED_REPLY),
            option_reply(Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, b"\0\0\0\1base:allocation"),
            option_reply(Option.SET_META_CONTEXT),
            info_replies(Option.GO, DISK, block_size=(1, 4096, 1 << 20), name="n", description="d"),
        ]
    )


#: All that servers of different ages say until the export is open.
HANDSHAKES = {
    "oldstyle": oldstyle_greeting(DISK),
    "newstyle, not fixed": greeting(0) + wire.EXPORT_NAME_REPLY.pack(DISK, EVERYTHING) + bytes(124),
    "without GO": greeting()
    + option_reply(Option.EXTENDED_HEADERS, OptionReply.ERR_UNSUP)
    + option_reply(Option.STRUCTURED_REPLY, OptionReply.ERR_UNSUP)
    + option_reply(Option.GO, OptionReply.ERR_UNSUP)
    + wire.EXPORT_NAME_REPLY.pack(DISK, EVERYTHING),
    "newstyle": newstyle(),
}

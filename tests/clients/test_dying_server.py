"""Every call against a server that dies in the middle of it: one clear error, the right phase, no hang, nothing left open."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

import nbdcore
from nbdcore import Client, CommandError, Disconnected, Error, Phase, ProtocolViolation, TransportError
from nbdcore.protocol import wire
from nbdcore.protocol.constants import EXTENDED_REPLY_MAGIC, Chunk
from nbdcore.testing.scripted import (
    Connection,
    Reply,
    Request,
    ScriptedServer,
    Step,
    answer,
    chunk,
    data,
    drain,
    error,
    first,
    half_close,
    hang_up,
    reset,
    wait_for,
)
from tests.clients.talking import (
    CALLS,
    CONTEXTS,
    DISK,
    HANDSHAKES,
    OPTION_CALLS,
    OPTION_MODE,
    PATIENCE,
    ready_for_options,
    script,
    talk,
)

FORMATS = {
    "simple": {"structured": False},
    "structured": {},
    "extended": {"extended": True},
}
#: Without structured replies there is no block status.
CALLS_AND_FORMATS = [(name, form) for name, call in CALLS.items() for form in FORMATS if form != "simple" or call.simple]
OVER = (Phase.CLOSED, Phase.DEAD)


def must_fail(client: Client, call: Callable[..., Any], expected: type[Error] = Disconnected) -> Error:
    """Make the call; it must end the connection, with this one error."""
    with pytest.raises(expected) as caught:
        call(client, timeout=PATIENCE)
    assert client.phase in OVER
    with pytest.raises(Disconnected, match="it ended with"):
        client.pread(1, 0)
    return caught.value


def reply_of(name: str, form: str) -> Reply:
    reply = CALLS[name].simple if form == "simple" else CALLS[name].chunks
    assert reply is not None
    return reply


def whole_reply(reply: Reply, form: str) -> int:
    """Return how long a reply is."""
    return len(reply(Request(0, 0, 1, 0, 8, extended=form == "extended")))


class Listening:
    """A server that listens on TCP and plays a script for each client, or one on a pair of sockets."""

    def __init__(self, scripts: list[list[Step]], *, tcp: bool) -> None:
        self.server = ScriptedServer(*scripts, patience=PATIENCE)
        self.port = self.server.listen_tcp() if tcp else None

    def client(self, **options: Any) -> Client:
        client = Client(**options)
        if self.port is None:
            return client.connect_stream(self.server.stream(), timeout=PATIENCE)
        return client.connect_tcp("127.0.0.1", self.port, timeout=PATIENCE)


# ---------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize(("name", "form"), CALLS_AND_FORMATS)
def test_server_that_hangs_up_at_any_byte_of_a_reply_ends_the_call(name, form):
    reply = reply_of(name, form)
    scripts = [script(answer(first(count, reply)), **FORMATS[form]) for count in range(whole_reply(reply, form))]
    listening = Listening(scripts, tcp=False)
    with listening.server:
        for count in range(len(scripts)):
            client = listening.client()
            must_fail(client, CALLS[name].make)
            assert client.phase is (Phase.DEAD if count else Phase.CLOSED), count


@pytest.mark.parametrize(("name", "form"), CALLS_AND_FORMATS)
def test_server_that_resets_at_any_byte_of_a_reply_ends_the_call(name, form):
    reply = reply_of(name, form)
    scripts = [script(answer(first(count, reply)), reset, **FORMATS[form]) for count in range(whole_reply(reply, form))]
    listening = Listening(scripts, tcp=True)
    with listening.server:
        for count in range(len(scripts)):
            client = listening.client()
            must_fail(client, CALLS[name].make)
            assert client.phase is Phase.DEAD, count


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_server_that_died_before_the_request_ends_the_call(name, tcp):
    connected = threading.Event()
    listening = Listening([script(wait_for(connected), reset if tcp else hang_up)], tcp=tcp)
    with listening.server:
        client = listening.client()
        connected.set()
    must_fail(client, CALLS[name].make)


@pytest.mark.parametrize("name", CALLS)
def test_server_that_dies_after_an_error_chunk_is_no_success(name):
    with talk(answer(error(5, "disk on fire", done=False))) as (client, _):
        assert must_fail(client, CALLS[name].make, CommandError).errno == errno.EIO


def test_server_that_dies_in_a_large_payload_ends_the_read():
    with talk(answer(first(300_000, data(bytes(600_000)))), size=DISK) as (client, _):
        buffer = bytearray(600_000)
        exc = must_fail(client, lambda c, **o: c.pread_into(buffer, 0, **o))
        assert "in the middle of a reply" in str(exc)


def test_server_that_dies_while_it_should_receive_ends_the_write():
    def dies(connection: Connection) -> None:
        connection.receive(wire.REQUEST.size + 1000)

    with talk(dies, size=64 << 20) as (client, _):
        must_fail(client, lambda c, **o: c.pwrite(bytes(16 << 20), 0, **o))


@pytest.mark.parametrize(
    "make",
    [
        lambda c, **o: c.pread(DISK, 0, **o),
        lambda c, **o: c.pwrite(bytes(DISK), 0, **o),
        lambda c, **o: c.zero(DISK, 0, **o),
        lambda c, **o: c.cache(DISK, 0, **o),
    ],
    ids=["pread", "pwrite", "zero", "cache"],
)
def test_server_that_dies_between_the_pieces_of_a_split_call_ends_it(make):
    def one_piece(request: Request) -> bytes:
        return (chunk(Chunk.NONE) if request.kind else data(bytes(request.count)))(request)

    with talk(answer(one_piece), answer(one_piece), block_size=(1, 4096, 1 << 16)) as (client, connection):
        must_fail(client, make)
        assert [request.count for request in connection.requests] == [1 << 16] * 2


def test_server_that_dies_between_the_replies_of_a_walk_ends_it():
    with talk(answer(CALLS["extents"].chunks)) as (client, _):
        must_fail(client, lambda c, **o: list(c.extents(**o)))


def test_server_that_talks_nonsense_kills_the_connection():
    with talk(answer(b"nonsense" * 4)) as (client, _):
        must_fail(client, CALLS["pread"].make, ProtocolViolation)
        assert client.phase is Phase.DEAD


def test_server_that_answers_with_extended_headers_unasked_kills_the_connection():
    reply = wire.EXTENDED_REPLY.pack(EXTENDED_REPLY_MAGIC, 1, 0, 1, 0, 0)
    with talk(answer(reply)) as (client, _):
        must_fail(client, CALLS["flush"].make, ProtocolViolation)


# ---------------------------------------------------------------------------------------------- the handshake


def one_way(said: bytes, *steps: Step) -> list[Step]:
    """Return a script that says it all at once, since what the client says changes nothing."""
    return [said, *steps]


@pytest.mark.parametrize("style", HANDSHAKES)
def test_the_handshake_as_a_whole_works(style):
    with ScriptedServer(one_way(HANDSHAKES[style], drain), patience=PATIENCE) as server:
        client = Client(server.stream(), timeout=PATIENCE)
        assert client.size == DISK
        client.close()


@pytest.mark.parametrize("style", HANDSHAKES)
def test_server_that_hangs_up_at_any_byte_of_the_handshake_kills_the_connection(style):
    whole = HANDSHAKES[style]
    with ScriptedServer(*(one_way(whole[:count], half_close, drain) for count in range(len(whole))), patience=PATIENCE) as server:
        for count in range(len(whole)):
            client = Client()
            with pytest.raises(Disconnected, match="the server closed the connection during the handshake"):
                client.connect_stream(server.stream(), timeout=PATIENCE)
            assert client.phase is Phase.DEAD, count


@pytest.mark.parametrize("style", HANDSHAKES)
def test_server_that_resets_at_any_byte_of_the_handshake_kills_the_connection(style):
    whole = HANDSHAKES[style]
    with ScriptedServer(*(one_way(whole[:count], reset) for count in range(len(whole))), patience=PATIENCE) as server:
        port = server.listen_tcp()
        for count in range(len(whole)):
            client = Client()
            # The reset may overtake the end of connecting itself.
            with pytest.raises((Disconnected, TransportError)):
                client.connect_tcp("127.0.0.1", port, timeout=PATIENCE)
            assert client.phase is Phase.DEAD, count


@pytest.mark.parametrize("name", OPTION_CALLS)
def test_server_that_hangs_up_at_any_byte_of_an_option_reply_kills_the_connection(name):
    make, reply = OPTION_CALLS[name]
    scripts = [[ready_for_options, lambda c, n=n: (c.receive_option(), c.send(reply[:n]))] for n in range(len(reply))]
    with ScriptedServer(*scripts, patience=PATIENCE) as server:
        for count in range(len(reply)):
            client = Client(server.stream(), timeout=PATIENCE, start_tls=lambda stream: stream, **OPTION_MODE)
            with pytest.raises(Disconnected, match="the server closed the connection during the handshake"):
                make(client, timeout=PATIENCE)
            assert client.phase is Phase.DEAD, count


@pytest.mark.parametrize("name", OPTION_CALLS)
def test_option_replies_as_a_whole_work(name):
    make, reply = OPTION_CALLS[name]
    steps = [ready_for_options, lambda c: (c.receive_option(), c.send(reply)), drain]
    with ScriptedServer(steps, patience=PATIENCE) as server:
        client = Client(server.stream(), timeout=PATIENCE, start_tls=lambda stream: stream, **OPTION_MODE)
        make(client, timeout=PATIENCE)
        assert client.phase is (Phase.CONNECTED if name == "opt_go" else Phase.NEGOTIATING)
        client.close()


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(nbdcore.TransportError, match="nothing listens there"):
        nbdcore.connect_tcp("127.0.0.1", port, timeout=PATIENCE)


def test_a_server_that_is_no_nbd_server_is_told_apart():
    with (
        ScriptedServer([b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", drain], patience=PATIENCE) as server,
        pytest.raises(ProtocolViolation, match="this is no NBD server"),
    ):
        Client(server.stream(), timeout=PATIENCE)


def test_contexts_that_the_server_has_are_selected():
    with talk(contexts=CONTEXTS) as (client, _):
        assert client.contexts == ("base:allocation",)

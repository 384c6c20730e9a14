"""A client that sends anything at all harms nobody but itself."""

from __future__ import annotations

import contextlib
import ssl
import struct
import threading
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdcore.protocol import constants, wire
from nbdcore.server import MemoryDisk, Server, ServerTLS
from tests.server.conftest import connect, server_threads
from tests.server.raw import PATIENCE, RawClient

SIZE = 1 << 20

u16 = st.integers(0, 2**16 - 1)
u32 = st.one_of(st.integers(0, 64), st.integers(0, 2**32 - 1))
u64 = st.one_of(st.integers(0, SIZE), st.integers(0, 2**64 - 1))
some_bytes = st.binary(max_size=100)

options = st.builds(
    lambda option, data, lie: struct.pack(">QII", constants.OPTION_MAGIC, option, lie if lie is not None else len(data)) + data,
    st.one_of(st.integers(0, 12), u32),
    st.one_of(
        some_bytes,
        st.builds(wire.pack_info_request, st.sampled_from(["", "x"]), st.lists(u16, max_size=4)),
        st.builds(
            wire.pack_meta_context_request, st.just(""), st.lists(st.sampled_from(["base:", "base:allocation"]), max_size=3)
        ),
    ),
    st.one_of(st.none(), st.none(), u32),
)
requests = st.builds(
    lambda layout, flags, command, cookie, offset, length, data: (
        layout[0].pack(layout[1], flags, command, cookie, offset, length % (1 << 32)) + data
    ),
    st.sampled_from(
        [(wire.REQUEST, constants.REQUEST_MAGIC), (wire.EXTENDED_REQUEST, constants.EXTENDED_REQUEST_MAGIC)],
    ),
    st.one_of(st.integers(0, 63), u16),
    st.one_of(st.integers(0, 8), u16),
    u64,
    u64,
    u64,
    some_bytes,
)
ANYTHING = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def server():
    with Server(MemoryDisk(SIZE), handshake_timeout=PATIENCE) as server:
        yield server
    assert server_threads() == []


@pytest.fixture(scope="module")
def honest(server):
    """A client that was there before, and stays."""
    client = connect(server)
    client.greet()
    client.agree()
    client.go()
    yield client
    client.close()


def say(server: Server, honest: RawClient, said: bytes) -> None:
    """Say something and hang up: nothing is left of that client, and the honest one is still served."""
    client = connect(server)
    listener = threading.Thread(target=swallow, args=(client,))
    listener.start()
    with contextlib.suppress(ConnectionError):
        client.send(said)
        client.sock.shutdown(1)
    listener.join(PATIENCE)
    assert not listener.is_alive()
    client.close()
    is_gone(server, others=1)
    honest.write(0, b"still here")
    assert honest.read(0, 10).contents() == b"still here"


def is_gone(server: Server, others: int = 0) -> None:
    """Wait until nothing is left of a client."""
    end = time.monotonic() + PATIENCE
    while len(server._clients) > others:
        assert time.monotonic() < end, "the client's thread is still there"
        time.sleep(0.001)


def swallow(client: RawClient) -> None:
    with contextlib.suppress(OSError):
        while client.sock.recv(1 << 20):
            pass


@ANYTHING
@given(said=some_bytes)
def test_any_bytes_instead_of_a_handshake(server, honest, said):
    say(server, honest, said)


@ANYTHING
@given(flags=st.sampled_from([0, 1, 2, 3]), said=st.lists(options, max_size=6))
def test_any_options(server, honest, flags, said):
    say(server, honest, wire.CLIENT_FLAGS.pack(flags) + b"".join(said))


@ANYTHING
@given(
    agreed=st.lists(st.sampled_from([constants.Option.STRUCTURED_REPLY, constants.Option.EXTENDED_HEADERS]), max_size=2),
    status=st.booleans(),
    said=st.lists(st.one_of(requests, requests, some_bytes), max_size=8),
)
def test_any_requests(server, honest, agreed, status, said):
    hello = wire.CLIENT_FLAGS.pack(3) + b"".join(wire.pack_option(option) for option in agreed)
    if status:
        hello += wire.pack_option(
            constants.Option.SET_META_CONTEXT, wire.pack_meta_context_request("", [constants.BASE_ALLOCATION])
        )
    hello += wire.pack_option(constants.Option.GO, wire.pack_info_request("", []))
    say(server, honest, hello + b"".join(said))


@pytest.fixture(scope="module")
def encrypting(pki):
    with Server(MemoryDisk(SIZE), tls=ServerTLS(certificates=pki), require_tls=False, handshake_timeout=PATIENCE) as server:
        yield server


@pytest.fixture(scope="module")
def trusting(pki):
    """What an honest client does TLS with."""
    return ssl.create_default_context(cafile=pki / "ca-cert.pem")


def say_within_tls(server: Server, context: ssl.SSLContext, before: bytes, within: bytes) -> None:
    """Say something before TLS, which may prevent it, and something within; nothing is left of that client."""
    client = connect(server)
    with contextlib.suppress(OSError, AssertionError):
        client.send(wire.CLIENT_FLAGS.pack(3) + before + wire.pack_option(constants.Option.STARTTLS))
        client.unpack(wire.GREETING)
        client.unpack(wire.HANDSHAKE_FLAGS)
        about = kind = 0
        while (about, kind) != (constants.Option.STARTTLS, constants.OptionReply.ACK):
            _, about, kind, length = client.unpack(wire.OPTION_REPLY)
            client.exactly(length)
        client.wrap(context)
        client.send(within)
        client.sock.unwrap()
    client.close()
    is_gone(server)


@ANYTHING
@given(said=st.one_of(some_bytes, st.builds(lambda data: b"\x16\x03\x01" + data, some_bytes)))
def test_any_bytes_instead_of_tls(encrypting, said):
    client = connect(encrypting)
    client.greet()
    assert client.option(constants.Option.STARTTLS) == [(constants.OptionReply.ACK, b"")]
    with contextlib.suppress(OSError):
        client.send(said)
    client.close()
    is_gone(encrypting)


# Those that are answered, and do not end the negotiation, so that TLS follows; with data that need not make sense.
answered = st.builds(wire.pack_option, st.one_of(st.integers(2, 12), u32).filter(lambda option: option not in (1, 7)), some_bytes)


@ANYTHING
@given(before=st.lists(answered, max_size=3), within=st.one_of(some_bytes, st.lists(options, max_size=3).map(b"".join)))
def test_any_options_before_tls_and_within(encrypting, trusting, before, within):
    say_within_tls(encrypting, trusting, b"".join(before), within)


@ANYTHING
@given(said=st.lists(st.one_of(requests, requests, some_bytes), max_size=5))
def test_any_requests_within_tls(encrypting, trusting, said):
    chosen = wire.pack_option(constants.Option.GO, wire.pack_info_request("", []))
    say_within_tls(encrypting, trusting, b"", chosen + b"".join(said))


def test_memory_per_client_is_bounded_whatever_it_declares(serve, client_of):
    """Ten clients announce the largest payloads and options there are, and send a little of them."""
    server = serve(MemoryDisk(1 << 40))
    tracemalloc.start()
    try:
        for number in range(10):
            client = client_of(server)
            client.greet()
            if number % 2:
                client.send(struct.pack(">QII", constants.OPTION_MAGIC, number, 0xFFFFFFFF) + bytes(1000))
            else:
                client.agree(extended=True)
                client.go()
                flags = int(constants.CommandFlag.PAYLOAD_LEN)
                client.send(client.pack(1 + number % 7, 0, 2**64 - 1, flags) + bytes(1000))
        time.sleep(0.2)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()

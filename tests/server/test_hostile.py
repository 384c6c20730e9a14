"""A client that sends anything at all harms nobody but itself."""

from __future__ import annotations

import contextlib
import struct
import threading
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdcore.protocol import constants, wire
from nbdcore.server import MemoryDisk, Server
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
    end = time.monotonic() + PATIENCE
    while len(server._clients) > 1:
        assert time.monotonic() < end, "the client's thread is still there"
        time.sleep(0.001)
    honest.write(0, b"still here")
    assert honest.read(0, 10).contents() == b"still here"


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

"""Connections at rest hold no memory for what they receive, and lose nothing of what has come in part."""

from __future__ import annotations

import gc
import tracemalloc

import pytest

from nbdcore.protocol.engine import Engine
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission import commands
from nbdcore.protocol.transmission.buffer import SCRATCH
from nbdcore.protocol.transmission.decoder import LARGE
from tests.protocol.harness import MODES, connected, data_chunk, feed, newborn, success

all_modes = pytest.mark.parametrize("mode", MODES)


def read(client, count, offset=0):
    command = commands.read(client.engine.limits, count, offset)
    client.submit(command)
    return command


def two_reads(mode, count):
    client = connected(mode)
    first, second = read(client, count), read(client, count, count)
    return client, success(mode, second, b"b" * count) + success(mode, first, b"a" * count)


@all_modes
@pytest.mark.parametrize("count", [8, 200])
def test_a_rest_at_any_byte_loses_nothing(mode, count):
    _, script = two_reads(mode, count)
    for at in range(len(script) + 1):
        client, _ = two_reads(mode, count)
        feed(client.engine, script[:at])
        client.engine.release_buffer()
        feed(client.engine, script[at:])
        assert [command.result() for command in client.commands] == [b"a" * count, b"b" * count], at


@all_modes
def test_a_rest_after_each_byte_of_a_large_payload_loses_nothing(mode):
    client = connected(mode)
    contents = bytes(range(256)) * (LARGE // 256)
    command, small = read(client, LARGE), read(client, 8)
    script = success(mode, command, contents) + success(mode, small, b"12345678")
    for at in range(len(script)):
        feed(client.engine, script[at : at + 1])
        client.engine.release_buffer()
    assert (command.result(), small.result()) == (contents, b"12345678")


def test_connections_that_take_turns_share_no_bytes():
    """Each is left with part of a reply while the other one rests."""
    for cut in range(1, 60):
        one, other = connected(), connected()
        first, second = read(one, 32), read(other, 32)
        script = data_chunk("structured", first, 0, b"1" * 32, done=True)
        feed(one.engine, script[:cut])
        one.engine.release_buffer()
        feed(other.engine, success("structured", second, b"2" * 32))
        other.engine.release_buffer()
        feed(one.engine, script[cut:])
        assert (first.result(), second.result()) == (b"1" * 32, b"2" * 32), cut


def test_two_rooms_at_a_time_are_two_places():
    one, other = connected(), connected()
    for client in (one, other):
        client.engine.release_buffer()
    room, another = one.engine.room(), other.engine.room()
    room[:4] = b"mine"
    another[:4] = b"not!"
    assert bytes(room[:4]) == b"mine"


def test_a_hundred_connections_at_rest_hold_less_than_one_scratch_buffer_each():
    gc.collect()
    tracemalloc.start()
    try:
        clients = [connected() for _ in range(100)]
        for client in clients:
            command = read(client, 8)
            client.hear(success("structured", command, b"12345678"))
            client.engine.release_buffer()
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < len(clients) * SCRATCH / 2


def test_a_rest_is_allowed_in_any_phase():
    client = newborn()
    for engine in (Engine(client.engine.settings), client.engine):
        engine.release_buffer()
    client.engine.end()
    client.engine.release_buffer()
    assert client.engine.phase is Phase.CLOSED

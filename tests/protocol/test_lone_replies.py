"""A reply that comes alone, as for a caller that asks one thing at a time, is decoded as quickly as among others."""

from __future__ import annotations

import sys

import pytest

from nbdcore.protocol.constants import Chunk
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission import commands
from nbdcore.protocol.transmission.buffer import SCRATCH
from tests.protocol.harness import MODES, chunk, connected, data_chunk, feed, none, simple, success

COUNT = 512
CHUNKED = ["structured", "extended"]


def ask(client, build, *arguments):
    command = build(client.engine.limits, *arguments)
    client.submit(command)
    return command


def calls_for(client, reply):
    """Return which functions of Python are called to take a reply in."""
    room = client.engine.room()
    room[: len(reply)] = reply
    called = []
    previous = sys.getprofile()
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None)
    try:
        client.engine.received(len(reply))
    finally:
        sys.setprofile(previous)
    return called


@pytest.mark.parametrize("mode", MODES)
def test_lone_acknowledgement_takes_no_more_calls_than_a_lone_read(mode):
    client = connected(mode)
    read = ask(client, commands.read, COUNT, 0)
    for_read = calls_for(client, success(mode, read, bytes(COUNT)))
    write = ask(client, commands.write, bytes(COUNT), 0)
    for_write = calls_for(client, none(mode, write) if mode != "simple" else simple(write))
    assert read.done
    assert write.done
    assert for_write == for_read


def test_simple_acknowledgement_under_structured_replies_takes_no_more_calls():
    mode = "structured"
    client = connected(mode)
    read = ask(client, commands.read, COUNT, 0)
    for_read = calls_for(client, success(mode, read, bytes(COUNT)))
    write = ask(client, commands.write, bytes(COUNT), 0)
    assert calls_for(client, simple(write)) == for_read


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("before", [0, 0xFF])
def test_bytes_of_an_earlier_receive_are_no_part_of_an_acknowledgement(mode, before):
    client = connected(mode)
    read = ask(client, commands.read, COUNT, 0)
    client.hear(success(mode, read, bytes([before]) * COUNT))
    for kind in (commands.trim, commands.zero, commands.cache):
        command = ask(client, kind, COUNT, COUNT)
        client.hear(none(mode, command))
        assert command.done
        assert command.error is None


@pytest.mark.parametrize("mode", CHUNKED)
def test_acknowledgement_may_end_with_the_scratch_buffer(mode):
    client = connected(mode)
    size = len(none(mode, 1))
    counts = [COUNT] * 400
    reads = [ask(client, commands.read, count, 0) for count in counts]
    header = len(data_chunk(mode, reads[0], 0, b""))
    filler = SCRATCH - size - len(counts) * (header + COUNT)
    last = ask(client, commands.read, filler - header, 0)
    write = ask(client, commands.flush)
    replies = [success(mode, read, bytes(read.count)) for read in (*reads, last)]
    everything = b"".join(replies) + none(mode, write)
    assert len(everything) == SCRATCH == len(client.engine.room())
    feed(client.engine, everything)
    assert write.done
    assert write.error is None
    assert all(command.done and command.error is None for command in client.commands)


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("length", [0, 1, 7])
def test_data_chunk_too_short_for_its_offset_fails_the_read_though_older_bytes_would_fit(mode, length):
    """What lies behind it in memory is the offset of the read: it must not be taken for this chunk's."""
    client = connected(mode)
    earlier = ask(client, commands.read, COUNT, 0)
    client.hear(success(mode, earlier, bytes(COUNT)))
    command = ask(client, commands.read, COUNT, 0)
    client.hear(chunk(mode, command, Chunk.OFFSET_DATA, bytes(length), done=True))
    assert command.done
    assert "chunk of type 1" in str(command.error)
    assert client.engine.phase is Phase.CONNECTED


@pytest.mark.parametrize("mode", CHUNKED)
def test_acknowledgement_for_nobody_is_skipped_and_a_read_that_gets_one_fails(mode):
    client = connected(mode)
    command = ask(client, commands.read, COUNT, 0)
    client.hear(none(mode, 0x7777), none(mode, command))
    assert command.done
    assert command.error is not None
    assert client.engine.phase is Phase.CONNECTED

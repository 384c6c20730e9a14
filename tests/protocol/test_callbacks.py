"""Callbacks in the middle of an answer: each piece of a read and of block status as it comes, and callbacks that go wrong."""

from __future__ import annotations

import errno

import pytest

from nbdcore.errors import CommandError, Disconnected
from nbdcore.protocol.constants import Chunk
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission import commands
from tests.protocol.harness import (
    MODES,
    connected,
    data_chunk,
    error_chunk,
    error_offset_chunk,
    everywhere,
    feed,
    hole_chunk,
    none,
    status_chunk,
    success,
)

CHUNKED = ("structured", "extended")
CONTEXTS = ((1, b"base:allocation"), (2, b"x:y"))
OFFSET, COUNT = 1000, 60


class Mistake(Exception):
    """What a callback of ours raises."""


def listening(mode, *, target=False):
    """A read, and what its callback was told: kind, offset, data in place by then, error."""
    client = connected(mode)
    memory = memoryview(bytearray(COUNT)) if target else None
    command = commands.read(client.engine.limits, COUNT, OFFSET, target=memory)
    client.told = told = []

    def on_chunk(command, kind, offset, length, number):
        begin = offset - command.offset
        told.append((kind, offset, bytes(command.allocate()[begin : begin + length]), number))

    command.on_chunk = on_chunk
    client.submit(command)
    return client, command


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", [False, True])
def test_read_in_one_piece_is_told_as_one(mode, target):
    def build():
        client, command = listening(mode, target=target)
        return client, success(mode, command, b"a" * COUNT)

    client = everywhere(build)
    assert client.told == [(Chunk.OFFSET_DATA, OFFSET, b"a" * COUNT, 0)]
    assert client.commands[0].result() == b"a" * COUNT


@pytest.mark.parametrize("mode", CHUNKED)
def test_pieces_of_a_read_are_told_as_they_come(mode):
    def build():
        client, command = listening(mode)
        script = (
            data_chunk(mode, command, OFFSET + 50, b"b" * 10)
            + hole_chunk(mode, command, OFFSET, 40)
            + data_chunk(mode, command, OFFSET + 40, b"c" * 10, done=True)
        )
        return client, script

    client = everywhere(build)
    assert client.told == [
        (Chunk.OFFSET_DATA, OFFSET + 50, b"b" * 10, 0),
        (Chunk.OFFSET_HOLE, OFFSET, bytes(40), 0),
        (Chunk.OFFSET_DATA, OFFSET + 40, b"c" * 10, 0),
    ]


@pytest.mark.parametrize("mode", CHUNKED)
def test_read_that_is_all_hole_is_told_with_zeroes_in_place(mode):
    client, command = listening(mode)
    client.hear(hole_chunk(mode, command, OFFSET, COUNT, done=True))

    assert client.told == [(Chunk.OFFSET_HOLE, OFFSET, bytes(COUNT), 0)]


@pytest.mark.parametrize("mode", CHUNKED)
def test_errors_with_an_offset_within_the_read_are_told_each_with_its_own_number(mode):
    def build():
        client, command = listening(mode)
        script = (
            error_offset_chunk(mode, command, 5, OFFSET + 3)
            + error_offset_chunk(mode, command, 28, OFFSET + COUNT)
            + error_offset_chunk(mode, command, 1, OFFSET + 4)
            + error_chunk(mode, command, 12)
            + data_chunk(mode, command, OFFSET, b"z" * 8)
            + none(mode, command)
        )
        return client, script

    client = everywhere(build)
    assert client.told == [
        (Chunk.ERROR_OFFSET, OFFSET + 3, b"", errno.EIO),
        (Chunk.ERROR_OFFSET, OFFSET + 4, b"", errno.EPERM),
        (Chunk.OFFSET_DATA, OFFSET, b"z" * 8, 0),
    ]
    error = client.commands[0].error
    assert (error.errno, error.offset) == (errno.EIO, OFFSET + 3)


@pytest.mark.parametrize("mode", CHUNKED)
def test_parts_of_block_status_are_told_in_place_of_being_kept(mode):
    def build():
        client = connected(mode, contexts=CONTEXTS)
        command = commands.block_status(client.engine.limits, 4096, 0)
        client.told = told = []
        command.on_extents = lambda _, context, lengths, flags: told.append((context, list(lengths), list(flags)))
        client.submit(command)
        script = (
            status_chunk(mode, command, 2, [(512, 7)])
            + status_chunk(mode, command, 9, [(1, 1)])
            + status_chunk(mode, command, 1, [(1024, 0), (512, 3), (0, 0)], done=True)
        )
        return client, script

    client = everywhere(build)
    assert client.told == [("x:y", [512], [7]), ("base:allocation", [1024, 512], [0, 3])]
    assert client.commands[0].chunks == []
    assert client.commands[0].error is None


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "simple"])
def test_parts_of_block_status_that_pass_the_end_together_are_an_error(mode):
    def build():
        client = connected(mode, contexts=CONTEXTS)
        command = commands.block_status(client.engine.limits, 4096, 0)
        client.told = told = []
        command.on_extents = lambda _, context, lengths, flags: told.append((context, list(lengths), list(flags)))
        client.submit(command)
        whole = client.engine.limits.size
        script = status_chunk(mode, command, 1, [(whole - 512, 0)]) + status_chunk(mode, command, 1, [(1024, 3)], done=True)
        return client, script

    client = everywhere(build)
    whole = client.engine.limits.size
    assert client.told == [("base:allocation", [whole - 512], [0]), ("base:allocation", [512], [3])]
    assert client.commands[0].error.errno == errno.EPROTO


@pytest.mark.parametrize("mode", MODES)
def test_callback_may_submit(mode):
    client, command = listening(mode)
    follower = commands.flush(client.engine.limits)
    command.on_chunk = lambda *_: client.queue(follower)
    client.hear(success(mode, command, b"a" * COUNT))
    client.hear(success(mode, follower))

    assert client.completed_once(follower)


# ---------------------------------------------------------------------------------------------- going wrong


def fail_loudly(*_):
    raise Mistake


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("last", ["data", "hole", "error", "none"])
def test_callback_that_raises_is_heard_of_and_loses_nothing(mode, last):
    client, command = listening(mode)
    command.on_chunk = fail_loudly
    after = commands.flush(client.engine.limits)
    client.submit(after)
    pieces = {
        "data": data_chunk(mode, command, OFFSET, b"a" * COUNT, done=True),
        "hole": hole_chunk(mode, command, OFFSET, COUNT, done=True),
        "error": error_offset_chunk(mode, command, 5, OFFSET, done=True),
        "none": data_chunk(mode, command, OFFSET, b"a" * COUNT) + none(mode, command),
    }

    with pytest.raises(Mistake):
        feed(client.engine, pieces[last] + success(mode, after))

    assert client.completed_once(command)
    assert client.completed_once(after)
    assert client.engine.phase is Phase.CONNECTED
    assert client.engine.pending == 0


@pytest.mark.parametrize("mode", CHUNKED)
def test_callback_of_block_status_that_raises_loses_nothing_and_a_broken_reply_after_it_is_fatal_still(mode):
    client = connected(mode, contexts=CONTEXTS)
    command = commands.block_status(client.engine.limits, 4096, 0)
    command.on_extents = fail_loudly
    client.submit(command)

    with pytest.raises(Mistake):
        feed(client.engine, status_chunk(mode, command, 1, [(512, 0)], done=True) + b"\xff" * 64)

    assert client.completed_once(command)
    assert client.engine.phase is Phase.DEAD


@pytest.mark.parametrize("mode", CHUNKED)
def test_command_given_up_is_told_nothing_any_more(mode):
    client, command = listening(mode)
    script = data_chunk(mode, command, OFFSET, b"a" * COUNT)
    client.hear(script[:50])
    client.engine.abandon(command, CommandError(0, "enough"))
    client.hear(
        script[50:],
        data_chunk(mode, command, OFFSET, b"a" * 10),
        hole_chunk(mode, command, OFFSET, 10),
        error_offset_chunk(mode, command, 5, OFFSET),
        none(mode, command),
    )

    assert client.told == []
    assert command.error.offset is None
    assert client.engine.in_flight == {}

    client = connected(mode, contexts=CONTEXTS)
    command = commands.block_status(client.engine.limits, 4096, 0)
    command.on_extents = fail_loudly
    client.submit(command)
    client.engine.abandon(command, Disconnected(0, "enough"))
    client.hear(status_chunk(mode, command, 1, [(512, 0)], done=True))
    assert client.engine.phase is Phase.CONNECTED

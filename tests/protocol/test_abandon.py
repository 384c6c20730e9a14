"""Commands given up: nothing that is not yet sent is sent, nothing of the caller's memory is touched, the connection lives."""

from __future__ import annotations

import errno
import gc
import weakref

import pytest

from nbdcore.errors import DeadlineExceeded, Disconnected
from nbdcore.protocol.constants import Chunk
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission import commands
from nbdcore.protocol.transmission.decoder import LARGE
from tests.protocol.harness import (
    MODES,
    SIZE,
    chunk,
    connected,
    data_chunk,
    error_chunk,
    feed,
    hole_chunk,
    none,
    simple,
    status_chunk,
    success,
)

GIVEN_UP = DeadlineExceeded(errno.ETIMEDOUT, "no answer in time")
UNTOUCHED = 0xEE
all_modes = pytest.mark.parametrize("mode", MODES)
chunked = pytest.mark.parametrize("mode", ["structured", "extended"])


def check_given_up(client, command):
    assert client.completed_once(command)
    assert command.data is None
    assert command.error is GIVEN_UP
    assert command.target is None
    assert command.payload is None


def check_lives(client, mode):
    after = commands.read(client.engine.limits, 8, 8)
    client.submit(after).hear(success(mode, after, b"b" * 8))
    assert after.result() == b"b" * 8
    assert client.engine.in_flight == {}


@all_modes
def test_command_given_up_before_it_is_packed_is_never_sent(mode):
    client = connected(mode)
    first, second, third = (client.queue(commands.read(client.engine.limits, 16, offset)) for offset in (0, 16, 32))

    client.engine.abandon(second, GIVEN_UP)
    sent = client.speak()

    check_given_up(client, second)
    assert len(sent) == 2 * (32 if mode == "extended" else 28)
    assert list(client.engine.in_flight) == [first.cookie, third.cookie]


@all_modes
def test_command_given_up_in_flight_has_its_answer_thrown_away(mode):
    for count in (16, LARGE):
        memory = bytearray([UNTOUCHED]) * count
        client = connected(mode)
        command = commands.read(client.engine.limits, count, 0, target=memoryview(memory))
        client.submit(command)

        client.engine.abandon(command, GIVEN_UP)
        client.hear(success(mode, command, b"a" * count))

        check_given_up(client, command)
        assert set(memory) == {UNTOUCHED}
        memory.extend(b"free to grow")
        check_lives(client, mode)


@all_modes
@pytest.mark.parametrize("count", [64, LARGE])
def test_memory_of_a_read_given_up_while_its_data_arrive_is_not_touched_after_that(mode, count):
    script_length = len(success(mode, connected_read(mode, count)[1], b"a" * count))
    for cut in [*range(1, min(100, script_length)), script_length // 2, script_length - 1]:
        client, command, memory = connected_read(mode, count)
        script = success(mode, command, b"a" * count)
        client.hear(script[:cut])
        written = bytes(memory)

        client.engine.abandon(command, GIVEN_UP)
        memory += b"free to grow"
        client.hear(script[cut:])

        check_given_up(client, command)
        assert memory == written + b"free to grow"
        check_lives(client, mode)


def connected_read(mode, count):
    client = connected(mode)
    memory = bytearray([UNTOUCHED]) * count
    command = commands.read(client.engine.limits, count, 0, target=memoryview(memory))
    client.submit(command)
    return client, command, memory


@chunked
def test_every_kind_of_chunk_for_a_read_given_up_is_skipped(mode):
    client, command, memory = connected_read(mode, 64)
    client.engine.abandon(command, GIVEN_UP)

    client.hear(
        data_chunk(mode, command, 0, b"a" * 8),
        hole_chunk(mode, command, 8, 8),
        hole_chunk(mode, command, 0, 64),
        error_chunk(mode, command, 5, b"late"),
        chunk(mode, command, 77, b"?"),
        none(mode, command),
    )

    check_given_up(client, command)
    assert set(memory) == {UNTOUCHED}
    check_lives(client, mode)


@chunked
@pytest.mark.parametrize("kind", ["status", "error"])
def test_control_chunk_of_a_command_given_up_in_the_middle_of_it_is_skipped(mode, kind):
    def begin():
        client = connected(mode, contexts=((1, b"base:allocation"),))
        command = commands.block_status(client.engine.limits, SIZE, 0)
        client.submit(command)
        if kind == "status":
            return client, command, status_chunk(mode, command, 1, [(512, 1)] * 8, done=True)
        return client, command, error_chunk(mode, command, 5, b"some text", done=True)

    for cut in range(1, len(begin()[2])):
        client, command, script = begin()
        client.hear(script[:cut])
        client.engine.abandon(command, GIVEN_UP)
        client.hear(script[cut:])

        check_given_up(client, command)
        assert command.chunks == []
        check_lives(client, mode)


@all_modes
def test_answer_outside_a_read_given_up_is_fatal_still(mode):
    if mode == "simple":
        return
    client, command, _ = connected_read(mode, 64)
    client.engine.abandon(command, GIVEN_UP)
    client.hear(data_chunk(mode, command, 60, b"a" * 8, done=True))

    assert client.engine.phase is Phase.DEAD
    check_given_up(client, command)


# ---------------------------------------------------------------------------------------------- writes


def writing(length=100_000, mode="structured"):
    """Three writes of which no payload is copied, the second with the largest, and what they are on the wire."""
    client = connected(mode)
    limits = client.engine.limits
    memories = [bytearray(b"1" * 20_000), bytearray(b"2" * length), bytearray(b"3" * 20_000)]
    writes = [client.queue(commands.write(limits, memoryview(memory), 0)) for memory in memories]
    return client, writes, memories


def whole_script():
    return writing()[0].speak()


@pytest.mark.parametrize("sent", [0, 10, 28, 20_027, 20_028, 20_040, 20_056, 20_057, 32_000, 120_055, 120_056, 120_070, 140_084])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_write_given_up_while_it_is_sent_goes_out_whole_from_memory_of_our_own(sent, which):
    expected = whole_script()
    client, writes, memories = writing()
    first = b"".join(client.engine.outgoing())[:sent]
    client.engine.sent(sent // 2)
    client.engine.sent(sent - sent // 2)

    client.engine.abandon(writes[which], GIVEN_UP)
    memories[which][:] = b"!" * len(memories[which])
    memories[which].clear()  # would raise BufferError if anybody still looked at it

    check_given_up(client, writes[which])
    assert first + client.speak() == expected
    for write in writes:
        client.hear(none("structured", write))
    check_lives(client, "structured")


def test_write_given_up_leaves_the_other_payloads_where_they_are():
    client, writes, memories = writing()
    client.engine.outgoing()
    client.engine.abandon(writes[1], GIVEN_UP)

    owners = [part.obj for part in client.engine.outgoing()]

    assert any(owner is memories[0] for owner in owners)
    assert any(owner is memories[2] for owner in owners)
    assert not any(owner is memories[1] for owner in owners)


@pytest.mark.parametrize("sent", [28, 20_056, 50_000, 120_055])
@pytest.mark.parametrize("error", [0, 1])
def test_write_answered_before_it_was_wholly_sent_lets_go_of_the_callers_memory(sent, error):
    expected = whole_script()
    client, writes, memories = writing()
    first = b"".join(client.engine.outgoing())[:sent]
    client.engine.sent(sent // 2)
    client.engine.sent(sent - sent // 2)

    feed(client.engine, simple(writes[1], error))
    assert client.completed_once(writes[1])
    memories[1][:] = b"!" * len(memories[1])
    memories[1].clear()

    assert first + client.speak() == expected


def test_payload_that_was_sent_is_let_go_when_the_write_is_done():
    client, writes, memories = writing()
    client.speak()
    client.hear(*(none("structured", write) for write in writes))

    assert all(write.payload is None for write in writes)
    for memory in memories:
        memory.clear()


def test_connection_that_ends_lets_go_of_all_memory():
    client, _, memories = writing()
    client.engine.outgoing()
    client.engine.sent(100)
    client.engine.fail(Disconnected(0, "gone"))

    for memory in memories:
        memory.clear()


def test_connection_that_ends_in_the_middle_of_a_large_read_lets_go_of_its_memory():
    client, command, memory = connected_read("structured", LARGE)
    client.hear(success("structured", command, b"a" * LARGE)[:1000])
    client.engine.fail(Disconnected(0, "gone"))
    command.target = None

    memory.clear()


# ---------------------------------------------------------------------------------------------- exactly once


@all_modes
@pytest.mark.parametrize("ending", ["answer", "fail", "again", "eof"])
def test_command_given_up_completes_once_whatever_follows(mode, ending):
    client, command, _ = connected_read(mode, 64)
    client.engine.abandon(command, GIVEN_UP)
    if ending == "answer":
        client.hear(success(mode, command, b"a" * 64))
    elif ending == "fail":
        client.engine.fail(Disconnected(0, "gone"))
    elif ending == "eof":
        client.engine.received_eof()
    client.engine.abandon(command, Disconnected(0, "again"))

    check_given_up(client, command)


def test_command_that_is_done_cannot_be_given_up():
    client, command, _ = connected_read("structured", 64)
    client.hear(success("structured", command, b"a" * 64))
    client.engine.abandon(command, GIVEN_UP)

    assert command.error is None
    assert command.result() == b"a" * 64
    assert client.completed_once(command)


def test_large_reads_given_up_do_not_confuse_where_answers_are_received():
    for mode in MODES:
        client, command, _ = connected_read(mode, LARGE)
        client.engine.abandon(command, GIVEN_UP)
        client.hear(success(mode, command, b"a" * LARGE))
        check_lives(client, mode)
        again, second, memory = connected_read(mode, LARGE)
        again.hear(success(mode, second, b"c" * LARGE))
        assert memory == b"c" * LARGE


def test_command_is_not_kept_alive_by_the_engine_once_its_answer_came():
    class Watched(commands.Command):
        """A command that can be watched."""

        __slots__ = ("__weakref__",)

    client = connected("structured")
    command = Watched(0, 0, 0, 16)
    client.engine.submit(command)
    client.speak()
    client.hear(success("structured", command, b"a" * 16))
    gone = weakref.ref(command)
    del command
    gc.collect()

    assert gone() is None


def test_kind_of_chunk_does_not_matter_for_an_answer_thrown_away():
    client, command, _ = connected_read("structured", 64)
    client.engine.abandon(command, GIVEN_UP)
    client.hear(chunk("structured", command, Chunk.OFFSET_DATA, b"short"), none("structured", command))

    check_lives(client, "structured")

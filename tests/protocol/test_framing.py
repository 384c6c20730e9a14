"""Where messages begin and end: strange cookies and magics, oversize, and servers that hang up in the middle."""

from __future__ import annotations

import errno
import struct

import pytest

from nbdcore.errors import Disconnected, ProtocolViolation
from nbdcore.protocol.constants import Chunk
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission import commands
from nbdcore.protocol.transmission.buffer import SCRATCH
from nbdcore.protocol.transmission.decoder import LARGE
from tests.protocol.harness import (
    MODES,
    chunk,
    connected,
    data_chunk,
    error_chunk,
    everywhere,
    feed,
    hole_chunk,
    none,
    simple,
    status_chunk,
    success,
)

CHUNKED = ("structured", "extended")
all_modes = pytest.mark.parametrize("mode", MODES)
chunked = pytest.mark.parametrize("mode", CHUNKED)


def with_read(mode, *, count=16, target=None):
    client = connected(mode)
    command = commands.read(client.engine.limits, count, 0, target=target)
    client.submit(command)
    return client, command


def check_lives(client, mode):
    """The read under way, and one more, get their data."""
    command = client.commands[0]
    client.hear(success(mode, command, b"a" * command.count))
    after = commands.read(client.engine.limits, 8, 8)
    client.submit(after).hear(success(mode, after, b"b" * 8))
    assert command.result() == b"a" * command.count
    assert after.result() == b"b" * 8


def check_dead(client):
    assert client.engine.phase is Phase.DEAD
    assert isinstance(client.engine.error, ProtocolViolation)
    for command in client.commands:
        assert client.completed_once(command)
        assert command.error is client.engine.error
    assert client.engine.pending == 0
    assert not len(client.engine.room())


# ---------------------------------------------------------------------------------------------- unknown cookies


@pytest.mark.parametrize("cookie", [0, 2, 99, (1 << 64) - 1])
def test_simple_success_that_nobody_waits_for_is_fatal_as_data_might_follow(cookie):
    check_dead(everywhere(lambda: (with_read("simple")[0], simple(cookie))))


@pytest.mark.parametrize("cookie", [0, 2, (1 << 64) - 1])
@pytest.mark.parametrize(("mode", "error"), [("simple", 5), ("structured", 5), ("structured", 0)])
def test_simple_reply_without_data_that_nobody_waits_for_is_ignored(mode, error, cookie):
    check_lives(everywhere(lambda: (with_read(mode)[0], simple(cookie, error))), mode)


@chunked
@pytest.mark.parametrize(
    "make",
    [
        none,
        lambda mode, cookie: data_chunk(mode, cookie, 0, b"\x67\x44\x66\x98" * 50, done=True),
        lambda mode, cookie: data_chunk(mode, cookie, 1 << 63, b"", done=True),
        lambda mode, cookie: chunk(mode, cookie, Chunk.OFFSET_DATA, b"123", done=True),
        lambda mode, cookie: hole_chunk(mode, cookie, 0, 0xFFFFFFFF),
        lambda mode, cookie: status_chunk(mode, cookie, 1, [(1, 1)] * 20),
        lambda mode, cookie: error_chunk(mode, cookie, 5, b"no such command"),
        lambda mode, cookie: chunk(mode, cookie, 77, bytes(200)),
    ],
    ids=["none", "data", "no data", "short data", "hole", "status", "error", "unknown"],
)
def test_chunk_that_nobody_waits_for_is_drained_in_full(mode, make):
    check_lives(everywhere(lambda: (with_read(mode)[0], make(mode, 7))), mode)


@chunked
def test_largest_chunk_that_nobody_waits_for_is_drained_through_the_scratch_buffer(mode):
    client, _ = with_read(mode, count=LARGE)
    client.hear(chunk(mode, 7, Chunk.OFFSET_DATA, length=(64 << 20) + 8))

    left = (64 << 20) + 8
    while left:
        room = client.engine.room()
        assert len(room) <= SCRATCH
        count = min(left, len(room))
        client.engine.received(count)
        left -= count

    check_lives(client, mode)


def test_answer_to_a_command_that_was_answered_before_is_one_that_nobody_waits_for():
    for mode in CHUNKED:
        client, command = with_read(mode)
        client.hear(success(mode, command, b"a" * 16))
        second = commands.read(client.engine.limits, 16, 0)
        client.submit(second).hear(success(mode, command, b"z" * 16), success(mode, second, b"b" * 16))

        assert command.result() == b"a" * 16
        assert second.result() == b"b" * 16
        assert client.completed_once(command)


def test_answer_to_a_command_that_was_queued_and_not_sent_is_one_that_nobody_waits_for():
    client = connected("structured")
    command = client.queue(commands.flush(client.engine.limits))
    feed(client.engine, none("structured", 1))
    assert not command.done

    client.speak()
    client.hear(none("structured", command))
    assert client.completed_once(command)


# ---------------------------------------------------------------------------------------------- magics


@all_modes
@pytest.mark.parametrize("magic", [0, 0x67446699, 0x25609513, 0x12560953, 0x96744668, 0xFFFFFFFF])
def test_reply_with_an_unknown_magic_is_fatal(mode, magic):
    check_dead(everywhere(lambda: (with_read(mode)[0], struct.pack(">I", magic) + bytes(40))))


@pytest.mark.parametrize("call", [0, 3])
def test_structured_reply_though_none_was_agreed_on_is_fatal(call):
    def build():
        client = connected("simple")
        command = commands.read(client.engine.limits, 16, 0) if call == 0 else commands.flush(client.engine.limits)
        client.submit(command)
        return client, none("structured", command)

    check_dead(everywhere(build))


@pytest.mark.parametrize(("mode", "other"), [("simple", "extended"), ("structured", "extended"), ("extended", "structured")])
def test_chunk_in_another_header_format_is_fatal(mode, other):
    def build():
        client, command = with_read(mode)
        return client, data_chunk(other, command, 0, b"a" * 16, done=True)

    check_dead(everywhere(build))


def test_simple_reply_under_extended_headers_is_fatal_without_waiting_for_more():
    def build():
        client, command = with_read("extended")
        return client, simple(command, 5)

    check_dead(everywhere(build))


@chunked
@pytest.mark.parametrize("length", [(64 << 20) + 9, 0xFFFFFFFF])
@pytest.mark.parametrize("cookie", [1, 7])
@pytest.mark.parametrize("kind", [Chunk.NONE, Chunk.OFFSET_DATA, Chunk.BLOCK_STATUS, Chunk.ERROR, 0x77])
def test_chunk_larger_than_anything_legal_is_fatal_as_soon_as_it_is_announced(mode, length, cookie, kind):
    check_dead(everywhere(lambda: (with_read(mode)[0], chunk(mode, cookie, kind, length=length))))


@pytest.mark.parametrize("length", [1 << 32, 1 << 63, (1 << 64) - 1])
def test_chunk_length_of_64_bits_is_fatal_alike(length):
    check_dead(everywhere(lambda: (with_read("extended")[0], chunk("extended", 1, Chunk.OFFSET_DATA, length=length))))


# ---------------------------------------------------------------------------------------------- hanging up


def scripts(mode):
    """An answer to one read of 16 bytes that has a bit of everything."""
    if mode == "simple":
        return lambda command: simple(command, data=b"a" * 16)
    return lambda command: (
        data_chunk(mode, command, 0, b"a" * 8)
        + error_chunk(mode, 9, 5, b"not yours")
        + hole_chunk(mode, command, 8, 8)
        + none(mode, command)
    )


@all_modes
@pytest.mark.parametrize("count", [16, LARGE])
def test_server_that_hangs_up_within_a_message_leaves_a_dead_connection_and_between_two_a_closed_one(mode, count):
    boundaries = {0}
    client, command = with_read(mode, count=count)
    whole = scripts(mode)(command) if count == 16 else success(mode, command, b"a" * count)
    if count == 16 and mode != "simple":
        parts = [data_chunk(mode, command, 0, b"a" * 8), error_chunk(mode, 9, 5, b"not yours"), hole_chunk(mode, command, 8, 8)]
        at = 0
        for part in parts:
            at += len(part)
            boundaries.add(at)
    for length in [*range(min(len(whole), 200)), len(whole) - 1]:
        client, command = with_read(mode, count=count)
        client.hear(whole[:length])
        client.engine.received_eof()

        assert client.engine.phase is (Phase.CLOSED if length in boundaries else Phase.DEAD), length
        assert isinstance(command.error, Disconnected)
        assert command.error.errno == errno.ENOTCONN
        assert client.completed_once(command)


@all_modes
def test_server_that_hangs_up_after_everything_was_answered_leaves_a_closed_connection(mode):
    client, command = with_read(mode)
    client.hear(success(mode, command, b"a" * 16))
    client.engine.received_eof()

    assert client.engine.phase is Phase.CLOSED
    assert isinstance(client.engine.error, Disconnected)
    assert command.result() == b"a" * 16
    assert client.completed_once(command)


@all_modes
def test_server_that_hangs_up_fails_what_is_in_flight_and_what_is_queued(mode):
    client, first = with_read(mode)
    second = client.queue(commands.flush(client.engine.limits))
    client.engine.received_eof()

    assert client.engine.phase is Phase.CLOSED
    for command in (first, second):
        assert isinstance(command.error, Disconnected)
        assert client.completed_once(command)
    assert "2 commands were not answered" in str(client.engine.error)
    assert client.speak() == b""


def test_message_does_not_count_commands_that_were_given_up():
    client, command = with_read("structured")
    client.engine.abandon(command, Disconnected(0, "enough"))
    client.engine.received_eof()

    assert "not answered" not in str(client.engine.error)


def test_message_counts_a_single_command_as_one():
    client, _ = with_read("structured")
    client.engine.received_eof()

    assert "1 command was not answered" in str(client.engine.error)


def test_first_reason_for_the_end_is_the_one_that_is_kept():
    client, command = with_read("structured")
    first = Disconnected(errno.ECONNRESET, "reset")
    client.engine.fail(first)
    client.engine.fail(ProtocolViolation(0, "later"))
    client.engine.received_eof()

    assert client.engine.error is first
    assert command.error is first
    assert client.engine.phase is Phase.DEAD
    assert client.completed_once(command)


@all_modes
def test_nothing_is_taken_after_the_end(mode):
    client, command = with_read(mode)
    client.engine.fail(Disconnected(0, "gone"))

    assert feed(client.engine, success(mode, command, b"a" * 16)) == 0


# ---------------------------------------------------------------------------------------------- the memory offered


@all_modes
def test_room_is_never_empty_while_connected_whatever_was_received(mode):
    client = connected(mode)
    limits = client.engine.limits
    memory = memoryview(bytearray(LARGE))
    client.submit(commands.read(limits, LARGE, 0, target=memory), commands.read(limits, 100, 0), commands.flush(limits))
    read, small, flush = client.commands
    script = success(mode, small, b"s" * 100) + success(mode, flush) + success(mode, read, b"l" * LARGE)
    for at in range(len(script)):
        assert len(client.engine.room())
        feed(client.engine, script[at : at + 1])

    assert len(client.engine.room()) == SCRATCH
    assert all(command.done and command.error is None for command in client.commands)


@all_modes
@pytest.mark.parametrize("whole", [True, False], ids=["at once", "in pieces"])
def test_large_read_that_was_answered_is_not_counted_any_more(mode, whole):
    client, large = with_read(mode, count=LARGE)
    flush = commands.flush(client.engine.limits)
    client.submit(flush)
    script = success(mode, large, b"l" * LARGE)
    client.hear(*([script] if whole else [script[:1000], script[1000:]]))
    assert client.completed_once(large)

    assert len(client.engine.room()) == SCRATCH, "a flush is all that is under way"
    client.hear(success(mode, flush))
    client.submit(commands.read(client.engine.limits, 16, 0))
    assert len(client.engine.room()) == SCRATCH, "a small read is all that is under way"


def test_room_is_scratch_again_when_a_small_command_joins_the_large_ones():
    client, _ = with_read("structured", count=LARGE)
    assert len(client.engine.room()) == 28

    client.submit(commands.flush(client.engine.limits))

    assert len(client.engine.room()) == SCRATCH

"""Bursts of replies: what ends one, and that whatever comes in the middle of one is dealt with as it is by itself.

Bytes that come one at a time never make a burst, so `everywhere` compares with and without.
"""

from __future__ import annotations

import errno
import struct

import pytest

from nbdcore.errors import DeadlineExceeded, ProtocolViolation
from nbdcore.protocol import constants, wire
from nbdcore.protocol.constants import Chunk, CommandType
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission import commands
from nbdcore.protocol.transmission.bursts import SHORTEST, acknowledgements, data_chunks, empty_chunks, simple_reads
from nbdcore.protocol.transmission.commands import Command
from tests.protocol.harness import MODES, broken_off, chunk, connected, data_chunk, everywhere, none, simple, success

COUNT = 40
MANY = 3 * SHORTEST
#: Where in the answers the odd one is: before there is a burst, first in one, in its middle, last.
PLACES = (0, 1, 2, 3, MANY // 2, MANY - 1)

all_modes = pytest.mark.parametrize("mode", MODES)
chunked = pytest.mark.parametrize("mode", MODES[1:])
places = pytest.mark.parametrize("place", PLACES)


def content(command):
    return bytes((command.offset + number) % 251 for number in range(command.count))


def good(mode, command):
    return success(mode, command, content(command) if command.type == CommandType.READ else b"")


def check_others(client, place):
    for number, command in enumerate(client.commands):
        assert client.completed_once(command)
        if number != place:
            assert command.error is None
            assert command.type != CommandType.READ or command.result() == content(command)


def reads(mode, place, *, odd=None, answer=good, change=None):
    """Many reads alike, one of them odd, or answered oddly; all answers together."""

    def build():
        client = connected(mode)
        limits = client.engine.limits
        for number in range(MANY):
            command = commands.read(limits, COUNT, 4096 * number)
            client.queue(odd(client) if odd is not None and number == place else command)
        client.speak()
        if change is not None:
            change(client, client.commands[place])
        answers = [(answer if number == place else good)(mode, command) for number, command in enumerate(client.commands)]
        return client, b"".join(answers)

    return everywhere(build, most=60)


# ---------------------------------------------------------------------------------------------- in the middle of a burst


@all_modes
def test_many_answers_alike_are_all_taken(mode):
    client = reads(mode, None)
    check_others(client, None)
    assert client.engine.traffic.chunks_received == MANY + 1
    assert client.engine.between_replies


@all_modes
@places
def test_error_among_answers_alike_is_that_reads_own(mode, place):
    client = reads(mode, place, answer=lambda mode, command: broken_off(mode, command, errno.EIO))
    check_others(client, place)
    assert client.commands[place].error.errno == errno.EIO


@all_modes
@places
@pytest.mark.parametrize("count", [1, COUNT - 1, COUNT + 1, 3 * COUNT])
def test_read_of_another_size_among_reads_alike_gets_its_own_data(mode, place, count):
    check_others(reads(mode, place, odd=lambda client: commands.read(client.engine.limits, count, 77)), None)


@all_modes
@places
def test_memory_that_a_caller_brought_is_filled_in_the_middle_of_a_burst(mode, place):
    def odd(client):
        return commands.read(client.engine.limits, COUNT, 77, target=memoryview(bytearray(COUNT)))

    client = reads(mode, place, odd=odd)
    check_others(client, None)
    assert client.commands[place].target == content(client.commands[place])


@all_modes
@places
def test_callback_is_called_in_the_middle_of_a_burst(mode, place):
    told = []

    def odd(client):
        command = commands.read(client.engine.limits, COUNT, 77)
        command.on_chunk = lambda _, kind, offset, length, error: told.append((kind, offset, length, error))
        return command

    check_others(reads(mode, place, odd=odd), None)
    assert set(told) == {(Chunk.OFFSET_DATA, 77, COUNT, 0)}


@all_modes
@places
def test_answer_to_a_read_given_up_is_thrown_away_in_the_middle_of_a_burst(mode, place):
    error = DeadlineExceeded(errno.ETIMEDOUT, "too late")
    client = reads(mode, place, change=lambda client, command: client.engine.abandon(command, error))
    check_others(client, place)
    assert client.commands[place].error is error
    assert client.commands[place].data is None


@all_modes
@places
def test_write_among_reads_and_read_among_writes_are_not_mistaken(mode, place):
    check_others(reads(mode, place, odd=lambda client: commands.write(client.engine.limits, bytes(COUNT), 0)), None)

    def build():
        client = connected(mode)
        for number in range(MANY):
            write = commands.write(client.engine.limits, bytes(COUNT), 4096 * number)
            client.queue(commands.read(client.engine.limits, COUNT, 77) if number == place else write)
        client.speak()
        answers = [good(mode, one) if one.type == CommandType.READ else simple(one) for one in client.commands]
        return client, b"".join(answers)

    if mode != "extended":
        check_others(everywhere(build, most=60), None)


@chunked
@places
def test_answer_in_pieces_in_the_middle_of_a_burst_is_put_together(mode, place):
    def answer(mode, command):
        data = content(command)
        first = data_chunk(mode, command, command.offset, data[:10])
        return first + data_chunk(mode, command, command.offset + 10, data[10:], done=True)

    check_others(reads(mode, place, answer=answer), None)


@chunked
@places
def test_whole_read_without_its_end_in_the_middle_of_a_burst_waits_for_it(mode, place):
    def answer(mode, command):
        return data_chunk(mode, command, command.offset, content(command)) + none(mode, command)

    check_others(reads(mode, place, answer=answer), None)


@chunked
@places
def test_data_of_the_usual_size_fail_a_longer_read_among_reads_alike(mode, place):
    client = reads(
        mode,
        place,
        odd=lambda client: commands.read(client.engine.limits, 2 * COUNT, 77),
        answer=lambda mode, one: data_chunk(mode, one, one.offset, content(one)[:COUNT], done=True),
    )
    check_others(client, place)
    assert client.commands[place].error.errno == errno.EPROTO


@chunked
@places
def test_data_for_a_write_among_reads_alike_fail_it(mode, place):
    client = reads(
        mode,
        place,
        odd=lambda client: commands.write(client.engine.limits, bytes(COUNT), 4096 * place),
        answer=lambda mode, one: data_chunk(mode, one, one.offset, bytes(COUNT), done=True),
    )
    check_others(client, place)
    assert client.commands[place].error.errno == errno.EPROTO


@chunked
@places
def test_data_that_came_before_already_fail_that_read_in_the_middle_of_a_burst(mode, place):
    def build():
        client = connected(mode)
        for number in range(MANY):
            client.queue(commands.read(client.engine.limits, COUNT, 4096 * number))
        client.speak()
        twice = client.commands[place]
        early = data_chunk(mode, twice, twice.offset, content(twice))
        return client, early + b"".join(good(mode, command) for command in client.commands)

    client = everywhere(build, most=60)
    check_others(client, place)
    assert client.commands[place].error.errno == errno.EPROTO


@chunked
@places
def test_data_elsewhere_in_the_middle_of_a_burst_end_the_connection_after_those_before(mode, place):
    client = reads(mode, place, answer=lambda mode, one: data_chunk(mode, one, one.offset + 1, content(one), done=True))
    assert isinstance(client.engine.error, ProtocolViolation)
    for number, command in enumerate(client.commands):
        assert client.completed_once(command)
        assert (command.error is None) == (number < place)


@places
def test_extended_answer_for_another_offset_in_the_middle_of_a_burst_fails_that_read(place):
    def answer(_, command):
        data = struct.pack(">Q", command.offset) + content(command)
        return (
            wire.EXTENDED_REPLY.pack(
                constants.EXTENDED_REPLY_MAGIC, 1, Chunk.OFFSET_DATA, command.cookie, command.offset + 1, len(data)
            )
            + data
        )

    client = reads("extended", place, answer=answer)
    check_others(client, place)
    assert client.commands[place].error.errno == errno.EPROTO


@chunked
@places
def test_chunk_for_nobody_in_the_middle_of_a_burst_is_skipped(mode, place):
    def answer(mode, command):
        return data_chunk(mode, 4711, 0, content(command), done=True) + good(mode, command)

    check_others(reads(mode, place, answer=answer), None)


@places
def test_simple_answer_for_nobody_in_the_middle_of_a_burst_ends_the_connection_after_those_before(place):
    client = reads("simple", place, answer=lambda _, command: simple(4711, data=content(command)))
    assert isinstance(client.engine.error, ProtocolViolation)
    assert [command.error is None for command in client.commands] == [number < place for number in range(MANY)]


@all_modes
@places
@pytest.mark.parametrize("wrong", [1, 16], ids=["one byte", "magic and cookie"])
def test_bytes_that_begin_no_reply_end_the_connection_after_those_before(mode, place, wrong):
    def answer(mode, command):
        return bytes(wrong) + good(mode, command)[wrong:]

    def writes():
        client = connected(mode)
        for number in range(MANY):
            client.queue(commands.write(client.engine.limits, bytes(COUNT), 4096 * number))
        client.speak()
        return client, b"".join((answer if number == place else good)(mode, one) for number, one in enumerate(client.commands))

    for client in (reads(mode, place, answer=answer), everywhere(writes, most=60)):
        assert client.engine.phase is Phase.DEAD
        assert [command.error is None for command in client.commands] == [number < place for number in range(MANY)]


@all_modes
@places
def test_refused_write_among_acknowledgements_is_that_writes_own(mode, place):
    def build():
        client = connected(mode)
        for number in range(MANY):
            client.queue(commands.write(client.engine.limits, bytes(COUNT), 4096 * number))
        client.speak()
        refused = client.commands[place]
        answers = [broken_off(mode, one, errno.ENOSPC) if one is refused else good(mode, one) for one in client.commands]
        return client, b"".join(answers)

    client = everywhere(build, most=60)
    check_others(client, place)
    assert client.commands[place].error.errno == errno.ENOSPC


@chunked
@places
def test_odd_answer_among_acknowledgements_in_chunks_is_that_writes_own(mode, place):
    def odd(command):
        if mode == "extended":
            header = constants.EXTENDED_REPLY_MAGIC, 1, Chunk.NONE, command.cookie, command.offset + 1, 0
            return wire.EXTENDED_REPLY.pack(*header)
        return chunk(mode, command, Chunk.NONE, b"?" * 3, done=True)

    def build():
        client = connected(mode)
        for number in range(MANY):
            client.queue(commands.write(client.engine.limits, bytes(COUNT), 4096 * number))
        client.speak()
        answers = [odd(one) if number == place else good(mode, one) for number, one in enumerate(client.commands)]
        return client, b"".join(answers)

    client = everywhere(build, most=60)
    check_others(client, place)
    assert client.commands[place].error.errno == errno.EPROTO


@chunked
def test_empty_chunk_that_is_no_end_is_left_by_a_burst_of_acknowledgements(mode):
    for kind, done in ((Chunk.NONE, False), (Chunk.ERROR, True)):
        waiting, completed = in_flight(1, 2, kind=CommandType.WRITE), []
        answers = none(mode, waiting[1]) + chunk(mode, waiting[2], kind, done=done)
        empty_chunks(waiting, completed, memoryview(answers), extended=mode == "extended")
        assert [command.cookie for command in completed] == [1]
        assert list(waiting) == [2]


@chunked
@places
def test_end_without_data_among_acknowledgements_fails_the_read(mode, place):
    def build():
        client = connected(mode)
        limits = client.engine.limits
        for number in range(MANY):
            write = commands.write(limits, bytes(COUNT), 4096 * number)
            client.queue(commands.read(limits, COUNT, 77) if number == place else write)
        client.speak()
        return client, b"".join(none(mode, command) for command in client.commands)

    client = everywhere(build, most=60)
    check_others(client, place)
    assert client.commands[place].error.errno == errno.EPROTO


# ---------------------------------------------------------------------------------------------- a burst by itself


def in_flight(*numbers, kind=CommandType.READ):
    found = {}
    for number in numbers:
        found[number] = command = Command(kind, 0, 4096 * number, COUNT)
        command.cookie = number
    return found


def take(mode, waiting, replies):
    completed = []
    if mode == "simple":
        simple_reads(waiting, completed, memoryview(replies), COUNT)
    else:
        data_chunks(waiting, completed, memoryview(replies), COUNT, extended=mode == "extended")
    return [command.cookie for command in completed]


@all_modes
def test_burst_takes_plain_answers_in_any_order_and_leaves_the_first_that_is_not(mode):
    waiting = in_flight(1, 2, 3, 4)
    waiting[3].on_chunk = print
    replies = b"".join(good(mode, waiting[number]) for number in (4, 1, 3, 2))
    assert take(mode, waiting, replies) == [4, 1]
    assert list(waiting) == [2, 3]
    assert not waiting[3].done
    assert waiting[3].data is None


@all_modes
def test_same_answer_twice_is_nobodys_the_second_time(mode):
    waiting = in_flight(1, 2)
    completed = []
    with pytest.raises(KeyError):
        take(mode, waiting, good(mode, waiting[1]) * 2)
    with pytest.raises(KeyError):
        acknowledgements(in_flight(5, kind=CommandType.WRITE), completed, memoryview(simple(5) * 2))
    assert [command.cookie for command in completed] == [5]
    with pytest.raises(KeyError):
        empty_chunks({}, completed, memoryview(none("extended", 5)), extended=True)


@chunked
def test_chunk_of_another_kind_or_unfinished_is_left(mode):
    for kind, done in ((Chunk.OFFSET_DATA, False), (Chunk.OFFSET_HOLE, True), (Chunk.ERROR, True)):
        waiting = in_flight(1)
        payload = struct.pack(">Q", 4096) + bytes(COUNT)
        assert take(mode, waiting, chunk(mode, waiting[1], kind, payload, done=done)) == []
        assert list(waiting) == [1]

"""A command that is alone takes a shorter way through the engine, and nobody can tell but by the clock."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nbdcore.errors import CommandError, Disconnected, ProtocolViolation
from nbdcore.protocol.constants import Chunk, CommandType
from nbdcore.protocol.engine import INLINE_PAYLOAD
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission import commands
from nbdcore.protocol.transmission.commands import Command
from nbdcore.protocol.transmission.decoder import LARGE
from tests.protocol.harness import (
    MODES,
    broken_off,
    chunk,
    connected,
    data_chunk,
    described,
    feed,
    hole_chunk,
    none,
    result,
    said,
    simple,
    success,
)

COUNT, OFFSET = 512, 1024
DATA = bytes(range(256)) * 2
KINDS = ("read", "into", "write")


def build(limits, kind, *, count=COUNT):
    """Return a command, and the memory that it reads into."""
    memory = bytearray(count)
    if kind == "write":
        return commands.write(limits, memoryview(DATA), OFFSET), memory
    target = memoryview(memory) if kind == "into" else None
    return commands.read(limits, count, OFFSET, target=target), memory


def put(engine, data):
    engine.room()[: len(data)] = data
    return len(data)


def good(mode, kind, command):
    if kind != "write":
        return success(mode, command, DATA)
    return simple(command) if mode != "extended" else none(mode, command)


def state(engine, command, memory):
    return (
        engine.phase,
        described(engine.error),
        command.done,
        described(command.error),
        result(command),
        bytes(memory),
        command.payload,
        [*engine.in_flight],
        engine.traffic,
        engine.pending,
        engine.between_replies,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_lone_command_ends_as_any_other_does(mode, kind):
    ends = []
    for alone in (True, False):
        engine = connected(mode).engine
        for _ in range(2):  # the second begins where the first has left things
            command, memory = build(engine.limits, kind)
            parts = engine.submit_alone(command) if alone else engine.submit(command) and engine.outgoing()
            assert [*map(bytes, parts)] == [*map(bytes, engine.outgoing())]
            sent = said(engine)
            count = put(engine, good(mode, kind, command))
            if alone:
                assert engine.received_alone(command, count)
            else:
                assert engine.received(count) == 1
        assert command.done
        ends.append((sent, state(engine, command, memory)))
    assert ends[0] == ends[1]


ODD = {
    "nothing": lambda _mode, _command: b"",
    "an error": lambda mode, command: broken_off(mode, command, 5),
    "half of it": lambda mode, command: success(mode, command, DATA)[:-100],
    "half of its header": lambda mode, command: success(mode, command, DATA)[:10],
    "more behind it": lambda mode, command: success(mode, command, DATA) + b"\0",
    "another command": lambda _mode, command: simple(command.cookie + 1, data=DATA),
    "no reply": lambda _mode, _command: b"x" * 600,
}
ODD_CHUNKS = {
    "another offset": lambda mode, command: data_chunk(mode, command, OFFSET + COUNT, DATA, done=True),
    "less data": lambda mode, command: data_chunk(mode, command, OFFSET, DATA[1:], done=True),
    "not the last": lambda mode, command: data_chunk(mode, command, OFFSET, DATA, done=False),
    "the data of another command": lambda mode, command: data_chunk(mode, command.cookie + 1, OFFSET, DATA, done=True),
    "a hole": lambda mode, command: hole_chunk(mode, command, OFFSET, COUNT, done=True),
    "no data": none,
    "an unknown chunk": lambda mode, command: chunk(mode, command, Chunk.OFFSET_HOLE + 7, bytes(COUNT + 8), done=True),
    "a simple reply": lambda _mode, command: simple(command, data=DATA),
}


@pytest.mark.parametrize(
    ("mode", "answer"),
    [*((mode, answer) for mode in MODES for answer in ODD)]
    + [(mode, answer) for mode in MODES if mode != "simple" for answer in ODD_CHUNKS],
)
def test_answer_that_is_not_plain_is_left_as_it_is(mode, answer):
    make = {**ODD, **ODD_CHUNKS}[answer]
    ends = []
    for tried in (True, False):
        engine = connected(mode).engine
        command, memory = build(engine.limits, "into")
        assert engine.submit_alone(command)
        said(engine)
        count = put(engine, make(mode, command))
        if tried:
            assert not engine.received_alone(command, count)
            assert not command.done
        engine.received(count)
        ends.append(state(engine, command, memory))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("mode", MODES)
def test_acknowledgement_of_the_wrong_kind_is_left_as_it_is(mode):
    engine = connected(mode).engine
    command, _ = build(engine.limits, "write")
    assert engine.submit_alone(command)
    said(engine)
    assert not engine.received_alone(command, put(engine, simple(command) if mode == "extended" else simple(command, 5)))
    assert not command.done


@pytest.mark.parametrize("mode", MODES)
def test_block_status_without_extents_is_no_success(mode):
    engine = connected(mode).engine
    command = commands.Command(CommandType.BLOCK_STATUS, 0, OFFSET, COUNT)
    command.cookie = 1
    engine.in_flight[1] = command
    assert not engine.received_alone(command, put(engine, simple(command) if mode != "extended" else none(mode, command)))
    assert not command.done


def test_answer_of_which_a_part_came_before_is_left_as_it_is():
    engine = connected().engine
    command, _ = build(engine.limits, "read")
    assert engine.submit_alone(command)
    said(engine)
    answer = success("structured", command, DATA)
    engine.received(put(engine, answer[:12]))
    assert not engine.received_alone(command, put(engine, answer[12:]))
    assert engine.received(len(answer) - 12) == 1
    assert command.result() == DATA


def test_command_with_others_beside_it_is_not_alone():
    engine = connected().engine
    first, _ = build(engine.limits, "read")
    assert engine.submit_alone(first)
    second, _ = build(engine.limits, "read")
    assert not engine.submit_alone(second)  # the first is not sent
    said(engine)
    assert not engine.submit_alone(second)  # nor answered
    engine.submit(second)
    assert not engine.received_alone(first, put(engine, success("structured", first, DATA)))
    said(engine)
    assert not engine.received_alone(first, put(engine, success("structured", first, DATA)))
    assert not first.done


@pytest.mark.parametrize("what", ["a trim", "the connection is being closed", "no connection"])
def test_what_takes_the_long_way_is_not_submitted(what):
    engine = connected().engine
    limits = engine.limits
    command = {
        "a trim": lambda: commands.trim(limits, COUNT, 0),
    }.get(what, lambda: commands.read(limits, COUNT, 0))()
    if what == "no connection":
        engine.end()
    elif what == "the connection is being closed":
        engine.submit(commands.disconnect())
        said(engine)
    assert not engine.submit_alone(command)
    assert command.mark is None
    assert not engine.in_flight
    assert not engine.has_outgoing


# ---------------------------------------------------------------------------------------------- large reads

HEAD = {"simple": 16, "structured": 28, "extended": 40}
LONG = bytes(range(256)) * (LARGE // 256)
#: A chunk's header may come by itself, without the offset of the data.
BEGINNINGS = [*HEAD.items(), ("structured", 20), ("extended", 32)]
beginnings = pytest.mark.parametrize(("mode", "begin"), BEGINNINGS)
targets = pytest.mark.parametrize("kind", ["read", "into"])


def large(mode, kind="into"):
    """Return an engine that has sent a large read, alone, the read, and its memory."""
    engine = connected(mode).engine
    command, memory = build(engine.limits, kind, count=LARGE)
    assert engine.submit_alone(command)
    said(engine)
    return engine, command, memory


def fill(engine, command, rooms, data):
    """Receive into what `begins_alone` returned, as a front end does. Returns what `ends_alone` says."""
    counts = []
    for room in rooms:
        part, data = data[: len(room)], data[len(room) :]
        room[: len(part)] = part
        counts.append(len(part))
    if engine.ends_alone(command, sum(counts)):
        return True
    for room, count in zip(rooms, counts, strict=True):
        if count:
            assert engine.room()[:count] == room[:count]
            engine.received(count)
    return False


@beginnings
@targets
def test_lone_large_read_ends_as_any_other_does(mode, begin, kind):
    ends = []
    for alone in (True, False):
        engine = connected(mode).engine
        for _ in range(2):  # the second begins where the first has left things
            command, memory = build(engine.limits, kind, count=LARGE)
            parts = engine.submit_alone(command) if alone else engine.submit(command) and engine.outgoing()
            assert [*map(bytes, parts)] == [*map(bytes, engine.outgoing())]
            sent = said(engine)
            answer = success(mode, command, LONG)
            if alone:
                rooms = engine.begins_alone(command, put(engine, answer[:begin]))
                assert sum(map(len, rooms)) == len(answer) - begin
                assert fill(engine, command, rooms, answer[begin:])
            else:
                assert feed(engine, answer) == len(answer)
        assert command.result() == LONG
        ends.append((sent, state(engine, command, memory)))
    assert ends[0] == ends[1]


@beginnings
@targets
def test_large_read_that_is_broken_off_anywhere_goes_on_as_any_other_does(mode, begin, kind):
    _, command, _ = large(mode, kind)
    rest = len(success(mode, command, LONG)) - begin
    for cut in sorted({0, 1, 7, 8, 9, rest - LARGE, 1000, rest - 1} - {rest}):
        engine, command, memory = large(mode, kind)
        answer = success(mode, command, LONG)
        rooms = engine.begins_alone(command, put(engine, answer[:begin]))
        assert not fill(engine, command, rooms, answer[begin : begin + cut])
        assert not command.done
        assert feed(engine, answer[begin + cut :]) == rest - cut
        assert command.result() == LONG
        assert engine.between_replies
        assert memory == (LONG if kind == "into" else bytes(LARGE))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [INLINE_PAYLOAD, INLINE_PAYLOAD + 1, LARGE])
def test_lone_write_of_any_size_is_sent_as_any_other_is(mode, count):
    ends = []
    for alone in (True, False):
        engine = connected(mode).engine
        for _ in range(2):
            command = commands.write(engine.limits, LONG[:count], OFFSET)
            parts = engine.submit_alone(command) if alone else engine.submit(command) and engine.outgoing()
            sizes = [*map(len, parts)]
            sent = said(engine)
            assert sent.endswith(LONG[:count])
            count_in = put(engine, good(mode, "write", command))
            assert engine.received_alone(command, count_in) if alone else engine.received(count_in) == 1
        ends.append((sizes, sent, state(engine, command, b"")))
    assert ends[0] == ends[1]


ODD_BEGINNINGS = {
    "an error": lambda mode, command: broken_off(mode, command, 5),
    "another command": lambda mode, command: success(mode, Command(command.type, 0, OFFSET, LARGE), LONG),
    "no reply": lambda _mode, _command: b"x" * 600,
    "not the last": lambda mode, command: data_chunk(mode, command, OFFSET, LONG, done=False),
    "less data": lambda mode, command: data_chunk(mode, command, OFFSET, LONG[1:], done=True),
    "a hole": lambda mode, command: hole_chunk(mode, command, OFFSET, LARGE, done=True),
    "no data": none,
}


@beginnings
@pytest.mark.parametrize("answer", ODD_BEGINNINGS)
def test_answer_that_does_not_begin_as_a_large_read_s_is_left_as_it_is(mode, begin, answer):
    if mode == "simple" and answer not in ("an error", "another command", "no reply"):
        answer = "an error"
    ends = []
    for tried in (True, False):
        engine, command, memory = large(mode)
        count = put(engine, ODD_BEGINNINGS[answer](mode, command)[:begin])
        if tried:
            assert not engine.begins_alone(command, count)
        engine.received(count)
        ends.append(state(engine, command, memory))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("count", [1, 19, 21, 27])
def test_part_of_a_header_is_left_as_it_is(count):
    engine, command, _ = large("structured")
    answer = success("structured", command, LONG)
    assert not engine.begins_alone(command, put(engine, answer[:count]))
    engine.received(count)
    assert not engine.begins_alone(command, put(engine, answer[count:28]))
    engine.received(28 - count)
    assert feed(engine, answer[28:]) == LARGE
    assert command.result() == LONG


@pytest.mark.parametrize(("mode", "begin"), [("structured", 20), ("extended", 32)])
def test_data_of_another_place_end_the_connection(mode, begin):
    engine, command, _ = large(mode)
    answer = bytearray(success(mode, command, LONG))
    answer[begin : begin + 8] = (OFFSET + 1).to_bytes(8, "big")
    rooms = engine.begins_alone(command, put(engine, answer[:begin]))
    for room, part in zip(rooms, (answer[begin : begin + 8], answer[begin + 8 :]), strict=True):
        room[:] = part
    assert not engine.ends_alone(command, sum(map(len, rooms)))
    engine.received(8)
    assert engine.phase is Phase.DEAD
    assert isinstance(command.error, ProtocolViolation)


@beginnings
def test_others_may_be_submitted_while_a_large_read_is_received(mode, begin):
    engine, command, _ = large(mode)
    answer = success(mode, command, LONG)
    rooms = engine.begins_alone(command, put(engine, answer[:begin]))
    other, second = build(engine.limits, "read")[0], build(engine.limits, "into", count=LARGE)[0]
    for one in (other, second):
        engine.submit(one)
    said(engine)
    assert fill(engine, command, rooms, answer[begin:])
    replies = success(mode, other, DATA) + success(mode, second, LONG)
    assert feed(engine, replies) == len(replies)
    assert command.result() == LONG
    assert other.result() == DATA
    assert second.result() == LONG


@beginnings
def test_large_read_beside_another_is_not_alone(mode, begin):
    engine, command, _ = large(mode)
    engine.submit(build(engine.limits, "read")[0])
    said(engine)
    answer = success(mode, command, LONG)
    assert not engine.begins_alone(command, put(engine, answer[:begin]))


@pytest.mark.parametrize(("mode", "count"), [("structured", (1 << 32) - 1), ("extended", (1 << 64) - 1)])
def test_error_for_the_largest_request_without_data_is_left_as_it_is(mode, count):
    engine = connected(mode).engine
    command = commands.trim(replace(engine.limits, strict=0), count, 0)
    engine.submit(command)
    said(engine)
    size = put(engine, broken_off(mode, command, 5))
    assert not engine.received_alone(command, size)
    assert not engine.begins_alone(command, size)
    assert engine.received(size) == 1
    assert isinstance(command.error, CommandError)


@beginnings
def test_end_of_the_connection_in_the_middle_of_a_large_read_is_its_outcome(mode, begin):
    engine, command, _ = large(mode)
    answer = success(mode, command, LONG)
    rooms = engine.begins_alone(command, put(engine, answer[:begin]))
    engine.fail(Disconnected(0, "gone"))
    assert not engine.ends_alone(command, sum(map(len, rooms)))
    assert isinstance(command.error, Disconnected)
    assert not engine.begins_alone(command, 0)

"""Answers to reads: whole, in pieces, with holes, and every way of sending the wrong bytes or to the wrong place."""

from __future__ import annotations

import errno
import itertools
import struct

import pytest

from nbdcore.errors import CommandError, ProtocolViolation
from nbdcore.protocol.constants import Chunk, CommandFlag
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission import commands
from nbdcore.protocol.transmission.commands import ALL_STRICT, Strict
from nbdcore.protocol.transmission.decoder import LARGE
from tests.protocol.harness import (
    MODES,
    SIZE,
    chunk,
    connected,
    data_chunk,
    error_chunk,
    everywhere,
    hole_chunk,
    none,
    simple,
    success,
)

CHUNKED = ("structured", "extended")
OFFSET = 1000
COUNT = 60
DATA = bytes(range(1, COUNT + 1))
UNTOUCHED = 0xEE

all_modes = pytest.mark.parametrize("mode", MODES)
chunked = pytest.mark.parametrize("mode", CHUNKED)
into = pytest.mark.parametrize("target", [False, True], ids=["own memory", "caller's memory"])


class Memory:
    """A caller's buffer in the middle of more memory, to see what is written around it."""

    def __init__(self, count):
        self.whole = bytearray([UNTOUCHED]) * (count + 200)
        self.count = count

    @property
    def view(self):
        return memoryview(self.whole)[100 : 100 + self.count]

    def intact_around(self):
        around = self.whole[:100] + self.whole[100 + self.count :]
        return len(self.whole) == self.count + 200 and set(around) == {UNTOUCHED}


def reading(mode, *, count=COUNT, offset=OFFSET, target=False, flags=0, size=SIZE):
    client = connected(mode, size=size)
    client.memory = Memory(count)
    command = commands.read(client.engine.limits, count, offset, target=client.memory.view if target else None, flags=flags)
    client.submit(command)
    return client, command


def answered(mode, answer, *, eof=False, most=400, **how):
    """Answer one read with what `answer(command)` makes, delivered in every way. Returns client and command."""

    def build():
        client, command = reading(mode, **how)
        return client, answer(command)

    client = everywhere(build, eof=eof, most=most)
    command = client.commands[0]
    assert client.memory.intact_around()
    return client, command


def check_good(client, command, data=DATA):
    assert client.engine.phase is Phase.CONNECTED
    assert client.completed_once(command)
    assert command.error is None
    assert command.result() == data
    assert client.engine.in_flight == {}
    assert client.engine.pending == 0


def check_failed(client, command, number=errno.EPROTO):
    """The command failed, and the connection goes on."""
    assert client.engine.phase is Phase.CONNECTED
    assert client.completed_once(command)
    assert isinstance(command.error, CommandError)
    assert command.error.errno == number
    assert client.engine.in_flight == {}
    mode = (
        "simple" if not client.engine.agreement.structured else "extended" if client.engine.agreement.extended else "structured"
    )
    after = commands.read(client.engine.limits, 3, 5)
    client.submit(after).hear(success(mode, after, b"xyz"))
    assert after.result() == b"xyz"


def check_fatal(client, command):
    assert client.engine.phase is Phase.DEAD
    assert isinstance(client.engine.error, ProtocolViolation)
    assert command.error is client.engine.error
    assert client.completed_once(command)


# ---------------------------------------------------------------------------------------------- good answers

GOLDEN = {
    "simple": "67446698 00000000 0000000000000001",
    "structured": "668e33ef 0001 0001 0000000000000001 00000044 00000000000003e8",
    "extended": "6e8a278c 0001 0001 0000000000000001 00000000000003e8 0000000000000044 00000000000003e8",
}


@all_modes
@into
def test_plain_answer_is_these_bytes(mode, target):
    client, command = answered(mode, lambda _: bytes.fromhex(GOLDEN[mode]) + DATA, target=target)

    check_good(client, command)
    if target:
        assert client.memory.view == DATA


@all_modes
@into
@pytest.mark.parametrize("count", [1, 512, LARGE - 1, LARGE, LARGE + 1, 200_000])
def test_answer_of_any_length_arrives_whole(mode, target, count):
    data = (bytes(range(256)) * (count // 256 + 1))[:count]
    most = 400 if count < 1000 else 12

    def build():
        client, command = reading(mode, count=count, target=target)
        return client, success(mode, command, data)

    first, script = build()
    first.hear(script)
    check_good(first, first.commands[0], data)
    for cut in (1, 15, 16, 17, 19, 20, 21, 28, 31, 32, 33, 39, 40, 41, 1000, count // 2, count, len(script) - 1)[:most]:
        client, script = build()
        client.hear(script[:cut], script[cut:])
        check_good(client, client.commands[0], data)
        assert client.memory.intact_around()


@all_modes
def test_large_answer_goes_straight_into_the_callers_memory(mode):
    client, command = reading(mode, count=1 << 17, target=True)
    script = success(mode, command, b"\x55" * (1 << 17))
    header = len(script) - (1 << 17)

    room = client.engine.room()
    assert len(room) == header, "nothing but the header is asked for while only large reads are under way"
    client.hear(script[:header])
    room = client.engine.room()

    assert room.obj is client.memory.whole
    assert len(room) == 1 << 17
    client.hear(script[header:])
    check_good(client, command, b"\x55" * (1 << 17))


@all_modes
def test_answers_to_a_burst_of_reads_are_taken_from_one_receive_in_any_order(mode):
    client = connected(mode)
    reads = [commands.read(client.engine.limits, 16, 16 * index) for index in range(50)]
    client.submit(*reads)

    client.hear(b"".join(success(mode, command, bytes([command.cookie]) * 16) for command in reversed(reads)))

    assert [command.result() for command in reads] == [bytes([cookie]) * 16 for cookie in range(1, 51)]
    assert all(client.completed_once(command) for command in reads)


@all_modes
def test_small_and_large_reads_under_way_together_get_their_own_data(mode):
    def build():
        client = connected(mode)
        limits = client.engine.limits
        targets = [bytearray(LARGE), None, bytearray(3), None, bytearray(LARGE + 7)]
        reads = [
            commands.read(limits, LARGE if target is None else len(target), 0, target=target and memoryview(target))
            for target in targets
        ]
        client.submit(*reads)
        order = (3, 0, 2, 4, 1)
        return client, b"".join(success(mode, reads[i], bytes([i + 1]) * reads[i].count) for i in order)

    client = everywhere(build, most=40)
    for index, command in enumerate(client.commands):
        assert command.result() == bytes([index + 1]) * command.count


@pytest.mark.parametrize("mode", MODES)
def test_read_of_nothing_is_answered_with_nothing(mode):
    def build():
        client = connected(mode, strict=int(ALL_STRICT & ~Strict.ZERO_SIZE))
        command = commands.read(client.engine.limits, 0, OFFSET)
        client.submit(command)
        return client, simple(command) if mode == "simple" else none(mode, command)

    client = everywhere(build)
    check_good(client, client.commands[0], b"")


# ---------------------------------------------------------------------------------------------- pieces


@chunked
@into
@pytest.mark.parametrize("last", ["data", "none"])
def test_pieces_in_any_order_make_the_whole(mode, target, last):
    edges = [(0, 10), (10, 11), (11, 40), (40, COUNT)]
    for order in itertools.permutations(edges):

        def answer(command, order=order):
            script = b""
            for index, (begin, end) in enumerate(order):
                done = last == "data" and index == len(order) - 1
                script += data_chunk(mode, command, OFFSET + begin, DATA[begin:end], done=done)
            return script + (none(mode, command) if last == "none" else b"")

        check_good(*answered(mode, answer, target=target, most=12))


@chunked
@into
def test_holes_read_as_zeroes_whatever_was_in_the_memory(mode, target):
    def answer(command):
        return (
            hole_chunk(mode, command, OFFSET, 10)
            + data_chunk(mode, command, OFFSET + 10, DATA[10:50])
            + hole_chunk(mode, command, OFFSET + 50, 10, done=True)
        )

    check_good(*answered(mode, answer, target=target), bytes(10) + DATA[10:50] + bytes(10))


@chunked
@into
def test_read_may_be_all_hole(mode, target):
    client, command = answered(mode, lambda command: hole_chunk(mode, command, OFFSET, COUNT, done=True), target=target)

    check_good(client, command, bytes(COUNT))
    if target:
        assert client.memory.view == bytes(COUNT)


@chunked
@pytest.mark.parametrize("at", [0, 30, COUNT])
@pytest.mark.parametrize("when", ["first", "last"])
@pytest.mark.parametrize("kind", ["data", "hole"])
def test_piece_of_no_bytes_within_the_range_is_tolerated(mode, at, when, kind):
    def answer(command):
        nothing = data_chunk(mode, command, OFFSET + at, b"") if kind == "data" else hole_chunk(mode, command, OFFSET + at, 0)
        pieces = data_chunk(mode, command, OFFSET + 20, DATA[20:]) + data_chunk(mode, command, OFFSET, DATA[:20])
        return (nothing + pieces if when == "first" else pieces + nothing) + none(mode, command)

    check_good(*answered(mode, answer))


@chunked
def test_pieces_of_two_reads_may_come_interleaved(mode):
    def build():
        client = connected(mode)
        first, second = (commands.read(client.engine.limits, 20, offset) for offset in (0, 10))
        client.submit(first, second)
        script = (
            data_chunk(mode, first, 10, b"B" * 10)
            + data_chunk(mode, second, 10, b"c" * 10)
            + data_chunk(mode, first, 0, b"A" * 10)
            + none(mode, first)
            + data_chunk(mode, second, 20, b"d" * 10, done=True)
        )
        return client, script

    client = everywhere(build)
    assert [command.result() for command in client.commands] == [b"A" * 10 + b"B" * 10, b"c" * 10 + b"d" * 10]


@chunked
def test_flags_of_a_chunk_that_are_unknown_are_ignored(mode):
    def answer(command):
        script = bytearray(data_chunk(mode, command, OFFSET, DATA, done=True))
        script[4:6] = b"\xff\xff"
        return bytes(script)

    check_good(*answered(mode, answer))


@chunked
def test_answer_in_one_piece_to_a_read_with_df(mode):
    client, command = answered(mode, lambda command: data_chunk(mode, command, OFFSET, DATA, done=True), flags=CommandFlag.DF)
    check_good(client, command)


@chunked
def test_df_that_is_too_much_for_the_server_is_an_error_of_the_command(mode):
    client, command = answered(mode, lambda command: error_chunk(mode, command, 75, done=True), flags=CommandFlag.DF)
    check_failed(client, command, errno.EOVERFLOW)


# ---------------------------------------------------------------------------------------------- too little, too much


@chunked
@into
@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [(0, 59)],
        [(1, 60)],
        [(0, 20), (21, 60)],
        [(0, 60), (0, 60)],
        [(0, 30), (20, 60)],
        [(0, 30), (20, 50)],
        [(20, 50), (0, 30)],
        [(0, 60), (59, 60)],
        [(59, 60), (0, 60)],
        [(0, 30), (0, 30)],
        [(0, 20), (40, 60), (10, 30)],
        [(30, 60), (0, 10), (5, 25)],
        [(0, 60), (30, 30), (10, 20)],
        [(0, 31), (30, 59)],
        [(30, 59), (0, 31)],
    ],
)
@pytest.mark.parametrize("holes", [False, True], ids=["data", "holes"])
def test_success_without_each_byte_exactly_once_fails_the_read(mode, target, pieces, holes):
    def answer(command):
        script = b""
        for begin, end in pieces:
            script += (
                hole_chunk(mode, command, OFFSET + begin, end - begin)
                if holes
                else data_chunk(mode, command, OFFSET + begin, DATA[begin:end])
            )
        return script + none(mode, command)

    check_failed(*answered(mode, answer, target=target, most=30))


@chunked
@into
def test_whole_read_sent_after_a_part_of_it_fails_the_read(mode, target):
    def answer(command):
        return data_chunk(mode, command, OFFSET, DATA[:10]) + data_chunk(mode, command, OFFSET, DATA, done=True)

    check_failed(*answered(mode, answer, target=target))


TRAPS = [
    (OFFSET - 1, 1),
    (OFFSET - 1, 2),
    (OFFSET - 1, COUNT),
    (OFFSET - COUNT, COUNT),
    (OFFSET + COUNT, 1),
    (OFFSET + COUNT + 1, 0),
    (OFFSET - 1, 0),
    (OFFSET + COUNT - 1, 2),
    (OFFSET, COUNT + 1),
    (OFFSET + 1, COUNT),
    (0, COUNT),
    (0, OFFSET + COUNT),
    ((1 << 64) - 1, 1),
    ((1 << 64) - 1, COUNT),
    ((1 << 64) - COUNT, COUNT),
    ((1 << 64) - OFFSET, COUNT),
    ((1 << 63), 1),
    ((1 << 32) + OFFSET, 1),
    (OFFSET, 4 * COUNT),
]


@chunked
@into
@pytest.mark.parametrize(("offset", "length"), TRAPS)
def test_data_outside_the_read_are_fatal_and_written_nowhere(mode, target, offset, length):
    client, command = answered(
        mode, lambda command: data_chunk(mode, command, offset, b"\xaa" * length, done=True), target=target, most=40
    )

    check_fatal(client, command)
    assert set(client.memory.whole) == {UNTOUCHED}


@chunked
@into
@pytest.mark.parametrize(("offset", "length"), [*TRAPS, (OFFSET, 0xFFFFFFFF), (OFFSET - 1, 0xFFFFFFFF)])
def test_hole_outside_the_read_is_fatal_and_written_nowhere(mode, target, offset, length):
    client, command = answered(mode, lambda command: hole_chunk(mode, command, offset, length, done=True), target=target)

    check_fatal(client, command)
    assert set(client.memory.whole) == {UNTOUCHED}


@chunked
@pytest.mark.parametrize("offset", [0, (1 << 63) - COUNT, (1 << 63), (1 << 64) - 1 - COUNT])
def test_read_at_either_end_of_the_numbers_has_its_data_checked_alike(mode, offset):
    how = {"offset": offset, "size": (1 << 64) - 1}

    def good(command):
        return data_chunk(mode, command, command.offset, DATA, done=True)

    def wrapped(command):
        return data_chunk(mode, command, (command.offset - 1) % (1 << 64), DATA, done=True)

    check_good(*answered(mode, good, **how))
    check_fatal(*answered(mode, wrapped, **how))


def _many_pieces(mode, pieces):
    client, command = reading(mode, count=4 * pieces)
    script = b"".join(data_chunk(mode, command, OFFSET + 2 * index, b"x") for index in range(pieces))
    return client.hear(script), command


@pytest.mark.parametrize("mode", ["structured"])
def test_separate_pieces_are_remembered_up_to_a_limit_then_fatal(mode):
    client, command = _many_pieces(mode, 1 << 16)
    assert client.engine.phase is Phase.CONNECTED
    assert not command.done

    check_fatal(*_many_pieces(mode, (1 << 16) + 1))


def test_pieces_in_order_are_remembered_as_one():
    pieces = (1 << 16) + 100  # more than may be separate
    client, command = reading("structured", count=pieces)
    for index in range(pieces):
        client.hear(data_chunk("structured", command, OFFSET + index, b"x"))
    client.hear(none("structured", command))

    check_good(client, command, b"x" * pieces)


# ---------------------------------------------------------------------------------------------- chunks of a wrong shape


@chunked
@pytest.mark.parametrize("length", [0, 1, 7])
@pytest.mark.parametrize("done", [False, True])
def test_data_chunk_too_short_for_its_offset_fails_the_read(mode, length, done):
    def answer(command):
        return chunk(mode, command, Chunk.OFFSET_DATA, bytes(length), done=done) + (b"" if done else none(mode, command))

    check_failed(*answered(mode, answer))


@chunked
@pytest.mark.parametrize("length", [0, 8, 11, 13, 16])
def test_hole_chunk_of_a_wrong_length_fails_the_read(mode, length):
    def answer(command):
        return chunk(mode, command, Chunk.OFFSET_HOLE, struct.pack(">QI", OFFSET, 1)[:length].ljust(length), done=True)

    check_failed(*answered(mode, answer))


@chunked
@pytest.mark.parametrize("kind", [3, 4, 7, 100, 0x7FFF, Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT])
@pytest.mark.parametrize("length", [0, 12, 100])
def test_chunk_that_does_not_belong_to_a_read_is_skipped_and_fails_it(mode, kind, length):
    def answer(command):
        return chunk(mode, command, kind, b"\x67" * length) + data_chunk(mode, command, OFFSET, DATA, done=True)

    check_failed(*answered(mode, answer))


@chunked
@pytest.mark.parametrize(("payload", "done"), [(b"", False), (b"x", True), (b"x" * 9, False)])
def test_end_of_an_answer_with_payload_or_without_its_flag_fails_the_read(mode, payload, done):
    def answer(command):
        return chunk(mode, command, Chunk.NONE, payload, done=done) + (b"" if done else none(mode, command))

    check_failed(*answered(mode, answer))


def test_answer_for_another_offset_is_skipped_and_fails_the_read():
    def answer(command):
        script = bytearray(data_chunk("extended", command, OFFSET, DATA, done=True))
        script[16:24] = struct.pack(">Q", OFFSET + 1)
        return bytes(script)

    check_failed(*answered("extended", answer))


@pytest.mark.parametrize("target", [False, True])
def test_simple_reply_to_a_read_though_chunks_were_agreed_on_is_skipped_with_its_data(target):
    check_failed(*answered("structured", lambda command: simple(command, data=DATA), target=target))


def test_simple_error_in_answer_to_a_read_though_chunks_were_agreed_on_is_an_error():
    check_failed(*answered("structured", lambda command: simple(command, 5)), errno.EIO)


# ---------------------------------------------------------------------------------------------- errors among data


@chunked
@pytest.mark.parametrize("order", ["error first", "error last"])
def test_data_before_or_after_an_error_do_not_save_the_read(mode, order):
    def answer(command):
        error = error_chunk(mode, command, 5, b"bad sector")
        pieces = data_chunk(mode, command, OFFSET, DATA)
        return (error + pieces if order == "error first" else pieces + error) + none(mode, command)

    client, command = answered(mode, answer)
    check_failed(client, command, errno.EIO)
    assert command.error.server_text == "bad sector"


@chunked
def test_incomplete_data_with_an_error_are_the_error_alone(mode):
    def answer(command):
        return data_chunk(mode, command, OFFSET, DATA[:10]) + error_chunk(mode, command, 5, done=True)

    check_failed(*answered(mode, answer), errno.EIO)


@all_modes
def test_rest_of_a_small_answer_is_received_together_with_the_answers_behind_it(mode):
    client = connected(mode)
    memory = [memoryview(bytearray(4096)) for _ in range(3)]
    client.submit(*(commands.read(client.engine.limits, 4096, 0, target=target) for target in memory))
    script = b"".join(success(mode, command, bytes([command.cookie]) * 4096) for command in client.commands)

    client.hear(script[:2000])
    assert len(client.engine.room()) >= len(script) - 2000

    client.hear(script[2000:])
    assert [bytes(target) for target in memory] == [bytes([cookie]) * 4096 for cookie in (1, 2, 3)]

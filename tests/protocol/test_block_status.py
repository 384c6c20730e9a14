"""Answers to block status: 32 and 64 bits, several contexts, and extents that cannot be."""

from __future__ import annotations

import errno
import struct
import tracemalloc
from array import array

import pytest

from nbdcore.errors import CommandError, ProtocolViolation
from nbdcore.protocol.constants import Chunk
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission import commands
from nbdcore.protocol.transmission.commands import StatusChunk
from tests.protocol.harness import SIZE, chunk, connected, error_chunk, everywhere, feed, none, simple, status_chunk

CONTEXTS = ((1, b"base:allocation"), (0xFFFFFFFF, b"x:y"))
OFFSET = 4096
COUNT = 65536

both = pytest.mark.parametrize("mode", ["structured", "extended"])


def asking(mode, *, size=SIZE, contexts=CONTEXTS, count=COUNT, offset=OFFSET):
    client = connected(mode, size=size, contexts=contexts)
    command = commands.block_status(client.engine.limits, count, offset)
    client.submit(command)
    return client, command


def answered(mode, answer, *, most=400, **how):
    def build():
        client, command = asking(mode, **how)
        return client, answer(command)

    client = everywhere(build, most=most)
    command = client.commands[0]
    assert client.completed_once(command)
    return client, command


def check_extents(command, chunks):
    assert command.chunks == [StatusChunk(name, array("Q", lengths), array("Q", flags)) for name, lengths, flags in chunks]


def check_good(client, command, *chunks):
    assert client.engine.phase is Phase.CONNECTED
    assert command.error is None
    check_extents(command, chunks)


def check_failed(client, command, *chunks, words=""):
    assert client.engine.phase is Phase.CONNECTED
    assert isinstance(command.error, CommandError)
    assert command.error.errno == errno.EPROTO
    assert words in str(command.error)
    check_extents(command, chunks)
    after = commands.flush(client.engine.limits)
    client.submit(after).hear(none("extended" if client.engine.agreement.extended else "structured", after))
    assert client.completed_once(after)


GOLDEN = {
    "structured": "668e33ef 0001 0005 0000000000000001 00000014 00000001 00008000 00000003 00008000 00000000",
    "extended": "6e8a278c 0001 0006 0000000000000001 0000000000001000 0000000000000028 00000001 00000002"
    "0000000000008000 0000000000000003 0000000000008000 0000000000000000",
}


@both
def test_plain_answer_is_these_bytes(mode):
    client, command = answered(mode, lambda _: bytes.fromhex(GOLDEN[mode]))

    check_good(client, command, ("base:allocation", [0x8000, 0x8000], [3, 0]))


@both
def test_contexts_come_in_the_servers_order_each_as_far_as_it_likes(mode):
    def answer(command):
        return (
            status_chunk(mode, command, 0xFFFFFFFF, [(512, 7)])
            + status_chunk(mode, command, 1, [(COUNT, 0), (512, 1)])
            + none(mode, command)
        )

    client, command = answered(mode, answer)

    check_good(client, command, ("x:y", [512], [7]), ("base:allocation", [COUNT, 512], [0, 1]))


@both
def test_several_chunks_of_one_context_are_kept_apart(mode):
    def answer(command):
        return status_chunk(mode, command, 1, [(1, 2)]) + status_chunk(mode, command, 1, [(3, 4)], done=True)

    check_good(*answered(mode, answer), ("base:allocation", [1], [2]), ("base:allocation", [3], [4]))


@both
@pytest.mark.parametrize("number", [0, 2, 0xFFFFFFFE])
def test_context_that_was_not_selected_is_ignored(mode, number):
    def answer(command):
        return status_chunk(mode, command, number, [(COUNT, 9)]) + status_chunk(mode, command, 1, [(COUNT, 0)], done=True)

    check_good(*answered(mode, answer), ("base:allocation", [COUNT], [0]))


@both
def test_status_in_answer_to_a_command_sent_without_contexts_is_ignored(mode):
    client = connected(mode, strict=0)
    command = commands.block_status(client.engine.limits, COUNT, OFFSET)
    client.submit(command).hear(status_chunk(mode, command, 1, [(COUNT, 9)], done=True))

    check_good(client, command)


@pytest.mark.parametrize("reply", [simple, lambda command: none("structured", command)], ids=["simple", "chunk"])
def test_success_without_any_extent_is_left_to_the_caller(reply):
    check_good(*answered("structured", reply))


def test_extents_and_flags_of_64_bits_are_kept_whole():
    size = (1 << 63) - 1
    extents = [(1 << 40, (1 << 64) - 1), (1 << 62, 1 << 32)]

    client, command = answered(
        "extended", lambda command: status_chunk("extended", command, 1, extents, done=True), size=size, count=1 << 41
    )

    check_good(client, command, ("base:allocation", [1 << 40, 1 << 62], [(1 << 64) - 1, 1 << 32]))


@both
def test_last_extent_may_reach_beyond_the_request_up_to_the_end(mode):
    def answer(command):
        return status_chunk(mode, command, 1, [(512, 1), (SIZE - OFFSET - 512, 0)], done=True)

    check_good(*answered(mode, answer), ("base:allocation", [512, SIZE - OFFSET - 512], [1, 0]))


# ---------------------------------------------------------------------------------------------- impossible extents


@both
@pytest.mark.parametrize("more", [[], [(512, 3)]])
def test_extent_past_the_end_is_cut_and_fails_the_command(mode, more):
    def answer(command):
        return status_chunk(mode, command, 1, [(512, 1), (SIZE - OFFSET - 511, 0), *more], done=True)

    check_failed(*answered(mode, answer), ("base:allocation", [512, SIZE - OFFSET - 512], [1, 0]), words="past the end")


def test_lengths_whose_sum_would_wrap_are_cut_alike():
    def answer(command):
        return status_chunk("extended", command, 1, [((1 << 64) - 1, 1), (2, 0), ((1 << 64) - 1, 1)], done=True)

    check_failed(*answered("extended", answer), ("base:allocation", [SIZE - OFFSET], [1]))


@both
def test_first_extent_of_no_bytes_fails_the_command(mode):
    def answer(command):
        return status_chunk(mode, command, 1, [(0, 1), (512, 0)], done=True)

    check_failed(*answered(mode, answer), words="no bytes")


@both
def test_later_extent_of_no_bytes_ends_the_list(mode):
    def answer(command):
        return status_chunk(mode, command, 1, [(512, 1), (0, 0), (512, 3)], done=True)

    check_good(*answered(mode, answer), ("base:allocation", [512], [1]))


@both
def test_lengths_that_have_zero_bytes_side_by_side_are_not_taken_for_no_bytes(mode):
    extents = [(1 << 16, 1), (1 << 12, 0), (1 << 24, 1), (1 << 12, 0), (1 << 16, 1), (1 << 8, 0)]

    def answer(command):
        return status_chunk(mode, command, 1, extents, done=True)

    client, command = answered(mode, answer, size=1 << 30)

    check_good(client, command, ("base:allocation", [length for length, _ in extents], [flags for _, flags in extents]))


@both
@pytest.mark.parametrize("length", [*range(13), 15, 16, 19, 21, 23, 25, 28, 32, 36])
def test_status_of_a_wrong_length_fails_the_command(mode, length):
    kind, right = (Chunk.BLOCK_STATUS_EXT, (24, 40)) if mode == "extended" else (Chunk.BLOCK_STATUS, (12, 20, 28, 36))
    if length in right:
        return
    payload = (struct.pack(">II", 1, 1) + b"\0\0\0\1" * 20)[:length]

    check_failed(*answered(mode, lambda command: chunk(mode, command, kind, payload, done=True)))


@pytest.mark.parametrize("announced", [1, 3, 0xFFFFFFFF])
def test_number_of_extents_that_does_not_fit_fails_the_command(announced):
    def answer(command):
        script = bytearray(status_chunk("extended", command, 1, [(512, 1), (512, 0)], done=True))
        script[36:40] = struct.pack(">I", announced)
        return bytes(script)

    client, command = answered("extended", answer)

    assert client.engine.phase is Phase.CONNECTED
    assert command.error.errno == errno.EPROTO


def test_status_of_32_bits_is_taken_under_extended_headers_too():
    payload = struct.pack(">III", 1, 512, 3)

    _, command = answered("extended", lambda command: chunk("extended", command, Chunk.BLOCK_STATUS, payload, done=True))

    assert command.error is None
    check_extents(command, [("base:allocation", [512], [3])])


def test_extents_that_are_not_counted_are_as_many_as_the_chunk_has():
    def answer(command):
        script = bytearray(status_chunk("extended", command, 1, [(512, 1), (512, 0)], done=True))
        script[36:40] = bytes(4)
        return bytes(script)

    _, command = answered("extended", answer)

    assert command.error is None
    check_extents(command, [("base:allocation", [512, 512], [1, 0])])


def test_status_of_64_bits_without_extended_headers_fails_the_command():
    payload = struct.pack(">IIQQ", 1, 1, 512, 3)

    def answer(command):
        return chunk("structured", command, Chunk.BLOCK_STATUS_EXT, payload, done=True)

    check_failed(*answered("structured", answer), ("base:allocation", [512], [3]))


@both
@pytest.mark.parametrize("build", [commands.flush, lambda limits: commands.trim(limits, 512, 0)], ids=["flush", "trim"])
def test_status_in_answer_to_another_command_is_skipped_and_fails_it(mode, build):
    client = connected(mode, contexts=CONTEXTS)
    command = build(client.engine.limits)
    client.submit(command).hear(status_chunk(mode, command, 1, [(512, 1)], done=True))

    check_failed(client, command)


@both
@pytest.mark.parametrize("kind", [Chunk.OFFSET_DATA, Chunk.OFFSET_HOLE])
def test_data_in_answer_to_block_status_are_skipped_and_fail_it(mode, kind):
    def answer(command):
        return chunk(mode, command, kind, struct.pack(">QI", OFFSET, 512), done=True)

    check_failed(*answered(mode, answer))


@both
def test_error_among_the_extents_is_the_outcome(mode):
    def answer(command):
        return (
            status_chunk(mode, command, 1, [(512, 1)])
            + error_chunk(mode, command, 12, b"no memory")
            + status_chunk(mode, command, 1, [(512, 1)], done=True)
        )

    _, command = answered(mode, answer)
    assert command.error.errno == errno.ENOMEM
    assert command.error.server_text == "no memory"


# ---------------------------------------------------------------------------------------------- bounds


@both
def test_most_extents_that_one_chunk_may_have_are_taken(mode):
    client, command = asking(mode, size=1 << 40)
    client.hear(status_chunk(mode, command, 1, [(1, 0)] * (1 << 20), done=True))

    assert command.error is None
    assert len(command.chunks[0].lengths) == 1 << 20


@both
def test_more_extents_in_one_chunk_are_skipped_and_fail_the_command(mode):
    client, command = asking(mode, size=1 << 40)
    script = status_chunk(mode, command, 1, [(1, 0)] * ((1 << 20) + 1), done=True)

    tracemalloc.start()
    try:
        client.hear(script)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    check_failed(client, command)
    assert peak < 1 << 20


@both
def test_endless_chunks_of_extents_are_taken_up_to_a_limit_for_all_contexts(mode):
    client, command = asking(mode, size=1 << 40)
    script = status_chunk(mode, command, 1, [(1, 0)] * (1 << 18))
    for _ in range(8):
        feed(client.engine, script)
    assert command.error is None

    client.hear(script, none(mode, command))

    assert len(command.chunks) == 8
    check_failed(client, command, *[("base:allocation", [1] * (1 << 18), [0] * (1 << 18))] * 8)


@both
def test_chunk_too_large_for_anything_is_fatal(mode):
    client, command = answered(
        mode,
        lambda command: chunk(
            mode, command, Chunk.BLOCK_STATUS_EXT if mode == "extended" else Chunk.BLOCK_STATUS, length=(64 << 20) + 9
        ),
    )

    assert client.engine.phase is Phase.DEAD
    assert isinstance(command.error, ProtocolViolation)

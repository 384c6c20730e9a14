"""Errors from the server: every number, texts and offsets, broken error chunks, and which of several counts."""

from __future__ import annotations

import errno
import struct

import pytest

from nbdcore.errors import CommandError
from nbdcore.protocol.constants import Chunk, ErrorNumber
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission import commands
from tests.protocol.harness import (
    MODES,
    broken_off,
    chunk,
    connected,
    error_chunk,
    error_offset_chunk,
    everywhere,
    none,
    simple,
    success,
)

CONTEXTS = ((1, b"base:allocation"),)
OFFSET, COUNT = 1024, 512
BUILD = {
    "read": lambda limits: commands.read(limits, COUNT, OFFSET),
    "write": lambda limits: commands.write(limits, memoryview(bytes(COUNT)), OFFSET),
    "flush": commands.flush,
    "trim": lambda limits: commands.trim(limits, COUNT, OFFSET),
    "zero": lambda limits: commands.zero(limits, COUNT, OFFSET),
    "cache": lambda limits: commands.cache(limits, COUNT, OFFSET),
    "block_status": lambda limits: commands.block_status(limits, COUNT, OFFSET),
}
CHUNKED = ("structured", "extended")
NUMBERS = {
    1: errno.EPERM,
    5: errno.EIO,
    12: errno.ENOMEM,
    22: errno.EINVAL,
    28: errno.ENOSPC,
    75: errno.EOVERFLOW,
    95: errno.ENOTSUP,
    108: errno.ESHUTDOWN,
    2: errno.EINVAL,
    110: errno.EINVAL,
    0x7FFFFFFF: errno.EINVAL,
    0xFFFFFFFF: errno.EINVAL,
}

chunked = pytest.mark.parametrize("mode", CHUNKED)
every = pytest.mark.parametrize("call", BUILD)


def answered(mode, call, answer, *, most=400, lives=True):
    def build():
        client = connected(mode, contexts=() if mode == "simple" else CONTEXTS)
        command = BUILD[call](client.engine.limits)
        client.submit(command)
        client.said.clear()
        return client, answer(command)

    client = everywhere(build, most=most)
    command = client.commands[0]
    assert client.engine.phase is Phase.CONNECTED
    assert client.completed_once(command)
    if not lives:
        return command
    after = commands.read(client.engine.limits, 3, 0)
    client.submit(after).hear(success(mode, after, b"abc"))
    assert after.result() == b"abc"
    return command


@pytest.mark.parametrize("mode", MODES)
@every
def test_command_succeeds(mode, call):
    if (mode, call) == ("simple", "block_status"):
        return
    data = bytes(range(256)) * 2 if call == "read" else b""

    command = answered(mode, call, lambda command: success(mode, command, data))

    assert command.error is None
    if call == "read":
        assert command.result() == data


@every
def test_simple_reply_is_good_for_every_command_but_a_read(call):
    if call == "read":
        return
    assert answered("structured", call, simple).error is None


@pytest.mark.parametrize("mode", MODES)
@every
def test_error_number_becomes_this_platforms(mode, call):
    if (mode, call) == ("simple", "block_status"):
        return
    for number, errno_here in NUMBERS.items():
        lives = number != ErrorNumber.ESHUTDOWN
        command = answered(mode, call, lambda command, number=number: broken_off(mode, command, number), most=8, lives=lives)

        assert isinstance(command.error, CommandError), number
        assert command.error.errno == errno_here, number
        assert {"zero": "write zeroes", "block_status": "block status"}.get(call, call) in str(command.error)


@chunked
@every
def test_text_of_an_error_is_kept_raw_and_shown_escaped(mode, call):
    text = "плохо\x1b[31m".encode() + b"\xff"
    command = answered(mode, call, lambda command: error_chunk(mode, command, 5, text, done=True))

    assert command.error.server_text == "плохо\x1b[31m\udcff"
    assert "плохо\\x1b[31m\\xff" in str(command.error)
    assert command.error.offset is None


@chunked
@every
def test_error_with_its_end_in_a_chunk_of_its_own(mode, call):
    command = answered(mode, call, lambda command: error_chunk(mode, command, 5) + none(mode, command))

    assert command.error.errno == errno.EIO


@chunked
def test_command_is_not_done_before_the_last_chunk(mode):
    client = connected(mode)
    command = commands.flush(client.engine.limits)
    client.submit(command).hear(error_chunk(mode, command, 5))
    assert not command.done

    client.hear(none(mode, command))
    assert client.completed_once(command)


@chunked
@every
def test_end_of_an_answer_without_its_flag_is_no_success(mode, call):
    if call == "read":
        return
    command = answered(mode, call, lambda command: chunk(mode, command, Chunk.NONE) + none(mode, command))

    assert command.error.errno == errno.EPROTO


@chunked
@every
def test_data_in_answer_to_anything_but_a_read_fail_it(mode, call):
    if call == "read":
        return

    def answer(command):
        return chunk(mode, command, Chunk.OFFSET_DATA, struct.pack(">Q", command.offset) + bytes(command.count), done=True)

    command = answered(mode, call, answer, most=20)

    assert command.error.errno == errno.EPROTO
    assert command.data is None


# ---------------------------------------------------------------------------------------------- offsets


@chunked
@pytest.mark.parametrize(
    ("offset", "kept"),
    [
        (OFFSET, True),
        (OFFSET + COUNT - 1, True),
        (OFFSET - 1, False),
        (OFFSET + COUNT, False),
        (0, False),
        ((1 << 64) - 1, False),
    ],
)
@pytest.mark.parametrize("call", ["read", "write", "block_status"])
def test_offset_of_an_error_is_kept_if_it_lies_within_the_command(mode, offset, kept, call):
    command = answered(mode, call, lambda command: error_offset_chunk(mode, command, 5, offset, b"here", done=True))

    assert command.error.errno == errno.EIO
    assert command.error.server_text == "here"
    assert command.error.offset == (offset if kept else None)


@chunked
def test_first_of_several_errors_counts_and_takes_nothing_from_the_others(mode):
    def answer(command):
        return (
            error_chunk(mode, command, 12, b"first")
            + error_offset_chunk(mode, command, 5, OFFSET + 3, b"second")
            + error_chunk(mode, command, 1, b"third", done=True)
        )

    error = answered(mode, "read", answer).error

    assert (error.errno, error.server_text, error.offset) == (errno.ENOMEM, "first", None)


@chunked
def test_first_of_several_offsets_counts(mode):
    def answer(command):
        return error_offset_chunk(mode, command, 5, OFFSET + 1) + error_offset_chunk(mode, command, 5, OFFSET + 2, done=True)

    assert answered(mode, "read", answer).error.offset == OFFSET + 1


@chunked
def test_broken_chunk_before_an_error_is_the_first_error(mode):
    def answer(command):
        return chunk(mode, command, 3, b"?") + error_offset_chunk(mode, command, 5, OFFSET, done=True)

    error = answered(mode, "read", answer).error
    assert (error.errno, error.offset) == (errno.EPROTO, None)


# ---------------------------------------------------------------------------------------------- broken error chunks


@chunked
@every
@pytest.mark.parametrize("kind", [Chunk.ERROR, Chunk.ERROR_OFFSET])
def test_error_number_0_is_an_error_all_the_same(mode, call, kind):
    command = answered(
        mode, call, lambda command: chunk(mode, command, kind, struct.pack(">IHQ", 0, 0, OFFSET), done=True), most=8
    )

    assert command.error.errno == errno.EPROTO


@chunked
@pytest.mark.parametrize("kind", [Chunk.ERROR, Chunk.ERROR_OFFSET, 0x8003, 0xFFFF])
def test_truncated_error_has_its_number_or_is_a_broken_one(mode, kind):
    for length in range(20):
        payload = (struct.pack(">IH", 28, 6) + b"sorry!" + struct.pack(">Q", OFFSET))[:length]

        error = answered(mode, "read", lambda command, data=payload: chunk(mode, command, kind, data, done=True), most=8).error

        assert error.errno == (errno.EPROTO if length < 4 else errno.ENOSPC), length
        assert error.server_text == ("" if length < 12 else "sorry!"), length
        assert error.offset is None


@chunked
@pytest.mark.parametrize("kind", [0x8003, 0x8004, 0xFFFF])
def test_error_of_an_unknown_type_is_an_error(mode, kind):
    payload = struct.pack(">IH", 1, 2) + b"no" + bytes(100)

    error = answered(mode, "write", lambda command: chunk(mode, command, kind, payload, done=True)).error

    assert (error.errno, error.server_text) == (errno.EPERM, "no")


@chunked
@pytest.mark.parametrize("kind", [Chunk.ERROR, Chunk.ERROR_OFFSET])
@pytest.mark.parametrize("claimed", [9, 100, 0xFFFF])
def test_text_longer_than_its_chunk_is_left_out_and_the_number_kept(mode, kind, claimed):
    payload = struct.pack(">IH", 28, claimed) + bytes(8)

    error = answered(mode, "read", lambda command: chunk(mode, command, kind, payload, done=True)).error

    assert (error.errno, error.server_text, error.offset) == (errno.ENOSPC, "", None)


@chunked
@pytest.mark.parametrize("length", [4096, 4097, 5000, 65535])
@pytest.mark.parametrize("kind", [Chunk.ERROR, Chunk.ERROR_OFFSET])
def test_text_beyond_the_limit_is_left_out_and_the_number_kept(mode, kind, length):
    payload = struct.pack(">IH", 28, length) + b"t" * length + struct.pack(">Q", OFFSET)

    error = answered(mode, "read", lambda command: chunk(mode, command, kind, payload, done=True), most=12).error

    assert error.errno == errno.ENOSPC
    assert error.server_text == ("t" * 4096 if length == 4096 else "")
    assert error.offset == (OFFSET if (length, kind) == (4096, Chunk.ERROR_OFFSET) else None)


@chunked
def test_long_tail_of_an_error_is_skipped(mode):
    payload = struct.pack(">IH", 28, 4) + b"full" + bytes(300_000)

    error = answered(mode, "write", lambda command: chunk(mode, command, Chunk.ERROR, payload, done=True), most=12).error

    assert (error.errno, error.server_text) == (errno.ENOSPC, "full")

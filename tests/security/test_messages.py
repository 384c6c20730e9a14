"""What a server says is believed only as far as it can be checked: magics, lengths, ranges, and how much there may be of it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import struct
from collections.abc import Callable

import pytest

from nbdcore.protocol import constants, wire
from nbdcore.protocol.constants import Chunk, CommandType, Info, Option, OptionReply
from nbdcore.testing.scripted import (
    Reply,
    Request,
    ScriptedServer,
    Step,
    answer,
    chunk,
    data,
    drain,
    error,
    expect_end,
    expect_option,
    greeting,
    hole,
    info_replies,
    option_reply,
    simple,
    status,
    unless_gone,
)
from tests.security.peers import DISK, Api, each_api, number, opened, paused, refused

READ = CommandType.READ


def header(kind: int, length: int, *, done: bool = True) -> Reply:
    """Build a chunk's header alone, whatever length it announces."""
    return lambda request: wire.STRUCTURED_REPLY.pack(constants.STRUCTURED_REPLY_MAGIC, int(done), kind, request.cookie, length)


def check_dies(api: Api, steps: list[Step], call: Callable[[object], object], *, opt_mode: bool = False) -> Exception:
    """Connect, make the call, and see that the connection is dead. Returns the error."""
    with ScriptedServer(steps) as server, contextlib.closing(api(opt_mode=opt_mode)) as client:
        client.connect(server.socket())
        failure = refused(lambda: call(client))
        assert client.dead
    return failure


# ---------------------------------------------------------------------------------------------- magic numbers


@each_api
@pytest.mark.parametrize("shift", [1, 4, 16])
def test_reply_with_an_unknown_magic_is_fatal_and_the_good_one_behind_it_is_not_searched_for(api, shift):
    good = data(b"a" * 512)
    bad = answer(lambda request: bytes(shift) + good(request) + good(request), kind=READ)
    check_dies(api, opened(bad, drain), lambda client: client.read(512))


@each_api
@pytest.mark.parametrize("said", [bytes(18), b"X" + greeting(), greeting()[:8] + bytes(10)])
def test_greeting_with_an_unknown_magic_is_fatal_and_is_answered_with_nothing(api, said):
    with ScriptedServer([said, expect_end]) as server, contextlib.closing(api()) as client:
        refused(lambda: client.connect(server.socket()))
        assert client.dead


@each_api
def test_option_reply_with_an_unknown_magic_is_fatal(api):
    bad = bytes(8) + option_reply(Option.LIST)
    check_dies(api, paused(expect_option(Option.LIST), bad, drain), lambda client: client.exports(), opt_mode=True)


# ---------------------------------------------------------------------------------------------- announced lengths


@each_api
@pytest.mark.parametrize("reply", [OptionReply.SERVER, OptionReply.ERR_UNKNOWN, OptionReply.ACK])
def test_option_reply_that_announces_a_gigabyte_is_fatal_before_a_byte_of_it_comes(api, reply):
    announced = wire.OPTION_REPLY.pack(constants.OPTION_REPLY_MAGIC, Option.LIST, reply, 1 << 30)
    script = paused(expect_option(Option.LIST), announced, expect_end)
    check_dies(api, script, lambda client: client.exports(), opt_mode=True)


@each_api
@pytest.mark.parametrize("kind", [Chunk.OFFSET_DATA, Chunk.OFFSET_HOLE, Chunk.NONE, Chunk.ERROR, Chunk.BLOCK_STATUS, 99])
@pytest.mark.parametrize("length", [(64 << 20) + 9, (1 << 32) - 1])
def test_chunk_that_announces_more_than_anything_legal_is_fatal_before_a_byte_of_it_comes(api, kind, length):
    check_dies(api, opened(answer(header(kind, length), kind=READ), expect_end), lambda client: client.read(512))


def _entry(length: int, name: bytes) -> bytes:
    return struct.pack(">I", length) + name


@each_api
@pytest.mark.parametrize(
    ("option", "reply", "payload"),
    [
        pytest.param(Option.LIST, OptionReply.SERVER, b"\0\0\0", id="export without room for its length"),
        pytest.param(Option.LIST, OptionReply.SERVER, _entry(2, b"a"), id="export name longer than what is left"),
        pytest.param(Option.LIST, OptionReply.SERVER, _entry((1 << 32) - 1, b"a"), id="export name of 4 GiB"),
        pytest.param(Option.LIST, OptionReply.SERVER, _entry(4097, bytes(4097)), id="export name beyond 4096 bytes"),
        pytest.param(Option.LIST, OptionReply.ACK, b"x", id="acknowledgement with data"),
        pytest.param(Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, b"\0\0\0", id="context without its number"),
        pytest.param(Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, b"\0\0\0\1" + b"c" * 4097, id="context beyond 4096"),
        pytest.param(Option.INFO, OptionReply.INFO, b"\0", id="information without its kind"),
        pytest.param(Option.INFO, OptionReply.INFO, wire.INFO_EXPORT.pack(0, 1, 1) + b"x", id="size and flags of 13 bytes"),
        pytest.param(Option.INFO, OptionReply.INFO, wire.INFO_EXPORT.pack(0, 1, 1)[:-1], id="size and flags of 11 bytes"),
        pytest.param(Option.INFO, OptionReply.INFO, wire.INFO_BLOCK_SIZE.pack(3, 1, 512, 512)[:-1], id="block size of 13"),
        pytest.param(Option.INFO, OptionReply.INFO, struct.pack(">H", Info.DESCRIPTION) + bytes(4097), id="description of 4097"),
    ],
)
def test_option_reply_of_a_length_that_its_kind_cannot_have_is_fatal(api, option, reply, payload):
    calls = {Option.LIST: lambda c: c.exports(), Option.SET_META_CONTEXT: lambda c: c.select(), Option.INFO: lambda c: c.info()}
    # What is wrong with one piece of an answer need not be noticed before its end.
    script = [option_reply(option, reply, payload) + option_reply(option), drain]
    if option is Option.SET_META_CONTEXT:  # contexts need structured replies
        granted = [expect_option(Option.STRUCTURED_REPLY), option_reply(Option.STRUCTURED_REPLY)]
        script = [*granted, expect_option(option), *script]
    else:
        script = [expect_option(option), *script]
    check_dies(api, paused(*script), lambda client: (_structured(client, option), calls[option](client)), opt_mode=True)


def _structured(client, option: int) -> None:
    if option == Option.SET_META_CONTEXT:
        (client.client if hasattr(client, "client") else client.handle).opt_structured_reply()


@each_api
def test_simple_reply_that_refuses_has_no_payload_to_wait_for(api):
    steps = [answer(simple(error=5), kind=READ), answer(simple(b"b" * 512), kind=READ), drain]
    with ScriptedServer(opened(*steps, structured=False)) as server, contextlib.closing(api()) as client:
        client.connect(server.socket())
        assert number(refused(lambda: client.read(512))) == errno.EIO
        assert client.read(512) == b"b" * 512


# ---------------------------------------------------------------------------------------------- lengths inside a payload


@each_api
@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (Chunk.ERROR, struct.pack(">IH", 5, 7) + b"six me"),
        (Chunk.ERROR, struct.pack(">IH", 5, 65535)),
        # The text would be within the payload, and leave too little of it for the offset.
        (Chunk.ERROR_OFFSET, struct.pack(">IH", 5, 8) + b"whatever" + bytes(7)),
        (Chunk.ERROR_OFFSET, struct.pack(">IH", 5, 16) + bytes(16)),
    ],
)
def test_text_of_an_error_that_is_longer_than_what_is_left_of_it_is_not_read(api, kind, payload):
    steps = [answer(chunk(kind, payload), kind=READ), answer(data(b"b" * 512), kind=READ), drain]
    with ScriptedServer(opened(*steps)) as server, contextlib.closing(api()) as client:
        client.connect(server.socket())
        assert number(refused(lambda: client.read(512))) in (errno.EIO, errno.EPROTO)
        assert client.read(512) == b"b" * 512


# ---------------------------------------------------------------------------------------------- where data may land


@each_api
@pytest.mark.parametrize("make", [lambda length, at: data(b"\xee" * length, at), hole], ids=["data", "hole"])
@pytest.mark.parametrize(
    ("length", "at"),
    [(512, 4096 - 512), (512, 4096 - 1), (512, 4096 + 512), (513, 4096), (2, 4096 + 511), (512, 0), (512, (1 << 64) - 512)],
)
def test_data_outside_of_the_read_are_fatal_and_land_nowhere(api, make, length, at):
    memory = bytearray(b"\x11" * 1536)
    with ScriptedServer(opened(answer(make(length, at), kind=READ), drain)) as server, contextlib.closing(api()) as client:
        client.connect(server.socket())
        refused(lambda: client.read_into(memoryview(memory)[512:1024], 4096))
        assert client.dead
    assert memory[:512] + memory[1024:] == b"\x11" * 1024
    assert b"\xee" not in memory
    assert len(memory) == 1536


@each_api
@pytest.mark.parametrize(
    "pieces",
    [
        [(512, 0), (512, 0)],
        [(1024, 0), (1, 1023)],
        [(600, 0), (512, 512)],
    ],
)
def test_bytes_of_a_read_that_come_twice_fail_it_though_they_stay_inside(api, pieces):
    chunks = [data(b"a" * length, at, done=False) for length, at in pieces]
    steps = [answer(*chunks, chunk(Chunk.NONE), kind=READ), answer(data(b"b" * 512), kind=READ), drain]
    with ScriptedServer(opened(*steps)) as server, contextlib.closing(api()) as client:
        client.connect(server.socket())
        assert number(refused(lambda: client.read(1024))) == errno.EPROTO
        assert client.read(512) == b"b" * 512


# ---------------------------------------------------------------------------------------------- extents


def raw_status(count: int | None, *words: int, context: int = 1) -> Reply:
    """Build a block status by its fields; `count` is what an extended one says of the number of its extents."""
    if count is None:
        return chunk(Chunk.BLOCK_STATUS, struct.pack(f">I{len(words)}I", context, *words))
    return chunk(Chunk.BLOCK_STATUS_EXT, struct.pack(f">II{len(words)}Q", context, count, *words))


@each_api
@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(raw_status(None), id="none"),
        pytest.param(raw_status(None, 512), id="half a one"),
        pytest.param(raw_status(None, 512, 0, 512), id="one and a half"),
        pytest.param(raw_status(0), id="none, extended"),
        pytest.param(raw_status(1), id="fewer than said"),
        pytest.param(raw_status(1, 512, 0, 512, 0), id="more than said"),
        pytest.param(raw_status((1 << 32) - 1, 512, 0), id="far fewer than said"),
        pytest.param(status(1, [(0, 0), (512, 0)]), id="the first of no bytes"),
        pytest.param(status(1, [(DISK - 512, 0), (1024, 0)]), id="past the end"),
    ],
)
def test_extents_that_cannot_be_fail_the_command_and_the_connection_goes_on(api, reply):
    extended = reply(Request(CommandType.BLOCK_STATUS, 0, 1, 0, 512))[6:8] == Chunk.BLOCK_STATUS_EXT.to_bytes(2)
    steps = [answer(reply, kind=CommandType.BLOCK_STATUS), answer(data(b"b" * 512), kind=READ), drain]
    with ScriptedServer(opened(*steps, extended=extended)) as server, contextlib.closing(api()) as client:
        client.connect(server.socket())
        assert number(refused(lambda: client.status(DISK))) == errno.EPROTO
        assert client.read(512) == b"b" * 512


@each_api
def test_later_extent_of_no_bytes_ends_the_list(api):
    with (
        ScriptedServer(opened(answer(status(1, [(512, 1), (0, 0), (512, 3)])), drain)) as server,
        contextlib.closing(api()) as client,
    ):
        client.connect(server.socket())
        assert client.status(4096) == [(512, 1)]


@each_api
def test_extents_whose_sum_would_wrap_at_64_bits_are_cut_at_the_end_of_the_disk(api):
    extents = [(1 << 63, 1), (1 << 63, 2), (512, 3)]
    with ScriptedServer(opened(answer(status(1, extents)), drain, extended=True)) as server, contextlib.closing(api()) as client:
        client.connect(server.socket())
        assert number(refused(lambda: client.status(4096))) == errno.EPROTO


# ---------------------------------------------------------------------------------------------- without end


def endlessly(reply: bytes) -> Step:
    """Say the same again and again, until the client hangs up."""

    def play(connection) -> None:
        many = reply * max(1, (64 << 10) // len(reply))
        for _ in itertools.count():
            connection.send(many)

    return unless_gone(play)


@each_api
@pytest.mark.parametrize("size", [0, 1 << 20], ids=["short", "long"])
@pytest.mark.parametrize("option", [Option.LIST, Option.INFO])
def test_answers_to_one_option_without_end_are_fatal(api, option, size):
    if option is Option.LIST:
        payload = _entry(1, b"a") + bytes(size)
        said = option_reply(option, OptionReply.SERVER, payload)
    else:
        said = option_reply(option, OptionReply.INFO, struct.pack(">H", 99) + bytes(size))
    call = {Option.LIST: lambda c: c.exports(), Option.INFO: lambda c: c.info()}[option]
    failure = check_dies(api, paused(expect_option(option), endlessly(said)), call, opt_mode=True)
    assert "does not end" in str(failure)


@each_api
def test_contexts_without_end_are_fatal(api):
    granted = [expect_option(Option.STRUCTURED_REPLY), option_reply(Option.STRUCTURED_REPLY)]
    said = option_reply(Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, b"\0\0\0\1" + b"c" * 1000)
    script = paused(*granted, expect_option(Option.SET_META_CONTEXT), endlessly(said))
    call = lambda c: (_structured(c, Option.SET_META_CONTEXT), c.select())  # noqa: E731 (as short as it is)
    assert "does not end" in str(check_dies(api, script, call, opt_mode=True))


@each_api
def test_long_text_of_a_refusal_is_skipped_and_the_connection_goes_on(api):
    refusal = option_reply(Option.LIST, OptionReply.ERR_POLICY, b"because " * (1 << 17))
    script = paused(expect_option(Option.LIST), refusal, expect_option(Option.INFO), info_replies(Option.INFO, DISK), drain)
    with ScriptedServer(script) as server, contextlib.closing(api(opt_mode=True)) as client:
        client.connect(server.socket())
        failure = refused(client.exports)
        assert number(failure) in (errno.EPERM, errno.ENOTSUP)
        assert len(str(failure)) < 1000
        client.info()
        assert client.size == DISK


# ---------------------------------------------------------------------------------------------- errors


@each_api
def test_error_that_names_an_offset_outside_of_the_command_is_kept_without_it(api):
    with ScriptedServer(opened(answer(error(5, offset=1 << 40)), drain)) as server, contextlib.closing(api()) as client:
        client.connect(server.socket())
        failure = refused(lambda: client.read(512))
        assert number(failure) == errno.EIO
        assert getattr(failure, "offset", None) is None

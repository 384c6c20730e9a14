"""Automatic mode: the exact bytes, what each refusal leads to, and how the export is opened on old servers."""

from __future__ import annotations

import errno

import pytest

from nbdcore.errors import NegotiationError, ProtocolViolation, UsageError
from nbdcore.protocol.constants import Option, OptionReply, TransmissionFlag
from nbdcore.protocol.engine import Engine
from nbdcore.protocol.handshake.agreement import BlockSize, Settings
from nbdcore.protocol.state import Phase
from tests.protocol.harness import (
    FLAGS,
    SIZE,
    ack,
    block_size,
    context,
    everywhere,
    export,
    export_name_reply,
    greeting,
    info,
    newborn,
    refused,
)

# ERR_SHUTDOWN is of another kind: see test_shutdown.
REFUSALS = [reply for reply in OptionReply if reply >> 31 and reply != OptionReply.ERR_SHUTDOWN] + [1 << 31 | 0x7777, 0xFFFFFFFF]

# What the client says, message by message, written down from the specification.
CLIENT_FLAGS = bytes.fromhex("00000003")
EXTENDED_HEADERS = bytes.fromhex("49484156454f5054 0000000b 00000000")
STRUCTURED_REPLY = bytes.fromhex("49484156454f5054 00000008 00000000")
SET_META_CONTEXT = bytes.fromhex(
    "49484156454f5054 0000000a 0000001f"
    "00000004 6469736b"  # export name
    "00000001 0000000f 626173653a616c6c6f636174696f6e"  # one query, base:allocation
)
GO = bytes.fromhex(
    "49484156454f5054 00000007 00000010 00000004 6469736b0003 0003 0001 0002"  # wanted: block size, name, description
)
EXPORT_NAME = bytes.fromhex("49484156454f5054 00000001 00000004 6469736b")
ABORT = bytes.fromhex("49484156454f5054 00000002 00000000")

OPENED = export() + ack(Option.GO)


def disk(**settings):
    return newborn(export="disk", **settings)


def test_all_granted_says_these_bytes_and_no_more():
    script = (
        greeting()
        + ack(Option.EXTENDED_HEADERS)
        + context(7, b"base:allocation")
        + ack(Option.SET_META_CONTEXT)
        + block_size(512, 4096, 1 << 25)
        + export(SIZE, FLAGS)
        + info(b"\x00\x01canonical")
        + info(b"\x00\x02a \xff description")
        + ack(Option.GO)
    )
    client = everywhere(lambda: (disk(), script))

    assert client.engine.phase is Phase.CONNECTED
    assert bytes(client.said) == CLIENT_FLAGS + EXTENDED_HEADERS + SET_META_CONTEXT + GO
    agreement = client.engine.agreement
    assert (agreement.protocol, agreement.structured, agreement.extended, agreement.tls) == ("newstyle-fixed", True, True, False)
    assert agreement.contexts == {7: "base:allocation"}
    assert agreement.export.canonical_name == "canonical"
    assert agreement.export.description == "a \udcff description"
    limits = client.engine.limits
    assert (limits.size, limits.flags, limits.minimum, limits.maximum) == (SIZE, FLAGS, 512, 1 << 25)
    assert limits.extended
    assert limits.structured
    assert limits.contexts


def test_options_are_asked_one_by_one_each_after_the_answer_to_the_last():
    client = disk()
    steps = [
        (greeting(), CLIENT_FLAGS + EXTENDED_HEADERS),
        (refused(Option.EXTENDED_HEADERS), STRUCTURED_REPLY),
        (ack(Option.STRUCTURED_REPLY), SET_META_CONTEXT),
        (context(1, b"base:allocation"), b""),
        (ack(Option.SET_META_CONTEXT), GO),
        (export(), b""),
        (ack(Option.GO), b""),
    ]
    for heard, answered in steps:
        client.said.clear()
        client.hear(heard)
        assert bytes(client.said) == answered


@pytest.mark.parametrize("error", REFUSALS)
def test_refused_extended_headers_fall_back_to_structured_replies(error):
    script = (
        greeting()
        + refused(Option.EXTENDED_HEADERS, error, b"no")
        + ack(Option.STRUCTURED_REPLY, Option.SET_META_CONTEXT)
        + OPENED
    )
    client = everywhere(lambda: (disk(), script))

    assert client.engine.phase is Phase.CONNECTED
    assert bytes(client.said) == CLIENT_FLAGS + EXTENDED_HEADERS + STRUCTURED_REPLY + SET_META_CONTEXT + GO
    assert client.engine.agreement.structured
    assert not client.engine.agreement.extended


@pytest.mark.parametrize("error", REFUSALS)
def test_refused_structured_replies_leave_simple_ones_and_no_contexts(error):
    script = greeting() + refused(Option.EXTENDED_HEADERS) + refused(Option.STRUCTURED_REPLY, error) + OPENED
    client = everywhere(lambda: (disk(), script))

    assert client.engine.phase is Phase.CONNECTED
    assert bytes(client.said) == CLIENT_FLAGS + EXTENDED_HEADERS + STRUCTURED_REPLY + GO
    assert not client.engine.agreement.structured
    assert not client.engine.limits.flags & TransmissionFlag.SEND_DF
    assert not client.engine.limits.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD


@pytest.mark.parametrize("error", REFUSALS)
def test_refused_contexts_are_no_reason_to_fail_and_those_named_before_the_refusal_do_not_count(error):
    script = (
        greeting()
        + ack(Option.EXTENDED_HEADERS)
        + context(1, b"base:allocation")
        + refused(Option.SET_META_CONTEXT, error)
        + OPENED
    )
    client = everywhere(lambda: (disk(), script))

    assert client.engine.phase is Phase.CONNECTED
    assert client.engine.agreement.contexts == {}
    assert not client.engine.limits.contexts


ERRNO = {
    OptionReply.ERR_UNSUP: errno.ENOTSUP,
    OptionReply.ERR_POLICY: errno.EPERM,
    OptionReply.ERR_INVALID: errno.EINVAL,
    OptionReply.ERR_PLATFORM: errno.ENOTSUP,
    OptionReply.ERR_TLS_REQD: errno.ENOTSUP,
    OptionReply.ERR_UNKNOWN: errno.ENOENT,
    OptionReply.ERR_SHUTDOWN: errno.ESHUTDOWN,
    OptionReply.ERR_BLOCK_SIZE_REQD: errno.EINVAL,
    OptionReply.ERR_TOO_BIG: errno.EINVAL,
    OptionReply.ERR_EXT_HEADER_REQD: errno.ENOTSUP,
}


@pytest.mark.parametrize("error", [error for error in (*REFUSALS, OptionReply.ERR_SHUTDOWN) if error != OptionReply.ERR_UNSUP])
def test_refused_export_is_final_and_the_server_is_told_goodbye(error):
    script = greeting() + ack(Option.EXTENDED_HEADERS, Option.SET_META_CONTEXT) + refused(Option.GO, error, b"go away\x1b[2J")
    client = everywhere(lambda: (disk(), script))

    failure = client.exchange.error
    assert client.engine.phase is Phase.DEAD
    assert client.engine.error is failure
    assert isinstance(failure, NegotiationError)
    assert failure.errno == ERRNO.get(error, 0)
    assert failure.reply == error
    assert failure.server_text == "go away\x1b[2J"
    assert "\x1b" not in str(failure)
    assert "disk" in str(failure)
    assert bytes(client.said) == CLIENT_FLAGS + EXTENDED_HEADERS + SET_META_CONTEXT + GO + ABORT
    assert client.completed_once(client.exchange)


@pytest.mark.parametrize("zeroes", [False, True])
def test_server_without_go_gets_the_export_name(zeroes):
    flags = 1 if zeroes else 3
    script = (
        greeting(flags)
        + refused(Option.STRUCTURED_REPLY)
        + refused(Option.GO, OptionReply.ERR_UNSUP, b"what?")
        + export_name_reply(zeroes=zeroes)
    )
    client = everywhere(lambda: (disk(extended_headers=False), script))

    assert client.engine.phase is Phase.CONNECTED
    assert client.exchange.error is None
    assert bytes(client.said) == bytes([0, 0, 0, flags]) + STRUCTURED_REPLY + GO + EXPORT_NAME
    assert client.engine.agreement.export.size == SIZE
    assert client.taken == len(script)


def test_server_without_go_is_left_where_extended_headers_forbid_the_export_name():
    script = greeting() + ack(Option.EXTENDED_HEADERS, Option.SET_META_CONTEXT) + refused(Option.GO, text=b"what?")
    client = everywhere(lambda: (disk(), script))

    assert isinstance(client.engine.error, NegotiationError)
    assert (client.engine.error.reply, client.engine.error.server_text) == (OptionReply.ERR_UNSUP, "what?")
    assert bytes(client.said) == CLIENT_FLAGS + EXTENDED_HEADERS + SET_META_CONTEXT + GO + ABORT


def test_server_without_go_keeps_the_contexts_selected_for_the_export():
    script = (
        greeting()
        + ack(Option.STRUCTURED_REPLY)
        + context(3, b"base:allocation")
        + ack(Option.SET_META_CONTEXT)
        + refused(Option.GO)
        + export_name_reply()
    )
    client = everywhere(lambda: (disk(extended_headers=False), script))

    assert client.engine.agreement.contexts == {3: "base:allocation"}
    assert client.engine.limits.contexts


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"structured_replies": False}, GO),
        ({"extended_headers": False}, STRUCTURED_REPLY + SET_META_CONTEXT + GO),
        ({"contexts": ()}, EXTENDED_HEADERS + GO),
    ],
)
def test_wishes_that_are_switched_off_are_not_asked_for(settings, options):
    script = (
        greeting()
        + {
            GO: b"",
            STRUCTURED_REPLY + SET_META_CONTEXT + GO: ack(Option.STRUCTURED_REPLY, Option.SET_META_CONTEXT),
            EXTENDED_HEADERS + GO: ack(Option.EXTENDED_HEADERS),
        }[options]
    )

    client = disk(**settings).hear(script + OPENED)

    assert client.engine.phase is Phase.CONNECTED
    assert bytes(client.said) == CLIENT_FLAGS + options


@pytest.mark.parametrize(
    ("block_size", "full_info", "items"),
    [(True, True, "0003 0003 0001 0002"), (True, False, "0001 0003"), (False, True, "0002 0001 0002"), (False, False, "0000")],
)
def test_information_is_asked_for_as_the_settings_say(block_size, full_info, items):
    client = newborn(structured_replies=False, contexts=(), block_size=block_size, full_info=full_info).hear(greeting())

    assert bytes(client.said).endswith(bytes.fromhex("00000000" + items))


@pytest.mark.parametrize("name", ["a\0b", "x" * 4097, "é" * 2049, "\ud800"])
def test_name_that_cannot_be_sent_is_refused_before_anything_is(name):
    with pytest.raises(UsageError) as refusal:
        Engine(Settings(export=name))
    assert refusal.value.errno == errno.EINVAL
    with pytest.raises(UsageError):
        Engine(Settings(contexts=(name,)))
    with pytest.raises(UsageError):
        Engine(Settings()).choose_export(name)


def test_longest_name_and_bytes_that_are_no_text_are_sent_as_they_are():
    client = newborn(export="\udcff" + "é" * 2047 + "x", contexts=()).hear(greeting() + ack(Option.EXTENDED_HEADERS))

    assert bytes(client.said).endswith(
        (4096).to_bytes(4, "big") + b"\xff" + "é".encode() * 2047 + b"x" + bytes.fromhex("0003 0003 0001 0002")
    )


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, 512, 512), BlockSize(1, 512, 512, advertised=True)),
        ((512, 4096, 1 << 25), BlockSize(512, 4096, 1 << 25, advertised=True)),
        ((65536, 65536, 0xFFFFFFFF), BlockSize(65536, 65536, 0xFFFFFFFF, advertised=True)),
        ((0, 4096, 1 << 25), BlockSize()),
        ((131072, 131072, 1 << 25), BlockSize()),
        ((3, 4096, 1 << 25), BlockSize()),
        ((1, 4097, 1 << 25), BlockSize()),
        ((1, 256, 1 << 25), BlockSize()),
        ((8192, 4096, 1 << 25), BlockSize()),
        ((512, 4096, 2048), BlockSize()),
        ((512, 4096, (1 << 25) + 1), BlockSize(512, 4096, 1 << 25, advertised=True)),
        ((65536, 65536, 65536 + 4096), BlockSize(65536, 65536, 65536, advertised=True)),
        ((0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF), BlockSize()),
    ],
)
def test_block_sizes_that_contradict_the_specification_are_ignored_as_a_whole(sizes, expected):
    client = newborn(structured_replies=False).hear(greeting() + export() + block_size(*sizes) + ack(Option.GO))

    assert client.engine.agreement.export.block_size == expected
    assert client.engine.limits.minimum == expected.minimum
    assert client.engine.limits.maximum == min(expected.maximum, 64 << 20)


@pytest.mark.parametrize(
    ("sizes", "payload"),
    [(None, 32 << 20), ((1, 4096, 65536), 1 << 20), ((1, 4096, 2 << 20), 2 << 20), ((1, 4096, 0xFFFFFFFF), 64 << 20)],
)
def test_most_that_a_write_may_carry_follows_from_the_advertised_maximum(sizes, payload):
    announced = block_size(*sizes) if sizes else b""
    client = newborn(structured_replies=False).hear(greeting() + export() + announced + ack(Option.GO))

    assert client.engine.limits.payload == payload


@pytest.mark.parametrize("flags", [0x8001, 0xFFFF, 0x0041, 0x0801, 0x1001])
@pytest.mark.parametrize("structured", [False, True])
def test_flags_that_what_was_agreed_on_rules_out_do_not_count_and_unknown_ones_are_kept(flags, structured):
    client = newborn(structured_replies=structured, extended_headers=False, contexts=())
    client.hear(greeting() + (ack(Option.STRUCTURED_REPLY) if structured else b"") + export(flags=flags) + ack(Option.GO))

    expected = flags & ~0x1000 if structured else flags & ~0x1080
    if not flags & 0x40:
        expected &= ~0x800
    assert client.engine.limits.flags == expected


def test_last_of_two_pieces_of_information_of_one_kind_counts():
    script = greeting() + export(1, 1) + info(b"\x00\x01one") + export(SIZE, 3) + info(b"\x00\x01two") + ack(Option.GO)
    client = everywhere(lambda: (newborn(structured_replies=False), script))

    assert client.engine.agreement.export.size == SIZE
    assert client.engine.agreement.export.canonical_name == "two"


def test_unknown_information_is_ignored_whatever_its_length():
    script = greeting() + info(b"\x77\x77") + info(b"\x77\x77" + bytes(9000)) + export() + info(b"\x77\x77x") + ack(Option.GO)
    client = everywhere(lambda: (newborn(structured_replies=False), script), most=100)

    assert client.engine.phase is Phase.CONNECTED


@pytest.mark.parametrize("answer", [ack(Option.GO), info(b"\x00\x01name") + ack(Option.GO)], ids=["nothing", "name"])
def test_export_accepted_without_size_and_flags_is_fatal(answer):
    client = everywhere(lambda: (newborn(structured_replies=False), greeting() + answer))

    assert client.engine.phase is Phase.DEAD
    assert isinstance(client.exchange.error, ProtocolViolation)

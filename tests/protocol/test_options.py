"""Opt mode, one option at a time: granted, refused, and every way to answer an option wrongly."""

from __future__ import annotations

import errno
import struct
import tracemalloc

import pytest

from nbdcore.errors import Disconnected, NegotiationError, ProtocolViolation, UsageError
from nbdcore.protocol.constants import Option, OptionReply
from nbdcore.protocol.handshake import negotiation
from nbdcore.protocol.handshake.agreement import Export
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
    feed,
    greeting,
    info,
    newborn,
    refused,
    reply,
    server,
)

QUERIES = ("base:", "x:y")
# Option -> how it is asked, beginning from a client in opt mode; and the option's own success.
ASKED = {
    Option.LIST: (negotiation.list_exports, ()),
    Option.STARTTLS: (negotiation.starttls, ()),
    Option.INFO: (negotiation.info, ("disk",)),
    Option.GO: (negotiation.go, ("disk",)),
    Option.STRUCTURED_REPLY: (negotiation.structured_reply, ()),
    Option.EXTENDED_HEADERS: (negotiation.extended_headers, ()),
    Option.LIST_META_CONTEXT: (negotiation.list_meta_context, ("disk", QUERIES)),
    Option.SET_META_CONTEXT: (negotiation.set_meta_context, ("disk", QUERIES)),
}
# The bytes of each request, from the specification.
MAGIC = "49484156454f5054"
SAID = {
    Option.LIST: f"{MAGIC} 00000003 00000000",
    Option.STARTTLS: f"{MAGIC} 00000005 00000000",
    Option.INFO: f"{MAGIC} 00000006 00000010 00000004 6469736b 0003 0003 0001 0002",
    Option.GO: f"{MAGIC} 00000007 00000010 00000004 6469736b 0003 0003 0001 0002",
    Option.STRUCTURED_REPLY: f"{MAGIC} 00000008 00000000",
    Option.EXTENDED_HEADERS: f"{MAGIC} 0000000b 00000000",
    Option.LIST_META_CONTEXT: f"{MAGIC} 00000009 0000001c 00000004 6469736b 00000002 00000005 626173653a 00000003 783a79",
    Option.SET_META_CONTEXT: f"{MAGIC} 0000000a 0000001c 00000004 6469736b 00000002 00000005 626173653a 00000003 783a79",
}
REFUSALS = [reply for reply in OptionReply if reply >> 31] + [0xFFFFFFFF]
#: Options whose refusal is an ordinary answer.
YES_OR_NO = (Option.STARTTLS, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS)


def paused(flags=3):
    """A client in opt mode that has agreed on nothing yet."""
    client = newborn(opt_mode=True, structured_replies=False).hear(greeting(flags))
    assert client.engine.phase is Phase.NEGOTIATING
    client.said.clear()
    client.exchanges.clear()
    client.taken = 0
    return client


def ask(option, client=None, *, name="disk"):
    client = client or paused()
    conversation, arguments = ASKED[option]
    arguments = (name, *arguments[1:]) if arguments else ()
    engine = client.engine
    client.follow(engine.option(conversation(engine.agreement, engine.settings, *arguments), enters=option is Option.GO))
    return client


@pytest.mark.parametrize("option", ASKED)
def test_request_is_these_bytes_and_the_phase_is_connecting_until_it_is_answered(option):
    client = ask(option)

    assert bytes(client.said) == bytes.fromhex(SAID[option])
    assert client.engine.phase is Phase.CONNECTING
    assert not client.exchange.done


@pytest.mark.parametrize("option", ASKED)
@pytest.mark.parametrize("error", [reply for reply in REFUSALS if reply != OptionReply.ERR_SHUTDOWN])  # see test_shutdown
def test_refusal_leaves_the_connection_negotiating(option, error):
    if option is Option.GO and error == OptionReply.ERR_UNSUP:
        return  # the one refusal that is not the end of it: test_go_falls_back_to_the_export_name
    client = everywhere(lambda: (ask(option), refused(option, error, "naïve".encode())))

    assert client.engine.phase is Phase.NEGOTIATING
    assert client.completed_once(client.exchange)
    if option in YES_OR_NO:
        assert client.exchange.result is False
        assert client.exchange.error is None
    else:
        failure = client.exchange.error
        assert isinstance(failure, NegotiationError)
        assert (failure.reply, failure.server_text) == (error, "naïve")
    assert not len(client.engine.room()), "between options the server has nothing to say"
    assert client.engine.error is None
    ask(Option.LIST, client).hear(ack(Option.LIST))
    assert client.exchange.result == []


@pytest.mark.parametrize("option", [option for option in ASKED if option is not Option.STARTTLS])
def test_server_without_fixed_newstyle_is_asked_nothing(option):
    client = ask(option, paused(flags=2))

    if option is Option.GO:
        assert bytes(client.said) == bytes.fromhex(f"{MAGIC} 00000001 00000004 6469736b")
        return
    assert isinstance(client.exchange.error, NegotiationError)
    assert client.exchange.error.errno == errno.ENOTSUP
    assert bytes(client.said) == b""
    assert client.engine.phase is Phase.NEGOTIATING


def test_list_returns_names_and_descriptions_as_the_server_has_them():
    script = server(b"") + server(b"disk", b"my disk") + server(b"\xff\xfe\x00", b"\x1b") + server(b"disk") + ack(Option.LIST)
    client = everywhere(lambda: (ask(Option.LIST), script))

    assert client.exchange.result == [Export(""), Export("disk", "my disk"), Export("\udcff\udcfe\0", "\x1b"), Export("disk")]
    assert client.engine.phase is Phase.NEGOTIATING


def test_list_that_ends_in_an_error_is_an_error():
    client = everywhere(lambda: (ask(Option.LIST), server(b"disk") + refused(Option.LIST, OptionReply.ERR_SHUTDOWN)))

    assert client.exchange.error.errno == errno.ESHUTDOWN


def test_longest_names_and_descriptions_are_taken_and_longer_entries_left_out():
    longest, too_long = server(b"n" * 4096, b"d" * 4096), server(b"n" * 4096, b"d" * 4097)
    client = everywhere(lambda: (ask(Option.LIST), longest + too_long + server(b"x") + ack(Option.LIST)), most=60)

    assert [entry.name for entry in client.exchange.result] == ["n" * 4096, "x"]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0",
        b"\0\0\0",
        struct.pack(">I", 1),
        struct.pack(">I", 5) + b"disk",
        struct.pack(">I", 0xFFFFFFFF) + b"disk",
        struct.pack(">I", 4097) + b"n" * 4097,
        struct.pack(">I", 1) + b"n" + b"d" * 4097,
    ],
    ids=["empty", "1 byte", "3 bytes", "1 of 0", "5 of 4", "4 GiB", "long name", "long description"],
)
def test_broken_entry_in_the_list_is_fatal(payload):
    client = everywhere(lambda: (ask(Option.LIST), reply(Option.LIST, OptionReply.SERVER, payload) + ack(Option.LIST)), most=60)

    assert client.engine.phase is Phase.DEAD
    assert isinstance(client.exchange.error, ProtocolViolation)
    assert client.exchange.error.errno == errno.EPROTO


def test_info_describes_the_export_and_opens_nothing():
    script = (
        export(SIZE, FLAGS, Option.INFO)
        + block_size(1, 4096, 1 << 25, Option.INFO)
        + info(b"\x00\x02hello", Option.INFO)
        + ack(Option.INFO)
    )
    client = everywhere(lambda: (ask(Option.INFO), script))

    described = client.exchange.result
    assert client.engine.phase is Phase.NEGOTIATING
    assert client.engine.agreement.export is described
    assert (described.name, described.size, described.description) == ("disk", SIZE, "hello")


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0",
        b"\0\0",
        bytes(11),
        bytes(13),
        b"\0\3" + bytes(11),
        b"\0\3" + bytes(13),
        b"\0\1" + b"n" * 4097,
        b"\0\2" + b"d" * 4097,
    ],
    ids=["empty", "half a type", "export 2", "export 11", "export 13", "sizes 13", "sizes 15", "long name", "long description"],
)
def test_information_of_a_wrong_length_is_fatal(option, payload):
    script = export(option=option) + info(payload, option) + ack(option)
    client = everywhere(lambda: (ask(option), script), most=60)

    assert client.engine.phase is Phase.DEAD
    assert isinstance(client.exchange.error, ProtocolViolation)


def test_longest_description_is_taken():
    text = b"d" * 4096
    client = ask(Option.INFO).hear(export(option=Option.INFO) + info(b"\0\2" + text, Option.INFO) + ack(Option.INFO))

    assert client.exchange.result.description == text.decode()


@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_contexts_are_returned_in_the_servers_order(option):
    script = (
        context(9, b"x:y", option) + context(2, b"base:allocation", option) + context(0, b"\xff" * 4096, option) + ack(option)
    )
    client = everywhere(lambda: (ask(option), script), most=60)

    assert client.exchange.result == ["x:y", "base:allocation", "\udcff" * 4096]
    selected = {9: "x:y", 2: "base:allocation", 0: "\udcff" * 4096}
    assert client.engine.agreement.contexts == (selected if option is Option.SET_META_CONTEXT else {})


def test_first_of_two_contexts_with_one_number_counts():
    option = Option.SET_META_CONTEXT
    client = everywhere(lambda: (ask(option), context(1, b"a:a") + context(2, b"b:b") + context(1, b"c:c") + ack(option)))

    assert client.engine.agreement.contexts == {1: "a:a", 2: "b:b"}
    assert client.exchange.result == ["a:a", "b:b"]


def test_listed_contexts_may_all_have_one_number():
    option = Option.LIST_META_CONTEXT
    client = everywhere(lambda: (ask(option), context(0, b"a:a", option) + context(0, b"b:b", option) + ack(option)))

    assert client.exchange.result == ["a:a", "b:b"]


@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
@pytest.mark.parametrize("length", [0, 1, 3, 4, 4 + 4097, 4 + 8192, 4 + 8193, 20000])
def test_context_of_a_wrong_length_is_fatal(option, length):
    script = reply(option, OptionReply.META_CONTEXT, b"x" * length) + ack(option)
    client = everywhere(lambda: (ask(option), script), most=60)

    assert client.engine.phase is Phase.DEAD
    assert isinstance(client.exchange.error, ProtocolViolation)
    assert client.engine.agreement.contexts == {}


# ---------------------------------------------------------------------------------------------- answers that are none


@pytest.mark.parametrize("option", ASKED)
def test_answer_with_a_wrong_magic_is_fatal(option):
    client = everywhere(lambda: (ask(option), b"\xff" + ack(option)[1:]))

    assert client.engine.phase is Phase.DEAD
    assert isinstance(client.exchange.error, ProtocolViolation)
    assert client.taken == 20


@pytest.mark.parametrize("option", ASKED)
def test_answer_to_another_option_is_fatal(option):
    client = everywhere(lambda: (ask(option), ack(Option.ABORT)))

    assert client.engine.phase is Phase.DEAD
    assert isinstance(client.exchange.error, ProtocolViolation)


@pytest.mark.parametrize("option", ASKED)
@pytest.mark.parametrize("length", [1, 8, 1 << 26])
def test_acknowledgement_with_data_is_fatal_without_waiting_for_them(option, length):
    client = everywhere(lambda: (ask(option), reply(option, OptionReply.ACK)[:-4] + struct.pack(">I", length)))

    assert client.engine.phase is Phase.DEAD
    assert isinstance(client.exchange.error, ProtocolViolation)
    assert not client.engine.wants_tls


@pytest.mark.parametrize("option", ASKED)
@pytest.mark.parametrize("kind", [OptionReply.ACK, OptionReply.INFO, OptionReply.ERR_UNSUP, OptionReply.SERVER])
@pytest.mark.parametrize("length", [(64 << 20) + 1, 0xFFFFFFFF])
def test_answer_that_announces_too_much_is_fatal_at_once(option, kind, length):
    client = everywhere(lambda: (ask(option), reply(option, kind)[:-4] + struct.pack(">I", length)))

    assert client.engine.phase is Phase.DEAD
    assert isinstance(client.exchange.error, ProtocolViolation)


EXPECTED = {
    Option.LIST: OptionReply.SERVER,
    Option.INFO: OptionReply.INFO,
    Option.GO: OptionReply.INFO,
    Option.LIST_META_CONTEXT: OptionReply.META_CONTEXT,
    Option.SET_META_CONTEXT: OptionReply.META_CONTEXT,
}


@pytest.mark.parametrize("option", ASKED)
@pytest.mark.parametrize("kind", [0, OptionReply.SERVER, OptionReply.INFO, OptionReply.META_CONTEXT, 5, 0x7FFFFFFF])
def test_answer_of_an_unexpected_type_is_fatal(option, kind):
    if EXPECTED.get(option) == kind:
        return  # what is expected is tested everywhere else
    client = everywhere(lambda: (ask(option), reply(option, kind, bytes(12))))

    assert client.engine.phase is Phase.DEAD
    assert isinstance(client.exchange.error, ProtocolViolation)


@pytest.mark.parametrize("length", [4097, 10000, 200000])
def test_long_explanation_of_a_refusal_is_cut(length):
    client = everywhere(lambda: (ask(Option.INFO), refused(Option.INFO, OptionReply.ERR_UNKNOWN, b"t" * length)), most=20)

    assert client.exchange.error.server_text == "t" * 4096
    assert client.engine.phase is Phase.NEGOTIATING


@pytest.mark.parametrize("option", EXPECTED)
def test_answers_without_end_are_fatal(option):
    client = ask(option)
    one = reply(option, EXPECTED[option], b"\x77\x77\x77\x77\x77" if option is not Option.LIST else bytes(4))
    burst = one * 1000

    heard = 0
    while client.engine.phase is Phase.CONNECTING and heard < 70:
        feed(client.engine, burst)
        heard += 1

    assert isinstance(client.exchange.error, ProtocolViolation)
    assert heard == 66, "65536 replies are the limit"


def test_long_answers_without_end_are_fatal_before_they_fill_the_memory():
    client = ask(Option.LIST)
    burst = server(b"n" * 4096, b"d" * 4096) * 128  # a megabyte

    tracemalloc.start()
    try:
        heard = 0
        while client.engine.phase is Phase.CONNECTING and heard < 100:
            feed(client.engine, burst)
            heard += 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert isinstance(client.exchange.error, ProtocolViolation)
    assert heard == 64
    assert peak < 80 << 20


def test_answers_too_long_to_keep_without_end_are_fatal_too():
    client = ask(Option.INFO)
    burst = info(b"\x77\x77" + bytes(1 << 20), Option.INFO)

    heard = 0
    while client.engine.phase is Phase.CONNECTING and heard < 100:
        feed(client.engine, burst)
        heard += 1

    assert isinstance(client.exchange.error, ProtocolViolation)
    assert heard == 64


def test_one_long_answer_is_drained_in_small_steps():
    client = ask(Option.INFO)
    feed(client.engine, reply(Option.INFO, OptionReply.INFO)[:-4] + struct.pack(">I", 32 << 20))

    most = 0
    left = 32 << 20
    while left:
        room = client.engine.room()
        most = max(most, len(room))
        client.engine.received(len(room))
        left -= len(room)

    assert most <= 1 << 16
    client.hear(export(option=Option.INFO), ack(Option.INFO))
    assert client.exchange.result.size == SIZE


# ---------------------------------------------------------------------------------------------- going, leaving


@pytest.mark.parametrize("flags", [3, 1])
def test_go_falls_back_to_the_export_name(flags):
    script = refused(Option.GO) + export_name_reply(zeroes=flags == 1)
    client = everywhere(lambda: (ask(Option.GO, paused(flags)), script))

    assert client.engine.phase is Phase.CONNECTED
    assert bytes(client.said) == bytes.fromhex(SAID[Option.GO] + f"{MAGIC} 00000001 00000004 6469736b")


def test_go_refused_can_be_tried_again_with_another_name():
    client = ask(Option.GO).hear(refused(Option.GO, OptionReply.ERR_UNKNOWN))
    assert client.exchange.error.errno == errno.ENOENT

    ask(Option.GO, client, name="other").hear(export() + ack(Option.GO))

    assert client.engine.phase is Phase.CONNECTED
    assert client.engine.agreement.export.name == "other"


def test_abort_says_goodbye_and_closes_without_waiting():
    client = paused()
    client.engine.abort()

    assert client.engine.phase is Phase.CLOSED
    assert client.speak() == bytes.fromhex(f"{MAGIC} 00000002 00000000")


def test_abort_of_a_server_without_fixed_newstyle_says_nothing():
    client = paused(flags=2)
    client.engine.abort()

    assert client.engine.phase is Phase.CLOSED
    assert client.speak() == b""


@pytest.mark.parametrize("option", ASKED)
def test_server_that_hangs_up_over_an_option_leaves_a_dead_connection_and_one_outcome(option):
    client = everywhere(lambda: (ask(option), b""), eof=True)

    assert client.engine.phase is Phase.DEAD
    assert isinstance(client.exchange.error, Disconnected)
    assert client.completed_once(client.exchange)
    client.engine.received_eof()
    client.engine.fail(Disconnected(0, "again"))
    assert client.completed_once(client.exchange)


@pytest.mark.parametrize("option", [Option.INFO, Option.GO, Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
@pytest.mark.parametrize("name", ["a\0b", "x" * 4097])
def test_name_that_cannot_be_sent_is_refused_with_nothing_sent_and_nothing_forgotten(option, name):
    client = ask(Option.INFO).hear(export(option=Option.INFO) + ack(Option.INFO))
    ask(Option.SET_META_CONTEXT, client).hear(context(1, b"a:a") + ack(Option.SET_META_CONTEXT))
    known, selected = client.engine.agreement.export, client.engine.agreement.contexts
    client.said.clear()

    with pytest.raises(UsageError):
        ask(option, client, name=name)

    assert client.engine.phase is Phase.NEGOTIATING
    assert client.speak() == b""
    assert client.engine.agreement.export is known
    assert client.engine.agreement.contexts is selected
    ask(Option.LIST, client).hear(ack(Option.LIST))
    assert client.exchange.result == []


def test_second_option_while_one_is_under_way_is_refused_and_harms_nobody():
    client = ask(Option.LIST)
    engine = client.engine

    with pytest.raises(UsageError) as refusal:
        engine.option(negotiation.structured_reply(engine.agreement, engine.settings))

    assert refusal.value.errno == errno.EINVAL
    assert client.speak() == b""
    client.hear(server(b"disk") + ack(Option.LIST))
    assert client.exchanges[0].result == [Export("disk")]


@pytest.mark.parametrize("option", ASKED)
def test_option_on_a_connection_that_has_ended_is_refused(option):
    for flags in (3, 2):
        client = paused(flags)
        client.engine.fail(Disconnected(0, "gone"))

        with pytest.raises(Disconnected, match="gone"):
            ask(option, client)

        assert client.engine.phase is Phase.DEAD
        assert client.speak() == b""


# ---------------------------------------------------------------------------------------------- what wipes what


def knowing():
    """A client in opt mode that has agreed on all there is, and selected contexts for "disk"."""
    client = newborn(opt_mode=True).hear(greeting() + ack(Option.EXTENDED_HEADERS))
    ask(Option.INFO, client).hear(export(option=Option.INFO) + ack(Option.INFO))
    ask(Option.SET_META_CONTEXT, client).hear(context(5, b"a:a") + ack(Option.SET_META_CONTEXT))
    agreement = client.engine.agreement
    assert agreement.extended
    assert agreement.structured
    assert agreement.export is not None
    assert agreement.contexts == {5: "a:a"}
    return client


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_asking_about_the_same_export_forgets_what_was_known_and_keeps_its_contexts(option):
    client = ask(option, knowing())
    assert client.engine.agreement.export is None

    client.hear(export(1234, option=option) + ack(option))

    assert client.engine.agreement.export.size == 1234
    assert client.engine.agreement.contexts == {5: "a:a"}
    assert client.engine.agreement.extended


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_asking_about_another_export_forgets_its_contexts_too(option):
    client = ask(option, knowing(), name="other").hear(export(option=option) + ack(option))

    assert client.engine.agreement.contexts == {}
    assert client.engine.agreement.contexts_for is None


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_refused_export_leaves_nothing_known_and_no_contexts(option):
    client = ask(option, knowing()).hear(export(option=option) + refused(option, OptionReply.ERR_UNKNOWN))

    assert client.engine.agreement.export is None
    assert client.engine.agreement.contexts == {}
    assert client.engine.agreement.extended
    assert client.engine.agreement.structured


def test_selecting_contexts_replaces_those_selected_before_as_soon_as_it_is_asked_for():
    client = ask(Option.SET_META_CONTEXT, knowing())
    assert client.engine.agreement.contexts == {}

    client.hear(context(6, b"b:b") + ack(Option.SET_META_CONTEXT))

    assert client.engine.agreement.contexts == {6: "b:b"}
    assert client.engine.agreement.export is not None


def test_selecting_contexts_in_vain_leaves_none_selected():
    client = ask(Option.SET_META_CONTEXT, knowing()).hear(
        context(6, b"b:b") + refused(Option.SET_META_CONTEXT, OptionReply.ERR_TOO_BIG)
    )

    assert client.engine.agreement.contexts == {}
    assert client.engine.agreement.export is not None


@pytest.mark.parametrize("option", [Option.LIST, Option.LIST_META_CONTEXT])
@pytest.mark.parametrize("granted", [True, False])
def test_listing_changes_nothing(option, granted):
    client = ask(option, knowing()).hear(ack(option) if granted else refused(option))

    agreement = client.engine.agreement
    assert agreement.export is not None
    assert agreement.contexts == {5: "a:a"}
    assert agreement.extended


@pytest.mark.parametrize("option", [Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS])
def test_refusal_of_what_was_granted_before_takes_nothing_away(option):
    client = ask(option, knowing()).hear(refused(option, OptionReply.ERR_INVALID))

    assert client.engine.agreement.extended
    assert client.engine.agreement.structured


def test_starting_tls_forgets_everything_but_that_it_is_on():
    client = ask(Option.STARTTLS, knowing()).hear(ack(Option.STARTTLS))
    client.engine.tls_started()

    agreement = client.engine.agreement
    assert agreement.tls
    assert (agreement.structured, agreement.extended, agreement.export, agreement.contexts) == (False, False, None, {})
    assert agreement.contexts_for is None
    assert client.engine.phase is Phase.NEGOTIATING


def test_starting_tls_in_vain_forgets_nothing():
    client = ask(Option.STARTTLS, knowing()).hear(refused(Option.STARTTLS, OptionReply.ERR_POLICY))

    assert client.engine.agreement.extended
    assert client.engine.agreement.contexts == {5: "a:a"}


def enter(client, name):
    engine = client.engine
    client.follow(engine.option(negotiation.enter(engine.agreement, engine.settings, name), enters=True))
    return client


def test_entering_selects_the_settings_contexts_unless_some_are_selected_for_that_export():
    client = knowing()
    client.said.clear()
    enter(client, "disk")
    assert bytes(client.said) == bytes.fromhex(SAID[Option.GO])

    client = knowing()
    client.said.clear()
    enter(client, "d")
    assert bytes(client.said) == bytes.fromhex(
        f"{MAGIC} 0000000a 0000001c 00000001 64 00000001 0000000f 626173653a616c6c6f636174696f6e"
    )


def test_selection_of_no_contexts_at_all_is_a_selection_that_entering_respects():
    client = newborn(opt_mode=True).hear(greeting() + ack(Option.EXTENDED_HEADERS))
    engine = client.engine
    client.follow(engine.option(negotiation.set_meta_context(engine.agreement, engine.settings, "disk", ())))
    client.hear(ack(Option.SET_META_CONTEXT))
    client.said.clear()

    enter(client, "disk").hear(export() + ack(Option.GO))

    assert bytes(client.said) == bytes.fromhex(SAID[Option.GO])
    assert not engine.limits.contexts

"""TLS, as far as the core goes: the hand-over, and that REQUIRE lets nothing else go out in the clear (CVE-2019-14842)."""

from __future__ import annotations

import errno

import pytest

from nbdcore.errors import Disconnected, ProtocolViolation, TLSError
from nbdcore.protocol.constants import Option, OptionReply
from nbdcore.protocol.handshake import negotiation
from nbdcore.protocol.handshake.agreement import Agreement, Settings, TLSPolicy
from nbdcore.protocol.state import Phase
from tests.protocol.harness import (
    ack,
    context,
    everywhere,
    export,
    export_name_reply,
    feed,
    greeting,
    newborn,
    oldstyle,
    refused,
    reply,
)

REFUSALS = [reply for reply in OptionReply if reply >> 31] + [1 << 31, 0xFFFFFFFF]
CLIENT_FLAGS = bytes.fromhex("00000003")
STARTTLS = bytes.fromhex("49484156454f5054 00000005 00000000")
EXTENDED_HEADERS = bytes.fromhex("49484156454f5054 0000000b 00000000")
GRANTED = greeting() + ack(Option.STARTTLS)
INSIDE = ack(Option.EXTENDED_HEADERS, Option.SET_META_CONTEXT) + export() + ack(Option.GO)

wanting = pytest.mark.parametrize("policy", [TLSPolicy.ALLOW, TLSPolicy.REQUIRE])
either_mode = pytest.mark.parametrize("opt_mode", [False, True], ids=["automatic", "opt mode"])


@wanting
def test_starttls_is_the_first_option_and_its_grant_asks_for_the_stream_to_be_swapped(policy):
    client = everywhere(lambda: (newborn(tls=policy), GRANTED))

    assert bytes(client.said) == CLIENT_FLAGS + STARTTLS
    assert client.engine.wants_tls
    assert not client.engine.agreement.tls
    assert client.engine.phase is Phase.CONNECTING


@wanting
def test_bytes_behind_the_grant_are_not_taken_until_the_stream_is_swapped(policy):
    injected = ack(Option.EXTENDED_HEADERS) + INSIDE
    client = everywhere(lambda: (newborn(tls=policy), GRANTED + injected))

    assert client.taken == len(GRANTED)
    assert not len(client.engine.room())
    assert bytes(client.said) == CLIENT_FLAGS + STARTTLS
    assert client.engine.wants_tls


@wanting
def test_handshake_goes_on_inside_tls_from_the_beginning(policy):
    client = newborn(tls=policy).hear(GRANTED)
    client.said.clear()

    client.engine.tls_started()
    assert not client.engine.wants_tls
    assert client.speak() == EXTENDED_HEADERS
    client.hear(INSIDE)

    assert client.engine.phase is Phase.CONNECTED
    assert client.engine.agreement.tls


def test_tls_is_not_asked_for_when_disabled():
    client = newborn(tls=TLSPolicy.DISABLE).hear(greeting())

    assert bytes(client.said) == CLIENT_FLAGS + EXTENDED_HEADERS


@pytest.mark.parametrize("error", [error for error in REFUSALS if error != OptionReply.ERR_SHUTDOWN])  # see test_shutdown
def test_allow_goes_on_in_the_clear_after_a_refusal(error):
    client = everywhere(lambda: (newborn(tls=TLSPolicy.ALLOW), greeting() + refused(Option.STARTTLS, error) + INSIDE))

    assert client.engine.phase is Phase.CONNECTED
    assert not client.engine.agreement.tls


@pytest.mark.parametrize("answer", [oldstyle(), greeting(0) + export_name_reply(zeroes=True)], ids=["oldstyle", "newstyle"])
def test_allow_goes_on_in_the_clear_with_a_server_that_cannot_do_tls(answer):
    assert newborn(tls=TLSPolicy.ALLOW).hear(answer).engine.phase is Phase.CONNECTED


@wanting
def test_failed_tls_handshake_is_never_followed_by_plain_text(policy):
    client = newborn(tls=policy).hear(GRANTED)
    client.said.clear()

    client.engine.fail(TLSError(0, "bad certificate"))
    assert feed(client.engine, INSIDE) == 0

    assert client.engine.phase is Phase.DEAD
    assert not client.engine.wants_tls
    assert isinstance(client.exchange.error, TLSError)
    assert client.speak() == b""


# ---------------------------------------------------------------------------------------------- REQUIRE


def check_refused(client, said):
    assert client.engine.phase is Phase.DEAD
    assert isinstance(client.engine.error, TLSError)
    assert client.engine.error.errno == errno.ENOTSUP
    assert bytes(client.said) == said
    assert client.speak() == b""
    assert client.engine.agreement.export is None


@either_mode
def test_require_refuses_an_oldstyle_server(opt_mode):
    client = everywhere(lambda: (newborn(tls=TLSPolicy.REQUIRE, opt_mode=opt_mode), oldstyle()))

    check_refused(client, b"")
    assert client.exchange.error is client.engine.error


@either_mode
@pytest.mark.parametrize("flags", [0, 2])
def test_require_refuses_a_server_without_fixed_newstyle(flags, opt_mode):
    wanting = {"tls": TLSPolicy.REQUIRE, "opt_mode": opt_mode}
    client = everywhere(lambda: (newborn(**wanting), greeting(flags) + export_name_reply(zeroes=not flags)))

    check_refused(client, b"")


@pytest.mark.parametrize("error", REFUSALS)
@pytest.mark.parametrize("settings", [{}, {"structured_replies": False}, {"contexts": ()}], ids=["all", "simple", "no contexts"])
def test_require_sends_nothing_after_a_refusal(error, settings):
    script = greeting() + refused(Option.STARTTLS, error, b"no TLS here") + INSIDE
    client = everywhere(lambda: (newborn(tls=TLSPolicy.REQUIRE, **settings), script))

    check_refused(client, CLIENT_FLAGS + STARTTLS)
    assert client.completed_once(client.exchange)


@pytest.mark.parametrize("kind", [OptionReply.SERVER, OptionReply.INFO, OptionReply.META_CONTEXT, 0, 0x7FFFFFFF])
@wanting
def test_strange_answer_to_starttls_is_fatal_whatever_the_policy(kind, policy):
    client = everywhere(lambda: (newborn(tls=policy), greeting() + reply(Option.STARTTLS, kind)))

    assert client.engine.phase is Phase.DEAD
    assert isinstance(client.exchange.error, ProtocolViolation)
    assert bytes(client.said) == CLIENT_FLAGS + STARTTLS


@pytest.mark.parametrize("length", range(20))
@wanting
def test_server_that_hangs_up_over_starttls_is_not_asked_again(length, policy):
    client = newborn(tls=policy).hear(greeting() + ack(Option.STARTTLS)[:length])
    client.engine.received_eof()

    assert client.engine.phase is Phase.DEAD
    assert isinstance(client.exchange.error, Disconnected)
    assert bytes(client.said) == CLIENT_FLAGS + STARTTLS


@pytest.mark.parametrize(
    ("conversation", "arguments"),
    [
        (negotiation.list_exports, ()),
        (negotiation.info, ("",)),
        (negotiation.go, ("",)),
        (negotiation.enter, ("",)),
        (negotiation.structured_reply, ()),
        (negotiation.extended_headers, ()),
        (negotiation.list_meta_context, ("", ())),
        (negotiation.set_meta_context, ("", ())),
    ],
)
@pytest.mark.parametrize("protocol", ["newstyle", "newstyle-fixed"])
def test_require_lets_no_option_out_in_the_clear(conversation, arguments, protocol):
    agreement = Agreement(protocol=protocol)
    with pytest.raises(TLSError, match="TLS is required, and it has not been started"):
        next(conversation(agreement, Settings(tls=TLSPolicy.REQUIRE), *arguments))


@either_mode
def test_require_tells_of_the_refusal_in_the_servers_own_words(opt_mode):
    client = newborn(tls=TLSPolicy.REQUIRE, opt_mode=opt_mode)
    client.hear(greeting() + refused(Option.STARTTLS, OptionReply.ERR_POLICY, b"not for you\x1b"))

    check_refused(client, CLIENT_FLAGS + STARTTLS)
    assert client.engine.error.server_text == "not for you\x1b"
    assert str(client.engine.error) == (
        "TLS is required, and starting TLS failed: the server's policy forbids it (ask its owner for TLS, or, if what is sent "
        "may be read and changed on the way, connect without: nbd:// in place of nbds://, or no tls=): not for you\\x1b (ENOTSUP)"
    )


@either_mode
def test_require_does_not_advise_against_tls_where_a_server_shuts_down(opt_mode):
    client = newborn(tls=TLSPolicy.REQUIRE, opt_mode=opt_mode)
    client.hear(greeting() + refused(Option.STARTTLS, OptionReply.ERR_SHUTDOWN, b""))

    check_refused(client, CLIENT_FLAGS + STARTTLS)
    assert "nbd://" not in str(client.engine.error)


def test_require_in_opt_mode_does_not_even_say_goodbye_in_the_clear():
    client = newborn(tls=TLSPolicy.REQUIRE, opt_mode=True, structured_replies=False)
    client.hear(greeting() + refused(Option.STARTTLS))
    client.engine.abort()

    assert client.speak() == b""


def test_require_is_content_once_tls_is_on():
    client = newborn(tls=TLSPolicy.REQUIRE, opt_mode=True).hear(GRANTED)
    client.engine.tls_started()
    client.hear(ack(Option.EXTENDED_HEADERS))
    assert client.engine.phase is Phase.NEGOTIATING

    engine = client.engine
    client.follow(engine.option(negotiation.enter(engine.agreement, engine.settings, ""), enters=True))
    client.hear(context(1, b"base:allocation") + ack(Option.SET_META_CONTEXT) + export() + ack(Option.GO))

    assert engine.phase is Phase.CONNECTED
    assert engine.agreement.contexts == {1: "base:allocation"}


def starttls_again():
    client = newborn(tls=TLSPolicy.REQUIRE, opt_mode=True, structured_replies=False).hear(GRANTED)
    client.engine.tls_started()
    engine = client.engine
    client.follow(engine.option(negotiation.starttls(engine.agreement, engine.settings)))
    return client


def test_tls_granted_a_second_time_is_fatal():
    client = everywhere(lambda: (starttls_again(), ack(Option.STARTTLS)))

    assert client.engine.phase is Phase.DEAD
    assert isinstance(client.exchange.error, ProtocolViolation)
    assert not client.engine.wants_tls


def test_tls_refused_a_second_time_leaves_the_first():
    client = everywhere(lambda: (starttls_again(), refused(Option.STARTTLS, OptionReply.ERR_INVALID)))

    assert client.exchange.result is False
    assert client.engine.phase is Phase.NEGOTIATING
    assert client.engine.agreement.tls

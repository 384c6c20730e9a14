"""Opt mode: what each option answers, what it wipes, and what a refusal leaves."""

from __future__ import annotations

import errno

import pytest

import nbdcore.libnbd as nbd
from nbdcore.protocol.constants import Option, OptionReply
from nbdcore.testing.scripted import (
    Negotiation,
    ScriptedServer,
    expect_option,
    greeting,
    hang_up,
    info_replies,
    oldstyle_greeting,
    option_reply,
)


def until_answered(handle) -> None:
    while handle.aio_is_connecting():
        handle.poll(10_000)


def scripted(handles, *steps):
    """Return a server, and a handle that asks for nothing by itself and has just been greeted by it."""
    server = ScriptedServer([greeting(), lambda connection: connection.receive(4), *steps])
    handle = handles()
    handle.set_opt_mode(True)
    handle.set_request_structured_replies(False)
    return server, handle


def test_exports_are_listed_one_by_one(negotiating):
    found = []
    assert negotiating.opt_list(lambda *export: found.append(export)) == 2
    assert sorted(found) == [("", ""), ("disk", "")]
    assert negotiating.aio_is_negotiating()


def test_export_is_known_once_it_was_asked_about_and_forgotten_when_another_is_named(negotiating):
    with pytest.raises(nbd.Error) as caught:
        negotiating.get_size()
    assert caught.value.errno == "EINVAL"
    negotiating.opt_info()
    assert negotiating.get_size() == 1 << 20
    negotiating.set_export_name("")
    assert negotiating.get_size() == 1 << 20
    negotiating.set_export_name("disk")
    with pytest.raises(nbd.Error, match="has not returned export size"):
        negotiating.get_size()
    negotiating.opt_go()
    assert negotiating.aio_is_ready()
    assert negotiating.get_export_name() == "disk"


def test_refused_export_leaves_the_handle_negotiating(negotiating):
    negotiating.opt_info()
    negotiating.set_export_name("no such export")
    for option in (negotiating.opt_info, negotiating.opt_go):
        with pytest.raises(nbd.Error) as caught:
            option()
        assert caught.value.errno == "ENOENT"
        assert negotiating.aio_is_negotiating()
    with pytest.raises(nbd.Error):
        negotiating.get_size()


def test_contexts_are_listed_and_selected(negotiating):
    found = []
    assert negotiating.opt_list_meta_context(found.append) == len(found) > 0
    assert "base:allocation" in found
    with pytest.raises(nbd.Error):
        negotiating.add_meta_context("x" * 5000)
    negotiating.add_meta_context("base:allocation")
    with pytest.raises(nbd.Error, match="no metadata context has been selected"):
        negotiating.can_meta_context("base:allocation")
    assert negotiating.opt_set_meta_context_queries([], found.append) == 0
    assert negotiating.can_meta_context("base:allocation") is False
    assert negotiating.opt_set_meta_context(lambda _name: None) == 1
    assert negotiating.can_meta_context("base:allocation") is True
    negotiating.clear_meta_contexts()
    assert negotiating.can_meta_context("base:allocation") is True
    negotiating.opt_info()
    assert negotiating.can_meta_context("base:allocation") is False


def test_selection_is_left_alone_when_contexts_are_not_requested(negotiating):
    negotiating.set_request_meta_context(False)
    assert negotiating.opt_set_meta_context_queries(["base:allocation"], lambda _name: None) == 1
    negotiating.opt_info()
    negotiating.opt_go()
    assert negotiating.can_meta_context("base:allocation") is True


def test_completion_hears_the_outcome_of_an_option(negotiating):
    heard = []
    negotiating.aio_opt_info(lambda error: heard.append(error.value))
    until_answered(negotiating)
    negotiating.set_export_name("no such export")
    negotiating.aio_opt_info(lambda error: heard.append(error.value))
    until_answered(negotiating)
    negotiating.aio_opt_list(lambda *export: heard.append(export), lambda error: heard.append(error.value))
    until_answered(negotiating)
    assert heard == [0, errno.ENOENT, ("", ""), ("disk", ""), 0]
    negotiating.set_export_name("")
    assert negotiating.aio_opt_list_meta_context(heard.append) == 0
    until_answered(negotiating)
    assert "base:allocation" in heard


def test_option_that_the_server_refuses_is_false_and_its_completion_hears_enotsup(handles):
    refused = [
        step
        for option in (Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS, Option.STARTTLS, Option.EXTENDED_HEADERS)
        for step in (expect_option(option), option_reply(option, OptionReply.ERR_POLICY))
    ]
    server, handle = scripted(handles, *refused)
    with server:
        handle.connect_socket(server.socket().detach())
        assert handle.opt_structured_reply() is False
        assert handle.opt_extended_headers() is False
        assert handle.opt_starttls() is False
        heard = []
        handle.aio_opt_extended_headers(lambda error: heard.append(error.value))
        until_answered(handle)
        assert heard == [errno.ENOTSUP]
        assert handle.aio_is_negotiating()
        handle.close()


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        (OptionReply.ERR_POLICY, 0),
        (OptionReply.ERR_PLATFORM, 0),
        (OptionReply.ERR_UNSUP, errno.ENOTSUP),
        (OptionReply.ERR_TLS_REQD, errno.ENOTSUP),
        (OptionReply.ERR_INVALID, errno.EINVAL),
        (OptionReply.ERR_UNKNOWN, errno.ENOENT),
        (OptionReply.ERR_SHUTDOWN, errno.ESHUTDOWN),
        (OptionReply.ERR_BLOCK_SIZE_REQD, errno.EINVAL),
        (OptionReply.ERR_TOO_BIG, errno.EINVAL),
    ],
)
def test_refusals_have_libnbds_numbers(reply, number, handles):
    server, handle = scripted(handles, expect_option(Option.INFO), option_reply(Option.INFO, reply, b"so \x1b it is"))
    with server:
        handle.connect_socket(server.socket().detach())
        with pytest.raises(nbd.Error) as caught:
            handle.opt_info()
        assert caught.value.errnum == number
        assert "so \\x1b it is" in caught.value.string
        handle.close()


def test_server_that_dies_during_an_option_completes_it_once(handles):
    server, handle = scripted(handles, expect_option(Option.GO), hang_up)
    heard = []
    with server:
        handle.connect_socket(server.socket().detach())
        handle.aio_opt_go(lambda error: heard.append(error.value))
        with pytest.raises(nbd.Error) as caught:
            until_answered(handle)
        assert caught.value.errnum == 0
        assert len(heard) == 1
        assert heard[0]
        assert handle.aio_is_dead()
        handle.close()


def test_abort_says_goodbye_and_closes(handles):
    server, handle = scripted(handles, expect_option(Option.ABORT))
    with server:
        handle.connect_socket(server.socket().detach())
        assert handle.opt_abort() is None
        assert handle.aio_is_closed()
        handle.close()


def test_shutdown_while_negotiating_says_goodbye(handles):
    server, handle = scripted(handles, expect_option(Option.ABORT))
    with server:
        handle.connect_socket(server.socket().detach())
        handle.shutdown()
        assert handle.aio_is_closed()
        handle.close()


def test_oldstyle_server_goes_straight_to_connected(handles):
    handle = handles()
    handle.set_opt_mode(True)
    with ScriptedServer([oldstyle_greeting(1 << 20)]) as server:
        handle.connect_socket(server.socket().detach())
        assert handle.get_protocol() == "oldstyle"
        assert handle.get_handshake_flags() == 0
        assert handle.get_size() == 1 << 20
        handle.close()


def test_size_that_no_file_can_have_overflows(handles):
    server, handle = scripted(handles, expect_option(Option.INFO), info_replies(Option.INFO, 1 << 63))
    with server:
        handle.connect_socket(server.socket().detach())
        handle.opt_info()
        with pytest.raises(nbd.Error) as caught:
            handle.get_size()
        assert caught.value.errno == "EOVERFLOW"
        handle.close()


@pytest.mark.parametrize(
    ("advertised", "sizes"),
    [
        ((512, 4096, 1 << 19), [512, 4096, 1 << 19, 1 << 20]),
        (None, [0, 0, 0, 32 << 20]),
        ((3, 4096, 1 << 19), [0, 0, 0, 32 << 20]),
    ],
)
def test_block_sizes_are_0_where_none_are_advertised_and_the_cap_is_known(advertised, sizes, handles):
    handle = handles()
    with ScriptedServer([greeting(), Negotiation(block_size=advertised)]) as server:
        handle.connect_socket(server.socket().detach())
        assert [handle.get_block_size(kind) for kind in range(4)] == sizes
        handle.close()

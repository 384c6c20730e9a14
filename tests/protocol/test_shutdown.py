"""A server that shuts down says so, and the client leaves it: the specification's sections on both kinds of termination."""

from __future__ import annotations

import errno

import pytest

from nbdcore.errors import CommandError, DeadlineExceeded, Disconnected, NegotiationError, TLSError, UsageError
from nbdcore.protocol import wire
from nbdcore.protocol.constants import REQUEST_MAGIC, Chunk, CommandType, ErrorNumber, Option, OptionReply
from nbdcore.protocol.handshake import negotiation
from nbdcore.protocol.handshake.agreement import TLSPolicy
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission.commands import disconnect, read, write
from tests.protocol.harness import (
    MODES,
    ack,
    broken_off,
    chunk,
    connected,
    context,
    data_chunk,
    error_chunk,
    error_offset_chunk,
    everywhere,
    export,
    greeting,
    newborn,
    refused,
    success,
)

SHUTDOWN = ErrorNumber.ESHUTDOWN
ABORT = wire.pack_option(Option.ABORT)
TEXT = b"back at noon"


def goodbyes(said, mode):
    """Return how often the client said goodbye, in what it has said since the handshake."""
    if mode == "extended":
        return said.count(b"\x21\xe4\x1c\x71\0\0\0\2")
    return said.count(REQUEST_MAGIC.to_bytes(4, "big") + b"\0\0\0\2")


# ---------------------------------------------------------------------------------------------- the transmission phase


@pytest.mark.parametrize("mode", MODES)
def test_goodbye_is_said_as_soon_as_nothing_is_in_flight(mode):
    client = connected(mode)
    client.submit(read(client.engine.limits, 512, 0))
    client.said.clear()
    client.hear(broken_off(mode, client.commands[0], SHUTDOWN))
    error = client.commands[0].error
    assert isinstance(error, CommandError)
    assert error.errno == errno.ESHUTDOWN
    assert goodbyes(client.said, mode) == 1
    assert client.engine.finished_sending
    assert client.engine.shutting_down


@pytest.mark.parametrize("mode", MODES)
def test_what_is_in_flight_is_waited_for_first(mode):
    client = connected(mode)
    limits = client.engine.limits
    first, second = read(limits, 512, 0), read(limits, 512, 512)
    client.submit(first, second)
    client.said.clear()
    client.hear(broken_off(mode, first, SHUTDOWN))
    assert not client.said
    assert not second.done
    client.hear(success(mode, second, b"x" * 512))
    assert second.result() == b"x" * 512
    assert goodbyes(client.said, mode) == 1


@pytest.mark.parametrize("mode", MODES)
def test_outcome_is_the_same_wherever_the_bytes_are_cut(mode):
    def build():
        client = connected(mode)
        limits = client.engine.limits
        client.submit(*(read(limits, 16, 16 * number) for number in range(4)))
        answers = [success(mode, command, b"x" * 16) for command in client.commands]
        answers[1] = broken_off(mode, client.commands[1], SHUTDOWN)
        return client, b"".join(answers)

    client = everywhere(build, eof=True)
    assert client.engine.phase is Phase.CLOSED
    assert goodbyes(client.said, mode) == 1
    assert [command.error is None for command in client.commands] == [True, False, True, True]


def test_no_further_request_is_sent():
    client = connected()
    limits = client.engine.limits
    sent, unsent = read(limits, 512, 0), read(limits, 512, 512)
    client.submit(sent)
    client.queue(unsent)
    client.said.clear()
    client.hear(broken_off("structured", sent, SHUTDOWN))
    assert isinstance(unsent.error, Disconnected)
    assert "shutting down" in str(unsent.error)
    assert client.completed_once(unsent)
    assert len(client.said) == wire.REQUEST.size  # the goodbye


def test_later_command_is_refused_as_on_a_connection_that_was_lost():
    client = connected()
    limits = client.engine.limits
    first, second = read(limits, 512, 0), read(limits, 512, 512)
    client.submit(first, second)
    client.hear(broken_off("structured", first, SHUTDOWN))
    for ask in (client.engine.submit, lambda command: client.engine.submit_all([command])):
        with pytest.raises(Disconnected, match="the server is shutting down"):
            ask(write(limits, b"x", 0))
    client.hear(success("structured", second, b"x" * 512))
    with pytest.raises(Disconnected, match="the server is shutting down"):
        client.engine.submit(write(limits, b"x", 0))


def test_completion_that_asks_for_more_is_refused():
    client = connected()
    limits = client.engine.limits
    raised = []

    def ask_again(_):
        try:
            client.engine.submit(read(limits, 512, 0))
        except Disconnected as exc:
            raised.append(exc)

    command = read(limits, 512, 0)
    command.completion = ask_again
    client.engine.submit(command)
    client.speak()
    client.hear(broken_off("structured", command, SHUTDOWN))
    assert len(raised) == 1


def test_connection_ends_as_one_that_the_server_shut_down():
    client = connected()
    client.submit(read(client.engine.limits, 512, 0))
    client.hear(broken_off("structured", client.commands[0], SHUTDOWN))
    client.engine.received_eof()
    assert client.engine.phase is Phase.CLOSED
    assert isinstance(client.engine.error, Disconnected)
    assert "the server is shutting down" in str(client.engine.error)
    assert client.engine.lost


def test_server_that_hangs_up_without_answering_all_is_named():
    client = connected()
    limits = client.engine.limits
    first, second = read(limits, 512, 0), read(limits, 512, 512)
    client.submit(first, second)
    client.hear(broken_off("structured", first, SHUTDOWN))
    client.engine.received_eof()
    assert isinstance(second.error, Disconnected)
    assert "the server is shutting down" in str(second.error)
    assert "1 command" in str(second.error)
    assert client.engine.lost


def test_program_that_takes_leave_meanwhile_says_goodbye_once():
    client = connected()
    limits = client.engine.limits
    first, second = read(limits, 512, 0), read(limits, 512, 512)
    client.submit(first, second)
    client.hear(broken_off("structured", first, SHUTDOWN))
    client.said.clear()
    leave = disconnect()
    client.submit(leave)
    assert leave.done
    assert client.completed_once(leave)
    client.hear(success("structured", second, b"x" * 512))
    assert goodbyes(client.said, "structured") == 1


def test_program_that_has_taken_leave_before_ends_the_connection_itself():
    client = connected()
    first = read(client.engine.limits, 512, 0)
    client.submit(first, disconnect())
    client.hear(broken_off("structured", first, SHUTDOWN))
    assert goodbyes(client.said, "structured") == 1
    client.engine.received_eof()
    assert client.engine.ended_by_program
    with pytest.raises(UsageError):
        client.engine.submit(read(client.engine.limits, 512, 0))


@pytest.mark.parametrize("mode", ["structured", "extended"])
@pytest.mark.parametrize("with_offset", [False, True])
def test_error_chunk_in_the_middle_of_a_reply_counts(mode, with_offset):
    client = connected(mode)
    command = read(client.engine.limits, 512, 0)
    client.submit(command)
    client.said.clear()
    client.hear(data_chunk(mode, command, 0, b"x" * 256))
    if with_offset:
        client.hear(error_offset_chunk(mode, command, SHUTDOWN, 256, TEXT))
    else:
        client.hear(error_chunk(mode, command, SHUTDOWN, TEXT))
    assert client.engine.shutting_down
    assert not client.said
    client.hear(chunk(mode, command, Chunk.NONE, done=True))
    assert command.error.server_text == TEXT.decode()
    assert goodbyes(client.said, mode) == 1


def test_second_error_of_a_command_counts_as_well():
    client = connected()
    command = read(client.engine.limits, 512, 0)
    client.submit(command)
    client.hear(error_chunk("structured", command, ErrorNumber.EIO))
    client.hear(error_chunk("structured", command, SHUTDOWN, done=True))
    assert command.error.errno == errno.EIO
    assert client.engine.shutting_down


@pytest.mark.parametrize("mode", MODES)
def test_answer_to_an_abandoned_command_counts(mode):
    client = connected(mode)
    command = read(client.engine.limits, 512, 0)
    client.submit(command)
    client.engine.abandon(command, DeadlineExceeded(errno.ETIMEDOUT, "late"))
    client.said.clear()
    client.hear(broken_off(mode, command, SHUTDOWN))
    assert isinstance(command.error, DeadlineExceeded)
    assert goodbyes(client.said, mode) == 1


def test_any_other_error_leaves_the_connection_as_it_is():
    client = connected()
    for number in sorted({*ErrorNumber} - {SHUTDOWN}):
        command = write(client.engine.limits, b"x", 0)
        client.submit(command)
        client.hear(broken_off("structured", command, number))
        assert command.type == CommandType.WRITE
    assert not client.engine.shutting_down
    assert goodbyes(client.said, "structured") == 0


# ---------------------------------------------------------------------------------------------- the handshake

GRANTED = {
    Option.EXTENDED_HEADERS: b"",
    Option.STRUCTURED_REPLY: refused(Option.EXTENDED_HEADERS),
    Option.SET_META_CONTEXT: refused(Option.EXTENDED_HEADERS) + ack(Option.STRUCTURED_REPLY),
    Option.GO: refused(Option.EXTENDED_HEADERS)
    + ack(Option.STRUCTURED_REPLY)
    + context(1, b"base:allocation")
    + ack(Option.SET_META_CONTEXT),
}


@pytest.mark.parametrize("option", GRANTED)
def test_option_of_the_handshake_that_meets_a_shutdown_ends_it_with_a_goodbye(option):
    def build():
        script = greeting() + GRANTED[option] + refused(option, OptionReply.ERR_SHUTDOWN, TEXT)
        return newborn(export="disk"), script

    client = everywhere(build)
    error = client.exchange.error
    assert isinstance(error, NegotiationError)
    assert (error.reply, error.server_text) == (OptionReply.ERR_SHUTDOWN, TEXT.decode())
    assert error is client.engine.error
    assert client.engine.phase is Phase.DEAD
    assert client.said.endswith(ABORT)
    assert client.said.count(ABORT) == 1


def test_starttls_that_meets_a_shutdown_ends_the_handshake():
    client = newborn(tls=TLSPolicy.ALLOW)
    client.hear(greeting(), refused(Option.STARTTLS, OptionReply.ERR_SHUTDOWN, TEXT))
    assert isinstance(client.exchange.error, NegotiationError)
    assert client.said.endswith(ABORT)


def test_nothing_is_said_in_the_clear_where_tls_is_required():
    client = newborn(tls=TLSPolicy.REQUIRE)
    client.hear(greeting(), refused(Option.STARTTLS, OptionReply.ERR_SHUTDOWN, TEXT))
    assert isinstance(client.exchange.error, TLSError)
    assert client.exchange.error.server_text == TEXT.decode()
    assert ABORT not in client.said


CONVERSATIONS = {
    Option.INFO: lambda *about: negotiation.info(*about, "disk"),
    Option.GO: lambda *about: negotiation.go(*about, "disk"),
    Option.LIST: negotiation.list_exports,
    Option.STARTTLS: negotiation.starttls,
    Option.STRUCTURED_REPLY: negotiation.structured_reply,
    Option.EXTENDED_HEADERS: negotiation.extended_headers,
    Option.LIST_META_CONTEXT: lambda *about: negotiation.list_meta_context(*about, "disk", ()),
    Option.SET_META_CONTEXT: lambda *about: negotiation.set_meta_context(*about, "disk", ("base:allocation",)),
}


@pytest.mark.parametrize("option", CONVERSATIONS)
def test_option_of_opt_mode_that_meets_a_shutdown_ends_the_connection_with_a_goodbye(option):
    client = newborn(opt_mode=True, structured_replies=False)
    client.hear(greeting())
    engine = client.engine
    assert engine.phase is Phase.NEGOTIATING
    exchange = client.follow(engine.option(CONVERSATIONS[option](engine.agreement, engine.settings), enters=option is Option.GO))
    client.said.clear()
    client.hear(refused(option, OptionReply.ERR_SHUTDOWN, TEXT))
    assert isinstance(exchange.error, NegotiationError)
    assert exchange.error.server_text == TEXT.decode()
    assert client.completed_once(exchange)
    assert client.said == ABORT
    assert engine.phase is Phase.DEAD
    assert engine.lost


def test_selecting_contexts_by_itself_does_not_hide_a_shutdown():
    client = newborn(opt_mode=True)
    client.hear(greeting(), ack(Option.EXTENDED_HEADERS))
    engine = client.engine
    exchange = client.follow(engine.option(negotiation.enter(engine.agreement, engine.settings, "disk"), enters=True))
    client.hear(refused(Option.SET_META_CONTEXT, OptionReply.ERR_SHUTDOWN, TEXT), export(), ack(Option.GO))
    assert isinstance(exchange.error, NegotiationError)
    assert engine.phase is Phase.DEAD

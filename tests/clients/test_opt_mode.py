"""Opt mode: one option at a time, what it teaches, and what is forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from nbdcore import (
    BlockSize,
    Client,
    ExportInfo,
    NegotiationError,
    Phase,
    ProtocolViolation,
    TLSError,
    TLSPolicy,
    TransmissionFlag,
    UsageError,
)
from nbdcore.protocol.constants import CommandType, Option, OptionReply
from nbdcore.streams.base import Stream, Want
from nbdcore.testing.scripted import (
    EVERYTHING,
    Connection,
    Negotiation,
    ScriptedServer,
    answer,
    drain,
    expect_end,
    expect_option,
    goodbye,
    greeting,
    info_replies,
    option_reply,
    simple,
    status,
)
from tests.clients.talking import CONTEXTS, DISK, PATIENCE, SILENT_OPTION_MODE, greeted


def opt_client(server: ScriptedServer, **options: Any) -> Client:
    return Client(server.stream(), timeout=PATIENCE, **{**SILENT_OPTION_MODE, **options})


def test_from_information_to_reading():
    negotiation = Negotiation(
        size=DISK, contexts=CONTEXTS, block_size=(1, 4096, 1 << 16), name="canonical", description="a disk", extended=True
    )
    with ScriptedServer([greeting(), negotiation, answer(status(1, [(8, 0)])), goodbye]) as server:
        client = Client(server.stream(), opt_mode=True, export="x", timeout=PATIENCE)
        assert client.phase is Phase.NEGOTIATING
        assert (client.protocol, client.structured_replies, client.extended_headers, client.tls) == (
            "newstyle-fixed",
            True,
            True,
            False,
        )
        info = client.opt_info(timeout=PATIENCE)
        assert info == ExportInfo(
            "x", DISK, TransmissionFlag(EVERYTHING), BlockSize(1, 4096, 1 << 16, advertised=True), "canonical", "a disk"
        )
        assert (client.size, client.export_name, client.description) == (DISK, "canonical", "a disk")
        assert client.opt_info("other", timeout=PATIENCE).name == "other"
        assert client.opt_list_meta_context(timeout=PATIENCE) == ["base:allocation"]
        assert client.opt_list_meta_context(["nothing:"], timeout=PATIENCE) == []
        assert client.opt_set_meta_context(["base:allocation"], timeout=PATIENCE) == ["base:allocation"]
        assert client.contexts == ("base:allocation",)
        client.opt_go(timeout=PATIENCE)
        assert client.phase is Phase.CONNECTED
        assert client.block_status(8, 0, timeout=PATIENCE)
        client.disconnect(timeout=PATIENCE)
        asked = [option for option, _ in server.connections[0].options]
        assert asked.count(Option.SET_META_CONTEXT) == 1, "what was selected for this export is not selected again"


def test_going_to_another_export_selects_its_contexts_anew():
    with ScriptedServer([greeting(), Negotiation(contexts=CONTEXTS), drain]) as server:
        client = Client(server.stream(), opt_mode=True, export="x", timeout=PATIENCE)
        client.opt_set_meta_context(["base:allocation"], timeout=PATIENCE)
        client.opt_go("y", timeout=PATIENCE)
        assert client.contexts == ("base:allocation",)
        asked = [data for option, data in server.connections[0].options if option == Option.SET_META_CONTEXT]
        assert [data[4:5] for data in asked] == [b"x", b"y"]
        client.close()


def test_contexts_are_not_asked_for_before_structured_replies():
    with ScriptedServer([greeted, expect_option(Option.INFO), info_replies(Option.INFO, 5), drain]) as server:
        client = opt_client(server)
        with pytest.raises(UsageError, match="opt_structured_reply"):
            client.opt_set_meta_context(["base:allocation"], timeout=PATIENCE)
        assert client.opt_info(timeout=PATIENCE).size == 5  # nothing else was sent
        client.close()


def refuse(option: int, reply: OptionReply, text: bytes = b"") -> list[Any]:
    return [expect_option(option), option_reply(option, reply, text)]


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda c: c.opt_list(), Option.LIST),
        (lambda c: c.opt_info("nope"), Option.INFO),
        (lambda c: c.opt_go("nope"), Option.GO),
        (lambda c: c.opt_list_meta_context(), Option.LIST_META_CONTEXT),
        (lambda c: c.opt_set_meta_context(["a:b"]), Option.SET_META_CONTEXT),
    ],
)
def test_a_refusal_is_an_answer_and_the_connection_goes_on_negotiating(make, option):
    steps = [
        expect_option(Option.STRUCTURED_REPLY),
        option_reply(Option.STRUCTURED_REPLY),
        *refuse(option, OptionReply.ERR_UNKNOWN, b"never heard of it"),
        expect_option(Option.INFO),
        info_replies(Option.INFO, 5),
    ]
    with ScriptedServer([greeted, *steps, drain]) as server:
        client = opt_client(server)
        assert client.opt_structured_reply(timeout=PATIENCE)
        with pytest.raises(NegotiationError, match="never heard of it") as caught:
            make(client)
        assert caught.value.errno == 2
        assert caught.value.reply == OptionReply.ERR_UNKNOWN
        assert client.phase is Phase.NEGOTIATING
        assert client.opt_info(timeout=PATIENCE).size == 5
        client.close()


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda c: c.opt_structured_reply(), Option.STRUCTURED_REPLY),
        (lambda c: c.opt_extended_headers(), Option.EXTENDED_HEADERS),
        (lambda c: c.opt_starttls(), Option.STARTTLS),
    ],
)
def test_what_may_be_granted_answers_true_or_false(make, option):
    steps = [*refuse(option, OptionReply.ERR_UNSUP), expect_option(option), option_reply(option)]
    with ScriptedServer([greeted, *steps, drain]) as server:
        client = opt_client(server, start_tls=lambda stream: stream)
        assert make(client) is False
        assert make(client) is True
        client.close()


def test_automatic_mode_ends_with_a_refusal_and_says_goodbye():
    steps = [expect_option(Option.GO), option_reply(Option.GO, OptionReply.ERR_UNKNOWN), expect_option(Option.ABORT), expect_end]
    with ScriptedServer([greeted, *steps]) as server:
        with pytest.raises(NegotiationError, match="opening export 'x' failed: the server has no such export") as caught:
            Client(server.stream(), timeout=PATIENCE, export="x", structured_replies=False, contexts=())
        assert caught.value.errno == 2


def test_the_goodbye_of_opt_mode():
    for leave in (Client.opt_abort, Client.close, Client.disconnect):
        with ScriptedServer([greeted, expect_option(Option.ABORT, b""), expect_end]) as server:
            client = opt_client(server)
            leave(client)
            assert client.phase is Phase.CLOSED


def test_a_context_manager_in_opt_mode_says_goodbye():
    with (
        ScriptedServer([greeted, expect_option(Option.ABORT, b""), expect_end]) as server,
        opt_client(server) as client,
    ):
        assert client.phase is Phase.NEGOTIATING


def test_a_wrong_export_name_is_a_usage_error_and_nothing_is_sent():
    with ScriptedServer([greeted, expect_option(Option.ABORT), expect_end]) as server:
        client = opt_client(server)
        for wrong in ("a\0b", "x" * 4097, b"x", 5):
            for make in (client.opt_info, client.opt_go, lambda name: client.opt_list_meta_context(export=name)):
                with pytest.raises(UsageError):
                    make(wrong)
        for queries in ("base:allocation", None, [None], ["a\0b"]):
            with pytest.raises(UsageError):
                client.opt_set_meta_context(queries)
        assert client.phase is Phase.NEGOTIATING
        client.opt_abort()


def test_an_oldstyle_server_is_connected_at_once_even_in_opt_mode():
    from nbdcore.testing.scripted import oldstyle_greeting

    with ScriptedServer([oldstyle_greeting(DISK), answer(simple(b"x")), drain]) as server:
        client = Client(server.stream(), opt_mode=True, timeout=PATIENCE)
        assert (client.phase, client.protocol, client.size) == (Phase.CONNECTED, "oldstyle", DISK)
        assert client.pread(1, 0, timeout=PATIENCE) == b"x"
        client.close()


# ---------------------------------------------------------------------------------------------- TLS: the hand-over


class Scrambled(Stream):
    """Stands for TLS: every byte over it is turned round."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __str__(self) -> str:
        return str(self._stream)

    def recv_into(self, room: memoryview) -> int | None:
        count = self._stream.recv_into(room)
        if count:
            room[:count] = scrambled(room[:count])
        return count

    def send(self, parts: Sequence[memoryview]) -> int | None:
        return self._stream.send([memoryview(scrambled(b"".join(parts)))]) if parts else self._stream.send(parts)

    def fileno(self) -> int:
        return self._stream.fileno()

    def wants(self) -> Want:
        return self._stream.wants()

    def finish_sending(self) -> bool:
        return self._stream.finish_sending()

    def hang_up(self) -> None:
        self._stream.hang_up()

    def close(self) -> None:
        self._stream.close()


def scrambled(data: Any) -> bytes:
    return bytes(byte ^ 0xFF for byte in data)


class ScrambledConnection(Connection):
    """The server's end of it."""

    def __init__(self, plain: Connection) -> None:
        super().__init__(plain._sock, plain._patience)

    def send(self, data: bytes) -> None:
        super().send(scrambled(data))

    def receive(self, count: int) -> bytes:
        return scrambled(super().receive(count))


def secretly(*steps: Any) -> Any:
    """Play steps over the scrambled connection."""

    def play(connection: Connection) -> None:
        secret = ScrambledConnection(connection)
        for step in steps:
            secret.send(step) if isinstance(step, bytes) else step(secret)

    return play


def test_a_handshake_goes_on_over_the_stream_that_start_tls_makes():
    wrapped: list[str] = []

    def start_tls(stream: Stream) -> Stream:
        wrapped.append(str(stream))
        return Scrambled(stream)

    options = [expect_option(Option.STARTTLS, b""), option_reply(Option.STARTTLS)]
    rest = [
        expect_option(Option.EXTENDED_HEADERS),
        option_reply(Option.EXTENDED_HEADERS, OptionReply.ERR_UNSUP),
        expect_option(Option.STRUCTURED_REPLY),
        option_reply(Option.STRUCTURED_REPLY, OptionReply.ERR_UNSUP),
        expect_option(Option.GO),
        info_replies(Option.GO, DISK),
        answer(simple(b"secret"), kind=CommandType.READ),
        goodbye,
    ]
    with ScriptedServer([greeted, *options, secretly(*rest)]) as server:
        client = Client(server.stream(), tls_policy=TLSPolicy.REQUIRE, start_tls=start_tls, timeout=PATIENCE)
        assert client.tls
        assert wrapped == ["a scripted server"]
        assert client.pread(6, 0, timeout=PATIENCE) == b"secret"
        client.disconnect(timeout=PATIENCE)


def test_nothing_learnt_in_the_clear_survives():
    def selected(option: int) -> bytes:
        return option_reply(option, OptionReply.META_CONTEXT, b"\0\0\0\1base:allocation") + option_reply(option)

    clear = [
        expect_option(Option.EXTENDED_HEADERS),
        option_reply(Option.EXTENDED_HEADERS),
        expect_option(Option.SET_META_CONTEXT),
        selected(Option.SET_META_CONTEXT),
        expect_option(Option.INFO),
        info_replies(Option.INFO, 666, name="forged", description="forged"),
        expect_option(Option.STARTTLS),
        option_reply(Option.STARTTLS),
    ]
    secret = [expect_option(Option.INFO), info_replies(Option.INFO, DISK), drain]
    with ScriptedServer([greeted, *clear, secretly(*secret)]) as server:
        client = opt_client(server, start_tls=Scrambled)
        assert client.opt_extended_headers()
        assert client.opt_set_meta_context(["base:allocation"]) == ["base:allocation"]
        assert client.opt_info().size == 666
        assert client.opt_starttls(timeout=PATIENCE) is True
        assert (client.tls, client.structured_replies, client.extended_headers) == (True, False, False)
        assert client.contexts == ()
        for name in ("size", "flags", "block_size", "export_name", "description"):
            with pytest.raises(UsageError, match="nothing is known of an export yet"):
                getattr(client, name)
        info = client.opt_info(timeout=PATIENCE)
        assert (info.size, info.canonical_name, info.description) == (DISK, None, None)
        assert not info.flags & (TransmissionFlag.SEND_DF | TransmissionFlag.BLOCK_STATUS_PAYLOAD)
        client.close()


def test_bytes_slipped_in_behind_the_answer_to_starttls_are_not_believed():
    forged = option_reply(Option.STARTTLS) + option_reply(Option.INFO, OptionReply.ERR_UNKNOWN, b"forged")
    with ScriptedServer([greeted, expect_option(Option.STARTTLS), forged, drain]) as server:
        client = opt_client(server, start_tls=Scrambled)
        assert client.opt_starttls(timeout=PATIENCE)
        with pytest.raises(ProtocolViolation):
            client.opt_info(timeout=PATIENCE)
        assert client.phase is Phase.DEAD


@pytest.mark.parametrize("raised", [TLSError(0, "the certificate has expired"), OSError(71, "no handshake"), ValueError("a bug")])
def test_a_start_tls_that_fails_ends_the_connection(raised):
    def start_tls(stream: Stream) -> Stream:
        raise raised

    with ScriptedServer([greeted, expect_option(Option.STARTTLS), option_reply(Option.STARTTLS), drain]) as server:
        client = Client(opt_mode=False, tls_policy=TLSPolicy.REQUIRE, start_tls=start_tls)
        with pytest.raises(type(raised), match=r"expired|no handshake|a bug"):
            client.connect_stream(server.stream(), timeout=PATIENCE)
        assert client.phase is Phase.DEAD


def test_a_server_without_tls_is_refused_where_tls_is_required_and_learns_nothing():
    steps = [*refuse(Option.STARTTLS, OptionReply.ERR_UNSUP), expect_end]
    with ScriptedServer([greeted, *steps]) as server, pytest.raises(TLSError, match="TLS is required"):
        Client(server.stream(), export="secret", tls_policy=TLSPolicy.REQUIRE, start_tls=Scrambled, timeout=PATIENCE)


def test_opt_starttls_is_refused_where_tls_is_forbidden():
    with ScriptedServer([greeted, expect_option(Option.ABORT), expect_end]) as server:
        client = opt_client(server, tls=False)
        with pytest.raises(UsageError, match="the client was made with tls=False"):
            client.opt_starttls()
        client.close()

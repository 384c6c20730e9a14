"""Somebody in the middle, or a server that behaves like one: strips TLS, slips bytes in, changes some, or cuts the connection."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdcore import (
    TLS,
    Client,
    DeadlineExceeded,
    Disconnected,
    Error,
    Phase,
    ProtocolViolation,
    TLSError,
    TLSPolicy,
    UsageError,
)
from nbdcore.protocol.constants import Option, OptionReply
from nbdcore.server import MemoryDisk, Server, ServerTLS
from nbdcore.streams.sockets import SocketStream, connected_pair
from nbdcore.testing.scripted import (
    Connection,
    ScriptedServer,
    drain,
    expect_end,
    expect_option,
    greeting,
    hang_up,
    info_replies,
    oldstyle_greeting,
    option_reply,
    wait_for,
)
from tests.certificates import CertificateAuthority
from tests.clients.talking import DISK, PATIENCE, SHORT, in_background

REFUSALS = [reply for reply in OptionReply if reply >> 31] + [1 << 31, 0xFFFFFFFF]
ASKED = [greeting(), lambda connection: connection.receive(4), expect_option(Option.STARTTLS, b"")]
GRANTED = option_reply(Option.STARTTLS)

asking = pytest.mark.parametrize("policy", [TLSPolicy.ALLOW, TLSPolicy.REQUIRE])
either_mode = pytest.mark.parametrize("opt_mode", [False, True], ids=["automatic", "opt mode"])


@pytest.fixture(scope="module")
def ca() -> CertificateAuthority:
    return CertificateAuthority()


@pytest.fixture(scope="module")
def pki(ca, tmp_path_factory) -> Path:
    return ca.write(tmp_path_factory.mktemp("pki"), server=ca.issue("server", "db.example"))


def fails(server: ScriptedServer, **options) -> Error:
    """Connect in vain, and return why."""
    client = Client(export="secret", **{"tls": True, **options})
    with pytest.raises(Error) as caught:
        client.connect_stream(server.stream(), timeout=PATIENCE)
    assert client.phase is Phase.DEAD
    return caught.value


# ---------------------------------------------------------------------------------------------- TLS stripped


@either_mode
@pytest.mark.parametrize("error", REFUSALS)
def test_a_refusal_ends_it_and_nothing_else_was_said(error, opt_mode):
    with ScriptedServer([*ASKED, option_reply(Option.STARTTLS, error, b"not \x1btoday"), expect_end]) as server:
        refused = fails(server, opt_mode=opt_mode)
    assert isinstance(refused, TLSError)
    assert str(refused).startswith("TLS is required, and starting TLS failed: ")
    assert "not \\x1btoday" in str(refused)
    assert refused.server_text == "not \x1btoday"


@either_mode
@pytest.mark.parametrize(
    ("said", "why"),
    [
        (oldstyle_greeting(DISK), "the server speaks the oldstyle handshake"),
        (greeting(0), "the server speaks an old newstyle handshake"),
        (greeting(2), "the server speaks an old newstyle handshake"),
    ],
)
def test_a_handshake_without_tls_ends_it_and_nothing_was_said(said, why, opt_mode):
    with ScriptedServer([said, expect_end]) as server:
        refused = fails(server, opt_mode=opt_mode)
    assert isinstance(refused, TLSError)
    assert f"TLS is required, and {why}" in str(refused)
    assert "connect without: nbd:// in place of nbds://" in str(refused)


@asking
@pytest.mark.parametrize("kind", [OptionReply.SERVER, OptionReply.INFO, 0, 0x7FFFFFFF])
def test_an_answer_of_another_kind_ends_it_whatever_the_policy(kind, policy):
    with ScriptedServer([*ASKED, option_reply(Option.STARTTLS, kind), expect_end]) as server:
        assert isinstance(fails(server, tls_policy=policy), ProtocolViolation)


@asking
def test_hanging_up_instead_of_an_answer_is_not_followed_by_plain_text(policy):
    with ScriptedServer([*ASKED, hang_up]) as server:
        assert isinstance(fails(server, tls_policy=policy), Disconnected)


@asking
def test_hanging_up_in_the_tls_handshake_is_not_followed_by_plain_text(policy):
    with ScriptedServer([*ASKED, GRANTED, lambda connection: connection.receive(5), hang_up]) as server:
        assert isinstance(fails(server, tls_policy=policy), TLSError)


# ---------------------------------------------------------------------------------------------- bytes slipped in


@asking
@pytest.mark.parametrize(
    "injected",
    [
        option_reply(Option.EXTENDED_HEADERS) + info_replies(Option.GO, 666, name="forged"),
        option_reply(Option.STARTTLS),
        bytes(1000),
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
def test_plain_text_behind_the_grant_is_taken_for_ciphertext_and_ends_it(policy, injected):
    with ScriptedServer([*ASKED, GRANTED + injected, drain]) as server:
        error = fails(server, tls_policy=policy)
    assert isinstance(error, TLSError)
    assert "is no TLS" in str(error)


def test_plain_text_in_place_of_the_tls_handshake_ends_it():
    def plain(connection: Connection) -> None:
        connection.receive(5)
        connection.send(info_replies(Option.GO, DISK))

    with ScriptedServer([*ASKED, GRANTED, plain, drain]) as server:
        assert isinstance(fails(server), TLSError)


def encrypted(pki: Path, talk: Callable[[Connection], None]) -> Callable[[Connection], None]:
    """Speak TLS as a server does, by Python's own ssl over the plain socket, then go on with `talk`."""

    def play(connection: Connection) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pki / "server-cert.pem", pki / "server-key.pem")
        connection._sock.settimeout(PATIENCE)
        connection._sock = context.wrap_socket(connection._sock, server_side=True)
        talk(connection)

    return play


def test_what_was_learnt_in_the_clear_is_asked_again(pki):
    """A man in the middle grants structured replies before STARTTLS; the server knows nothing of it (CVE-2021-3716)."""
    clear = [
        greeting(),
        lambda connection: connection.receive(4),
        expect_option(Option.EXTENDED_HEADERS),
        option_reply(Option.EXTENDED_HEADERS),
        expect_option(Option.INFO),
        info_replies(Option.INFO, 666, name="forged"),
        expect_option(Option.STARTTLS),
        GRANTED,
    ]

    def inside(connection: Connection) -> None:
        expect_option(Option.INFO)(connection)
        connection.send(info_replies(Option.INFO, DISK))
        expect_option(Option.ABORT)(connection)

    with ScriptedServer([*clear, encrypted(pki, inside)]) as server:
        client = Client(server.stream(), tls=TLS(ca=pki / "ca-cert.pem"), tls_policy=TLSPolicy.DISABLE, opt_mode=True)
        assert client.extended_headers
        assert client.opt_info().size == 666
        assert client.opt_starttls(timeout=PATIENCE)
        assert (client.structured_replies, client.extended_headers) == (False, False)
        assert client.opt_info(timeout=PATIENCE).size == DISK
        assert client.description == ""
        client.close()


def test_tls_is_not_asked_for_a_second_time(pki):
    options = {"tls": TLS(ca=pki / "ca-cert.pem"), "opt_mode": True, "structured_replies": False}
    with ScriptedServer([*ASKED, GRANTED, encrypted(pki, expect_option(Option.ABORT))]) as server:
        client = Client(server.stream(), timeout=PATIENCE, **options)
        with pytest.raises(UsageError, match="encrypted already"):
            client.opt_starttls(timeout=PATIENCE)
        client.opt_abort()


# ---------------------------------------------------------------------------------------------- on the way


class Relay:
    """Passes bytes between a client and a server, until it is told what to do to the server's."""

    def __init__(self, far: socket.socket) -> None:
        self.near, self._here = connected_pair()
        self._far = far
        self.change: Callable[[bytes], bytes] | None = None
        self._threads = [
            threading.Thread(target=self._pass, args=(self._here, far, False), daemon=True),
            threading.Thread(target=self._pass, args=(far, self._here, True), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _pass(self, source: socket.socket, target: socket.socket, from_server: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(self.change(data) if from_server and self.change is not None else data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        for end in (self._here, self._far):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        self._here.close()
        self._far.close()


@pytest.fixture
def relay(pki) -> Iterator[Relay]:
    """A way to a server with TLS."""
    with Server(MemoryDisk(DISK), tls=ServerTLS(certificates=pki)) as server:
        near, far = connected_pair()
        server.serve_stream(SocketStream(near))
        with contextlib.closing(Relay(far)) as between:
            yield between


@pytest.fixture
def client(pki, relay) -> Iterator[Client]:
    tls = TLS(ca=pki / "ca-cert.pem", hostname="db.example")
    with contextlib.closing(Client(SocketStream(relay.near), tls=tls, timeout=PATIENCE)) as connected:
        connected.pwrite(b"honest", 0, timeout=PATIENCE)
        assert connected.pread(6, 0, timeout=PATIENCE) == b"honest"
        yield connected


def test_a_changed_byte_is_noticed(relay, client):
    relay.change = lambda data: data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(TLSError, match="changed on the way"):
        client.pread(6, 0, timeout=PATIENCE)
    assert client.phase is Phase.DEAD


def test_a_connection_that_is_cut_off_is_no_goodbye(relay, client):
    relay.change = lambda _: b""
    with in_background(lambda: client.pread(6, 0, timeout=PATIENCE)) as outcome:
        relay.cut()
    assert isinstance(outcome[0], Disconnected)
    with pytest.raises(Disconnected):
        client.pread(6, 0, timeout=PATIENCE)
    assert client.phase is Phase.DEAD


def test_a_server_that_says_nothing_more_is_given_up_at_the_deadline(relay, client):
    relay.change = lambda _: b""
    with pytest.raises(DeadlineExceeded):
        client.pread(6, 0, timeout=SHORT)
    assert client.phase is Phase.CONNECTED


def test_answers_that_come_byte_by_byte_are_put_together(relay, client):
    """A relay of one byte a message: the descriptor is ready over and over while no record is complete."""

    def dribble(data: bytes) -> bytes:
        for byte in data[:-1]:
            relay._here.sendall(bytes([byte]))
        return data[-1:]

    relay.change = dribble
    assert client.pread(600, 0, timeout=PATIENCE) == b"honest" + bytes(594)


# ---------------------------------------------------------------------------------------------- handshakes that do not end


def test_the_tls_handshake_has_the_callers_deadline():
    silence = threading.Event()
    with ScriptedServer([*ASKED, GRANTED, wait_for(silence)]) as server:
        with pytest.raises(DeadlineExceeded):
            Client(server.stream(), tls=True, timeout=0.2)
        silence.set()


def test_closing_ends_a_tls_handshake_under_way():
    begun, silence = threading.Event(), threading.Event()
    steps = [*ASKED, GRANTED, lambda connection: connection.receive(5), lambda _: begun.set(), wait_for(silence)]
    client = Client(tls=True)
    with ScriptedServer(steps) as server:
        with in_background(lambda: client.connect_stream(server.stream(), timeout=PATIENCE)) as outcome:
            assert begun.wait(PATIENCE)
            client.close()
        silence.set()
    assert isinstance(outcome[0], Disconnected)
    assert "closed by this program" in str(outcome[0])

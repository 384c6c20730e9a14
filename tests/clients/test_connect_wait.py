"""Waiting for a server: attempts are made again while it is not up, and not once after an error that waiting does not mend."""

from __future__ import annotations

import contextlib
import errno
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdcore
from nbdcore import (
    TLS,
    Client,
    DeadlineExceeded,
    Disconnected,
    Error,
    NegotiationError,
    Phase,
    ProtocolViolation,
    TLSError,
    TransportError,
    TransportUnavailable,
    UsageError,
)
from nbdcore.clients.connect.establish import establish
from nbdcore.clients.connect.target import Target, endpoint_by_name
from nbdcore.protocol.constants import Option, OptionReply
from nbdcore.protocol.handshake.agreement import Settings, TLSPolicy
from nbdcore.server import MemoryDisk, Server, ServerTLS
from nbdcore.testing.scripted import (
    Negotiation,
    ScriptedServer,
    expect_option,
    goodbye,
    greeting,
    hang_up,
    oldstyle_greeting,
    option_reply,
    reset,
    wait_for,
)
from tests.certificates import CertificateAuthority
from tests.clients.talking import DISK, PATIENCE, in_background
from tests.interop.programs import path_of

OPENED = [greeting(), Negotiation(size=DISK), goodbye]


@contextlib.contextmanager
def later(*steps, seconds: float = 0.3) -> Iterator[threading.Thread]:
    """Do these one after the other, each after a while."""
    stop = threading.Event()

    def work() -> None:
        for step in steps:
            if stop.wait(seconds):
                return
            step()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join(PATIENCE)


def check_open(client: Client) -> None:
    assert client.phase is Phase.CONNECTED
    assert client.size == DISK
    client.disconnect(timeout=PATIENCE)


# ---------------------------------------------------------------------------------------------- retryable errors


def test_a_unix_socket_that_is_not_there_yet(socket_path):
    with (
        ScriptedServer(OPENED) as server,
        later(lambda: server.listen_unix(socket_path)),
    ):
        check_open(nbdcore.connect_unix(socket_path, wait=PATIENCE))


def test_a_unix_socket_that_is_nobodys_and_then_is_replaced(socket_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(socket_path))
    with (
        ScriptedServer(OPENED) as server,
        later(socket_path.unlink, lambda: server.listen_unix(socket_path), seconds=0.15),
    ):
        check_open(nbdcore.connect(f"nbd+unix:///?socket={socket_path}", wait=PATIENCE))


def test_a_tcp_port_that_nobody_listens_on_yet():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # bound, so that it is ours; not listening, so that it refuses
        port = holder.getsockname()[1]
        with in_background(lambda: nbdcore.connect_tcp("127.0.0.1", port, wait=PATIENCE)) as outcome:
            time.sleep(0.2)
            holder.listen()
            sock, _ = holder.accept()
            with ScriptedServer(OPENED) as server, server.socket() as script:
                thread = threading.Thread(target=pump, args=(sock, script), daemon=True)
                thread.start()
                while not outcome:
                    time.sleep(0.005)
                check_open(outcome[0])
                thread.join(PATIENCE)


def pump(one: socket.socket, other: socket.socket) -> None:
    """Carry bytes between two sockets until both have ended."""

    def carry(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    back = threading.Thread(target=carry, args=(other, one), daemon=True)
    back.start()
    carry(one, other)
    back.join(PATIENCE)
    one.close()


@pytest.mark.parametrize("first", [hang_up, reset], ids=["hangs up", "resets"])
def test_a_server_that_hangs_up_without_a_word(socket_path, first):
    with ScriptedServer([first], [first], [first], OPENED) as server:
        server.listen_unix(socket_path)
        client = nbdcore.connect_unix(socket_path, wait=PATIENCE)
        check_open(client)
    assert len(server.connections) == 4


def test_a_server_that_says_nothing_within_the_timeout_of_an_attempt(socket_path):
    silence = threading.Event()
    with ScriptedServer([wait_for(silence)], OPENED) as server:
        server.listen_unix(socket_path)
        check_open(nbdcore.connect_unix(socket_path, timeout=0.3, wait=PATIENCE))
        silence.set()


def test_tls_and_the_list_of_exports_wait_too(socket_path, tmp_path):
    ca = CertificateAuthority()
    pki = ca.write(tmp_path / "pki", server=ca.issue("server", "db.example"))
    with Server({"a": MemoryDisk(DISK)}, tls=ServerTLS(certificates=pki)) as server:
        tls = TLS(ca=pki / "ca-cert.pem")
        uri = f"nbds+unix:///a?socket={socket_path}"
        with later(lambda: server.listen("unix", path=str(socket_path))):
            assert [export.name for export in nbdcore.list_exports(uri, tls=tls, wait=PATIENCE)] == ["a"]
        with nbdcore.connect(uri, tls=tls, wait=PATIENCE) as disk:
            assert disk.tls


@pytest.mark.parametrize("name", ["ECONNREFUSED", "ENOENT", "ETIMEDOUT", "ECONNRESET", "EAGAIN", "ENODEV", "EHOSTUNREACH"])
def test_what_a_server_that_is_not_up_looks_like(name):
    route = endpoint_by_name("unix", {"path": "/nonexistent"})
    assert route.is_retryable(TransportError(getattr(errno, name), ""), heard=False)


@pytest.mark.parametrize(
    "error",
    [
        TransportError(errno.EACCES, ""),
        TransportError(errno.ENAMETOOLONG, ""),
        TransportError(errno.EMFILE, ""),
        TransportUnavailable(errno.ENOENT, ""),
        UsageError(errno.ENOENT, ""),
        NegotiationError(errno.ENOENT, ""),
        TLSError(errno.ECONNRESET, ""),
        ProtocolViolation(errno.EPROTO, ""),
    ],
    ids=lambda error: f"{type(error).__name__} {error.errno}",
)
def test_what_cannot_heal(error):
    assert not endpoint_by_name("unix", {"path": "/nonexistent"}).is_retryable(error, heard=False)


def test_one_of_several_addresses_that_may_heal_is_enough():
    """Such as a first address of a kind that this machine has no way to reach, and a second that refuses for the moment."""
    error = TransportError(errno.EADDRNOTAVAIL, "both failed")
    error.failures = (TransportError(errno.EADDRNOTAVAIL, ""), TransportError(errno.ECONNREFUSED, ""))
    route = endpoint_by_name("tcp", {"host": "db.example"})
    assert route.is_retryable(error, heard=False)
    error.failures = error.failures[:1]
    assert not route.is_retryable(error, heard=False)


def test_host_of_which_an_address_cannot_be_reached_from_here_is_waited_for(monkeypatch):
    real = socket.getaddrinfo

    def look_up(host, *arguments, flags=0, **options):
        if host not in ("two.test", b"two.test"):
            return real(host, *arguments, flags=flags, **options)
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "no number")
        kind = socket.SOCK_STREAM
        # Nothing can be connected to from here by the first: it is for documentation only, or there is no IPv6 at all.
        return [(socket.AF_INET6, kind, 0, "", ("2001:db8::1", port, 0, 0)), (socket.AF_INET, kind, 0, "", ("127.0.0.1", port))]

    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with (
        Server(MemoryDisk(DISK)) as server,
        later(lambda: server.listen("tcp", host="127.0.0.1", port=port)),
        nbdcore.connect(f"nbd://two.test:{port}", wait=PATIENCE) as disk,
    ):
        assert disk.size == DISK


def test_names_that_cannot_be_looked_up_just_now():
    route = endpoint_by_name("tcp", {"host": "db.example"})

    def failed(number: int) -> TransportError:
        error = TransportError(0, "")
        error.__cause__ = socket.gaierror(number, "")
        return error

    assert route.is_retryable(failed(socket.EAI_AGAIN), heard=False)
    assert not route.is_retryable(failed(socket.EAI_NONAME), heard=False)


def test_a_server_that_has_said_something_is_up():
    route = endpoint_by_name("unix", {"path": "/nonexistent"})
    for error in (Disconnected(0, ""), DeadlineExceeded(errno.ETIMEDOUT, "")):
        assert (route.is_retryable(error, heard=False), route.is_retryable(error, heard=True)) == (True, False)


# ---------------------------------------------------------------------------------------------- what does not


@pytest.mark.parametrize(
    ("script", "kind", "options"),
    [
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], ProtocolViolation, {}),
        ([greeting(), hang_up], Disconnected, {}),
        ([greeting()[:5], hang_up], Disconnected, {}),
        ([oldstyle_greeting(DISK)], TLSError, {"tls": True}),
        (
            [
                greeting(),
                lambda connection: connection.receive(4),
                expect_option(Option.STARTTLS),
                option_reply(Option.STARTTLS, OptionReply.ERR_POLICY),
            ],
            TLSError,
            {"tls": True},
        ),
        (
            [
                greeting(),
                lambda connection: connection.receive(4),
                expect_option(Option.GO),
                option_reply(Option.GO, OptionReply.ERR_UNKNOWN),
                expect_option(Option.ABORT),
            ],
            NegotiationError,
            {"structured_replies": False},
        ),
    ],
    ids=["no NBD server", "hangs up after its greeting", "hangs up within it", "oldstyle", "TLS refused", "unknown export"],
)
def test_what_cannot_heal_ends_it_at_the_first_attempt(socket_path, script, kind, options):
    with ScriptedServer(script) as server:
        server.listen_unix(socket_path)
        client = Client(**options)
        with pytest.raises(kind) as caught:
            client.connect_unix(socket_path, wait=PATIENCE)
        assert type(caught.value) is kind
        assert client.phase is Phase.DEAD
    assert len(server.connections) == 1


def test_a_wrong_call_is_wrong_at_once():
    for wait in (-1, float("nan"), "soon"):
        client = Client()
        with pytest.raises(UsageError, match="a timeout is a number of seconds"):
            client.connect_unix("/nonexistent", wait=wait)
        assert client.phase is Phase.CREATED


@pytest.mark.parametrize("wait", [None, 0])
def test_without_waiting_there_is_one_attempt(wait):
    with pytest.raises(TransportError, match="there is no such socket"):
        nbdcore.connect_unix("/nonexistent", wait=wait)


# ---------------------------------------------------------------------------------------------- the end of the wait


def test_the_last_error_is_the_cause_when_the_time_is_up(socket_path):
    client = Client()
    with pytest.raises(DeadlineExceeded, match=r"no server at unix socket .* within 0\.3 s \(cannot connect to") as caught:
        client.connect_unix(socket_path, wait=0.3)
    assert isinstance(caught.value.__cause__, TransportError)
    assert caught.value.__cause__.errno == errno.ENOENT
    assert client.phase is Phase.DEAD
    with pytest.raises(UsageError, match="the connection is dead"):
        client.connect_unix(socket_path)


def test_an_attempt_does_not_outlast_the_wait(socket_path):
    silence = threading.Event()
    with ScriptedServer([wait_for(silence)]) as server:
        server.listen_unix(socket_path)
        with pytest.raises(DeadlineExceeded) as caught:
            nbdcore.connect_unix(socket_path, wait=0.3)
        silence.set()
    assert isinstance(caught.value.__cause__, DeadlineExceeded)


def test_an_attempt_that_was_cut_off_is_not_what_is_told(socket_path):
    silence = threading.Event()
    with ScriptedServer([hang_up], [wait_for(silence)]) as server:
        server.listen_unix(socket_path)
        with pytest.raises(DeadlineExceeded, match="before its greeting") as caught:
            nbdcore.connect_unix(socket_path, wait=0.3)
        silence.set()
    assert isinstance(caught.value.__cause__, Disconnected)


def test_pauses_grow_to_half_a_second():
    """So that a server is neither missed for long nor kept busy by those that wait for it."""
    target = Target(endpoint_by_name("unix", {"path": "/nonexistent"}), TLSPolicy.DISABLE, None)
    attempts = establish(target, Settings(), timeout=None, wait=PATIENCE)
    requests = [next(attempts) for _ in range(9)]
    assert all(request.waiting == () for request in requests)
    pauses = [request.seconds for request in requests]
    assert pauses[0] <= 0.01
    assert all(later in (2 * earlier, 0.5) for earlier, later in itertools.pairwise(pauses))
    assert pauses[-2:] == [0.5, 0.5]
    attempts.close()


@pytest.mark.parametrize("seconds", [0, 0.2])
def test_closing_ends_the_wait(socket_path, seconds):
    client = Client()
    with in_background(lambda: client.connect_unix(socket_path, wait=PATIENCE)) as outcome:
        while client.phase is Phase.CREATED:
            time.sleep(0.001)
        time.sleep(seconds)
        client.close()
    assert isinstance(outcome[0], Disconnected)
    assert "closed by this program while connecting" in str(outcome[0])
    assert client.phase in (Phase.CLOSED, Phase.DEAD)


def test_closing_at_any_moment_leaves_a_closed_client(socket_path):
    """Attempts fail, and are forgotten, all the time: none may bring a client back to life that was closed meanwhile."""
    with hanging_up(socket_path):
        for number in range(30):
            client = Client()
            with in_background(lambda client=client: client.connect_unix(socket_path, wait=PATIENCE)) as outcome:
                while client.phase is Phase.CREATED:
                    time.sleep(0.0001)
                time.sleep(number / 1000)
                client.close()
            assert isinstance(outcome[0], Error)
            assert not isinstance(outcome[0], DeadlineExceeded)
            assert client.phase in (Phase.CLOSED, Phase.DEAD)


@contextlib.contextmanager
def hanging_up(path: Path) -> Iterator[None]:
    """A server that hangs up on everybody."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        ending = threading.Event()

        def serve() -> None:
            while not ending.is_set():
                listener.accept()[0].close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ending.set()
            with socket.socket(socket.AF_UNIX) as last:
                last.connect(str(path))
            thread.join(PATIENCE)


def test_while_waiting_the_client_is_connecting(socket_path):
    client = Client()
    with in_background(lambda: client.connect_unix(socket_path, wait=0.4)) as outcome:
        while client.phase is Phase.CREATED:
            time.sleep(0.001)
        with pytest.raises(UsageError, match="the connection is connecting"):
            client.connect_unix(socket_path)
    assert isinstance(outcome[0], DeadlineExceeded)


@pytest.mark.interop("nbdkit")
def test_a_command_that_ends_without_a_word_is_run_again(tmp_path):
    tries = tmp_path / "tries"
    script = f'echo x >> {tries}; [ $(wc -l < {tries}) -ge 3 ] || {{ echo "not yet" >&2; exit 1; }}; exec "$0" "$@"'
    argv = ["sh", "-c", script, path_of("nbdkit"), "-s", "memory", str(DISK)]
    check_open(nbdcore.connect_command(argv, wait=PATIENCE))
    assert tries.read_text() == "x\n" * 3


def test_a_program_that_cannot_be_started_does_not_heal():
    assert not endpoint_by_name("command", {"argv": ["x"]}).is_retryable(TransportError(errno.ENOENT, ""), heard=False)
    assert endpoint_by_name("command", {"argv": ["x"]}).is_retryable(Disconnected(0, ""), heard=False)

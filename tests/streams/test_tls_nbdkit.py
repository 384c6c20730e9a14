"""TLS with a stranger's server: nbdkit, whose TLS is GnuTLS. An NBD handshake over it, reads and writes, and refusals."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdcore.clients.session.session import Session
from nbdcore.errors import TLSError
from nbdcore.protocol.engine import Engine
from nbdcore.protocol.handshake.agreement import Settings, TLSPolicy
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission import commands
from nbdcore.streams.sockets import SocketStream
from nbdcore.streams.tls.credentials import TLS, supports_tls_psk
from nbdcore.streams.tls.starting import client_starter
from nbdcore.streams.waiting import Deadline, wait
from tests.certificates import PSK_LINE, PSK_USER, CertificateAuthority
from tests.interop.servers import Server, nbdkit
from tests.streams.tls_pairs import PATIENCE

pytestmark = pytest.mark.interop("nbdkit")

VERSIONS = {"TLSv1.2": "NORMAL:-VERS-TLS1.3", "TLSv1.3": "NORMAL:-VERS-TLS1.2"}
SIZE = 8 << 20

versions = pytest.mark.parametrize("priority", VERSIONS.values(), ids=VERSIONS)
over = pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])


@contextmanager
def session(server: Server, tls: TLS, host: str | None) -> Iterator[Session]:
    """Connect with TLS, and yield the session when the export is open. Raises what ended it before."""
    engine = Engine(Settings(tls=TLSPolicy.REQUIRE))
    connection = Session(engine, SocketStream(server.connect()), start_tls=client_starter(tls, host))
    try:
        exchange = engine.handshake()
        run(connection, lambda: exchange.done)
        if engine.error is not None:
            raise engine.error
        yield connection
    finally:
        connection.close()


def run(connection: Session, done) -> None:
    deadline = Deadline.after(PATIENCE)
    connection.advance()
    while not done():
        assert not deadline.expired
        if not connection._stream.buffered():
            wait(connection.fileno(), connection.interest(), deadline, "nbdkit answers")
        connection.advance()


def write_and_read_back(connection: Session) -> None:
    data = memoryview(random.Random(1).randbytes(SIZE))
    room = bytearray(SIZE)
    step = 1 << 20
    limits, engine = connection.engine.limits, connection.engine
    for make in (
        lambda at: commands.write(limits, data[at : at + step], at),
        lambda at: commands.read(limits, step, at, target=memoryview(room)[at : at + step]),
    ):
        pending = [make(at) for at in range(0, SIZE, step)]
        for command in pending:
            engine.submit(command)
        run(connection, lambda pending=pending: all(command.done for command in pending))
        assert [command.error for command in pending] == [None] * len(pending)
    assert room == data
    engine.submit(commands.disconnect())
    run(connection, lambda: connection.over)
    assert engine.phase is Phase.CLOSED, engine.error


@pytest.fixture(scope="module")
def ca() -> CertificateAuthority:
    return CertificateAuthority()


@pytest.fixture(scope="module")
def folder(ca, tmp_path_factory) -> Path:
    issued = {"server": ca.issue("server", "db.example", "127.0.0.1"), "client": ca.issue("client")}
    return ca.write(tmp_path_factory.mktemp("pki"), **issued)


@over
@versions
def test_certificates_both_ways(folder, tcp, priority):
    with nbdkit(f"--tls-certificates={folder}", "--tls-verify-peer", "memory", str(SIZE), tls="require", tcp=tcp) as server:
        tls = TLS(certificates=folder, priority=priority, hostname=None if tcp else "db.example")
        with session(server, tls, "127.0.0.1" if tcp else None) as connection:
            write_and_read_back(connection)


def test_name_that_the_certificate_does_not_have(folder):
    with (
        nbdkit(f"--tls-certificates={folder}", "memory", str(SIZE), tls="require") as server,
        pytest.raises(TLSError, match=r"not for the name 'other\.example'"),
        session(server, TLS(certificates=folder, hostname="other.example"), None),
    ):
        pass


@over
@versions
def test_client_without_the_certificate_that_is_demanded(ca, folder, tmp_path, tcp, priority):
    tls = TLS(certificates=ca.write(tmp_path), priority=priority)
    with (
        nbdkit(f"--tls-certificates={folder}", "--tls-verify-peer", "memory", str(SIZE), tls="require", tcp=tcp) as server,
        pytest.raises(TLSError, match=r"client certificate|certificate of this side"),
        session(server, tls, None),
    ):
        pass


class TestPreSharedKeys:
    # From Python 3.13 on.
    __test__ = supports_tls_psk()

    @pytest.fixture
    def keys(self, tmp_path) -> Path:
        path = tmp_path / "keys.psk"
        path.write_text(PSK_LINE)
        return path

    @over
    @versions
    def test_right_key(self, keys, tcp, priority):
        with (
            nbdkit(f"--tls-psk={keys}", "memory", str(SIZE), tls="require", tcp=tcp) as server,
            session(server, TLS(psk_file=keys, username=PSK_USER, priority=priority), "127.0.0.1") as connection,
        ):
            write_and_read_back(connection)

    @versions
    def test_wrong_key(self, keys, tmp_path, priority):
        wrong = tmp_path / "wrong.psk"
        wrong.write_text(f"{PSK_USER}:{'ff' * 32}\n")
        with (
            nbdkit(f"--tls-psk={keys}", "memory", str(SIZE), tls="require") as server,
            pytest.raises(TLSError, match="user name and pre-shared key"),
            session(server, TLS(psk_file=wrong, username=PSK_USER, priority=priority), None),
        ):
            pass

    @versions
    def test_server_that_shows_a_certificate_instead(self, keys, folder, priority):
        with (
            nbdkit(f"--tls-certificates={folder}", "memory", str(SIZE), tls="require") as server,
            pytest.raises(TLSError, match="pre-shared key"),
            session(server, TLS(psk_file=keys, username=PSK_USER, priority=priority), None),
        ):
            pass

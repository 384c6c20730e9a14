"""TLS, as a program uses it: whom a client believes, and what it does then. The servers are strangers: nbdkit and qemu-nbd."""

from __future__ import annotations

import errno
import pickle
import random
import threading
from pathlib import Path

import pytest

import nbdcore
from nbdcore import TLS, Client, NegotiationError, Phase, TLSError, TLSPolicy, UsageError
from tests.certificates import PSK_LINE, PSK_USER, CertificateAuthority
from tests.clients.talking import PATIENCE
from tests.interop.servers import Server, nbdkit, qemu_nbd

pytestmark = pytest.mark.interop("nbdkit", "qemu-nbd")

SIZE = 8 << 20
VERSIONS = {"TLSv1.2": "NORMAL:-VERS-TLS1.3", "TLSv1.3": "NORMAL:-VERS-TLS1.2"}

over = pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])


@pytest.fixture(scope="module")
def ca() -> CertificateAuthority:
    return CertificateAuthority()


@pytest.fixture(scope="module")
def pki(ca, tmp_path_factory) -> Path:
    """A server for the address 127.0.0.1 and for a name, a client, and the CA of both."""
    issued = {"server": ca.issue("server", "db.example", "127.0.0.1"), "client": ca.issue("client")}
    return ca.write(tmp_path_factory.mktemp("pki"), **issued)


@pytest.fixture
def trusting(ca, tmp_path) -> Path:
    """A folder of a client that trusts the CA and has nothing to show."""
    return ca.write(tmp_path / "trusting")


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "disk"
    with path.open("wb") as disk:
        disk.truncate(SIZE)
    return path


def serving(folder: Path, *options: str, tcp: bool = False, tls: str = "require"):
    return nbdkit(f"--tls-certificates={folder}", *options, "memory", str(SIZE), tls=tls, tcp=tcp)


def qemu_serving(folder: Path, image: Path, *, tcp: bool = False, verify: bool = False):
    credentials = f"tls-creds-x509,id=tls,endpoint=server,dir={folder},verify-peer={'yes' if verify else 'no'}"
    return qemu_nbd(image, "--object", credentials, "--tls-creds=tls", tcp=tcp)


def secured(server: Server) -> str:
    return server.uri.replace("nbd", "nbds", 1) if not server.uri.startswith("nbds") else server.uri


def use(client: Client, *, threads: int = 1) -> None:
    """Write and read back more than any buffer on the way holds, from several threads at once, and take leave."""
    assert client.tls
    data = random.Random(1).randbytes(SIZE)
    part = SIZE // threads
    wrong: list[object] = []

    def work(number: int) -> None:
        at = number * part
        client.pwrite(data[at : at + part], at, timeout=PATIENCE)
        for offset, count in [(at, 3), *((offset, part // 8) for offset in range(at, at + part, part // 8))]:
            if client.pread(count, offset, timeout=PATIENCE) != data[offset : offset + count]:
                wrong.append((offset, count))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE)
    assert not any(worker.is_alive() for worker in workers)
    assert wrong == []
    client.disconnect(timeout=PATIENCE)
    assert client.phase is Phase.CLOSED


# ---------------------------------------------------------------------------------------------- whom it believes


@over
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_server_with_the_right_certificate_is_used(pki, trusting, tcp, threads, version):
    with serving(pki, tcp=tcp) as server:
        tls = TLS(certificates=trusting, priority=VERSIONS[version])
        use(nbdcore.connect(server.uri, tls=tls, timeout=PATIENCE), threads=threads)


@over
def test_so_is_qemus(pki, trusting, image, tcp):
    with qemu_serving(pki, image, tcp=tcp) as server:
        use(nbdcore.connect(secured(server), tls=TLS(certificates=trusting), timeout=PATIENCE), threads=2)


@over
def test_both_sides_show_certificates(pki, image, tcp):
    with qemu_serving(pki, image, tcp=tcp, verify=True) as server:
        use(nbdcore.connect(secured(server), tls=TLS(certificates=pki), timeout=PATIENCE))
    with serving(pki, "--tls-verify-peer", tcp=tcp) as server:
        use(nbdcore.connect(server.uri, tls=TLS(certificates=pki), timeout=PATIENCE))


@over
def test_a_client_that_shows_no_certificate_where_one_is_demanded_is_told_so(pki, trusting, tcp):
    with (
        serving(pki, "--tls-verify-peer", tcp=tcp) as server,
        pytest.raises(TLSError, match=r"client certificate|certificate of this side"),
    ):
        nbdcore.connect(server.uri, tls=TLS(certificates=trusting), timeout=PATIENCE)


@over
def test_the_systems_cas_are_trusted_without_a_word(pki, tcp, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(pki / "ca-cert.pem"))
    with serving(pki, tcp=tcp) as server:
        with nbdcore.connect(server.uri, timeout=PATIENCE) as disk:
            assert disk.tls
        if tcp:
            with nbdcore.connect_tcp("127.0.0.1", server.port, tls=True, timeout=PATIENCE) as disk:
                assert disk.tls
        else:
            with nbdcore.connect_unix(server.path, tls=True, timeout=PATIENCE) as disk:
                assert disk.tls


@over
@pytest.mark.parametrize("tls", [None, True])
def test_a_ca_that_the_system_does_not_have_is_not_trusted(pki, tcp, tls):
    with serving(pki, tcp=tcp) as server, pytest.raises(TLSError, match="issued by a CA that is not trusted here"):
        nbdcore.connect(server.uri, tls=tls, timeout=PATIENCE)


BAD = {
    "wrong CA": (lambda _: CertificateAuthority().issue("server", "127.0.0.1", "db.example"), "a CA that is not trusted here"),
    "expired": (lambda ca: ca.issue("server", "127.0.0.1", "db.example", days=(-3, -2)), "has expired"),
    "not yet valid": (lambda ca: ca.issue("server", "127.0.0.1", "db.example", days=(2, 3)), "is not valid yet"),
    "self-signed": (lambda ca: ca.issue("server", "127.0.0.1", "db.example", self_signed=True), "is self-signed"),
    "a client's": (lambda ca: ca.issue("client", "127.0.0.1", "db.example"), "another purpose than to be a server"),
}


@over
@pytest.mark.parametrize("policy", [TLSPolicy.REQUIRE, TLSPolicy.ALLOW])
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_certificate_ends_the_connection(ca, trusting, tmp_path, tcp, policy, fault):
    issue, said = BAD[fault]
    with serving(ca.write(tmp_path / "bad", server=issue(ca)), tcp=tcp) as server:
        check_not_believed(server, trusting, said, policy)


@over
@pytest.mark.parametrize("fault", BAD)
def test_so_does_one_of_qemus(ca, trusting, tmp_path, image, tcp, fault):
    issue, said = BAD[fault]
    # QEMU looks at its own certificate against its CA, and its dates, before it starts: so it shows this one without that look.
    folder = ca.write(tmp_path / "bad", server=issue(ca))
    credentials = f"tls-creds-x509,id=tls,endpoint=server,dir={folder},verify-peer=no,sanity-check=no"
    with qemu_nbd(image, "--object", credentials, "--tls-creds=tls", tcp=tcp) as server:
        check_not_believed(server, trusting, said, TLSPolicy.REQUIRE)


def check_not_believed(server: Server, trusting: Path, said: str, policy: TLSPolicy) -> None:
    client = Client(tls=TLS(certificates=trusting), tls_policy=policy)
    with pytest.raises(TLSError, match=said):
        client.connect(server.uri, timeout=PATIENCE, wait=PATIENCE)
    assert client.phase is Phase.DEAD


def test_no_certificate_matters_where_the_caller_says_so(ca, tmp_path):
    folder = ca.write(tmp_path / "bad", server=CertificateAuthority().issue("server", "elsewhere.example", days=(-3, -2)))
    with serving(folder, tcp=True) as server:
        use(nbdcore.connect(server.uri, tls=TLS(verify=False), timeout=PATIENCE))


# ---------------------------------------------------------------------------------------------- names


@pytest.fixture
def named(ca, tmp_path) -> Path:
    return ca.write(tmp_path / "named", server=ca.issue("server", "db.example", "localhost"))


@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd"])
def test_the_host_of_tcp_must_be_the_certificates(named, trusting, image, kind):
    tls = TLS(certificates=trusting)
    with serving(named, tcp=True) if kind == "nbdkit" else qemu_serving(named, image, tcp=True) as server:
        with pytest.raises(TLSError, match=r"not for the address '127\.0\.0\.1'"):
            nbdcore.connect_tcp("127.0.0.1", server.port, tls=tls, timeout=PATIENCE)
        with nbdcore.connect_tcp("localhost", server.port, tls=tls, timeout=PATIENCE) as disk:
            assert disk.tls


def test_an_address_among_the_certificates_names_will_do(pki, trusting):
    with (
        serving(pki, tcp=True) as server,
        nbdcore.connect_tcp("127.0.0.1", server.port, tls=TLS(certificates=trusting), timeout=PATIENCE) as disk,
    ):
        assert disk.tls


@over
def test_a_name_that_the_caller_gives_goes_before_the_hosts(named, trusting, tcp):
    with serving(named, tcp=tcp) as server:
        with nbdcore.connect(server.uri, tls=TLS(certificates=trusting, hostname="db.example"), timeout=PATIENCE) as disk:
            assert disk.tls
        with pytest.raises(TLSError, match=r"not for the name 'other\.example'"):
            nbdcore.connect(server.uri, tls=TLS(certificates=trusting, hostname="other.example"), timeout=PATIENCE)


def test_the_name_of_an_attempt_before_is_not_used(named, trusting):
    """libnbd uses the host of an earlier, failed TCP connection on the same handle to check a later one over a unix socket."""
    client = Client(tls=TLS(certificates=trusting))
    with serving(named) as server:
        with pytest.raises(UsageError):
            client.connect_tcp("bad host", 1)
        use(client.connect_unix(server.path, timeout=PATIENCE))


def test_a_uri_may_name_the_host(named, trusting):
    with serving(named) as server:
        tls = TLS(certificates=trusting)
        with nbdcore.connect(f"{server.uri}&tls-hostname=db.example", tls=tls, timeout=PATIENCE) as disk:
            assert disk.tls
        with pytest.raises(TLSError, match=r"not for the name 'other\.example'"):
            nbdcore.connect(f"{server.uri}&tls-hostname=other.example", tls=tls, timeout=PATIENCE)


def test_over_a_stream_and_a_socket_the_chain_is_checked(named, trusting):
    tls = TLS(certificates=trusting)
    with serving(named, tcp=True) as server:
        with nbdcore.connect_socket(server.connect(), tls=tls, timeout=PATIENCE) as disk:
            assert disk.tls
        with pytest.raises(TLSError, match="a CA that is not trusted here"):
            nbdcore.connect_socket(server.connect(), tls=True, timeout=PATIENCE)


# ---------------------------------------------------------------------------------------------- policies


@over
def test_allow_encrypts_where_the_server_has_it(pki, trusting, tcp):
    with serving(pki, tcp=tcp, tls="on") as server:
        use(nbdcore.connect(server.uri, tls=TLS(certificates=trusting), tls_policy=TLSPolicy.ALLOW, timeout=PATIENCE))


def test_allow_goes_on_in_the_clear_where_the_server_has_not():
    with (
        nbdkit("memory", str(SIZE)) as server,
        nbdcore.connect(server.uri, tls_policy=TLSPolicy.ALLOW, timeout=PATIENCE) as disk,
    ):
        assert not disk.tls
        assert disk.pread(3, 0) == bytes(3)


@pytest.mark.parametrize("opt_mode", [False, True])
def test_require_is_refused_by_a_server_without_tls(opt_mode):
    with nbdkit("memory", str(SIZE)) as server:
        client = Client(tls=True, opt_mode=opt_mode)
        with pytest.raises(TLSError, match="TLS is required, and starting TLS failed") as caught:
            client.connect(server.uri, timeout=PATIENCE, wait=PATIENCE)
        assert caught.value.errno == errno.ENOTSUP
        assert client.phase is Phase.DEAD


def test_an_nbds_uri_requires_tls_whatever_the_policy():
    with nbdkit("memory", str(SIZE)) as server, pytest.raises(TLSError, match="TLS is required"):
        nbdcore.connect(secured(server), tls_policy=TLSPolicy.ALLOW, timeout=PATIENCE)


def test_a_plain_client_is_told_that_the_server_requires_tls(pki):
    with serving(pki) as server, pytest.raises(NegotiationError, match="the server requires TLS"):
        nbdcore.connect_unix(server.path, timeout=PATIENCE)


# ---------------------------------------------------------------------------------------------- lists and opt mode


@over
def test_exports_are_listed_by_tls(pki, trusting, tcp):
    tls = TLS(certificates=trusting)
    with serving(pki, tcp=tcp) as server:
        assert [export.name for export in nbdcore.list_exports(server.uri, tls=tls, timeout=PATIENCE)] == [""]
        with nbdcore.connect(server.uri, tls=tls, timeout=PATIENCE) as disk:
            assert [export.name for export in disk.list_exports(timeout=PATIENCE)] == [""]
        with pytest.raises(TLSError):
            nbdcore.list_exports(server.uri, timeout=PATIENCE)


def test_opt_mode_pauses_inside_tls(pki, trusting):
    with serving(pki) as server:
        client = nbdcore.connect(server.uri, tls=TLS(certificates=trusting), opt_mode=True, timeout=PATIENCE)
        assert (client.phase, client.tls, client.structured_replies) == (Phase.NEGOTIATING, True, True)
        assert client.opt_info(timeout=PATIENCE).size == SIZE
        client.opt_go(timeout=PATIENCE)
        use(client)


@pytest.mark.parametrize("options", [{}, {"tls": True, "tls_policy": TLSPolicy.DISABLE}], ids=["unasked", "disabled"])
def test_tls_can_be_started_by_hand_with_the_systems_cas(pki, options, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(pki / "ca-cert.pem"))
    with serving(pki, tls="on", tcp=True) as server:
        client = Client(opt_mode=True, **options).connect_tcp("127.0.0.1", server.port, timeout=PATIENCE)
        assert (client.tls, client.structured_replies) == (False, True)
        assert client.opt_starttls(timeout=PATIENCE) is True
        assert (client.tls, client.structured_replies) == (True, False)
        assert client.opt_structured_reply(timeout=PATIENCE)
        client.opt_go(timeout=PATIENCE)
        use(client)


def test_a_handshake_by_hand_that_fails_ends_the_connection(pki):
    with serving(pki, tls="on", tcp=True) as server:
        client = Client(opt_mode=True).connect_tcp("127.0.0.1", server.port, timeout=PATIENCE)
        with pytest.raises(TLSError, match="a CA that is not trusted here"):
            client.opt_starttls(timeout=PATIENCE)
        assert client.phase is Phase.DEAD
        assert isinstance(client._engine.error, TLSError)


def test_tls_by_hand_refused_goes_on_in_the_clear():
    with nbdkit("memory", str(SIZE)) as server:
        client = Client(opt_mode=True).connect(server.uri, timeout=PATIENCE)
        assert client.opt_starttls(timeout=PATIENCE) is False
        client.opt_go(timeout=PATIENCE)
        assert client.size == SIZE
        client.disconnect(timeout=PATIENCE)


def test_tls_a_second_time_is_refused_and_leaves_the_first(pki, trusting):
    with serving(pki) as server:
        client = nbdcore.connect(server.uri, tls=TLS(certificates=trusting), opt_mode=True, timeout=PATIENCE)
        with pytest.raises(UsageError, match="encrypted already"):
            client.opt_starttls(timeout=PATIENCE)
        client.opt_go(timeout=PATIENCE)
        use(client)


# ---------------------------------------------------------------------------------------------- pre-shared keys


class TestPreSharedKeys:
    # From Python 3.13 on.
    __test__ = nbdcore.supports_tls_psk()

    @pytest.fixture
    def keys(self, tmp_path) -> Path:
        path = tmp_path / "keys.psk"
        path.write_text(PSK_LINE)
        return path

    @over
    @pytest.mark.parametrize("version", VERSIONS)
    def test_the_right_key(self, keys, tcp, version):
        with nbdkit(f"--tls-psk={keys}", "memory", str(SIZE), tls="require", tcp=tcp) as server:
            tls = TLS(psk_file=keys, username=PSK_USER, priority=VERSIONS[version])
            use(nbdcore.connect(server.uri, tls=tls, timeout=PATIENCE), threads=2)

    @over
    @pytest.mark.parametrize("version", VERSIONS)
    def test_the_right_key_of_qemu(self, keys, image, tcp, version):
        credentials = f"tls-creds-psk,id=tls,endpoint=server,dir={keys.parent}"
        with qemu_nbd(image, "--object", credentials, "--tls-creds=tls", tcp=tcp) as server:
            tls = TLS(psk_file=keys, username=PSK_USER, priority=VERSIONS[version])
            use(nbdcore.connect(server.uri, tls=tls, timeout=PATIENCE))
            with pytest.raises(TLSError, match="or a pre-shared key"):
                nbdcore.connect(server.uri, tls=True, timeout=PATIENCE)

    def test_the_user_of_a_uri(self, keys):
        with nbdkit(f"--tls-psk={keys}", "memory", str(SIZE), tls="require", tcp=True) as server:
            uri = server.uri.replace("://", f"://{PSK_USER}@") + f"?tls-type=psk&tls-psk-file={keys}"
            use(nbdcore.connect(uri, allow_local_files=True, timeout=PATIENCE))

    def test_the_wrong_key(self, keys, tmp_path):
        wrong = tmp_path / "wrong.psk"
        wrong.write_text(f"{PSK_USER}:{'ff' * 32}\n")
        with (
            nbdkit(f"--tls-psk={keys}", "memory", str(SIZE), tls="require") as server,
            pytest.raises(TLSError),
        ):
            nbdcore.connect(server.uri, tls=TLS(psk_file=wrong, username=PSK_USER), timeout=PATIENCE)


class TestWithoutPreSharedKeys:
    # Before Python 3.13.
    __test__ = not nbdcore.supports_tls_psk()

    def test_they_are_refused_before_anything_is_opened(self, tmp_path):
        client = Client(tls=TLS(psk_file=tmp_path / "keys.psk"))
        with pytest.raises(UsageError, match=r"Python 3\.13") as caught:
            client.connect_unix(tmp_path / "nobody", timeout=PATIENCE)
        assert caught.value.errno == errno.ENOTSUP
        assert client.phase is Phase.CREATED


# ---------------------------------------------------------------------------------------------- this machine


@pytest.mark.parametrize("policy", [None, TLSPolicy.ALLOW])
def test_what_is_wrong_here_is_said_before_anything_is_opened(tmp_path, policy):
    """Nobody listens at that path, so an attempt would be another error."""
    for tls in (TLS(certificates=tmp_path), TLS(ca=tmp_path / "none"), TLS(priority="SORCERY"), TLS(hostname="a..b")):
        client = Client(tls=tls, tls_policy=policy)
        with pytest.raises(UsageError):
            client.connect_unix(tmp_path / "nobody", timeout=PATIENCE)
        assert client.phase is Phase.CREATED
        client.close()


def test_credentials_can_be_pickled():
    tls = TLS(certificates="/pki", hostname="db.example")
    assert pickle.loads(pickle.dumps(tls)) == tls
    assert hash(pickle.loads(pickle.dumps(tls))) == hash(tls)

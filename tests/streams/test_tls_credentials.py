"""Whom a client and a server accept, and what is said when they do not; files and settings that cannot be used."""

from __future__ import annotations

import errno
import pickle
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from nbdcore.errors import TLSError, UsageError
from nbdcore.streams.memory import memory_pair
from nbdcore.streams.tls import contexts
from nbdcore.streams.tls.credentials import TLS, ServerTLS, supports_tls, supports_tls_psk
from nbdcore.streams.tls.priorities import Priority, parse_priority
from nbdcore.streams.tls.starting import client_starter, server_starter
from tests.certificates import PSK_LINE, CertificateAuthority
from tests.streams.tls_pairs import PAIRS, connected, receive, send, shake_both, started

NAME = "db.example"
VERSIONS = {"TLSv1.2": "NORMAL:-VERS-TLS1.3", "TLSv1.3": "NORMAL:-VERS-TLS1.2"}

pairs = pytest.mark.parametrize("make_pair", PAIRS, ids=lambda pair: pair.__name__)
versions = pytest.mark.parametrize("priority", VERSIONS.values(), ids=VERSIONS)


class World:
    """A CA, a stranger's CA, and folders of certificates by what is in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca, self.stranger = CertificateAuthority(), CertificateAuthority("stranger")
        self.trust = self.ca.write(folder / "trust")
        self.good = self.server(NAME, "127.0.0.1", "::1")

    def server(self, *names: str, **how) -> Path:
        """Return a server's folder with a certificate for these names."""
        folder = self.folder / f"server-{len(list(self.folder.iterdir()))}"
        return self.ca.write(folder, server=self.ca.issue("server", *names, **how))

    def client(self, ca: CertificateAuthority | None = None, **how) -> Path:
        """Return a client's folder: it trusts the CA, and shows what `ca` issued."""
        folder = self.folder / f"client-{len(list(self.folder.iterdir()))}"
        return self.ca.write(folder, client=(ca or self.ca).issue("client", **how))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("pki"))


def refusal(client: TLS, server: ServerTLS, host: str | None, make_pair=memory_pair) -> str:
    """Return what the client says of a connection that must fail: in the handshake, or when it first wants to hear something."""
    near, far = make_pair()
    with started(client_starter(client, host), server_starter(server), lambda: (near, far)) as ends:
        mine = [error for error in shake_both(*ends) if str(near) in str(error)]
        if not mine:
            with pytest.raises(TLSError) as caught:
                receive(ends[0])
            mine.append(caught.value)
        assert len(mine) == 1
        assert isinstance(mine[0], TLSError)
        return str(mine[0])


def accepted(client: TLS, server: ServerTLS, host: str | None, make_pair=memory_pair) -> None:
    with connected(client_starter(client, host), server_starter(server), make_pair) as (near, far):
        send(near, b"there")
        assert receive(far) == b"there"
        send(far, b"and back")
        assert receive(near) == b"and back"


# --- the server's certificate ---


@pairs
@versions
@pytest.mark.parametrize("host", [NAME, f"{NAME}.", "127.0.0.1", "::1", "::1%lo", "DB.example", None, ""])
def test_right_certificate_is_accepted(world, host, make_pair, priority):
    accepted(TLS(certificates=world.trust, priority=priority), ServerTLS(certificates=world.good), host, make_pair)


@pairs
@pytest.mark.parametrize("host", ["other.example", "127.0.0.2", "::2", "example", f"x.{NAME}"])
def test_certificate_for_another_name_is_refused(world, host, make_pair):
    words = refusal(TLS(certificates=world.trust), ServerTLS(certificates=world.good), host, make_pair)
    assert f"its certificate is not for the {'name' if host[-1].isalpha() else 'address'} {host!r}" in words


def test_address_needs_a_certificate_for_the_address(world):
    names_only = world.server("localhost")
    assert "'127.0.0.1'" in refusal(TLS(certificates=world.trust), ServerTLS(certificates=names_only), "127.0.0.1")


def test_hostname_is_checked_in_place_of_the_host(world):
    server = ServerTLS(certificates=world.good)
    accepted(TLS(certificates=world.trust, hostname=NAME), server, "10.0.0.1")
    accepted(TLS(certificates=world.trust, hostname=NAME), server, None)
    assert "'other.example'" in refusal(TLS(certificates=world.trust, hostname="other.example"), server, NAME)


def test_empty_hostname_leaves_the_chain_to_be_checked(world):
    accepted(TLS(certificates=world.trust, hostname=""), ServerTLS(certificates=world.good), "other.example")
    foreign = world.stranger.write(world.folder / "foreign", server=world.stranger.issue("server", NAME))
    assert "not trusted" in refusal(TLS(certificates=world.trust, hostname=""), ServerTLS(certificates=foreign), None)


@pairs
@versions
@pytest.mark.parametrize("host", [NAME, None])
def test_certificate_of_another_ca_is_refused(world, host, make_pair, priority):
    foreign = world.stranger.write(world.folder / "foreign", server=world.stranger.issue("server", NAME))
    words = refusal(TLS(certificates=world.trust, priority=priority), ServerTLS(certificates=foreign), host, make_pair)
    assert "issued by a CA that is not trusted here" in words


@pytest.mark.parametrize("host", [NAME, None])
def test_system_store_does_not_know_the_ca(world, host):
    assert "not trusted here" in refusal(TLS(), ServerTLS(certificates=world.good), host)


def test_system_store_that_knows_the_ca_accepts(world, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(world.trust / "ca-cert.pem"))
    accepted(TLS(), ServerTLS(certificates=world.good), NAME)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"days": (-3, -1)}, "has expired"),
        ({"days": (1, 2)}, "is not valid yet"),
        ({"self_signed": True}, "is self-signed"),
    ],
)
@pytest.mark.parametrize("host", [NAME, None])
def test_unusable_certificate_is_refused_with_the_reason(world, how, words, host):
    assert words in refusal(TLS(certificates=world.trust), ServerTLS(certificates=world.server(NAME, **how)), host)


def test_certificate_of_a_client_is_not_a_servers(world):
    folder = world.ca.write(world.folder / "swapped", server=world.ca.issue("client", NAME))
    assert "another purpose than to be a server" in refusal(TLS(certificates=world.trust), ServerTLS(certificates=folder), NAME)


def test_revoked_certificate_is_refused(world):
    issued = world.ca.issue("server", NAME)
    server = world.ca.write(world.folder / "revoked", server=issued)
    trust = world.ca.write(world.folder / "trust-with-list")
    (trust / "ca-crl.pem").write_bytes(world.ca.revoke(issued))
    assert "was revoked" in refusal(TLS(certificates=trust), ServerTLS(certificates=server), NAME)
    accepted(TLS(certificates=trust), ServerTLS(certificates=world.good), NAME)


@pairs
def test_without_verify_anybody_is_accepted(world, make_pair):
    foreign = world.server("other.example", self_signed=True)
    accepted(TLS(verify=False), ServerTLS(certificates=foreign), NAME, make_pair)


def test_explicit_files_take_the_place_of_the_folders(world):
    foreign = world.stranger.write(world.folder / "explicit", server=world.stranger.issue("server", NAME))
    client = TLS(certificates=world.trust, ca=foreign / "ca-cert.pem")
    server = ServerTLS(certificates=world.good, certificate=str(foreign / "server-cert.pem"), key=str(foreign / "server-key.pem"))
    accepted(client, server, NAME)


def test_certificate_and_key_in_one_file(world):
    both = world.folder / "both.pem"
    both.write_bytes((world.good / "server-key.pem").read_bytes() + (world.good / "server-cert.pem").read_bytes())
    accepted(TLS(certificates=world.trust), ServerTLS(certificate=both), NAME)


@pytest.mark.parametrize(
    ("credentials", "host", "told"),
    [
        (TLS(verify=False), NAME, NAME),
        (TLS(verify=False), f"{NAME}.", NAME),
        (TLS(verify=False, hostname="said.example"), "10.0.0.1", "said.example"),
        (TLS(verify=False), "127.0.0.1", None),
        (TLS(verify=False), "::1", None),
        (TLS(verify=False), None, None),
        (TLS(verify=False, hostname=""), NAME, None),
    ],
)
def test_server_is_told_the_name_unless_it_is_an_address(world, credentials, host, told):
    heard: list[str | None] = []
    server = server_starter(ServerTLS(certificates=world.good))
    server.keywords["context"].sni_callback = lambda _tls, name, _context: heard.append(name)
    with connected(client_starter(credentials, host), server):
        assert heard == [told]


# --- the client's certificate ---


@pairs
@versions
def test_client_with_a_certificate_is_accepted(world, make_pair, priority):
    server = ServerTLS(certificates=world.good, verify_clients=True)
    accepted(TLS(certificates=world.client(), priority=priority), server, NAME, make_pair)


@versions
def test_client_without_a_certificate_is_refused(world, priority):
    server = ServerTLS(certificates=world.good, verify_clients=True)
    words = refusal(TLS(certificates=world.trust, priority=priority), server, NAME)
    assert "demands a certificate of this side" in words or "found nothing in common" in words


@versions
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"ca": CertificateAuthority("nobody's")}, "does not trust the CA that issued the certificate of this side"),
        ({"days": (-3, -1)}, "says that the certificate of this side has expired"),
    ],
)
def test_wrong_client_certificate_is_refused_with_the_reason(world, priority, how, words):
    server = ServerTLS(certificates=world.good, verify_clients=True)
    assert words in refusal(TLS(certificates=world.client(**how), priority=priority), server, NAME)


def test_alert_is_found_though_sending_fails_first(world):
    server = ServerTLS(certificates=world.good, verify_clients=True)
    client = TLS(certificates=world.trust, priority=VERSIONS["TLSv1.3"])
    with started(client_starter(client, NAME), server_starter(server)) as (near, far):
        while not near.handshake():
            assert not far.handshake()
        with pytest.raises(TLSError, match="showed no certificate"):
            far.handshake()
        far.close()
        with pytest.raises(TLSError, match="demands a certificate of this side"):
            near.send([memoryview(b"hello")])


def test_client_shows_nothing_to_a_server_that_does_not_ask(world):
    accepted(TLS(certificates=world.client()), ServerTLS(certificates=world.good), NAME)


# --- settings ---


@pytest.mark.parametrize("ciphers", ["ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE+AESGCM:@SECLEVEL=1"])
def test_ciphers_are_openssls(world, ciphers):
    client = TLS(certificates=world.trust, ciphers=ciphers)
    server = ServerTLS(certificates=world.good, priority=VERSIONS["TLSv1.2"])
    with connected(client_starter(client, NAME), server_starter(server)) as (near, _):
        assert "AES" in near.cipher
        assert "GCM" in near.cipher


def test_anonymous_ciphers_are_never_offered(world):
    names = {cipher["name"] for cipher in contexts.client_context(TLS(ciphers="ALL:COMPLEMENTOFALL"), None).get_ciphers()}
    assert names
    assert not {name for name in names if "NULL" in name or name.startswith(("ADH", "AECDH"))}


@pytest.mark.parametrize(
    ("priority", "version", "cipher"),
    [
        ("NORMAL:-VERS-TLS1.3:-AES-256-GCM:-CHACHA20-POLY1305", "TLSv1.2", "AES128-GCM"),
        ("SECURE256", "TLSv1.3", ""),
        ("SECURE256:-VERS-ALL:+VERS-TLS1.2", "TLSv1.2", "256"),
        ("SECURE192:-VERS-TLS1.3:%SAFE_RENEGOTIATION", "TLSv1.2", ""),
        ("normal:-vers-tls1.0:-VERS-TLS1.1:!RSA:+AES-128-GCM", "TLSv1.3", ""),
        ("SECURE128:+VERS-ALL", "TLSv1.3", ""),
    ],
)
def test_priority_is_obeyed(world, priority, version, cipher):
    client = TLS(certificates=world.trust, priority=priority)
    with connected(client_starter(client, NAME), server_starter(ServerTLS(certificates=world.good))) as (near, _):
        assert near.version == version
        assert cipher in near.cipher
        assert near._tls.cipher()[2] >= parse_priority(priority).bits


def test_cipher_weaker_than_the_priority_is_refused(world):
    client = client_starter(TLS(certificates=world.trust, priority="SECURE256"), NAME)
    client.keywords["least_bits"] = 257
    with started(client, server_starter(ServerTLS(certificates=world.good))) as (near, far):
        errors = shake_both(near, far)
        assert any("257 are demanded here" in str(error) for error in errors)


@pytest.mark.parametrize(
    "priority",
    [
        "",
        "NONE:+VERS-TLS1.3",
        "@SYSTEM",
        "SECURE:-VERS-TLS1.2",
        "NORMAL:+VERS-TLS1.1",
        "NORMAL:+ANON-DH",
        "NORMAL:+3DES-CBC",
        "NORMAL:-ECDHE-RSA",
        "NORMAL:%COMPAT",
        "NORMAL:%SERVER_PRECEDENCE",
        "NORMAL:VERS-TLS1.2",
        "NORMAL:-VERS-ALL",
        "NORMAL:-VERS-TLS1.2:-VERS-TLS1.3",
        "NORMAL:-AES-128-GCM",
        "NORMAL:+",
        "NORMAL:-",
        "NORMAL\n:-VERS-TLS1.2",
    ],
)
def test_priority_that_cannot_be_done_is_refused(priority):
    with pytest.raises(UsageError, match="priority"):
        client_starter(TLS(priority=priority))


def test_parsed_priority():
    assert parse_priority("NORMAL") == Priority()
    assert parse_priority("PFS:-AES-128-CBC:-AES-256-CBC:+AES-256-CBC") == Priority(without=frozenset({"aes-128-cbc"}))
    assert parse_priority("SECURE192:-VERS-TLS1.2") == Priority(bits=192, tls12=False)


@pytest.mark.parametrize("ciphers", ["NO-SUCH-CIPHER", "\0"])
def test_ciphers_that_openssl_does_not_know_are_refused(ciphers):
    with pytest.raises(UsageError, match="knows no cipher"):
        client_starter(TLS(ciphers=ciphers))


def test_versions_before_1_2_and_renegotiation_are_never_allowed(world):
    for context in (contexts.client_context(TLS(), None), contexts.server_context(ServerTLS(certificates=world.good))):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert context.options & ssl.OP_NO_RENEGOTIATION


# --- arguments and files ---


@pytest.mark.parametrize(
    "make",
    [
        lambda: TLS(psk_file="keys", certificates="folder"),
        lambda: TLS(psk_file="keys", ca="file"),
        lambda: TLS(psk_file="keys", certificate="file"),
        lambda: TLS(key="file"),
        lambda: TLS(priority="NORMAL", ciphers="ALL"),
        ServerTLS,
        lambda: ServerTLS(ca="file"),
        lambda: ServerTLS(psk_file="keys", certificates="folder"),
        lambda: ServerTLS(psk_file="keys", verify_clients=True),
        lambda: ServerTLS(certificate="file", verify_clients=True),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(make):
    with pytest.raises(UsageError):
        make()


def test_credentials_are_plain_values(world):
    for value in (TLS(certificates=world.trust, hostname=NAME), ServerTLS(certificates=world.good)):
        assert pickle.loads(pickle.dumps(value)) == value
        assert hash(value) == hash(pickle.loads(pickle.dumps(value)))


@pytest.mark.parametrize("host", ["a..b", ".example", "x" * 64 + ".example", "a\0b", "a\udc80"])
def test_host_that_no_certificate_could_be_for_is_refused(host):
    with pytest.raises(UsageError, match="no host name"):
        client_starter(TLS(), host)


@pytest.mark.parametrize("name", ["ca-cert.pem", "client-cert.pem", "client-key.pem"])
def test_missing_file_of_a_clients_folder_is_named(world, name):
    folder = world.client()
    (folder / name).unlink()
    with pytest.raises(UsageError, match=name) as caught:
        client_starter(TLS(certificates=folder), NAME)
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
def test_missing_file_of_a_servers_folder_is_named(world, name):
    folder = world.server(NAME)
    (folder / name).unlink()
    with pytest.raises(UsageError, match=name) as caught:
        server_starter(ServerTLS(certificates=folder, verify_clients=True))
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("name", ["ca-cert.pem", "ca-crl.pem", "client-cert.pem", "client-key.pem"])
def test_file_that_holds_something_else_is_named(world, name):
    folder = world.client()
    (folder / name).write_text("something else\n")
    with pytest.raises(UsageError, match="PEM form") as caught:
        client_starter(TLS(certificates=folder), NAME)
    assert str(folder) in str(caught.value)


def test_key_of_another_certificate_is_refused(world):
    folder = world.client()
    (folder / "client-key.pem").write_bytes(world.ca.issue("client").key_pem())
    with pytest.raises(UsageError, match="not that of the certificate"):
        client_starter(TLS(certificates=folder), NAME)


def test_encrypted_key_is_refused_without_asking_on_the_terminal(world):
    folder, issued = world.client(), world.ca.issue("client")
    (folder / "client-cert.pem").write_bytes(issued.certificate_pem())
    (folder / "client-key.pem").write_bytes(issued.key_pem(b"password"))
    with pytest.raises(UsageError, match="encrypted"):
        client_starter(TLS(certificates=folder), NAME)


# --- what this Python can do ---


def test_this_python_has_tls():
    assert supports_tls()


def test_pre_shared_keys_are_tested_from_python_3_13_on():
    """Where this fails, OpenSSL was built without them, and every test of them is left out."""
    assert supports_tls_psk() == (sys.version_info >= (3, 13))


def test_psk_without_support_is_refused_clearly(tmp_path, monkeypatch):
    (tmp_path / "keys").write_text(PSK_LINE)
    monkeypatch.setattr(ssl, "HAS_PSK", False, raising=False)
    for make_ready in (
        lambda: client_starter(TLS(psk_file=tmp_path / "keys")),
        lambda: server_starter(ServerTLS(psk_file=tmp_path / "keys")),
    ):
        with pytest.raises(UsageError, match=r"needs Python 3\.13") as caught:
            make_ready()
        assert caught.value.errno == errno.ENOTSUP


def test_python_without_ssl_is_said_so_clearly():
    code = (
        "import sys, importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == '_ssl' else find(name, *rest)\n"
        "from nbdcore.streams.tls.credentials import TLS, supports_tls_psk, supports_tls\n"
        "from nbdcore.streams.tls.starting import client_starter\n"
        "print(supports_tls(), supports_tls_psk())\n"
        "try: client_starter(TLS())\n"
        "except ValueError as exc: print(exc)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["False False", "this Python was built without the ssl module: it has no TLS (ENOTSUP)"]


def test_credentials_do_not_import_ssl():
    code = (
        "import sys, nbdcore.streams.tls.starting, nbdcore.streams.tls.credentials as c\n"
        "c.TLS(), c.ServerTLS(certificates='x'); print('ssl' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"

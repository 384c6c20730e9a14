"""Pre-shared keys: both sides prove that they know the key, and nothing else does instead."""

from __future__ import annotations

import errno
import getpass
import ssl
from pathlib import Path

import pytest

from nbdcore.errors import Disconnected, TLSError, UsageError
from nbdcore.streams.base import Stream
from nbdcore.streams.memory import memory_pair
from nbdcore.streams.tls.credentials import TLS, ServerTLS, supports_tls_psk
from nbdcore.streams.tls.starting import client_starter, server_starter
from nbdcore.testing.choppy import ChoppyStream
from tests.certificates import PSK_KEY, PSK_LINE, PSK_USER, CertificateAuthority
from tests.streams.tls_pairs import PAIRS, connected, receive, send, shake_both, started

# From Python 3.13 on. What older ones answer is tested in test_tls_credentials.
__test__ = supports_tls_psk()

VERSIONS = {"TLSv1.2": "NORMAL:-VERS-TLS1.3", "TLSv1.3": "NORMAL:-VERS-TLS1.2"}
versions = pytest.mark.parametrize("priority", VERSIONS.values(), ids=VERSIONS)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("psk") / "keys.psk"
    path.write_text(f"carol:0011\n{PSK_LINE}")
    return path


@pytest.fixture
def other_keys(tmp_path) -> Path:
    path = tmp_path / "others.psk"
    path.write_text(f"{PSK_USER}:ffee\nmallory:{PSK_KEY.hex()}\n")
    return path


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ca = CertificateAuthority()
    return ca.write(tmp_path_factory.mktemp("pki"), server=ca.issue("server", "db.example"))


@pytest.mark.parametrize("make_pair", PAIRS, ids=lambda pair: pair.__name__)
@pytest.mark.parametrize("host", ["db.example", "127.0.0.1", None])
@versions
def test_right_key_is_accepted(keys, make_pair, priority, host):
    client = client_starter(TLS(psk_file=keys, username=PSK_USER, priority=priority), host)
    with connected(client, server_starter(ServerTLS(psk_file=keys)), make_pair) as (near, far):
        assert VERSIONS[near.version] == priority
        send(near, b"there")
        assert receive(far) == b"there"
        send(far, b"back")
        assert receive(near) == b"back"


@versions
def test_sessions_stay_secret_when_the_key_becomes_known(keys, priority):
    client = client_starter(TLS(psk_file=keys, username=PSK_USER, priority=priority))
    with connected(client, server_starter(ServerTLS(psk_file=keys))) as (near, _):
        assert near.version == "TLSv1.3" or "DHE" in near.cipher


@versions
def test_handshake_byte_by_byte(keys, priority):
    def make_pair() -> tuple[Stream, Stream]:
        near, far = memory_pair()
        return ChoppyStream(near, most=1, seed=1), ChoppyStream(far, most=1, seed=2)

    client = client_starter(TLS(psk_file=keys, username=PSK_USER, priority=priority))
    with connected(client, server_starter(ServerTLS(psk_file=keys)), make_pair) as (near, far):
        send(near, b"there")
        assert receive(far, 5) == b"there"


@versions
@pytest.mark.parametrize("username", [PSK_USER, "mallory"], ids=["wrong key", "unknown user"])
def test_wrong_key_and_unknown_user_are_refused_by_both(keys, other_keys, priority, username):
    client = client_starter(TLS(psk_file=other_keys, username=username, priority=priority))
    with started(client, server_starter(ServerTLS(psk_file=keys))) as ends:
        errors = shake_both(*ends)
        assert len(errors) == 2
        assert all(isinstance(error, TLSError) for error in errors)


@versions
@pytest.mark.parametrize("self_signed", [False, True])
def test_server_that_ignores_the_key_and_shows_a_certificate_is_refused(keys, tmp_path, priority, self_signed):
    ca = CertificateAuthority()
    folder = ca.write(tmp_path, server=ca.issue("server", "db.example", self_signed=self_signed))
    client = client_starter(TLS(psk_file=keys, username=PSK_USER, priority=priority), "db.example")
    with started(client, server_starter(ServerTLS(certificates=folder))) as (near, far):
        with pytest.raises(TLSError, match=r"did not use the pre-shared key|found nothing in common"):
            raise next(error for error in shake_both(far, near) if str(near) in str(error))
        assert near.version is None


def test_server_with_a_certificate_of_the_systems_cas_is_refused_too(keys, tmp_path, monkeypatch):
    ca = CertificateAuthority()
    folder = ca.write(tmp_path, server=ca.issue("server", "db.example"))
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "ca-cert.pem"))
    client = client_starter(TLS(psk_file=keys, username=PSK_USER, verify=False), "db.example")
    with started(client, server_starter(ServerTLS(certificates=folder))) as (near, far):
        errors = shake_both(near, far)
        assert "did not use the pre-shared key" in str(errors[0])


def test_certificate_does_not_do_even_where_the_context_would_accept_it(keys, pki):
    # Were the context ever to accept certificates, the second look would still find that no key was used.
    careless = client_starter(TLS(psk_file=keys, username=PSK_USER))
    careless.keywords["context"].verify_mode = ssl.CERT_NONE
    with started(careless, server_starter(ServerTLS(certificates=pki))) as (near, far):
        errors = shake_both(near, far)
        assert "did not prove that it knows the pre-shared key" in str(errors[0])
        with pytest.raises(Disconnected):
            near.send([memoryview(b"a secret")])


def test_client_without_a_key_is_refused(keys, pki):
    with started(client_starter(TLS(certificates=pki), "db.example"), server_starter(ServerTLS(psk_file=keys))) as ends:
        errors = shake_both(*ends)
        assert len(errors) == 2
        assert all("in common" in str(error) for error in errors)


def test_unknown_user_is_refused_before_connecting(keys):
    with pytest.raises(UsageError, match="no pre-shared key of the user 'nobody'") as caught:
        client_starter(TLS(psk_file=keys, username="nobody"))
    assert caught.value.errno == errno.EINVAL


def test_user_of_the_program_is_the_default(keys, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: PSK_USER)
    with connected(client_starter(TLS(psk_file=keys)), server_starter(ServerTLS(psk_file=keys))) as (near, _):
        assert near.version == "TLSv1.3"


def test_program_whose_user_nobody_knows_must_name_one(keys, monkeypatch):
    def nobody() -> str:
        raise KeyError("uid")

    monkeypatch.setattr(getpass, "getuser", nobody)
    with pytest.raises(UsageError, match="username="):
        client_starter(TLS(psk_file=keys))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="none"):
        client_starter(TLS(psk_file=tmp_path / "none"))
    with pytest.raises(UsageError, match="none"):
        server_starter(ServerTLS(psk_file=tmp_path / "none"))

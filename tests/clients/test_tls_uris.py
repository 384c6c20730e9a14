"""What a URI may say of TLS, and what the caller's own words make of it. What is refused is refused before anything is opened."""

from __future__ import annotations

import errno
from pathlib import Path
from urllib.parse import quote

import pytest

import nbdcore
from nbdcore import TLS, Client, Phase, TLSError, TLSPolicy, UsageError
from nbdcore.clients.connect.tls import Encryption, Permissions
from nbdcore.server import MemoryDisk, Server, ServerTLS
from nbdcore.uri import parse_uri
from tests.certificates import CertificateAuthority
from tests.clients.talking import DISK, PATIENCE

EVERYTHING = Permissions(local_files=True, unverified=True, priority=True)


def joined(uri: str, tls: TLS | bool | None = None, policy: TLSPolicy | None = None, permissions=EVERYTHING) -> Encryption:
    return Encryption.of(tls, policy, None).with_uri(parse_uri(uri), permissions)


def check_refused(uri: str, number: int, said: str, **options) -> None:
    """An attempt to connect to that path would be another error."""
    uri = uri.replace("?", "?socket=/nonexistent&") if "?" in uri else f"{uri}?socket=/nonexistent"
    client = Client(**options)
    with pytest.raises(UsageError, match=said) as caught:
        client.connect(uri, timeout=PATIENCE, wait=PATIENCE)
    assert caught.value.errno == number
    assert client.phase is Phase.CREATED
    client.close()


# ---------------------------------------------------------------------------------------------- what it may not say


@pytest.mark.parametrize(
    ("parameter", "option"),
    [
        ("tls-certificates=/pki", "allow_local_files"),
        ("tls-certificates", "allow_local_files"),
        ("tls-psk-file=/etc/shadow", "allow_local_files"),
        ("tls-verify-peer=0", "allow_unverified"),
        ("tls-verify-peer=false", "allow_unverified"),
        ("TLS-Verify-Peer=OFF", "allow_unverified"),
        ("tls-verify-peer=1&tls-verify-peer=0", "allow_unverified"),
        ("tls-priority=NORMAL", "allow_priority"),
        ("tls-hostname=a&tls-priority=NORMAL", "allow_priority"),
    ],
)
def test_what_could_harm_the_caller_needs_permission(parameter, option):
    allowances = {"allow_local_files": True, "allow_unverified": True, "allow_priority": True, option: False}
    for others in ({}, allowances):
        check_refused(f"nbds+unix:///?{parameter}", errno.EPERM, f"only where the caller says {option}=True", **others)
        check_refused(f"nbd+unix:///?{parameter}", errno.EPERM, f"{option}=True", tls=True, **others)


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ("tls-verify-peer=perhaps", "tls-verify-peer is 0 or 1, not 'perhaps'"),
        ("tls-verify-peer", "tls-verify-peer is 0 or 1, not ''"),
        ("tls-hostname=", "tls-hostname is empty"),
        ("tls-hostname=a..b", "no host name that a certificate could be for"),
        ("tls-type=carrier", "tls-type is x509 or psk, not 'carrier'"),
        ("tls-type", "tls-type is x509 or psk, not ''"),
        ("tls-type=psk", "tls-type=psk, and no file of pre-shared keys was given"),
        ("tls-verify-pear=1", "no query parameter tls-verify-pear"),
        ("tls-priority=SORCERY", "SORCERY"),
        ("tls-certificates=/nonexistent", "/nonexistent/ca-cert.pem"),
        ("tls-certificates=/pki&tls-psk-file=/keys", "TLS uses certificates or pre-shared keys"),
    ],
)
def test_what_is_wrong_is_said(parameter, said):
    allowances = {"allow_local_files": True, "allow_unverified": True, "allow_priority": True}
    number = errno.ENOENT if "nonexistent" in said else errno.EINVAL
    check_refused(f"nbds+unix:///?{parameter}", number, said, **allowances)


def test_anonymous_tls_is_not_done():
    check_refused("nbds+unix:///?tls-type=anon", errno.ENOTSUP, "nobody would know who the server is", allow_unverified=True)


def test_tls_that_is_forbidden_and_demanded_is_a_contradiction():
    check_refused("nbds+unix:///", errno.EINVAL, r"nbds\+unix demands TLS", tls=False)
    check_refused("nbds+unix:///", errno.EINVAL, r"nbds\+unix demands TLS", tls_policy=TLSPolicy.DISABLE)


@pytest.mark.parametrize("parameter", ["tls-hostname=db.example", "tls-verify-peer=1", "tls-type=x509", "tls-certificates=/pki"])
def test_parameters_about_tls_in_a_uri_without_it_are_a_mistake(parameter):
    check_refused(f"nbd+unix:///?{parameter}", errno.EINVAL, r"write nbds\+unix, or pass tls=True")


def test_parameters_about_tls_for_a_way_of_the_callers_own_are_a_mistake():
    check_refused("nbds+unix:///?tls-hostname=a", errno.EINVAL, "and so does start_tls", start_tls=lambda stream: stream)


# ---------------------------------------------------------------------------------------------- what it may say


def test_a_uri_alone():
    assert joined("nbds://host/") == Encryption(TLSPolicy.REQUIRE, TLS())
    assert joined("nbd://host/") == Encryption()
    assert joined("nbds://host/?tls-hostname=db.example").credentials == TLS(hostname="db.example")
    assert joined("nbds://host/?tls-certificates=/pki&tls-priority=NORMAL").credentials == TLS(
        certificates="/pki", priority="NORMAL"
    )
    assert joined("nbds://host/?tls-verify-peer=0").credentials == TLS(verify=False)
    assert joined("nbds://host/?tls-verify-peer=0&tls-verify-peer=yes").credentials == TLS()
    assert joined("nbds://bob@host/?tls-psk-file=/keys&tls-type=psk").credentials == TLS(psk_file="/keys", username="bob")
    assert joined("nbds://bob@host/?tls-psk-file=/keys&tls-username=eve").credentials == TLS(psk_file="/keys", username="eve")
    assert joined("nbds://host/?tls-type=x509").credentials == TLS()


def test_what_the_caller_says_goes_first():
    mine = TLS(certificates="/mine", hostname="mine.example", username="me", priority="NORMAL")
    said = "nbds://you@host/?tls-certificates=/yours&tls-hostname=yours.example&tls-priority=SECURE256&tls-username=you"
    assert joined(said, mine) == Encryption(TLSPolicy.REQUIRE, mine)
    assert joined("nbds://host/?tls-hostname=yours.example", TLS(ca="/ca")).credentials == TLS(ca="/ca", hostname="yours.example")
    assert joined("nbds://host/?tls-verify-peer=1", TLS(verify=False)).credentials == TLS()
    assert joined("nbds://host/?tls-verify-peer=0", TLS(verify=False), permissions=Permissions()).credentials == TLS(verify=False)


@pytest.mark.parametrize(
    ("scheme", "tls", "policy", "settled"),
    [
        ("nbd", None, None, TLSPolicy.DISABLE),
        ("nbd", False, None, TLSPolicy.DISABLE),
        ("nbd", True, None, TLSPolicy.REQUIRE),
        ("nbd", TLS(), None, TLSPolicy.REQUIRE),
        ("nbd", None, TLSPolicy.ALLOW, TLSPolicy.ALLOW),
        ("nbd", TLS(), TLSPolicy.ALLOW, TLSPolicy.ALLOW),
        ("nbd", TLS(), TLSPolicy.DISABLE, TLSPolicy.DISABLE),
        ("nbds", None, None, TLSPolicy.REQUIRE),
        ("nbds", TLS(), None, TLSPolicy.REQUIRE),
        ("nbds", None, TLSPolicy.ALLOW, TLSPolicy.REQUIRE),
        ("nbds", TLS(), TLSPolicy.ALLOW, TLSPolicy.REQUIRE),
    ],
)
def test_whether_tls_is_asked_for(scheme, tls, policy, settled):
    assert joined(f"{scheme}://host/", tls, policy).settled is settled


@pytest.fixture(scope="module")
def pki(tmp_path_factory) -> Path:
    ca = CertificateAuthority()
    return ca.write(tmp_path_factory.mktemp("pki"), server=ca.issue("server", "db.example"))


@pytest.fixture
def uri(pki):
    """A server on TCP whose certificate has another name."""
    with Server(MemoryDisk(DISK), tls=ServerTLS(certificates=pki)) as server:
        yield server.uri(server.listen("tcp", host="127.0.0.1", port=0))


def test_a_permitted_uri_does_what_it_says(uri, pki):
    certificates = f"tls-certificates={quote(str(pki))}"
    with nbdcore.connect(f"{uri}?{certificates}&tls-hostname=db.example", allow_local_files=True, timeout=PATIENCE) as disk:
        assert disk.tls
        assert disk.size == DISK
    with pytest.raises(TLSError, match=r"not for the address '127\.0\.0\.1'"):
        nbdcore.connect(f"{uri}?{certificates}", allow_local_files=True, timeout=PATIENCE)
    with nbdcore.connect(f"{uri}?tls-verify-peer=0", allow_unverified=True, timeout=PATIENCE) as disk:
        assert disk.tls


# ---------------------------------------------------------------------------------------------- transports


@pytest.mark.parametrize("allowed", [[], ["tcp"], ["tcp", "vsock"], ["UNIX"]])
def test_a_uri_uses_only_the_transports_that_are_allowed(allowed):
    check_refused("nbd+unix:///", errno.EPERM, "needs the transport unix, and allow_transports names", allow_transports=allowed)


def test_a_uri_that_runs_a_program_needs_permission():
    for scheme in ("nbd+ssh", "nbds+ssh"):
        check_refused(f"{scheme}://host/", errno.EPERM, r"the caller says allow_transports=\['ssh'\]")
        check_refused(f"{scheme}://host/", errno.EPERM, "names tcp", allow_transports=["tcp"])


def test_an_allowed_transport_is_used(socket_path):
    with Server(MemoryDisk(DISK)) as server:
        where = server.uri(server.listen("unix", path=str(socket_path)))
        with nbdcore.connect(where, allow_transports=["unix"], timeout=PATIENCE) as disk:
            assert disk.size == DISK

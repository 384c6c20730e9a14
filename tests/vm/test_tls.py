"""nbdcore's own client with TLS over a real AF_VSOCK, to nbdkit on the host. It begins before the server does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.certificates import CertificateAuthority, Issued
from tests.interop.servers import Server, nbdkit
from tests.vm import encrypted
from tests.vm.guest import Guest

pytestmark = [pytest.mark.vm, pytest.mark.xdist_group("vm")]

PORT = 10811
# nbdkit's pattern: each eight bytes are their own offset.
PATTERN = b"".join(offset.to_bytes(8, "big") for offset in range(0, encrypted.READ, 8)).hex()


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    return CertificateAuthority()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    with nbdkit(f"--tls-certificates={folder}", "pattern", "1M", tls="require") as running:
        yield running


@pytest.fixture
def server(authority: CertificateAuthority, tmp_path: Path) -> Iterator[Server]:
    with serving(authority.write(tmp_path / "pki", server=authority.issue("server", "host.example"))) as running:
        yield running


@pytest.fixture
def trusted(authority: CertificateAuthority, tmp_path: Path) -> str:
    return (authority.write(tmp_path / "trusted") / "ca-cert.pem").read_text()


def test_a_guest_waits_for_the_hosts_server_and_reads_by_tls(guest: Guest, server: Server, trusted: str) -> None:
    with contextlib.ExitStack() as late:
        with guest.calling(encrypted.reads, cid=2, port=PORT, trusted=trusted):
            threading.Event().wait(1)  # long enough for attempts that are refused; the outcome does not depend on it
            late.enter_context(guest.offer(server.path, port=PORT))
        assert guest.call(encrypted.reads, cid=2, port=PORT, trusted=trusted, hostname="host.example") == PATTERN


def test_a_guest_holds_the_certificate_against_the_name_that_was_said(guest: Guest, server: Server, trusted: str) -> None:
    with guest.offer(server.path, port=PORT):
        said = guest.call(encrypted.refusal, cid=2, port=PORT, trusted=trusted, hostname="other.example")
    assert "not for the name 'other.example'" in said


BAD: dict[str, tuple[Callable[[CertificateAuthority], Issued], str]] = {
    "wrong CA": (lambda _: CertificateAuthority().issue("server", "host.example"), "a CA that is not trusted here"),
    "expired": (lambda ca: ca.issue("server", "host.example", days=(-3, -2)), "has expired"),
    "self-signed": (lambda ca: ca.issue("server", "host.example", self_signed=True), "is self-signed"),
    "a client's": (lambda ca: ca.issue("client", "host.example"), "another purpose than to be a server"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_guest_refuses_a_bad_certificate_whether_or_not_it_knows_a_name(
    guest: Guest, authority: CertificateAuthority, trusted: str, tmp_path: Path, fault: str
) -> None:
    issue, words = BAD[fault]
    with serving(authority.write(tmp_path / "bad", server=issue(authority))) as server, guest.offer(server.path, port=PORT):
        for hostname in (None, "host.example"):
            assert words in guest.call(encrypted.refusal, cid=2, port=PORT, trusted=trusted, hostname=hostname)


def test_a_guest_may_say_an_address_that_the_certificate_must_be_for(
    guest: Guest, authority: CertificateAuthority, trusted: str, tmp_path: Path
) -> None:
    folder = authority.write(tmp_path / "pki", server=authority.issue("server", "192.0.2.1"))
    with serving(folder) as server, guest.offer(server.path, port=PORT):
        assert guest.call(encrypted.reads, cid=2, port=PORT, trusted=trusted, hostname="192.0.2.1") == PATTERN
        said = guest.call(encrypted.refusal, cid=2, port=PORT, trusted=trusted, hostname="192.0.2.2")
    assert "not for the address '192.0.2.2'" in said

"""nbdcore's own client with TLS over a real AF_VSOCK, to nbdkit on the host. It begins before the server does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.certificates import CertificateAuthority
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


@pytest.fixture
def server(authority: CertificateAuthority, tmp_path: Path) -> Iterator[Server]:
    folder = authority.write(tmp_path / "pki", server=authority.issue("server", "host.example"))
    with nbdkit(f"--tls-certificates={folder}", "pattern", "1M", tls="require") as running:
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

"""Programs written for libnbd's Python module, over a real AF_VSOCK to nbdkit on the host: in the clear and with TLS required."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import CertificateAuthority
from tests.interop.servers import nbdkit
from tests.vm import manual
from tests.vm.guest import Guest

pytestmark = [pytest.mark.vm, pytest.mark.xdist_group("vm")]

PORT = 10809
# nbdkit's pattern: each eight bytes are their own offset.
PATTERN = b"".join(offset.to_bytes(8, "big") for offset in range(0, manual.READ, 8)).hex()


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    return CertificateAuthority()


@pytest.fixture
def plain_server(guest: Guest) -> Iterator[None]:
    """A server on the host that knows nothing of TLS."""
    with nbdkit("pattern", "1M") as server, guest.offer(server.path, port=PORT):
        yield


@pytest.fixture
def tls_server(guest: Guest, authority: CertificateAuthority, tmp_path: Path) -> Iterator[str]:
    """A server on the host that talks to nobody without TLS, and the certificate of the CA that issued its own."""
    folder = authority.write(tmp_path / "pki", server=authority.issue("server", "host.example"))
    with (
        nbdkit(f"--tls-certificates={folder}", "pattern", "1M", tls="require") as server,
        guest.offer(server.path, port=PORT),
    ):
        yield (folder / "ca-cert.pem").read_text()


@pytest.mark.parametrize("program", [manual.reads, manual.reads_by_polling])
@pytest.mark.parametrize("opt_mode", [False, True])
@pytest.mark.usefixtures("plain_server")
def test_manuals_program_reads_the_hosts_disk(guest: Guest, program: Callable[..., Any], *, opt_mode: bool) -> None:
    assert guest.call(program, cid=2, port=PORT, opt_mode=opt_mode) == PATTERN


@pytest.mark.parametrize("program", [manual.reads, manual.reads_by_polling])
@pytest.mark.parametrize("opt_mode", [False, True])
def test_manuals_program_reads_the_hosts_disk_with_tls_required(
    guest: Guest, tls_server: str, program: Callable[..., Any], *, opt_mode: bool
) -> None:
    assert guest.call(program, cid=2, port=PORT, opt_mode=opt_mode, trusted=tls_server) == PATTERN


def test_name_that_is_said_is_checked_over_vsock_which_has_none_of_its_own(guest: Guest, tls_server: str) -> None:
    right = guest.call(manual.reads, cid=2, port=PORT, opt_mode=False, trusted=tls_server, hostname="host.example")
    assert right == PATTERN
    assert "other.example" in guest.call(manual.refusal, cid=2, port=PORT, trusted=tls_server, hostname="other.example")


@pytest.mark.usefixtures("tls_server")
def test_server_whose_certificate_a_stranger_issued_is_refused_over_vsock(guest: Guest, tmp_path: Path) -> None:
    stranger = CertificateAuthority().write(tmp_path / "stranger")
    said = guest.call(manual.refusal, cid=2, port=PORT, trusted=(stranger / "ca-cert.pem").read_text())
    assert "issued by a CA that is not trusted" in said


@pytest.mark.usefixtures("plain_server")
def test_server_without_tls_is_refused_over_vsock_where_it_is_required(
    guest: Guest, authority: CertificateAuthority, tmp_path: Path
) -> None:
    trusted = authority.write(tmp_path) / "ca-cert.pem"
    assert "TLS is required" in guest.call(manual.refusal, cid=2, port=PORT, trusted=trusted.read_text())


def test_demo_finds_vsock_right(guest: Guest) -> None:
    shown = guest.call(manual.demonstrates)
    assert [line.split()[:2] for line in shown.splitlines() if line.startswith("vsock ")] == [["vsock", "right"]], shown

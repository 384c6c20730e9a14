"""The server's TLS as other people's clients see it: libnbd's tools and QEMU's, whose TLS is GnuTLS."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

import nbdcore
from nbdcore.server import ExportSettings, MemoryDisk, Server, ServerTLS
from nbdcore.streams.tls.credentials import supports_tls_psk
from tests.certificates import PSK_LINE, PSK_USER, CertificateAuthority
from tests.interop.programs import run

MEBIBYTE = 1 << 20
SIZE = 48 * MEBIBYTE
# What is said to QEMU's tools, by the folder of certificates.
QEMU_CREDENTIALS = "tls-creds-x509,id=tls,endpoint=client,dir={}"

versions = pytest.mark.parametrize("priority", ["NORMAL:-VERS-TLS1.3", "NORMAL:-VERS-TLS1.2"], ids=["TLSv1.2", "TLSv1.3"])


@pytest.fixture(params=["unix", "tcp"])
def served(request, short_folder) -> Iterator:
    """Start a server on a unix socket, and on TCP: `served(exports, ...)` gives the URI for clients."""
    address = {"unix": {"path": str(short_folder / "s")}, "tcp": {"host": "127.0.0.1", "port": 0}}[request.param]
    with contextlib.ExitStack() as stack:

        def start(exports, **options) -> str:
            server = stack.enter_context(Server(exports, **options))
            return server.uri(server.listen(request.param, **address))

        yield start


def with_parameter(uri: str, name: str, value: str | Path) -> str:
    return f"{uri}{'&' if '?' in uri else '?'}{name}={quote(str(value))}"


def qemu_image(uri: str) -> str:
    """Return a disk behind TLS in the words of QEMU's --image-opts."""
    where = nbdcore.parse_uri(uri)
    path = where.parameter("socket")
    server = (
        f"server.type=unix,server.path={path}" if path else f"server.type=inet,server.host={where.host},server.port={where.port}"
    )
    return f"driver=nbd,{server},tls-creds=tls,tls-hostname=localhost"


def qemu_img(folder: Path, verb: str, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run("qemu-img", verb, "--object", QEMU_CREDENTIALS.format(folder), *arguments, check=check)


@pytest.mark.interop("nbdinfo")
@versions
def test_nbdinfo_shows_the_export(served, pki, priority):
    uri = served(MemoryDisk(SIZE), tls=ServerTLS(certificates=pki, priority=priority))
    told = json.loads(run("nbdinfo", "--json", with_parameter(uri, "tls-certificates", pki)).stdout)
    assert (told["TLS"], told["structured"]) == (True, True)
    (export,) = told["exports"]
    assert (export["export-size"], export["contexts"]) == (SIZE, ["base:allocation"])


@pytest.mark.interop("nbdinfo")
def test_nbdinfo_lists_what_it_may_know_of(served, pki):
    exports = {"open": MemoryDisk(MEBIBYTE), "secret": ExportSettings(MemoryDisk(MEBIBYTE), require_tls=True)}
    uri = served(exports, tls=ServerTLS(certificates=pki), require_tls=False)
    for address, names in (
        (with_parameter(uri, "tls-certificates", pki), ["open", "secret"]),
        (uri.replace("nbds", "nbd", 1), ["open"]),
    ):
        listed = json.loads(run("nbdinfo", "--list", "--json", address).stdout)["exports"]
        assert [export["export-name"] for export in listed] == names


@pytest.mark.interop("nbdinfo")
def test_nbdinfo_without_tls_is_refused(served, pki):
    uri = served(MemoryDisk(SIZE), tls=ServerTLS(certificates=pki))
    done = run("nbdinfo", "--size", uri.replace("nbds", "nbd", 1), check=False)
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.interop("nbdcopy")
@versions
def test_nbdcopy_writes_and_reads_every_byte(served, pki, tmp_path, priority):
    disk = MemoryDisk(SIZE)
    uri = with_parameter(
        served(disk, tls=ServerTLS(certificates=pki, priority=priority, verify_clients=True)), "tls-certificates", pki
    )
    data = random.Random(5).randbytes(SIZE)
    (tmp_path / "source").write_bytes(data)
    run("nbdcopy", tmp_path / "source", uri)
    assert disk.pread(SIZE, 0) == data
    run("nbdcopy", uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data


@pytest.mark.interop("nbdinfo")
@pytest.mark.parametrize("shown", ["none", "another CA's"])
def test_nbdinfo_without_the_certificate_that_is_demanded_is_refused(served, ca, pki, tmp_path, caplog, shown):
    ca.write(tmp_path)
    if shown != "none":
        stranger = CertificateAuthority("strangers").issue("client")
        ca.write(tmp_path, client=stranger)
    uri = served(MemoryDisk(SIZE), tls=ServerTLS(certificates=pki, verify_clients=True))
    assert run("nbdinfo", with_parameter(uri, "tls-certificates", tmp_path), check=False).returncode == 1
    assert run("nbdinfo", "--size", with_parameter(uri, "tls-certificates", pki)).stdout.split() == [str(SIZE)]
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "the TLS handshake with" in line


@pytest.mark.interop("qemu-img")
@versions
def test_qemu_img_copies_both_ways(served, pki, tmp_path, priority):
    disk = MemoryDisk(SIZE)
    image = qemu_image(served(disk, tls=ServerTLS(certificates=pki, priority=priority, verify_clients=True)))
    data = random.Random(6).randbytes(SIZE // 2) + bytes(SIZE // 2)
    (tmp_path / "source").write_bytes(data)
    qemu_img(pki, "convert", "-n", "-f", "raw", "--target-image-opts", tmp_path / "source", image)
    assert disk.pread(SIZE, 0) == data
    qemu_img(pki, "convert", "-O", "raw", "--image-opts", image, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data


@pytest.mark.interop("qemu-img")
def test_qemu_img_that_does_not_trust_the_server_goes_away(served, pki, tmp_path):
    CertificateAuthority("strangers").write(tmp_path)
    image = qemu_image(served(MemoryDisk(SIZE), tls=ServerTLS(certificates=pki)))
    assert qemu_img(tmp_path, "info", "--image-opts", image, check=False).returncode == 1
    assert qemu_img(pki, "info", "--image-opts", image).returncode == 0


class TestPreSharedKeys:
    # From Python 3.13 on.
    __test__ = supports_tls_psk()

    @pytest.mark.interop("nbdinfo", "nbdcopy")
    @versions
    def test_client_with_the_key_copies_every_byte(self, served, tmp_path, priority):
        keys = tmp_path / "keys.psk"
        keys.write_text(PSK_LINE)
        disk = MemoryDisk(SIZE)
        uri = served(disk, tls=ServerTLS(psk_file=keys, priority=priority))
        uri = with_parameter(uri.replace("://", f"://{PSK_USER}@"), "tls-psk-file", keys)
        assert json.loads(run("nbdinfo", "--json", uri).stdout)["TLS"] is True
        data = random.Random(7).randbytes(SIZE)
        (tmp_path / "source").write_bytes(data)
        run("nbdcopy", tmp_path / "source", uri)
        assert disk.pread(SIZE, 0) == data

    @pytest.mark.interop("nbdinfo")
    @pytest.mark.parametrize("line", [f"{PSK_USER}:ff00", "mallory:ff00"])
    def test_client_with_another_key_is_refused(self, served, tmp_path, line):
        keys, others = tmp_path / "keys.psk", tmp_path / "others.psk"
        keys.write_text(PSK_LINE)
        others.write_text(f"{line}\n")
        user = line.partition(":")[0]
        uri = served(MemoryDisk(SIZE), tls=ServerTLS(psk_file=keys)).replace("://", f"://{user}@")
        assert run("nbdinfo", with_parameter(uri, "tls-psk-file", others), check=False).returncode == 1

    @pytest.mark.interop("qemu-img")
    @versions
    def test_qemu_img_with_the_key_copies_every_byte_and_with_another_none(self, served, tmp_path, priority):
        right, wrong = tmp_path / "right", tmp_path / "wrong"
        for folder, line in ((right, PSK_LINE), (wrong, f"{PSK_USER}:ff00\n")):
            folder.mkdir()
            (folder / "keys.psk").write_text(line)
        disk = MemoryDisk(SIZE)
        uri = served(disk, tls=ServerTLS(psk_file=right / "keys.psk", priority=priority))
        image = qemu_image(uri).removesuffix(",tls-hostname=localhost")
        data = random.Random(8).randbytes(SIZE)
        (tmp_path / "source").write_bytes(data)
        credentials = f"tls-creds-psk,id=tls,endpoint=client,username={PSK_USER},dir="
        assert run("qemu-img", "info", "--object", f"{credentials}{wrong}", "--image-opts", image, check=False).returncode == 1
        copied = ("-n", "-f", "raw", "--target-image-opts", tmp_path / "source", image)
        run("qemu-img", "convert", "--object", f"{credentials}{right}", *copied)
        assert disk.pread(SIZE, 0) == data

"""The server as other people's clients see it: libnbd's tools, QEMU's, fio."""

# ruff: noqa: ARG002  # back ends made for one test look at some of their arguments only

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator

import pytest

from nbdcore.server import BlockSizes, ExportSettings, FileDisk, MemoryDisk, Server
from tests.interop.programs import QEMU_NBD_10, run, version_of
from tests.interop.servers import qemu_nbd

MEBIBYTE = 1 << 20
NBDINFO_WITH_EXTENDED_HEADERS = (1, 18)
SIZE = 16 * MEBIBYTE + 512


def contents() -> bytes:
    """Return a disk's worth of bytes with data, zeroes, and boundaries in odd places."""
    numbers = random.Random(2)
    disk = bytearray(SIZE)
    for start, length in [(0, 1000), (MEBIBYTE + 77, 3 * MEBIBYTE), (9 * MEBIBYTE, 5), (SIZE - 700, 700)]:
        disk[start : start + length] = numbers.randbytes(length)
    return bytes(disk)


@pytest.fixture(params=["memory", "file"])
def disk(request, tmp_path):
    """An empty disk of each kind."""
    if request.param == "memory":
        return MemoryDisk(SIZE)
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, SIZE)
    return FileDisk(path)


@pytest.fixture
def filled(disk):
    """The same with contents, written around its zeroes so that it stays sparse."""
    data = contents()
    for start in range(0, SIZE, 4096):
        piece = data[start : start + 4096]
        if any(piece):
            disk.pwrite(piece, start)
    return disk


@pytest.fixture
def served(short_folder) -> Iterator:
    servers = []

    def start(exports, **options) -> str:
        server = Server(exports, **options)
        servers.append(server)
        server.start()
        return server.listen("unix", path=str(short_folder / f"s{len(servers)}")).address.uri()

    yield start
    for server in servers:
        server.stop()


# ---------------------------------------------------------------------------------------------- libnbd


@pytest.mark.interop("nbdinfo")
def test_nbdinfo_shows_the_export(served):
    settings = ExportSettings(MemoryDisk(SIZE), description="a disk of ours", block_sizes=BlockSizes(1, 8192, MEBIBYTE))
    uri = served({"disk": settings})
    text = run("nbdinfo", uri).stdout
    packets = "extended" if version_of("nbdinfo") >= NBDINFO_WITH_EXTENDED_HEADERS else "structured"
    assert f"protocol: newstyle-fixed without TLS, using {packets} packets" in text
    (export,) = json.loads(run("nbdinfo", "--json", uri).stdout)["exports"]
    assert export["export-size"] == SIZE
    assert export["description"] == "a disk of ours"
    assert export["contexts"] == ["base:allocation"]
    assert not export["is_read_only"]
    for ability in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        assert export[f"can_{ability}"]
    sizes = [export[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")]
    assert sizes == [1, 8192, MEBIBYTE]


@pytest.mark.interop("nbdinfo")
def test_nbdinfo_shows_a_read_only_export_with_a_minimum_block_size(served):
    uri = served(
        ExportSettings(MemoryDisk(MEBIBYTE), block_sizes=BlockSizes(512), rotational=True, multi_conn=False), read_only=True
    )
    (export,) = json.loads(run("nbdinfo", "--json", uri).stdout)["exports"]
    assert export["is_read_only"]
    assert export["is_rotational"]
    assert not export["can_multi_conn"]
    assert not export["can_zero"]
    assert export["block_size_minimum"] == 512


@pytest.mark.interop("nbdinfo")
def test_nbdinfo_lists_several_exports(served):
    uri = served({"one": MemoryDisk(1000), "zwei €": ExportSettings(MemoryDisk(2000), description="Zwei")})
    listed = json.loads(run("nbdinfo", "--list", "--json", uri).stdout)["exports"]
    assert [(export["export-name"], export["export-size"]) for export in listed] == [("one", 1000), ("zwei €", 2000)]
    assert listed[1]["description"] == "Zwei"
    assert run("nbdinfo", "--list", uri).stdout.count("export-size") == 2


@pytest.mark.interop("nbdinfo")
def test_nbdinfo_maps_data_and_holes(served, filled):
    told = json.loads(run("nbdinfo", "--map", "--json", served(filled)).stdout)
    data = contents()
    end = 0
    for extent in told:
        assert extent["offset"] == end
        end += extent["length"]
        assert extent["type"] in (0, 3)
        if extent["type"] == 3:
            assert not any(data[extent["offset"] : end])
    assert end == SIZE
    assert {extent["type"] for extent in told} == {0, 3}
    nothing = run("nbdinfo", "--map", served(MemoryDisk(1 << 40))).stdout.split()
    assert nothing[1:3] == [str(1 << 40), "3"]


@pytest.mark.interop("nbdcopy")
@pytest.mark.parametrize("options", [[], ["--no-extents"], ["--synchronous", "--connections=1"], ["--request-size=4096"]])
def test_nbdcopy_reads_every_byte(served, filled, tmp_path, options):
    run("nbdcopy", *options, served(filled), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == contents()


@pytest.mark.interop("nbdcopy")
@pytest.mark.parametrize("options", [[], ["--allocated"], ["--destination-is-zero"], ["--flush", "--request-size=1048576"]])
def test_nbdcopy_writes_every_byte(served, disk, tmp_path, options):
    if "--destination-is-zero" not in options:
        disk.pwrite(b"old" * (SIZE // 3), 0)
    (tmp_path / "source").write_bytes(contents())
    uri = served(disk)
    run("nbdcopy", *options, tmp_path / "source", uri)
    assert disk.pread(SIZE, 0) == contents()


@pytest.mark.interop("nbdcopy")
def test_nbdcopy_from_one_of_our_servers_to_another(served, filled):
    copy = MemoryDisk(SIZE)
    run("nbdcopy", served(filled), served(copy))
    assert copy.pread(SIZE, 0) == contents()
    assert copy.allocated < SIZE // 2


@pytest.mark.interop("nbdcopy")
def test_nbdcopy_reports_a_back_end_that_fails(served, tmp_path):
    class Failing(MemoryDisk):
        def pread(self, count, offset):
            raise OSError(5, "the tape tore")

        extents = None

    done = run("nbdcopy", served(Failing(MEBIBYTE)), tmp_path / "copy", check=False)
    assert done.returncode != 0
    assert "Input/output error" in done.stderr


# ---------------------------------------------------------------------------------------------- QEMU


@pytest.mark.interop("qemu-img")
def test_qemu_img_shows_and_maps_a_disk(served, filled):
    uri = served(filled)
    shown = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", uri).stdout)
    assert shown["virtual-size"] == SIZE
    told = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", uri).stdout)
    data = contents()
    assert sum(extent["length"] for extent in told) == SIZE
    for extent in told:
        if extent["zero"]:
            assert not any(data[extent["start"] : extent["start"] + extent["length"]])
    assert any(not extent["present"] or extent["zero"] for extent in told)


@pytest.mark.interop("qemu-img")
def test_qemu_img_compares_and_converts_from_us(served, filled, tmp_path):
    (tmp_path / "same").write_bytes(contents())
    uri = served(filled)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, tmp_path / "same").stdout
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, tmp_path / "copy.qcow2")
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri, tmp_path / "copy.qcow2")
    (tmp_path / "same").write_bytes(contents()[:-1] + b"?")
    assert run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, tmp_path / "same", check=False).returncode == 1


@pytest.mark.interop("qemu-img")
def test_qemu_img_converts_to_us(served, disk, tmp_path):
    disk.pwrite(b"old" * (SIZE // 3), 0)
    (tmp_path / "source").write_bytes(contents())
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", tmp_path / "source", served(disk))
    assert disk.pread(SIZE, 0) == contents()


@pytest.mark.interop("qemu-io")
def test_qemu_io_uses_every_command(served, disk):
    commands = [
        "write -P 7 0 1M",
        "write -z 4k 64k",
        "write -zu 256k 64k",
        "discard 512k 64k",
        "flush",
        "read -P 7 128k 4k",
        "write -f -P 9 1M 4k",
    ]
    arguments = [part for command in commands for part in ("-c", command)]
    output = run("qemu-io", "-f", "raw", *arguments, served(disk)).stdout
    assert "error" not in output.lower()
    assert "verification failed" not in output
    assert disk.pread(4096, 0) == b"\7" * 4096
    assert disk.pread(64 << 10, 4096) == bytes(64 << 10)
    assert disk.pread(64 << 10, 256 << 10) == bytes(64 << 10)
    assert disk.pread(4096, MEBIBYTE) == b"\x09" * 4096


@pytest.mark.interop(QEMU_NBD_10, "nbdcopy")
def test_qemu_10_reads_and_writes_with_extended_headers(served, disk, tmp_path):
    """QEMU's NBD client, behind its own server: what is copied to and from it has passed through both."""
    uri = served(disk)
    listed = run(QEMU_NBD_10, "--list", f"--socket={uri.partition('socket=')[2]}").stdout
    assert "transaction size: 64-bit" in listed
    assert "block-status-payload" in listed
    (tmp_path / "source").write_bytes(contents())
    with qemu_nbd(uri, binary=QEMU_NBD_10) as proxy:
        run("nbdcopy", tmp_path / "source", proxy.uri)
        assert disk.pread(SIZE, 0) == contents()
        run("nbdcopy", proxy.uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == contents()


# ---------------------------------------------------------------------------------------------- fio


@pytest.mark.interop("fio")
@pytest.mark.parametrize("pattern", ["randwrite", "write"])
def test_fio_verifies_what_it_wrote(served, disk, pattern, tmp_path):
    done = run(
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={served(disk)}",
        f"--rw={pattern}",
        "--bsrange=512-70144",  # multiples of 512: what fio verifies at a time is their greatest common divisor
        "--bs_unaligned=1",
        "--iodepth=32",
        "--size=8m",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--output-format=json",
        f"--aux-path={tmp_path}",
    )
    (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    assert job["error"] == 0
    assert job["read"]["io_bytes"] == job["write"]["io_bytes"] > 7 * MEBIBYTE

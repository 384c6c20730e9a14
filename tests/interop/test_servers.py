"""The servers and images that the other interop tests stand on are what they say, seen by an independent client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop import images, programs
from tests.interop.programs import QEMU_NBD_10, run
from tests.interop.servers import nbd_server, nbdkit, qemu_nbd

MEBIBYTE = 1 << 20


def info(uri: str) -> dict:
    return json.loads(run("nbdinfo", "--json", uri).stdout)


def extents(uri: str, context: str) -> list[tuple[int, int, int]]:
    found = json.loads(run("nbdinfo", "--json", f"--map={context}", uri).stdout)
    return [(extent["offset"], extent["length"], extent["type"]) for extent in found]


@pytest.mark.interop("nbdkit", "nbdinfo")
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_nbdkit_serves_its_plugin_through_its_filter(start, tcp):
    server = start(nbdkit("memory", "1M", "blocksize-minimum=4096", filters=["blocksize-policy"], tcp=tcp))
    export = info(server.uri)["exports"][0]
    assert (export["export-size"], export["block_size_minimum"]) == (MEBIBYTE, 4096)


@pytest.mark.interop("qemu-nbd", QEMU_NBD_10, "nbdinfo")
@pytest.mark.parametrize("binary", ["qemu-nbd", QEMU_NBD_10])
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_qemu_nbd_serves_a_named_export(start, tmp_path, binary, tcp):
    image = images.raw_image(tmp_path / "disk", MEBIBYTE)
    server = start(qemu_nbd(image, binary=binary, export="a b", tcp=tcp))
    assert info(server.uri)["exports"][0]["export-size"] == MEBIBYTE


@pytest.mark.interop("qemu-nbd", "nbdinfo")
def test_qemu_nbd_that_does_not_persist_ends_with_its_first_client(start, tmp_path, eventually):
    server = start(qemu_nbd(images.raw_image(tmp_path / "disk", MEBIBYTE), persistent=False))
    run("nbdinfo", server.uri)
    eventually(lambda: server.process.poll() is not None, "qemu-nbd ended")


@pytest.mark.interop(QEMU_NBD_10)
def test_qemu_nbd_10_has_extended_headers(start, tmp_path):
    # NBD_OPT_EXTENDED_HEADERS (11) answered with NBD_REP_ACK (1), where QEMU 7.2 says NBD_REP_ERR_UNSUP.
    server = start(qemu_nbd(images.raw_image(tmp_path / "disk", MEBIBYTE), binary=QEMU_NBD_10))
    with server.connect() as connection, connection.makefile("rb") as stream:
        stream.read(18)
        connection.sendall((3).to_bytes(4, "big") + b"IHAVEOPT" + (11).to_bytes(4, "big") + bytes(4))
        reply = stream.read(20)
    assert int.from_bytes(reply[12:16], "big") == 1


@pytest.mark.interop("nbd-server", "nbdcopy")
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_nbd_server_serves_the_file(start, tmp_path, tcp):
    data = {0: images.pattern(4096), 65536: images.pattern(4096, seed=1)}
    image = images.raw_image(tmp_path / "disk", MEBIBYTE, data)
    server = start(nbd_server({"disk": image}, tcp=tcp))
    run("nbdcopy", server.uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == images.contents(MEBIBYTE, data) == image.read_bytes()


@pytest.mark.interop("qemu-nbd", "qemu-img", "qemu-io", "nbdinfo")
def test_the_dirty_bitmap_has_what_was_written_after_it_was_added(start, tmp_path):
    image = images.qcow2_image(tmp_path / "disk.qcow2", MEBIBYTE, {0: images.pattern(65536)})
    images.add_dirty_bitmap(image, "changes", [(131072, 65536), (524288, 1)])
    server = start(qemu_nbd(image, format="qcow2", bitmap="changes", read_only=True))
    assert extents(server.uri, "qemu:dirty-bitmap:changes") == [
        (0, 131072, 0),
        (131072, 65536, 1),
        (196608, 327680, 0),
        (524288, 65536, 1),
        (589824, 458752, 0),
    ]
    assert extents(server.uri, "base:allocation")[0] == (0, 65536, 0)


@pytest.mark.interop("nbdkit")
def test_a_server_that_cannot_start_says_why():
    with pytest.raises(AssertionError, match="at its start") as failure, nbdkit("no-such-plugin"):
        pass
    assert "no-such-plugin" in "".join(failure.value.__notes__)


@pytest.mark.interop("nbdkit", "qemu-nbd", "nbd-server")
@pytest.mark.parametrize("which", ["nbdkit", "qemu-nbd", "nbd-server"])
def test_a_killed_server_is_gone_with_the_connections_it_had(start, tmp_path, which):
    image = images.raw_image(tmp_path / "disk", MEBIBYTE)
    servers = {
        "nbdkit": lambda: nbdkit("file", image),
        "qemu-nbd": lambda: qemu_nbd(image),
        "nbd-server": lambda: nbd_server({"disk": image}),
    }
    server = start(servers[which]())
    with server.connect() as connection, connection.makefile("rb") as stream:
        assert stream.read(18).startswith(b"NBDMAGIC")
        server.kill()
        assert stream.read() == b""
    with pytest.raises(ConnectionRefusedError):
        server.connect()


SERVE_UNTIL_KILLED = """
import sys, time
from pathlib import Path
from tests.interop import servers
which, image = sys.argv[1], Path(sys.argv[2])
start = {
    "nbdkit": lambda: servers.nbdkit("file", image),
    "qemu-nbd": lambda: servers.qemu_nbd(image),
    "nbd-server": lambda: servers.nbd_server({"disk": image}),
}[which]
with start() as server:
    print(server.process.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.interop("nbdkit", "qemu-nbd", "nbd-server")
@pytest.mark.parametrize("which", ["nbdkit", "qemu-nbd", "nbd-server"])
def test_a_server_dies_with_a_killed_test_process(tmp_path, monkeypatch, eventually, which):
    # Killed, it cannot remove its temporary folder: that goes where pytest cleans up.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    arguments = [sys.executable, "-c", SERVE_UNTIL_KILLED, which, images.raw_image(tmp_path / "disk", MEBIBYTE)]
    with subprocess.Popen(arguments, cwd=programs.REPOSITORY, stdout=subprocess.PIPE, text=True) as parent:
        server = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(10)
    eventually(lambda: ended(server), f"{which} ended")


def ended(process: int) -> bool:
    """Whether the process is gone, or dead and waits for its parent to notice."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1].startswith("Z")
    except FileNotFoundError:
        return True

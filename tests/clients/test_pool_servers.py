"""Several connections to strangers: nbdkit, qemu-nbd and nbd-server, alive and dying, slow, encrypted, or with few to give."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

import nbdcore
from nbdcore import TLS, Disconnected, Phase, Pool
from nbdcore.clients.connect import establish as establishing
from tests.certificates import CertificateAuthority
from tests.clients.talking import PATIENCE, together
from tests.interop.servers import nbd_server, nbdkit, qemu_nbd

SIZE = 8 << 20
AREA = SIZE // 8


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def use(disk: Pool) -> None:
    """Write a disk's whole contents and read them back, in every way, from many threads."""
    contents = random.Random(1).randbytes(SIZE)

    def work(number: int) -> bool:
        base, middle, end = number * AREA, number * AREA + AREA // 2, (number + 1) * AREA
        disk.pwrite(contents[base:middle], base, timeout=PATIENCE)
        pieces = [(at, contents[at : min(at + 5000, end)]) for at in range(middle, end, 5000)]
        assert sorted(disk.pwrite_many(pieces, timeout=PATIENCE)) == [at for at, _ in pieces]
        disk.flush(timeout=PATIENCE)
        return disk.pread(AREA, base, timeout=PATIENCE) == contents[base:end]

    assert together(8, work) == [True] * 8
    rng = random.Random(2)
    buffers = [(rng.randrange(SIZE - 70_000), bytearray(rng.randrange(1, 70_000))) for _ in range(300)]
    assert sorted(disk.pread_into_many(buffers, timeout=PATIENCE)) == sorted(offset for offset, _ in buffers)
    assert all(buffer == contents[offset : offset + len(buffer)] for offset, buffer in buffers)


@pytest.mark.interop("nbdkit")
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_nbdkit_keeps_what_is_written(tcp):
    with nbdkit("memory", str(SIZE), tcp=tcp) as server, nbdcore.create_pool(server.uri, connections=4, timeout=PATIENCE) as disk:
        assert disk.connections == 4
        use(disk)
        assert sum(extent.length for extent in disk.extents(timeout=PATIENCE)) == SIZE
        assert disk.connections == 4


@pytest.mark.interop("nbdkit")
def test_a_slow_server_is_asked_on_all_connections_at_once():
    slow = nbdkit("memory", str(SIZE), "rdelay=20ms", filters=["delay"])
    with slow as server, nbdcore.create_pool(server.uri, connections=8, timeout=PATIENCE) as disk:
        disk.pwrite(bytes(range(256)) * 16, 0, timeout=PATIENCE)
        ranges = [(n * 16, 16) for n in range(256)]
        found = dict(disk.pread_many(ranges, depth=128, timeout=PATIENCE))
        assert found == {at: bytes(range(at % 256, at % 256 + 16)) for at, _ in ranges}


@pytest.mark.interop("nbdkit")
def test_an_export_of_nbdkit_that_is_not_multi_conn_gets_one_connection():
    with (
        nbdkit("memory", str(SIZE), "multi-conn-mode=disable", filters=["multi-conn"]) as server,
        nbdcore.create_pool(server.uri, connections=4, timeout=PATIENCE) as disk,
    ):
        assert (disk.can_multi_conn, disk.connections) == (False, 1)
        use(disk)


@pytest.mark.interop("qemu-nbd")
def test_qemu_nbd_keeps_what_is_written(image):
    with qemu_nbd(image, shared=4) as server, nbdcore.create_pool(server.uri, connections=4, timeout=PATIENCE) as disk:
        assert disk.connections == 4
        use(disk)
    assert image.read_bytes() == random.Random(1).randbytes(SIZE)


@pytest.mark.interop("qemu-nbd")
def test_qemu_nbd_with_room_for_two_has_two(image, monkeypatch):
    monkeypatch.setattr(establishing, "GRACE", 0.5)  # it takes the others, and does not greet them
    with qemu_nbd(image, shared=2) as server, nbdcore.create_pool(server.uri, connections=4, timeout=PATIENCE) as disk:
        assert disk.connections == 2
        use(disk)


@pytest.mark.interop("nbd-server")
def test_nbd_server_has_as_many_as_it_says_that_it_can(image):
    with (
        nbd_server({"disk": image}, options={"flush": "true"}) as server,
        nbdcore.create_pool(server.uri, connections=4, timeout=PATIENCE) as disk,
    ):
        assert disk.connections == (4 if disk.can_multi_conn else 1)
        use(disk)
    assert image.read_bytes() == random.Random(1).randbytes(SIZE)


@pytest.mark.interop("nbdkit")
def test_each_connection_is_encrypted_and_verified(tmp_path):
    ca = CertificateAuthority()
    served = ca.write(tmp_path / "server", server=ca.issue("server", "127.0.0.1"))
    trusting = ca.write(tmp_path / "client")
    with (
        nbdkit(f"--tls-certificates={served}", "memory", str(SIZE), tls="require", tcp=True) as server,
        nbdcore.create_pool(server.uri, connections=3, tls=TLS(certificates=trusting), timeout=PATIENCE) as disk,
    ):
        assert (disk.connections, disk.tls) == (3, True)
        use(disk)
        assert disk.connections == 3


@pytest.mark.interop("nbdkit")
def test_a_server_that_is_killed_ends_every_call_on_every_connection():
    with nbdkit("memory", "1M", "rdelay=20", filters=["delay"]) as server:
        disk = nbdcore.create_pool(server.uri, connections=4, timeout=PATIENCE)
        killer = threading.Timer(0.1, server.kill)
        killer.start()
        outcomes = together(16, lambda n: disk.pread(4096, 4096 * n) if n % 2 else [*disk.pread_many([(0, 4096)] * 8)])
        killer.join()
        assert {type(outcome) for outcome in outcomes} == {Disconnected}
        assert disk.phase in (Phase.CLOSED, Phase.DEAD)
        assert disk.connections == 0
        disk.close()

"""The asyncio client and strangers: nbdkit and qemu-nbd, alive and dying."""

from __future__ import annotations

import asyncio
import random

import pytest

from nbdcore import Disconnected, Phase, aio
from tests.aio.talking import PATIENCE, everything
from tests.interop.servers import nbdkit, qemu_nbd

SIZE = 8 << 20


async def use(disk) -> None:
    """Write a disk's whole contents and read them back, in every way at once."""
    contents = random.Random(1).randbytes(SIZE)
    pieces = [(offset, contents[offset : min(offset + 5000, SIZE // 2)]) for offset in range(0, SIZE // 2, 5000)]
    await asyncio.gather(everything(disk.pwrite_many(pieces)), disk.pwrite(contents[SIZE // 2 :], SIZE // 2, timeout=PATIENCE))
    await disk.flush(timeout=PATIENCE)
    assert await disk.pread(SIZE, 0, timeout=PATIENCE) == contents
    rng = random.Random(2)
    ranges = [(rng.randrange(SIZE - 4096), rng.randrange(1, 4096)) for _ in range(300)]
    reads = await asyncio.gather(*(disk.pread(count, offset, timeout=PATIENCE) for offset, count in ranges))
    assert reads == [contents[offset : offset + count] for offset, count in ranges]
    async for offset, data in disk.pread_many(ranges):
        assert data == contents[offset : offset + len(data)]
    extents = await everything(disk.extents(timeout=PATIENCE))
    assert sum(extent.length for extent in extents) == SIZE


@pytest.mark.interop("nbdkit")
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_nbdkit_keeps_what_is_written(run, tcp):
    async def main(uri):
        async with aio.connect(uri, timeout=PATIENCE) as disk:
            await use(disk)

    with nbdkit("memory", str(SIZE), tcp=tcp) as server:
        run(main(server.uri))


@pytest.mark.interop("qemu-nbd")
def test_qemu_nbd_keeps_what_is_written(run, tmp_path):
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(SIZE)

    async def main(uri):
        async with aio.connect(uri, timeout=PATIENCE) as disk:
            await use(disk)

    with qemu_nbd(image) as server:
        run(main(server.uri))


@pytest.mark.interop("nbdkit")
def test_replies_out_of_order_reach_each_its_own_task(run):
    async def main(uri):
        async with aio.connect(uri, timeout=PATIENCE) as disk:
            assert len(await asyncio.gather(*(disk.pread(512, 512 * n, timeout=PATIENCE) for n in range(64)))) == 64

    with nbdkit("memory", "1M", "rdelay=10ms", filters=["delay"]) as server:
        run(main(server.uri))


@pytest.mark.interop("nbdkit")
def test_a_server_that_is_killed_ends_every_task(run):
    async def main(server):
        disk = await aio.connect(server.uri, timeout=PATIENCE)
        tasks = [asyncio.create_task(disk.pread(4096, 4096 * n)) for n in range(64)]
        await asyncio.sleep(0.05)
        await asyncio.to_thread(server.kill)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} == {Disconnected}
        assert disk.phase in (Phase.CLOSED, Phase.DEAD)

    with nbdkit("memory", "1M", "rdelay=20", filters=["delay"]) as server:
        run(main(server))


@pytest.mark.interop("nbdkit")
def test_a_program_of_ours_is_a_server(run):
    async def main():
        async with aio.connect_command(["nbdkit", "-s", "memory", str(SIZE)], timeout=PATIENCE) as disk:
            await use(disk)
        async with aio.connect_socket_activation(["nbdkit", "memory", str(SIZE)], timeout=PATIENCE) as disk:
            assert disk.size == SIZE

    run(main())

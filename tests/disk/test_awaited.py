"""Checksums and comparisons under asyncio: the same results, and a cancelled task does not wait for a server."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading

import pytest

import nbdcore
import nbdcore.aio
from nbdcore.disk import checksum, compare
from nbdcore.errors import CommandError
from tests.disk.disks import ToldDisk, random_disk, served

PATIENCE = 20.0

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="its disks are served on unix sockets"),
    pytest.mark.usefixtures("nothing_left_behind"),
]


def test_results_are_those_of_the_blocking_functions(socket_path, tmp_path):
    disk = random_disk(1, 5_000_000)
    path = tmp_path / "disk"
    path.write_bytes(disk.contents[:-1] + b"?")
    told = []

    async def both(uri):
        return await asyncio.gather(
            nbdcore.aio.checksum(uri, progress=lambda *now: told.append((*now, threading.get_ident())), timeout=PATIENCE),
            nbdcore.aio.compare(uri, path, timeout=PATIENCE),
            nbdcore.aio.checksum(lambda: nbdcore.connect(uri), offset=1000, length=10),
        )

    with served(disk, socket_path) as uri:
        found = asyncio.run(both(uri))
        assert found == [checksum(uri), compare(uri, path), checksum(uri, offset=1000, length=10)]
    assert told[-1] == (disk.size, disk.size, threading.get_ident())


def test_an_error_is_raised_in_the_task(socket_path):
    class FailingDisk(ToldDisk):
        def pread(self, count, offset):
            raise OSError(5, f"bad sector in {count} bytes at {offset}")

    with served(FailingDisk(bytes(4096), []), socket_path) as uri, pytest.raises(CommandError, match="bad sector"):
        asyncio.run(nbdcore.aio.checksum(uri, timeout=PATIENCE))


def test_a_cancelled_task_waits_for_no_read(socket_path):
    asked, go_on = threading.Event(), threading.Event()

    class HangingDisk(ToldDisk):
        def pread(self, count, offset):
            asked.set()
            go_on.wait(PATIENCE)
            return super().pread(count, offset)

    async def cancelled(uri):
        for what in (
            nbdcore.aio.checksum(uri),
            nbdcore.aio.checksum(lambda: nbdcore.connect(uri)),
            nbdcore.aio.compare(uri, uri),
        ):
            asked.clear()
            task = asyncio.create_task(what)
            await asyncio.to_thread(asked.wait, PATIENCE)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with served(HangingDisk(bytes(1 << 20), []), socket_path) as uri:
        asyncio.run(cancelled(uri))
        assert not go_on.is_set()
        go_on.set()


def test_a_cancelled_task_waits_for_no_connection():
    async def cancelled(listener):
        uri = f"nbd://127.0.0.1:{listener.getsockname()[1]}/"
        task = asyncio.create_task(nbdcore.aio.checksum(uri))
        client, _ = await asyncio.to_thread(listener.accept)
        with client:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE)
        asyncio.run(asyncio.wait_for(cancelled(silent), PATIENCE))


def test_a_task_cancelled_while_its_function_connects_waits_for_no_read(socket_path):
    connecting, cancelled, asked, go_on = (threading.Event() for _ in range(4))

    class HangingDisk(ToldDisk):
        def pread(self, count, offset):
            asked.set()
            go_on.wait(PATIENCE)
            return super().pread(count, offset)

    async def run(uri):
        def connect():
            connecting.set()
            cancelled.wait(PATIENCE)
            return nbdcore.connect(uri)

        task = asyncio.create_task(nbdcore.aio.checksum(connect))
        await asyncio.to_thread(connecting.wait, PATIENCE)
        task.cancel()
        asyncio.get_running_loop().call_later(0.05, cancelled.set)
        with pytest.raises(asyncio.CancelledError):
            await task

    with served(HangingDisk(bytes(1 << 20), []), socket_path) as uri:
        asyncio.run(asyncio.wait_for(run(uri), PATIENCE / 4))
        assert not asked.is_set()
        go_on.set()


def test_an_unknown_name_of_the_module_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'unicorn'"):
        nbdcore.aio.unicorn  # noqa: B018 (looking it up is the test)

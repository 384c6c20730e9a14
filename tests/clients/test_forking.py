"""A fork copies a client into a child: whatever the child does with its copy, it ends, and the parent's connection goes on."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import nbdcore
from nbdcore import aio
from nbdcore.server import MemoryDisk, Server
from nbdcore.testing.scripted import Negotiation, ScriptedServer, data, greeting, serve, wait_for
from tests import leaks
from tests.clients.talking import PATIENCE
from tests.forks import SERVER, busy, needs_fork, status_of_child

pytestmark = needs_fork

CALLS = {
    "pread": lambda client: client.pread(512, 0),
    "flush": lambda client: client.flush(),
    "pread_many": lambda client: list(client.pread_many([(0, 512)])),
}
RANGES = [(index * 4096, 4096) for index in range(256)]
CHILDREN = 10


@pytest.fixture
def uri():
    with Server(MemoryDisk(1 << 20)) as server:
        yield server.listen("tcp", host="127.0.0.1", port=0).address.uri()


def drop(client):
    client.__del__()


def read_them_all(client):
    return len(list(client.pread_many(RANGES, depth=16)))


@pytest.mark.parametrize("connect", [nbdcore.connect, nbdcore.create_pool])
@pytest.mark.parametrize(
    "leave", [lambda client: client.close(), lambda client: client.disconnect(), drop], ids=["close", "disconnect", "drop"]
)
def test_child_that_leaves_its_copy_ends_while_the_parent_is_busy(uri, connect, leave):
    with connect(uri, timeout=PATIENCE) as client:
        with busy(lambda: read_them_all(client)) as rounds:
            statuses = [status_of_child(lambda: leave(client)) for _ in range(CHILDREN)]
        assert statuses == [0] * CHILDREN
        assert set(rounds) == {len(RANGES)}
        assert len(client.pread(512, 0, timeout=PATIENCE)) == 512


@pytest.mark.parametrize("leave", [lambda client: client.close(), lambda client: client.disconnect(), drop])
@pytest.mark.parametrize("make", [nbdcore.Client, lambda: nbdcore.Pool(connections=1)])
def test_child_that_leaves_its_copy_frees_the_descriptors_and_leaves_the_program_to_its_parent(make, leave):
    before = leaks.open_descriptors()
    with make().connect_command(SERVER, timeout=PATIENCE) as client:
        opened = leaks.open_descriptors().keys() - before.keys()

        def child():
            leave(client)
            assert not leaks.open_descriptors().keys() & opened

        assert len(opened) == 2
        assert status_of_child(child) == 0
        assert len(client.pread(512, 0, timeout=PATIENCE)) == 512


def test_child_that_leaves_its_copy_says_no_goodbye_in_opt_mode(uri):
    with nbdcore.connect(uri, timeout=PATIENCE, opt_mode=True) as client:
        assert status_of_child(client.close) == 0
        client.opt_go(timeout=PATIENCE)
        assert len(client.pread(512, 0, timeout=PATIENCE)) == 512


@pytest.mark.parametrize("connect", [aio.connect, aio.create_pool])
@pytest.mark.parametrize("call", ["close", "disconnect"])
def test_child_that_leaves_its_copy_of_an_asyncio_client_disturbs_nobody(uri, connect, call):
    async def parent():
        async with connect(uri, timeout=PATIENCE) as client:
            reads = [asyncio.ensure_future(client.pread(4096, offset)) for offset, _ in RANGES]
            await asyncio.sleep(0)

            def child():
                asyncio.run(getattr(client, call)())

            statuses = [status_of_child(child) for _ in range(3)]
            assert statuses == [0, 0, 0]
            assert [len(data) for data in await asyncio.wait_for(asyncio.gather(*reads), PATIENCE)] == [4096] * len(RANGES)

    asyncio.run(parent())


@pytest.mark.parametrize("make", [nbdcore.Client, lambda: nbdcore.Pool(connections=1)], ids=["Client", "Pool"])
@pytest.mark.parametrize("call", CALLS)
def test_child_that_calls_a_client_busy_in_another_thread_of_its_parent_fails_at_once(call, make):
    release = threading.Event()
    steps = [greeting(), Negotiation(size=1 << 20), wait_for(release), serve(data(bytes(512)))]
    with ScriptedServer(steps) as server, ThreadPoolExecutor(1) as pool:
        client = make().connect_socket(server.socket(), timeout=PATIENCE)
        answer = pool.submit(client.pread, 512, 0)
        end = time.monotonic() + PATIENCE
        while not client._session()._session.waited_for:
            assert time.monotonic() < end
            time.sleep(0.001)

        def child():
            for _ in range(2):
                with pytest.raises(nbdcore.Disconnected, match="fork"):
                    CALLS[call](client)
            client.close()

        assert status_of_child(child) == 0
        release.set()
        assert answer.result(PATIENCE) == bytes(512)
        client.close()


def test_child_uses_the_connection_in_place_of_a_parent_that_left(uri):
    client = nbdcore.connect(uri, timeout=PATIENCE)
    assert status_of_child(lambda: client.pread(512, 0, timeout=PATIENCE)) == 0
    client.close()

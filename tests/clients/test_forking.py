"""A fork copies a client into a child: whatever the child does with its copy, it ends, and the parent's connection goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time

import pytest

import nbdcore
from nbdcore import aio
from nbdcore.server import MemoryDisk, Server
from tests.clients.talking import PATIENCE

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

RANGES = [(index * 4096, 4096) for index in range(256)]
CHILDREN = 10


@pytest.fixture
def uri():
    with Server(MemoryDisk(1 << 20)) as server:
        yield server.listen("tcp", host="127.0.0.1", port=0).address.uri()


def status_of_child(work):
    """Fork, let the child work, and return its exit status: 0, 1 where it raised, 14 where it hung."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(5)
        status = 1
        with contextlib.suppress(BaseException):
            work()
            status = 0
        os._exit(status)
    return os.waitpid(pid, 0)[1]


def drop(client):
    client.__del__()


@contextlib.contextmanager
def busy(client):
    """Keep another thread at work on the client; ends when the block does."""
    stop = threading.Event()
    rounds = []

    def work():
        while not stop.is_set():
            rounds.append(len(list(client.pread_many(RANGES, depth=16))))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    end = time.monotonic() + PATIENCE
    while not rounds and time.monotonic() < end:
        time.sleep(0.001)
    try:
        yield rounds
    finally:
        stop.set()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the parent's thread hangs"


@pytest.mark.parametrize("connect", [nbdcore.connect, nbdcore.create_pool])
@pytest.mark.parametrize(
    "leave", [lambda client: client.close(), lambda client: client.disconnect(), drop], ids=["close", "disconnect", "drop"]
)
def test_child_that_leaves_its_copy_ends_while_the_parent_is_busy(uri, connect, leave):
    with connect(uri, timeout=PATIENCE) as client:
        with busy(client) as rounds:
            statuses = [status_of_child(lambda: leave(client)) for _ in range(CHILDREN)]
        assert statuses == [0] * CHILDREN
        assert set(rounds) == {len(RANGES)}
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


def test_child_uses_the_connection_in_place_of_a_parent_that_left(uri):
    client = nbdcore.connect(uri, timeout=PATIENCE)
    assert status_of_child(lambda: client.pread(512, 0, timeout=PATIENCE)) == 0
    client.close()

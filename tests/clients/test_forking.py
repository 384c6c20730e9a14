"""A fork copies a client into a child: whatever the child does with its copy, it ends, and the parent's connection goes on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest

import nbdcore
from nbdcore import aio
from nbdcore.clients.blocking.several import SharedSessions
from nbdcore.clients.blocking.threads import SharedSession
from nbdcore.protocol.engine import Engine
from nbdcore.server import MemoryDisk, Server
from nbdcore.streams import connecting
from nbdcore.streams.waiting import wait_any
from nbdcore.testing.scripted import Negotiation, ScriptedServer, data, greeting, serve, wait_for
from tests import leaks
from tests.clients.talking import PATIENCE
from tests.forks import SERVER, busy, needs_fork, status_of_child, stopped_in

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


# ---------------------------------------------------------------------------------------------- while another thread connects

LEAVES = {"close": lambda client: client.close(), "disconnect": lambda client: client.disconnect(), "drop": drop, "exit": id}
MAKES = {"Client": nbdcore.Client, "Pool": lambda: nbdcore.Pool(connections=2)}


def wait_until_some_thread_is_in(function):
    end = time.monotonic() + PATIENCE
    while not any(
        frame.f_code is function.__code__ for top in sys._current_frames().values() for frame, _ in traceback.walk_stack(top)
    ):
        assert time.monotonic() < end
        time.sleep(0.001)


@contextlib.contextmanager
def connecting_to_silence(client):
    """Have another thread connect to a server that accepts and stays silent; yields the descriptor that the client has."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        before = leaks.open_descriptors()
        outcome = pool.submit(client.connect_tcp, *listener.getsockname(), timeout=PATIENCE)
        accepted, _ = listener.accept()
        with accepted:
            (descriptor,) = leaks.open_descriptors().keys() - before.keys() - {accepted.fileno()}
            wait_until_some_thread_is_in(wait_any)
            yield descriptor
            client.close()
            with pytest.raises(nbdcore.Disconnected, match="closed by this program"):
                outcome.result(PATIENCE)


@pytest.mark.parametrize("leave", LEAVES)
@pytest.mark.parametrize("make", MAKES)
def test_child_that_leaves_a_client_that_another_thread_connects_ends_and_the_parent_connects_on(leave, make):
    client = MAKES[make]()
    with connecting_to_silence(client):
        assert [status_of_child(lambda: LEAVES[leave](client)) for _ in range(CHILDREN)] == [0] * CHILDREN
        assert client.phase is nbdcore.Phase.CONNECTING


@pytest.mark.parametrize("make", MAKES)
def test_child_that_closes_a_client_that_another_thread_connects_frees_the_descriptor(make):
    client = MAKES[make]()
    with connecting_to_silence(client) as descriptor:

        def child():
            assert descriptor in leaks.open_descriptors()
            client.close()
            assert descriptor not in leaks.open_descriptors()

        assert status_of_child(child) == 0


@pytest.mark.parametrize("make", MAKES)
def test_child_that_uses_a_client_that_another_thread_connects_is_told_that_it_is_the_parents(make):
    client = MAKES[make]()
    with connecting_to_silence(client):

        def child():
            for call in (lambda: client.pread(512, 0), lambda: client.size):
                with pytest.raises(nbdcore.Disconnected, match="fork"):
                    call()
            with pytest.raises(nbdcore.UsageError):
                client.connect_tcp()

        assert status_of_child(child) == 0


@pytest.mark.parametrize("leave", LEAVES)
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize(
    "step",
    [Engine.connecting, connecting.connect_socket, SharedSession.__init__, SharedSessions.__init__, Engine.end],
    ids=lambda step: step.__qualname__,
)
def test_child_that_leaves_a_client_in_the_middle_of_any_step_of_another_threads_connect_ends(leave, make, step, uri):
    if make == "Client" and step is SharedSessions.__init__:
        step = SharedSession.__init__
    client = MAKES[make]()
    work = client.close if step is Engine.end else lambda: client.connect(uri, timeout=PATIENCE)
    with stopped_in(step, work):
        assert status_of_child(lambda: LEAVES[leave](client)) == 0
    assert len(client.pread(512, 0, timeout=PATIENCE)) == 512 if step is not Engine.end else client.closed
    client.close()

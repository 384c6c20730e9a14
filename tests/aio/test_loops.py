"""A client and its event loop: the loop that ends first, the wrong loop, clients that nobody closed."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
import weakref

import pytest

from nbdcore import Phase, UsageError, aio
from nbdcore.aio import AsyncClient
from nbdcore.server import MemoryDisk, Server
from nbdcore.testing.scripted import ScriptedServer, drain, expect_end, wait_for
from tests.aio.talking import PATIENCE, until
from tests.clients.talking import script

SIZE = 1 << 20


@pytest.fixture
def served(socket_path):
    with Server(MemoryDisk(SIZE)) as server:
        yield server.listen("unix", path=str(socket_path)).address.uri()


@pytest.fixture
def quiet(caplog, capfd):
    """Nothing may be said about what the test leaves behind: not as a warning, not in a log, not on standard error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        gc.collect()
    assert [str(warning.message) for warning in caught] == []
    assert caplog.records == []
    assert capfd.readouterr().err == ""


def test_a_loop_may_be_closed_with_a_client_that_lives(new_loop, served, quiet):
    loop = new_loop()
    client = loop.run_until_complete(aio.connect(served, timeout=PATIENCE).__aenter__())
    loop.close()
    assert client.phase is Phase.CONNECTED
    client._close()
    assert client.phase is Phase.CLOSED


def test_a_loop_may_be_closed_with_a_goodbye_that_waits(new_loop):
    ended = threading.Event()
    with ScriptedServer(script(wait_for(ended)), patience=PATIENCE) as server:
        loop = new_loop()
        client = loop.run_until_complete(aio.connect_stream(server.stream(), timeout=PATIENCE).__aenter__())
        task = loop.create_task(client.disconnect())
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()
        asyncio.run(client.close())
        assert client.phase in (Phase.CLOSED, Phase.DEAD)
        ended.set()
        task._log_destroy_pending = False  # nobody can wait for it any more


def test_a_loop_may_be_closed_with_a_client_that_nobody_knows_any_more(new_loop, served, quiet):
    loop = new_loop()
    loop.run_until_complete(aio.connect(served, timeout=PATIENCE).__aenter__())
    loop.close()


def test_asyncio_run_may_end_with_calls_that_wait(new_loop, quiet):
    tasks = []

    async def main(server):
        client = await aio.connect_stream(server.stream(), timeout=PATIENCE)
        tasks.extend(asyncio.create_task(client.pread(8, 8 * n)) for n in range(4))
        await until(lambda: len(client._engine.in_flight) == 4, "all are under way")

    with ScriptedServer(script(drain)) as server:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main(server))
        assert all(task.cancelled() for task in tasks)
        tasks.clear()
        gc.collect()


def test_a_client_that_is_dropped_closes_its_connection(run):
    async def main():
        with ScriptedServer(script(expect_end)) as server:
            client = await aio.connect_stream(server.stream(), timeout=PATIENCE)
            del client
            gc.collect()
            await asyncio.sleep(0)

    run(main())


def test_a_client_that_is_dropped_in_another_thread_is_closed_by_its_loop(run):
    async def main():
        with ScriptedServer(script(expect_end)) as server:
            clients = [await aio.connect_stream(server.stream(), timeout=PATIENCE)]
            thread = threading.Thread(target=clients.clear)
            thread.start()
            thread.join()
            assert clients == []
            await asyncio.sleep(0)

    run(main())


def test_a_client_is_of_no_use_in_another_loop(new_loop, served):
    with asyncio.Runner(loop_factory=new_loop) as one, asyncio.Runner(loop_factory=new_loop) as other:
        client = one.run(AsyncClient().connect(served, timeout=PATIENCE))
        for call in (lambda: client.pread(8, 0), client.flush, lambda: client.pread(SIZE, 0)):
            with pytest.raises(UsageError, match="belongs to the event loop"):
                other.run(call())
        assert one.run(client.pread(8, 0)) == bytes(8)
        one.run(client.disconnect(timeout=PATIENCE))


def test_a_client_may_be_closed_from_another_loop(new_loop, served):
    with asyncio.Runner(loop_factory=new_loop) as one, asyncio.Runner(loop_factory=new_loop) as other:
        client = one.run(AsyncClient().connect(served, timeout=PATIENCE))
        other.run(client.close())
        one.run(asyncio.sleep(0))
        assert client.phase is Phase.CLOSED


def test_a_loop_that_cannot_watch_descriptors_is_refused_with_a_word_on_what_to_do(served):
    class NoWatching(asyncio.SelectorEventLoop):
        """As Windows' default loop: it has transports, and no add_reader."""

        add_reader = asyncio.AbstractEventLoop.add_reader

        def _add_reader(self, *arguments):
            return super()._add_reader(*arguments)

    with asyncio.Runner(loop_factory=NoWatching) as runner:
        client = AsyncClient()
        with pytest.raises(UsageError, match=r"NoWatching cannot watch descriptors.*SelectorEventLoop"):
            runner.run(client.connect(served))
        assert client.phase is Phase.CREATED


def test_a_reference_to_the_loop_s_watch_keeps_no_client_alive(run, served):
    async def main():
        client = await aio.connect(served, timeout=PATIENCE)
        alive = weakref.ref(client)
        del client
        gc.collect()
        assert alive() is None

    run(main())

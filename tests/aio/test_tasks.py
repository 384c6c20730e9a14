"""Many tasks on one connection, several connections in one loop, and what they cost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import threading
import tracemalloc
from collections.abc import Sequence

import pytest

from nbdcore import Phase, UsageError, aio
from nbdcore.server import MemoryDisk, Server
from nbdcore.streams.base import Stream, Want
from nbdcore.streams.sockets import connected_pair
from nbdcore.testing.scripted import Connection, ScriptedServer, answer, data, drain
from tests.aio.talking import DONE, PATIENCE, talk, until
from tests.clients.talking import OPTION_CALLS, OPTION_MODE, newstyle, ready_for_options, script

SIZE = 1 << 20


class Counting(Stream):
    """Passes everything on, and counts how often it was asked to send something."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.sends = 0
        for name in ("recv_into", "fileno", "buffered", "finish_sending", "hang_up", "close"):
            setattr(self, name, getattr(stream, name))

    def send(self, parts: Sequence[memoryview]) -> int | None:
        self.sends += 1
        return self._stream.send(parts)

    def wants(self) -> Want:
        return self._stream.wants()

    def recv_into(self, room: memoryview) -> int | None: ...
    def fileno(self) -> int: ...
    def finish_sending(self) -> bool: ...
    def close(self) -> None: ...


def word(offset: int) -> bytes:
    return offset.to_bytes(8, "big")


@pytest.fixture
def served(socket_path):
    """The URI of a disk whose every eight bytes say where they are."""
    disk = MemoryDisk(SIZE)
    disk.pwrite(b"".join(word(offset) for offset in range(0, SIZE, 8)), 0)
    with Server(disk) as server:
        yield server.listen("unix", path=str(socket_path)).address.uri()


def test_sixty_four_tasks_get_each_its_own(run, served):
    async def main():
        async with aio.connect(served, timeout=PATIENCE) as disk:

            async def reader(seed: int) -> None:
                rng = random.Random(seed)
                for _ in range(20):
                    offset, count = 8 * rng.randrange(SIZE // 8 - 64), 8 * rng.randrange(1, 64)
                    got = await disk.pread(count, offset, timeout=PATIENCE)
                    assert got == b"".join(word(at) for at in range(offset, offset + count, 8))

            await asyncio.gather(*(reader(seed) for seed in range(64)))

    run(main())


def test_tasks_that_read_and_write_and_give_up_disturb_nobody(run, served):
    async def main():
        async with aio.connect(served, timeout=PATIENCE) as disk:

            async def worker(number: int) -> None:
                rng = random.Random(number)
                mine = number * 4096
                kept = bytearray(await disk.pread(4096, mine))
                for _ in range(15):
                    offset, count = rng.randrange(4000), rng.randrange(1, 96)
                    kept[offset : offset + count] = piece = rng.randbytes(count)
                    await disk.pwrite(piece, mine + offset)
                    doomed = asyncio.create_task(disk.pread_into(bytearray(4096), mine))
                    await asyncio.sleep(0)
                    doomed.cancel()
                    assert await disk.pread(4096, mine) == kept

            await asyncio.gather(*(worker(number) for number in range(16)))

    run(main())


def test_the_requests_of_one_turn_of_the_loop_are_sent_together(run):
    def all_at_once(connection: Connection) -> None:
        requests = [connection.receive_request() for _ in range(64)]
        connection.send(b"".join(data(b"12345678")(request) for request in requests))

    async def main():
        async with talk(all_at_once, drain, over=Counting) as (client, _):
            stream = client._shared._session._stream
            stream.sends = 0
            await asyncio.gather(*(client.pread(8, 8 * n) for n in range(64)))
            assert stream.sends == 1

    run(main())


def test_the_descriptor_is_watched_for_writing_only_while_something_is_unsent(run):
    event = threading.Event()

    def slow(connection: Connection) -> None:
        assert event.wait(PATIENCE)
        connection.send(DONE(connection.receive_request()))

    async def main():
        async with talk(slow, drain, size=16 << 20) as (client, _):
            live = client._shared
            assert live._watched == Want.READ
            task = asyncio.create_task(client.pwrite(bytes(8 << 20), 0))
            await until(lambda: client._engine.in_flight, "the write has begun")
            await asyncio.sleep(0)
            assert live._watched == Want.READ | Want.WRITE
            event.set()
            await task
            assert live._watched == Want.READ

    run(main())


def test_several_clients_live_in_one_loop(run, served):
    async def main():
        clients = await asyncio.gather(*(aio.connect(served, timeout=PATIENCE) for _ in range(10)))
        reads = await asyncio.gather(*(client.pread(8, 8 * n) for n, client in enumerate(clients)))
        assert reads == [word(8 * n) for n in range(10)]
        await clients[3].close()
        assert await clients[4].pread(8, 0) == word(0)
        await asyncio.gather(*(client.disconnect(timeout=PATIENCE) for client in clients))
        assert {client.phase for client in clients} == {Phase.CLOSED}

    run(main())


def test_no_connection_has_a_thread(run):
    async def main():
        with ScriptedServer(*[script(drain)] * 5) as server:
            streams = [server.stream() for _ in range(5)]
            before = threading.active_count()
            clients = [await aio.connect_stream(stream, timeout=PATIENCE) for stream in streams]
            assert threading.active_count() == before
            for client in clients:
                await client.close()

    run(main())


def test_idle_connections_hold_little_memory(run, served):
    many = 50

    async def main():
        await (await aio.connect(served, timeout=PATIENCE)).close()
        gc.collect()
        tracemalloc.start()
        try:
            clients = [await aio.connect(served, timeout=PATIENCE) for _ in range(many)]
            for client in clients:
                await client.pread(100_000, 0)
                await client.pread(8, 0)
            gc.collect()
            own = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, "*/nbdcore/server/*")])
            held = sum(statistic.size for statistic in own.statistics("filename"))
        finally:
            tracemalloc.stop()
        assert held < many * 50 * 1024
        for client in clients:
            await client.close()

    run(main())


def test_connections_whose_handshake_came_in_one_piece_hold_little_memory(run):
    many = 20

    async def main():
        with contextlib.ExitStack() as stack:
            ends = [connected_pair() for _ in range(many)]
            for _, far in ends:
                stack.enter_context(far)
                far.sendall(newstyle())
            tracemalloc.start()
            try:
                clients = [await aio.connect_socket(near, timeout=PATIENCE) for near, _ in ends]
                gc.collect()
                held = tracemalloc.get_traced_memory()[0]
            finally:
                tracemalloc.stop()
            assert held < many * 50 * 1024
            for client in clients:
                await client.close()

    run(main())


def test_connections_that_wait_for_answers_hold_little_memory(run):
    many = 20

    async def main():
        async with contextlib.AsyncExitStack() as stack:
            clients = [(await stack.enter_async_context(talk(answer(data(b"data")), drain)))[0] for _ in range(many)]
            waiting = []
            tracemalloc.start()
            try:
                for client in clients:
                    both = [asyncio.create_task(client.pread(4, offset)) for offset in (0, 4)]
                    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE)
                    waiting += both
                gc.collect()
                own = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/nbdcore/protocol/*")])
                held = sum(statistic.size for statistic in own.statistics("filename"))
            finally:
                tracemalloc.stop()
            assert held < many * 50 * 1024
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)

    run(main())


def test_two_tasks_cannot_ask_two_options_at_a_time(run):
    make, reply = OPTION_CALLS["opt_list"]

    async def main():
        asked = asyncio.Event()
        loop = asyncio.get_running_loop()

        def step(connection: Connection) -> None:
            connection.receive_option()
            loop.call_soon_threadsafe(asked.set)
            assert event.wait(PATIENCE)
            connection.send(reply)

        event = threading.Event()
        with ScriptedServer([ready_for_options, step, drain]) as server:
            async with aio.connect_stream(server.stream(), timeout=PATIENCE, **OPTION_MODE) as client:
                task = asyncio.create_task(make(client))
                await asked.wait()
                with pytest.raises(UsageError, match="opt_list: the connection is connecting"):
                    await make(client)
                event.set()
                assert [export.name for export in await task] == ["a"]
                assert client.phase is Phase.NEGOTIATING

    run(main())

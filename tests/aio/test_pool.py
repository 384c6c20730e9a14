"""Several connections as one, for asyncio: how many, where requests go, loss, cancelling, closing, wrong calls."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest

import nbdcore.aio
from nbdcore import DeadlineExceeded, Disconnected, Phase, ProtocolViolation, UsageError
from nbdcore.aio import AsyncClient, AsyncPool
from nbdcore.clients.connect import establish as establishing
from nbdcore.protocol.constants import CommandType, TransmissionFlag
from nbdcore.protocol.state import LEGAL
from nbdcore.streams.memory import memory_pair
from nbdcore.testing.scripted import (
    EVERYTHING,
    Request,
    ScriptedServer,
    Step,
    answer,
    drain,
    expect_end,
    goodbye,
    hang_up,
    serve,
    unless_gone,
    wait_for,
)
from tests.aio.talking import CALLS, DISK, PATIENCE, SHORT, everything, until
from tests.clients.talking import expected, good, script
from tests.clients.test_pool import DIFFERENT, REFUSALS, kinds
from tests.interop.servers import nbdkit, qemu_nbd

SIZE = 8 << 20


@contextlib.asynccontextmanager
async def pooled(
    *scripts: Iterable[Step], connections: int | None = None, **options: Any
) -> AsyncIterator[tuple[AsyncPool, ScriptedServer]]:
    """A pool of as many connections as there are scripts, unless told otherwise. Leaving does not say goodbye."""
    with ScriptedServer(*scripts, patience=PATIENCE) as server:
        timing = {"timeout": options.pop("timeout", PATIENCE)}
        port = server.listen_tcp()
        pool = await AsyncPool(connections=connections or len(scripts), **options).connect_tcp("127.0.0.1", port, **timing)
        try:
            yield pool, server
        finally:
            await pool.close()


# ---------------------------------------------------------------------------------------------- how many there are


def test_as_many_as_asked_for_are_opened_and_each_takes_leave(run):
    async def main():
        async with pooled(*[script(goodbye)] * 5) as (pool, server):
            assert isinstance(pool, AsyncPool)
            assert pool.connections == len(server.connections) == 5
            assert (pool.phase, pool.size) == (Phase.CONNECTED, DISK)
            assert "connected, 5 to " in repr(pool)
            await pool.disconnect(timeout=PATIENCE)
            assert (pool.connections, pool.phase, pool.size) == (0, Phase.CLOSED, DISK)

    run(main())


def test_an_export_that_is_not_multi_conn_gets_one_connection(run):
    async def main():
        alone = int(EVERYTHING & ~TransmissionFlag.CAN_MULTI_CONN)
        async with pooled(script(serve(good), flags=alone), connections=4) as (pool, server):
            assert (pool.connections, len(server.connections)) == (1, 1)
            assert await pool.pread(8, 3, timeout=PATIENCE) == expected(3, 8)

    run(main())


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_a_server_that_refuses_some_leaves_fewer(run, refusal):
    async def main():
        async with pooled(script(serve(good)), refusal, script(serve(good)), refusal) as (pool, _):
            assert pool.connections == 2
            found = dict(await everything(pool.pread_many([(n, 8) for n in range(99)], timeout=PATIENCE)))
            assert found == {n: expected(n, 8) for n in range(99)}

    run(main())


def test_a_server_that_accepts_and_never_greets_delays_by_no_more_than_the_grace(run, monkeypatch):
    monkeypatch.setattr(establishing, "GRACE", SHORT)

    async def main():
        async with pooled(script(serve(good)), [expect_end], [expect_end]) as (pool, _):
            assert pool.connections == 1
            assert await pool.pread(8, 3, timeout=PATIENCE) == expected(3, 8)

    run(main())


@pytest.mark.parametrize("difference", DIFFERENT.values(), ids=DIFFERENT)
def test_a_connection_to_something_else_is_not_used_and_told_so(run, difference):
    async def main():
        contexts = ["base:allocation", "qemu:allocation-depth"]
        async with pooled(script(serve(good)), script(goodbye, **difference), contexts=contexts) as (pool, server):
            assert pool.connections == 1
            for n in range(5):
                assert await pool.pread(8, n, timeout=PATIENCE) == expected(n, 8)
            assert kinds(server.connections[1]) == []

    run(main())


# ---------------------------------------------------------------------------------------------- where requests go


def test_the_requests_of_many_tasks_are_spread_evenly(run):
    async def main():
        gate = threading.Barrier(4)
        steps = [lambda c: [c.receive_request() for _ in range(16)], lambda _: gate.wait(PATIENCE)]
        steps += [lambda c: [c.send(good(request)) for request in c.requests], unless_gone(drain)]
        async with pooled(*[script(*steps)] * 4) as (pool, _):
            found = await asyncio.gather(*(pool.pread(8, n, timeout=PATIENCE) for n in range(64)))
            assert found == [expected(n, 8) for n in range(64)]

    run(main())


@pytest.mark.parametrize("name", CALLS)
def test_each_call_works(run, name):
    async def main():
        async with pooled(*[script(serve(CALLS[name].chunks))] * 2) as (pool, _):
            await CALLS[name].make(pool, timeout=PATIENCE)

    run(main())


def test_a_flush_is_sent_once_and_after_all_that_it_covers(run):
    log: list[str] = []

    def logged(request: Request) -> bytes:
        log.append(CommandType(request.kind).name)
        return good(request)

    async def main():
        async with pooled(*[script(serve(logged))] * 4) as (pool, server):
            assert len(await everything(pool.pwrite_many([(n, b"x") for n in range(64)], timeout=PATIENCE))) == 64
            await pool.flush(timeout=PATIENCE)
            assert Counter(log) == {"WRITE": 64, "FLUSH": 1}
            assert log[-1] == "FLUSH"
            assert all(CommandType.WRITE in kinds(connection) for connection in server.connections)

    run(main())


# ---------------------------------------------------------------------------------------------- loss


def test_a_lost_connection_fails_its_own_requests_only(run):
    async def main():
        release = threading.Event()
        lives = script(answer(lambda r: release.wait(PATIENCE) and good(r)), serve(good))
        dies = script(lambda c: c.receive_request(), wait_for(release), hang_up)
        async with pooled(lives, dies) as (pool, _):
            tasks = [asyncio.create_task(pool.pread(8, n, timeout=PATIENCE)) for n in range(2)]
            await asyncio.sleep(SHORT)
            release.set()
            first, second = await asyncio.gather(*tasks, return_exceptions=True)
            assert first == expected(0, 8)
            assert isinstance(second, Disconnected)
            assert (pool.phase, pool.connections, pool.size) == (Phase.CONNECTED, 1, DISK)
            for n in range(20):
                assert await pool.pread(8, n, timeout=PATIENCE) == expected(n, 8)

    run(main())


def test_a_loop_that_lost_a_connection_yields_the_rest_then_raises(run):
    async def main():
        broken = script(answer(b"x" * 64), unless_gone(drain))
        async with pooled(script(serve(good)), broken, script(serve(good))) as (pool, _):
            found = []

            async def read() -> None:
                async for offset, data in pool.pread_many([(n, 8) for n in range(500)], timeout=PATIENCE):
                    found.append(offset)
                    assert data == expected(offset, 8)

            with pytest.raises(ProtocolViolation):
                await read()
            assert len(found) == len(set(found)) > 0
            assert pool.connections == 2
            assert await everything(pool.pread_many([(5, 8)], timeout=PATIENCE)) == [(5, expected(5, 8))]

    run(main())


def test_when_the_last_is_lost_the_pool_is(run):
    async def main():
        async with pooled(*[script(lambda c: [c.receive_request() for _ in range(3)], hang_up)] * 3) as (pool, _):
            errors = await asyncio.gather(*(pool.pread(8, n, timeout=PATIENCE) for n in range(9)), return_exceptions=True)
            assert {type(exc) for exc in errors} == {Disconnected}
            assert len({id(exc) for exc in errors}) == 9
            assert pool.connections == 0
            with pytest.raises(Disconnected, match="it ended with: the server closed the connection"):
                await pool.pread(8, 0)

    run(main())


# ---------------------------------------------------------------------------------------------- cancelling and closing


def test_a_cancelled_read_never_writes_and_every_connection_stays(run):
    async def main():
        late = threading.Event()
        slow = script(answer(lambda r: late.wait(PATIENCE) and good(r)), serve(good))
        async with pooled(slow, slow) as (pool, _):
            buffers = [bytearray(b"untouched") for _ in range(2)]
            tasks = [asyncio.create_task(pool.pread_into(buffer, 3)) for buffer in buffers]
            await asyncio.sleep(SHORT)
            for task in tasks:
                task.cancel()
            assert {type(got) for got in await asyncio.gather(*tasks, return_exceptions=True)} == {asyncio.CancelledError}
            late.set()
            found = await asyncio.gather(*(pool.pread(8, n, timeout=PATIENCE) for n in range(50)))
            assert found == [expected(n, 8) for n in range(50)]
            assert buffers == [b"untouched"] * 2
            assert pool.connections == 2

    run(main())


def test_leaving_a_loop_early_and_deadlines_leave_every_connection_usable(run):
    async def main():
        async with pooled(*[script(serve(good))] * 3) as (pool, _):
            for _ in range(10):
                buffers = [(n, bytearray(100)) for n in range(200)]
                many = pool.pread_into_many(buffers, depth=100, timeout=PATIENCE)
                async for _ in many:
                    break
                await many.aclose()
                left = [bytes(buffer) for _, buffer in buffers]
                with contextlib.suppress(DeadlineExceeded):
                    await pool.pread(8, 0, timeout=0)
                assert await pool.pread(8, 3, timeout=PATIENCE) == expected(3, 8)
                assert [bytes(buffer) for _, buffer in buffers] == left
            assert pool.connections == 3

    run(main())


def test_closing_ends_every_call(run):
    async def main():
        silent = script(unless_gone(lambda c: [c.receive_request() for _ in range(99)]))
        async with pooled(silent, silent, silent) as (pool, server):
            tasks = [asyncio.create_task(pool.pread(8, n)) for n in range(9)]
            await until(lambda: sum(len(connection.requests) for connection in server.connections) == 9, "all were asked")
            await pool.close()
            assert {type(exc) for exc in await asyncio.gather(*tasks, return_exceptions=True)} == {Disconnected}
            assert (pool.phase, pool.connections) == (Phase.CLOSED, 0)

    run(main())


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_ending_while_further_connections_are_opened_leaves_none(run, how):
    async def main():
        with ScriptedServer(script(drain), [expect_end], [expect_end], patience=PATIENCE) as server:
            pool = AsyncPool(connections=3)
            task = asyncio.create_task(pool.connect_tcp("127.0.0.1", server.listen_tcp()))
            await until(lambda: len(server.connections) == 3, "all are open")
            if how == "close":
                await pool.close()
            else:
                task.cancel()
            with pytest.raises((Disconnected, asyncio.CancelledError)) as caught:
                await task
            assert caught.type is (Disconnected if how == "close" else asyncio.CancelledError)
            assert (pool.phase in (Phase.CLOSED, Phase.DEAD), pool.connections) == (True, 0)

    run(main())


def test_a_pool_that_nobody_knows_any_more_is_closed(run):
    async def main():
        with ScriptedServer(*[script(expect_end)] * 3, patience=PATIENCE) as server:
            pool = await AsyncPool(connections=3).connect_tcp("127.0.0.1", server.listen_tcp(), timeout=PATIENCE)
            assert pool.connections == 3
            del pool

    run(main())


# ---------------------------------------------------------------------------------------------- the shape of a pool


def test_a_new_pool_is_not_connected(run):
    async def main():
        pool = AsyncPool()
        assert (pool.phase, pool.connections, repr(pool)) == (Phase.CREATED, 0, "<nbdcore.aio.AsyncPool newly created>")
        with pytest.raises(UsageError, match=r"^pread: the connection is newly created"):
            await pool.pread(1, 0)
        await pool.close()

    run(main())


def test_a_pool_has_what_a_client_has_but_opt_mode_and_listing():
    public = {name for name in dir(AsyncClient) if not name.startswith("_")}
    missing = public - {name for name in dir(AsyncPool) if not name.startswith("_")}
    assert missing == {"list_exports"} | {name for name in LEGAL if name.startswith("opt_")}


@pytest.mark.parametrize("options", [{"connections": 0}, {"connections": 129}, {"connections": "2"}, {"opt_mode": True}])
def test_what_makes_no_pool_is_a_usage_error(options):
    with pytest.raises(UsageError, match="a pool"):
        nbdcore.aio.connect("nbd://127.0.0.1:1", **{"connections": 2, **options})


@pytest.mark.parametrize("name", ["connect_command", "connect_socket_activation", "connect_socket", "connect_stream"])
def test_what_leads_to_no_second_connection_is_a_usage_error(run, name):
    async def main():
        near, far = memory_pair()
        where = {"connect_socket": near.fileno(), "connect_stream": near}.get(name, ["true"])
        with contextlib.closing(near), contextlib.closing(far):
            pool = AsyncPool(connections=2)
            with pytest.raises(UsageError, match=f"^{name}: .* and a pool of 2 was asked for"):
                await getattr(pool, name)(where)
            assert pool.phase is Phase.CREATED
            with pytest.raises(UsageError, match="a pool of connections is made by create_pool"):
                getattr(nbdcore.aio, name)(where, connections=2)

    run(main())


# ---------------------------------------------------------------------------------------------- strangers


async def use(disk: AsyncPool) -> None:
    """Write a disk's whole contents and read them back, in every way at once."""
    contents = random.Random(1).randbytes(SIZE)
    half = SIZE // 2
    pieces = [(at, contents[at : min(at + 5000, half)]) for at in range(0, half, 5000)]
    await asyncio.gather(everything(disk.pwrite_many(pieces)), disk.pwrite(contents[half:], half, timeout=PATIENCE))
    await disk.flush(timeout=PATIENCE)
    parts = await asyncio.gather(*(disk.pread(1 << 16, at, timeout=PATIENCE) for at in range(0, SIZE, 1 << 16)))
    assert b"".join(parts) == contents
    async for offset, data in disk.pread_many([(at, 5000) for at in range(0, SIZE - 5000, 7000)]):
        assert data == contents[offset : offset + 5000]


@pytest.mark.interop("nbdkit")
def test_nbdkit_keeps_what_is_written(run):
    async def main(uri):
        async with nbdcore.aio.create_pool(uri, connections=4, timeout=PATIENCE) as disk:
            assert disk.connections == 4
            await use(disk)
        async with nbdcore.aio.connect(uri, timeout=PATIENCE) as disk:
            assert type(disk) is AsyncClient

    with nbdkit("memory", str(SIZE)) as server:
        run(main(server.uri))


@pytest.mark.interop("qemu-nbd")
def test_qemu_nbd_with_room_for_two_has_two(run, tmp_path, monkeypatch):
    monkeypatch.setattr(establishing, "GRACE", 0.5)  # it takes the others, and does not greet them
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(SIZE)

    async def main(uri):
        async with nbdcore.aio.create_pool(uri, connections=4, timeout=PATIENCE) as disk:
            assert disk.connections == 2
            await use(disk)

    with qemu_nbd(image, shared=2) as server:
        run(main(server.uri))


@pytest.mark.interop("nbdkit")
def test_a_server_that_is_killed_ends_every_task_on_every_connection(run):
    async def main(server):
        disk = await nbdcore.aio.create_pool(server.uri, connections=4, timeout=PATIENCE)
        tasks = [asyncio.create_task(disk.pread(4096, 4096 * n)) for n in range(64)]
        await asyncio.sleep(SHORT)
        await asyncio.to_thread(server.kill)
        assert {type(got) for got in await asyncio.gather(*tasks, return_exceptions=True)} == {Disconnected}
        assert disk.connections == 0

    with nbdkit("memory", "1M", "rdelay=20", filters=["delay"]) as server:
        run(main(server))

"""Cancellation is exact at every stage of a command: nothing more is written to its buffer, and the connection goes on."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from nbdcore import Disconnected, Phase
from nbdcore.aio import AsyncClient
from nbdcore.protocol.constants import CommandType
from nbdcore.testing.scripted import Connection, ScriptedServer, answer, data, drain, serve, wait_for
from tests.aio.talking import CALLS, DISK, DONE, PATIENCE, SHORT, held, late, talk, until
from tests.clients.talking import in_two_parts, slow_to_receive

LARGE = 200_000


async def cancelled(task: asyncio.Task) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("name", CALLS)
def test_a_cancelled_call_costs_no_connection(run, name):
    event = threading.Event()

    async def main():
        async with talk(late(event, CALLS[name].chunks), answer(DONE, kind=CommandType.FLUSH)) as (client, connection):
            task = asyncio.create_task(CALLS[name].make(client))
            await until(lambda: connection.requests, "the request was received")
            await cancelled(task)
            event.set()
            await client.flush(timeout=PATIENCE)

    run(main())


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("turns", range(4))
def test_a_call_that_is_cancelled_after_any_number_of_turns_harms_nothing(run, name, turns):
    async def main():
        async with talk(serve(CALLS[name].chunks)) as (client, _):
            task = asyncio.create_task(CALLS[name].make(client))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            await CALLS[name].make(client, timeout=PATIENCE)

    run(main())


@pytest.mark.parametrize("part", [0, 10, 40, 100_020], ids=["nothing", "half a header", "some data", "most data"])
def test_a_late_reply_does_not_touch_the_buffer_of_a_cancelled_read(run, part):
    event = threading.Event()
    step = in_two_parts(data(b"x" * LARGE), part, event)

    async def main():
        async with talk(step, answer(data(b"y" * 8), kind=CommandType.READ)) as (client, connection):
            buffer = bytearray(LARGE)
            received = client._engine.traffic.bytes_received
            task = asyncio.create_task(client.pread_into(buffer, 0))
            await until(lambda: connection.requests, "the request was received")
            await until(lambda: client._engine.traffic.bytes_received - received >= part, "the first part has come")
            await cancelled(task)
            kept = bytes(buffer)
            assert not held(buffer)
            event.set()
            assert await client.pread(8, 0, timeout=PATIENCE) == b"y" * 8
            assert buffer == kept

    run(main())


def test_a_read_whose_answer_comes_with_its_cancellation_ends_either_way_and_lets_go_of_the_buffer(run):
    """The answer is there before the cancelled task had its turn."""

    async def main():
        async with talk(serve(data(b"x" * 512))) as (client, _):
            outcomes = set()
            for turns in range(12):
                buffer = bytearray(512)
                task = asyncio.create_task(client.pread_into(buffer, 0, timeout=PATIENCE))
                for _ in range(turns):
                    await asyncio.sleep(0.0002)
                task.cancel()
                await asyncio.wait([task])
                outcomes.add("cancelled" if task.cancelled() else task.result())
                assert not held(buffer)
                after = bytes(buffer)
                assert await client.pread(512, 0, timeout=PATIENCE) == b"x" * 512
                assert buffer == after
            assert "cancelled" in outcomes

    run(main())


def test_a_completion_that_finds_its_caller_cancelled_harms_nobody_else(run):
    """Two answers in one receive: the first one's task was cancelled in the same turn of the loop, before it could notice."""

    async def main():
        event = threading.Event()

        def both(connection: Connection) -> None:
            requests = [connection.receive_request() for _ in range(2)]
            connection.send(b"".join(data(b"12345678")(request) for request in requests))
            event.set()

        async with talk(both, drain) as (client, _):
            tasks = [asyncio.create_task(client.pread(8, offset)) for offset in (0, 8)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # sent
            assert event.wait(PATIENCE)  # with the loop standing still: the answers are received after the cancellation
            tasks[0].cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(results[0], asyncio.CancelledError)
            assert results[1] == b"12345678"
            assert client.phase is Phase.CONNECTED

    run(main())


def test_a_write_that_was_half_sent_is_finished_from_a_copy(run):
    contents = bytearray(b"a" * (8 << 20))
    event, received = threading.Event(), []

    async def main():
        async with talk(slow_to_receive(event, received), answer(DONE, kind=CommandType.FLUSH), size=16 << 20) as (client, _):
            task = asyncio.create_task(client.pwrite(contents, 0))
            await until(lambda: client._engine.in_flight and client._engine.has_outgoing, "part of it was sent")
            await cancelled(task)
            assert not held(contents)
            contents[:] = b"b" * len(contents)
            event.set()
            await client.flush(timeout=PATIENCE)

    run(main())
    assert received == [b"a" * (8 << 20)]


@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_which_nothing_was_sent_when_it_was_cancelled_is_never_sent(run, name):
    event = threading.Event()

    def slow(connection: Connection) -> None:
        wait_for(event)(connection)
        connection.send(DONE(connection.receive_request()))

    async def main():
        async with talk(slow, answer(DONE, kind=CommandType.FLUSH), size=16 << 20) as (client, connection):
            first = asyncio.create_task(client.pwrite(bytes(8 << 20), 0, timeout=PATIENCE))
            await until(lambda: client._engine.in_flight, "a write has begun, and fills the socket's buffer")
            second = asyncio.create_task(CALLS[name].make(client))
            await until(lambda: client._engine.pending == 2, "the call is queued behind it")
            await asyncio.sleep(0.01)
            await cancelled(second)
            event.set()
            await first
            await client.flush(timeout=PATIENCE)
            assert [request.kind for request in connection.requests] == [CommandType.WRITE, CommandType.FLUSH]

    run(main())


@pytest.mark.parametrize("call", ["pread", "pread_into", "pwrite", "zero", "cache"])
def test_a_split_call_that_is_cancelled_gives_up_every_piece(run, call):
    event = threading.Event()

    def four_then_flush(connection: Connection) -> None:
        requests = [connection.receive_request() for _ in range(4)]
        assert event.wait(PATIENCE)
        for request in requests:
            connection.send((data(b"x" * request.count) if request.kind == CommandType.READ else DONE)(request))

    async def main():
        buffer = bytearray(DISK)
        steps = (four_then_flush, answer(DONE, kind=CommandType.FLUSH))
        async with talk(*steps, block_size=(1, 4096, 1 << 16)) as (client, connection):
            arguments = {"pread": (DISK, 0), "pread_into": (buffer, 0), "pwrite": (buffer, 0)}.get(call, (DISK, 0))
            task = asyncio.create_task(getattr(client, call)(*arguments))
            await until(lambda: len(connection.requests) == 4, "four pieces are under way")
            await cancelled(task)
            assert not held(buffer)
            event.set()
            await client.flush(timeout=PATIENCE)
            assert buffer == bytes(DISK)

    run(main())


def test_asyncio_timeout_works_as_cancellation_does(run):
    event = threading.Event()

    async def main():
        async with talk(late(event, data(b"x" * 64)), answer(DONE, kind=CommandType.FLUSH)) as (client, _):
            buffer = bytearray(64)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(SHORT):
                    await client.pread_into(buffer, 0)
            assert not held(buffer)
            event.set()
            await client.flush(timeout=PATIENCE)
            assert buffer == bytes(64)

    run(main())


def test_one_task_of_many_is_cancelled_and_the_others_get_their_own(run):
    event = threading.Event()

    def all_at_once(connection: Connection) -> None:
        requests = [connection.receive_request() for _ in range(64)]
        assert event.wait(PATIENCE)
        # In one piece: the client hangs up when the last that it waits for is there, and that is not the last one.
        connection.send(b"".join(data(bytes([request.offset % 256]) * 16)(request) for request in reversed(requests)))

    async def main():
        async with talk(all_at_once, drain) as (client, connection):
            tasks = [asyncio.create_task(client.pread(16, offset)) for offset in range(64)]
            await until(lambda: len(connection.requests) == 64, "all are under way")
            for task in tasks[::3]:
                task.cancel()
            event.set()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for offset, result in enumerate(results):
                if offset % 3 == 0:
                    assert isinstance(result, asyncio.CancelledError)
                else:
                    assert result == bytes([offset]) * 16

    run(main())


@pytest.mark.parametrize("said", [b"", b"NBDMAGIC", b"NBDMAGICIHAVEOPT\0\3"])
def test_a_cancelled_handshake_is_the_end_of_the_connection(run, said):
    async def main():
        with ScriptedServer([said, drain]) as server:
            client = AsyncClient()
            task = asyncio.create_task(client.connect_stream(server.stream()))
            await asyncio.sleep(SHORT)
            await cancelled(task)
            assert client.phase is Phase.DEAD

    run(main())


def test_a_cancelled_disconnect_closes_at_once(run):
    event = threading.Event()

    async def main():
        async with talk(lambda c: c.receive_request(), wait_for(event), drain) as (client, connection):
            task = asyncio.create_task(client.disconnect())
            await until(lambda: connection.requests, "the goodbye was received")
            await cancelled(task)
            assert client.phase is Phase.CLOSED
            event.set()

    run(main())


def test_closing_ends_the_calls_that_wait(run):
    async def main():
        async with talk(drain) as (client, _):
            buffer = bytearray(64)
            calls = [call.make(client) for call in CALLS.values()] + [client.pread_into(buffer, 0)]
            tasks = [asyncio.create_task(call) for call in calls]
            await asyncio.sleep(SHORT)
            await client.close()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(result) for result in results} == {Disconnected}
            assert len({id(result) for result in results}) == len(results), "each has an exception of its own"
            assert all("closed by this program" in str(result) for result in results)
            del results, tasks
            gc.collect()
            assert not held(buffer)

    run(main())


def test_closing_ends_a_disconnect_that_waits(run):
    event = threading.Event()

    async def main():
        async with talk(lambda c: c.receive_request(), wait_for(event), drain) as (client, connection):
            tasks = [asyncio.create_task(client.disconnect(timeout=PATIENCE)) for _ in range(3)]
            await until(lambda: connection.requests, "the goodbye was received")
            await client.close()
            assert await asyncio.gather(*tasks) == [None] * 3
            event.set()

    run(main())


def test_a_buffer_is_free_when_a_call_has_been_refused_or_lost(run):
    async def main():
        buffer = bytearray(64)
        async with talk(lambda c: c.receive_request()) as (client, _):
            with pytest.raises(Disconnected):
                await client.pread_into(buffer, 0)
            assert not held(buffer)

    run(main())

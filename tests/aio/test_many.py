"""Many requests in one loop: in the order in which they finish, consumed lazily, bounded by depth, and left at any moment."""

from __future__ import annotations

import asyncio
import threading

import pytest

from nbdcore import CommandError, DeadlineExceeded, Disconnected, Phase, UsageError, aio
from nbdcore.protocol.constants import CommandType
from nbdcore.server import Server
from nbdcore.testing.choppy import ChoppyStream
from nbdcore.testing.scripted import answer, drain, serve
from tests.aio.talking import DONE, PATIENCE, SHORT, everything, held, talk, until
from tests.clients.many import (
    CONTENTS,
    RANGES,
    WRONG_OPTIONS,
    backwards,
    dying,
    every_call,
    every_wrong_input,
    every_wrong_item,
    failing,
    first_only,
    in_fours,
    in_small_pieces,
    offsets_of,
    start,
)
from tests.clients.talking import expected, good


async def collect(iterator, results):
    """Keep what comes before an error, too."""
    async for result in iterator:
        results.append(result)


@every_call
@pytest.mark.parametrize("depth", [1, 2, 64])
def test_each_item_is_yielded_once(run, name, depth):
    async def main():
        async with talk(serve(good)) as (client, _):
            results = await everything(start(client, name, range(0, 4000, 16), depth=depth))
            assert sorted(offsets_of(name, results)) == [*range(0, 4000, 16)]
            if name == "pread_many":
                assert all(got == expected(offset, 16) for offset, got in results)

    run(main())


@every_call
def test_over_a_stream_that_is_as_awkward_as_allowed(run, name):
    async def main():
        async with talk(serve(good), over=lambda stream: ChoppyStream(stream, most=60)) as (client, _):
            results = await everything(start(client, name, range(0, 400, 16), depth=7))
            assert sorted(offsets_of(name, results)) == [*range(0, 400, 16)]

    run(main())


@pytest.mark.parametrize("items", [[], iter(()), ()])
@every_call
def test_nothing_to_do_is_done(run, name, items):
    async def main():
        async with talk(drain) as (client, _):
            assert await everything(getattr(client, name)(items)) == []

    run(main())


def test_results_come_in_the_order_in_which_they_finish(run):
    async def main():
        async with talk(backwards, drain) as (client, _):
            results = await everything(client.pread_many([(offset, 4) for offset in range(10)]))
            assert [offset for offset, _ in results] == [*reversed(range(10))]

    run(main())


@every_call
def test_the_input_is_consumed_no_further_than_depth_ahead(run, name):
    async def main():
        consumed = []

        def offsets():
            for offset in range(100):
                consumed.append(offset)
                yield offset

        async with talk(serve(good)) as (client, _):
            done = 0
            async for _ in start(client, name, offsets(), depth=5):
                done += 1
                await asyncio.sleep(0)
                assert len(consumed) <= done + 5
            assert done == 100

    run(main())


def test_no_more_than_depth_are_under_way(run):
    counts: list[int] = []

    async def main():
        async with talk(in_fours(counts), drain) as (client, _):
            async for _ in client.pread_many(((offset, 4) for offset in range(20)), depth=4):
                await asyncio.sleep(SHORT / 10)

    run(main())
    assert counts == [4] * 5


# ---------------------------------------------------------------------------------------------- against a real server


@pytest.fixture
def served(socket_path):
    """The URI of a disk that must be asked for 16 KiB at most."""
    with Server(in_small_pieces()) as server:
        yield server.listen("unix", path=str(socket_path)).address.uri()


def test_what_is_written_is_read_though_each_item_comes_in_pieces(run, served):
    async def main():
        async with aio.connect(served, timeout=PATIENCE) as disk:
            items = [(offset, CONTENTS[offset : offset + count]) for offset, count in RANGES]
            assert sorted(await everything(disk.pwrite_many(items, fua=True))) == [offset for offset, _ in RANGES]
            assert dict(await everything(disk.pread_many(RANGES))) == dict(items)
            buffers = {offset: bytearray(count) for offset, count in RANGES}
            assert sorted(await everything(disk.pread_into_many(buffers.items(), depth=3))) == [*buffers]
            assert buffers == dict(items)
            holes = RANGES[::2]
            assert sorted(await everything(disk.zero_many(holes[:5], no_hole=True))) == [offset for offset, _ in holes[:5]]
            await everything(disk.trim_many(holes[5:], fua=True))
            for offset, got in await everything(disk.pread_many(RANGES)):
                assert got == (bytes(len(got)) if (offset, len(got)) in holes else CONTENTS[offset : offset + len(got)])

    run(main())


def test_several_loops_share_a_connection_with_single_calls(run, served):
    async def main():
        async with aio.connect(served, timeout=PATIENCE) as disk:
            await disk.pwrite(bytes(range(256)) * 256, 0)

            async def walk(step: int) -> None:
                async for offset, got in disk.pread_many((offset, step) for offset in range(0, 1 << 15, step)):
                    assert got == bytes((offset + n) % 256 for n in range(step))

            single = (disk.pread(256, 256 * n) for n in range(64))
            await asyncio.gather(*(walk(step) for step in (64, 100, 128)), *single)

    run(main())


# ---------------------------------------------------------------------------------------------- errors


@every_call
def test_after_an_error_the_rest_is_yielded_and_no_more_is_begun(run, name):
    async def main():
        async with talk(serve(failing(32, 48))) as (client, connection):
            results = []
            with pytest.raises(CommandError, match="at offset 32 failed"):
                await collect(start(client, name, range(0, 1600, 16), depth=8), results)
            assert {0, 16, 64, 80, 96, 112} <= set(offsets_of(name, results))
            assert {32, 48}.isdisjoint(offsets_of(name, results))
            assert len(connection.requests) < 32
            assert client.phase is Phase.CONNECTED
            await client.flush()

    run(main())


def test_an_error_in_one_piece_fails_its_item(run):
    async def main():
        async with talk(serve(failing(1 << 16)), block_size=(1, 4096, 1 << 16)) as (client, _):
            results = []
            with pytest.raises(CommandError, match=f"at offset {1 << 16} failed"):
                await collect(client.pread_many([(1 << 17, 8), (0, 1 << 17), (9, 8)]), results)
            assert sorted(offsets_of("pread_many", results)) == [9, 1 << 17]

    run(main())


@every_wrong_item
def test_a_wrong_item_is_told_when_those_before_it_are_done(run, item, said):
    async def main():
        async with talk(serve(good)) as (client, _):
            results = []
            with pytest.raises(UsageError, match=said):
                await collect(client.pread_many([(0, 8), (8, 8), item, (16, 8)]), results)
            assert offsets_of("pread_many", results) == [0, 8]

    run(main())


def test_an_exception_of_the_input_comes_through_when_those_before_it_are_done(run):
    def ranges():
        yield 0, 8
        raise KeyError("mine")

    async def main():
        async with talk(serve(good)) as (client, _):
            results = []
            with pytest.raises(KeyError, match="mine"):
                await collect(client.pread_many(ranges()), results)
            assert offsets_of("pread_many", results) == [0]

    run(main())


@every_call
def test_wrong_arguments_are_told_at_the_call(run, name):
    async def main():
        client = aio.AsyncClient()
        with pytest.raises(UsageError, match="newly created"):
            getattr(client, name)([])
        async with talk(drain) as (client, _):
            for options in WRONG_OPTIONS:
                with pytest.raises(UsageError, match=r"depth|timeout"):
                    getattr(client, name)([], **options)

    run(main())


@every_call
@every_wrong_input
def test_what_cannot_be_iterated_is_a_usage_error(run, name, wrong):
    async def main():
        async with talk(drain) as (client, _):
            with pytest.raises(UsageError, match=f"^{name}: pairs of offset and .* are needed"):
                await everything(getattr(client, name)(wrong))

    run(main())


@every_call
def test_an_asynchronous_input_is_a_usage_error(run, name):
    async def ranges():
        yield 0, 4096

    async def main():
        async with talk(drain) as (client, _):
            with pytest.raises(UsageError, match=f"^{name}: pairs of offset and .* are needed.*not async_generator"):
                await everything(getattr(client, name)(ranges()))

    run(main())


@every_call
def test_a_server_that_dies_in_the_middle_ends_it(run, name):
    async def main():
        async with talk(answer(good), answer(good)) as (client, _):
            results = []
            with pytest.raises(Disconnected):
                await collect(start(client, name, range(0, 1600, 16), depth=8), results)
            assert offsets_of(name, results) == [0, 16]

    run(main())


@every_call
def test_an_answer_that_came_before_the_server_died_counts_though_sending_fails_first(run, name):
    first_taken, dead = threading.Event(), threading.Event()

    async def main():
        async with talk(dying(first_taken, dead)) as (client, _):
            results = start(client, name, range(0, 1600, 16), depth=8)
            taken = [await anext(results)]
            first_taken.set()
            assert dead.wait(PATIENCE)  # nothing else runs meanwhile: the loop sends before it receives
            with pytest.raises(Disconnected):
                await collect(results, taken)
            assert offsets_of(name, taken) == [0, 16]

    run(main())


# ---------------------------------------------------------------------------------------------- leaving


@pytest.mark.parametrize("how", ["break", "exception", "aclose", "dropped", "cancelled", "deadline"])
def test_leaving_early_touches_no_buffer_and_keeps_the_connection(run, how):
    event = threading.Event()
    buffers = [bytearray(1 << 16) for _ in range(8)]

    async def leave(client) -> None:
        reads = client.pread_into_many(enumerate(buffers), timeout=SHORT if how == "deadline" else None)
        assert await anext(reads) == 0
        if how == "break":
            # What follows is a loop's `break`: the iterator goes with the frame.
            return
        if how == "aclose":
            await reads.aclose()
            assert await everything(reads) == []
        elif how == "dropped":
            del reads
        elif how == "exception":
            raise KeyError
        elif how == "cancelled":
            task = asyncio.create_task(anext(reads))
            await asyncio.sleep(SHORT)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            assert await everything(reads) == []
        else:
            with pytest.raises(DeadlineExceeded, match="read of 65536 bytes at offset 1"):
                await anext(reads)
            assert await everything(reads) == []

    async def main():
        async with talk(first_only(event), answer(DONE, kind=CommandType.FLUSH), size=1 << 20) as (client, _):
            try:
                await leave(client)
            except KeyError:
                assert how == "exception"
            assert not any(map(held, buffers[1:]))
            event.set()
            await client.flush(timeout=PATIENCE)
            assert buffers[0] == bytes(1 << 16)
            assert all(buffer == bytes(1 << 16) for buffer in buffers[1:])

    run(main())


def test_a_break_gives_up_at_once(run):
    event = threading.Event()

    async def main():
        async with talk(first_only(event), answer(DONE, kind=CommandType.FLUSH)) as (client, _):
            async for _ in client.pread_many((offset, 8) for offset in range(8)):
                break
            assert all(command.discard for command in client._engine.in_flight.values())
            event.set()
            await client.flush(timeout=PATIENCE)

    run(main())


def test_a_loop_that_is_dropped_in_another_thread_is_given_up_by_the_event_loop(run):
    event = threading.Event()

    async def main():
        async with talk(first_only(event), answer(DONE, kind=CommandType.FLUSH)) as (client, _):
            reads = [client.pread_many((offset, 8) for offset in range(8))]
            await anext(reads[0])
            thread = threading.Thread(target=reads.clear)
            thread.start()
            thread.join()
            await until(lambda: all(c.discard for c in client._engine.in_flight.values()), "it is given up")
            event.set()
            await client.flush(timeout=PATIENCE)

    run(main())


def test_a_loop_is_for_one_task_and_a_second_one_is_told_so(run):
    event = threading.Event()

    async def main():
        async with talk(first_only(event), drain) as (client, _):
            reads = client.pread_many((offset, 8) for offset in range(8))
            assert await anext(reads) == (0, expected(0, 8))
            first = asyncio.create_task(anext(reads))
            await asyncio.sleep(0)
            with pytest.raises(UsageError, match="for one task"):
                await anext(reads)
            event.set()
            assert await first == (1, expected(1, 8))
            assert [offset for offset, _ in await everything(reads)] == [*range(2, 8)]

    run(main())


def test_closing_a_loop_in_which_another_task_waits_ends_it_there(run):
    event = threading.Event()

    async def main():
        async with talk(first_only(event), answer(DONE, kind=CommandType.FLUSH)) as (client, _):
            reads = client.pread_many((offset, 8) for offset in range(8))
            assert await anext(reads) == (0, expected(0, 8))
            waiting = asyncio.create_task(everything(reads))
            await asyncio.sleep(0)
            await reads.aclose()
            async with asyncio.timeout(PATIENCE):
                assert await waiting == []
            event.set()
            await client.flush(timeout=PATIENCE)

    run(main())


def test_the_memory_of_what_was_yielded_is_free(run):
    async def main():
        async with talk(serve(good)) as (client, _):
            buffers = [bytearray(64) for _ in range(8)]
            reads = client.pread_into_many((16 * n, buffer) for n, buffer in enumerate(buffers))
            for _ in buffers:
                await anext(reads)
            assert not any(map(held, buffers))
            with pytest.raises(StopAsyncIteration):
                await anext(reads)
            with pytest.raises(StopAsyncIteration):
                await anext(reads)

    run(main())


@pytest.mark.parametrize("depth", [1, 2, 64])
@pytest.mark.parametrize("size", [64, 1500], ids=["whole", "in pieces"])
@pytest.mark.parametrize("call", ["pread_into_many", "pwrite_many"])
def test_no_buffer_is_held_once_its_offset_was_yielded(run, call, size, depth):
    async def main():
        async with talk(serve(good), block_size=(1, 512, 512), size=1 << 16) as (client, _):
            buffers = {4096 * number: bytearray(size) for number in range(8)}
            async for offset in getattr(client, call)(buffers.items(), depth=depth, timeout=PATIENCE):
                assert not held(buffers[offset])

    run(main())

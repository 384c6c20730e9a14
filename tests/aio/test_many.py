"""Many requests in one loop: in the order in which they finish, consumed lazily, bounded by depth, and left at any moment."""

from __future__ import annotations

import asyncio
import threading

import pytest

from nbdcore import CommandError, DeadlineExceeded, Disconnected, Phase, UsageError, aio
from nbdcore.protocol.constants import CommandType
from nbdcore.server import BlockSizes, ExportSettings, MemoryDisk, Server
from nbdcore.testing.choppy import ChoppyStream
from nbdcore.testing.scripted import Connection, Request, answer, data, drain, error, serve
from tests.aio.talking import DISK, DONE, PATIENCE, SHORT, everything, held, talk, until

SIZE = 1 << 20
SMALL_PIECES = BlockSizes(minimum=1, preferred=4096, maximum=1 << 14)

#: Name -> what to pass for a place on the disk.
CALLS = {
    "pread_many": lambda offset, count: (offset, count),
    "pread_into_many": lambda offset, count: (offset, bytearray(count)),
    "pwrite_many": lambda offset, count: (offset, bytes(count)),
    "zero_many": lambda offset, count: (offset, count),
    "trim_many": lambda offset, count: (offset, count),
}
every_call = pytest.mark.parametrize("name", CALLS)


def good(request: Request) -> bytes:
    """Answer a read with its offset over and over, and all else with success."""
    if request.kind == CommandType.READ:
        return data(bytes([request.offset % 251]) * request.count)(request)
    return DONE(request)


async def collect(iterator, results):
    """Keep what comes before an error, too."""
    async for result in iterator:
        results.append(result)


def start(client, name, offsets, count=16, **options):
    return getattr(client, name)((CALLS[name](offset, count) for offset in offsets), **options)


def offsets_of(name, results):
    return [result[0] for result in results] if name == "pread_many" else results


@every_call
@pytest.mark.parametrize("depth", [1, 2, 64])
def test_each_item_is_yielded_once(run, name, depth):
    async def main():
        async with talk(serve(good)) as (client, _):
            results = await everything(start(client, name, range(0, 4000, 16), depth=depth))
            assert sorted(offsets_of(name, results)) == [*range(0, 4000, 16)]
            if name == "pread_many":
                assert all(got == bytes([offset % 251]) * 16 for offset, got in results)

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
    def backwards(connection: Connection) -> None:
        requests = [connection.receive_request() for _ in range(10)]
        connection.send(b"".join(good(request) for request in reversed(requests)))

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
    most = []

    def many_at_a_time(connection: Connection) -> None:
        for _ in range(5):
            requests = [connection.receive_request() for _ in range(4)]
            most.append(len(requests))
            connection._sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection._sock.recv(1)
            connection.send(b"".join(good(request) for request in requests))

    async def main():
        async with talk(many_at_a_time, drain) as (client, _):
            async for _ in client.pread_many(((offset, 4) for offset in range(20)), depth=4):
                await asyncio.sleep(SHORT / 10)

    run(main())
    assert most == [4] * 5


# ---------------------------------------------------------------------------------------------- against a real server


@pytest.fixture
def served(socket_path):
    """The URI of a disk that must be asked for 16 KiB at most."""
    with Server(ExportSettings(MemoryDisk(SIZE), block_sizes=SMALL_PIECES)) as server:
        yield server.listen("unix", path=str(socket_path)).address.uri()


def test_what_is_written_is_read_though_each_item_comes_in_pieces(run, served):
    contents = bytes(range(256)) * (SIZE // 256)
    pieces = [(offset, min(50_000, SIZE - offset)) for offset in range(0, SIZE, 50_000)]

    async def main():
        async with aio.connect(served, timeout=PATIENCE) as disk:
            items = [(offset, contents[offset : offset + count]) for offset, count in pieces]
            assert sorted(await everything(disk.pwrite_many(items, fua=True))) == [offset for offset, _ in pieces]
            assert dict(await everything(disk.pread_many(pieces))) == dict(items)
            buffers = {offset: bytearray(count) for offset, count in pieces}
            assert sorted(await everything(disk.pread_into_many(buffers.items(), depth=3))) == [*buffers]
            assert buffers == dict(items)
            holes = pieces[::2]
            assert sorted(await everything(disk.zero_many(holes[:5], no_hole=True))) == [offset for offset, _ in holes[:5]]
            await everything(disk.trim_many(holes[5:], fua=True))
            for offset, got in await everything(disk.pread_many(pieces)):
                assert got == (bytes(len(got)) if (offset, len(got)) in holes else contents[offset : offset + len(got)])

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


def failing(*offsets: int):
    return lambda request: (error(28, "no room") if request.offset in offsets else good)(request)


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


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ((DISK, 1), "past the end"),
        ((0, 0), "no bytes"),
        ((0, "8"), "pread_many: count is an integer"),
        ((0,), "pread_many: each item is a pair"),
        (5, "pread_many: each item is a pair"),
    ],
)
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
            for options in ({"depth": 0}, {"depth": -1}, {"depth": "5"}, {"depth": True}, {"timeout": -1}, {"timeout": "1"}):
                with pytest.raises(UsageError, match=r"depth|timeout"):
                    getattr(client, name)([], **options)

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


# ---------------------------------------------------------------------------------------------- leaving


def first_only(event: threading.Event):
    """Answer the first of eight requests; the others when the event has happened."""

    def step(connection: Connection) -> None:
        requests = [connection.receive_request() for _ in range(8)]
        connection.send(good(requests[0]))
        assert event.wait(PATIENCE)
        connection.send(b"".join(good(request) for request in requests[1:]))

    return step


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

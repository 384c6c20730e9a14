"""Many requests in one loop: in the order in which they finish, consumed lazily, bounded by depth, and left at any moment."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import nbdcore
from nbdcore import Client, CommandError, DeadlineExceeded, Disconnected, Phase, TransmissionFlag, UsageError
from nbdcore.protocol.constants import CommandType
from nbdcore.protocol.transmission.commands import Command
from nbdcore.server import Server
from nbdcore.testing.choppy import ChoppyStream
from nbdcore.testing.scripted import ScriptedServer, answer, drain, half_close, serve, wait_for
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
from tests.clients.talking import DONE, PATIENCE, SHORT, expected, good, held, in_background, script, talk, together


@every_call
@pytest.mark.parametrize("depth", [1, 2, 64])
def test_each_item_is_yielded_once(name, depth):
    with talk(serve(good)) as (client, _):
        results = list(start(client, name, range(0, 4000, 16), depth=depth))
        assert sorted(offsets_of(name, results)) == [*range(0, 4000, 16)]
        if name == "pread_many":
            assert all(got == expected(offset, 16) for offset, got in results)


@every_call
def test_over_a_stream_that_is_as_awkward_as_allowed(name):
    with ScriptedServer(script(serve(good)), patience=PATIENCE) as server:
        client = Client(ChoppyStream(server.stream(), most=60), timeout=PATIENCE)
        results = list(start(client, name, range(0, 400, 16), depth=7))
        assert sorted(offsets_of(name, results)) == [*range(0, 400, 16)]
        client.close()


@pytest.mark.parametrize("items", [[], iter(()), ()])
@every_call
def test_nothing_to_do_is_done(name, items):
    with talk(drain) as (client, _):
        assert list(getattr(client, name)(items)) == []


class Offset:
    """An integer of somebody else's, as numpy's are."""

    def __index__(self) -> int:
        return 512


@every_call
@pytest.mark.parametrize("in_pieces", [False, True])
def test_an_offset_that_is_as_good_as_an_integer_is_yielded_as_one(name, in_pieces):
    count = (5 << 30 if name == "trim_many" else 50_000) if in_pieces else 16
    with talk(serve(good), size=1 << 40, block_size=(1, 4096, 1 << 14)) as (client, connection):
        (result,) = start(client, name, [Offset()], count)
        (offset,) = offsets_of(name, [result])
        assert (type(offset), offset) == (int, 512)
        assert (len(connection.requests) > 1) == in_pieces


def test_results_come_in_the_order_in_which_they_finish():
    with talk(backwards, drain) as (client, _):
        results = list(client.pread_many([(offset, 4) for offset in range(10)]))
        assert [offset for offset, _ in results] == [*reversed(range(10))]


@every_call
def test_the_input_is_consumed_no_further_than_depth_ahead(name):
    consumed = []

    def offsets():
        for offset in range(100):
            consumed.append(offset)
            yield offset

    with talk(serve(good)) as (client, _):
        done = 0
        for _ in start(client, name, offsets(), depth=5):
            done += 1
            assert len(consumed) < done + 5
        assert done == 100


def test_an_endless_input_is_fine():
    def ranges():
        while True:
            yield 0, 8

    with talk(serve(good)) as (client, _):
        reads = client.pread_many(ranges())
        assert [next(reads) for _ in range(1000)] == [(0, bytes(8))] * 1000
        reads.close()
        client.flush(timeout=PATIENCE)


def test_no_more_than_depth_are_under_way():
    counts: list[int] = []
    with talk(in_fours(counts), drain) as (client, _):
        assert len(list(client.pread_many(((offset, 4) for offset in range(20)), depth=4))) == 20
    assert counts == [4] * 5


# ---------------------------------------------------------------------------------------------- against a real server


@pytest.fixture
def disk() -> Iterator[Client]:
    """A disk that must be asked for 16 KiB at most."""
    with Server(in_small_pieces()) as server:
        address = server.listen("tcp", host="127.0.0.1", port=0).address
        with nbdcore.connect(address.uri(), timeout=PATIENCE) as client:
            yield client


def test_what_is_written_is_read_though_each_item_comes_in_pieces(disk):
    items = [(offset, CONTENTS[offset : offset + count]) for offset, count in RANGES]
    assert sorted(disk.pwrite_many(items, fua=True)) == [offset for offset, _ in RANGES]
    assert dict(disk.pread_many(RANGES)) == dict(items)
    buffers = {offset: bytearray(count) for offset, count in RANGES}
    assert sorted(disk.pread_into_many(buffers.items(), depth=3)) == [*buffers]
    assert buffers == dict(items)
    holes = RANGES[::2]
    assert sorted(disk.zero_many(holes[:5], no_hole=True)) == [offset for offset, _ in holes[:5]]
    assert len(list(disk.trim_many(holes[5:], fua=True))) == len(holes[5:])
    for offset, got in disk.pread_many(RANGES):
        assert got == (bytes(len(got)) if (offset, len(got)) in holes else CONTENTS[offset : offset + len(got)])


def test_several_loops_in_one_thread_share_the_connection(disk):
    disk.pwrite(bytes(range(256)) * 256, 0)
    walks = {step: disk.pread_many([(offset, step) for offset in range(0, 1 << 15, step)]) for step in (64, 100, 128)}
    left = dict(walks)
    while left:
        for step, walk in list(left.items()):
            try:
                offset, got = next(walk)
            except StopIteration:
                del left[step]
                continue
            assert got == bytes((offset + n) % 256 for n in range(step))
            assert disk.pread(4, 0) == bytes(range(4))


def test_loops_and_single_calls_of_several_threads_share_the_connection(disk):
    disk.pwrite(bytes(range(256)) * 256, 0)
    outcomes: list[Any] = []

    def walk(step: int) -> None:
        good = all(
            got == bytes((offset + n) % 256 for n in range(step))
            for _ in range(5)
            for offset, got in disk.pread_many(((offset, step) for offset in range(0, 1 << 15, step)), depth=8, timeout=PATIENCE)
        )
        outcomes.append(good)

    def single(count: int) -> None:
        outcomes.append(all(disk.pread(count, 256 * n, timeout=PATIENCE) == bytes(range(count)) for n in range(200)))

    threads = [threading.Thread(target=walk, args=(step,)) for step in (256, 100, 512)]
    threads += [threading.Thread(target=single, args=(count,)) for count in (1, 100, 256)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * PATIENCE)
        assert not thread.is_alive()
    assert outcomes == [True] * 6


# ---------------------------------------------------------------------------------------------- errors


def collect(iterator: Iterator[Any], results: list[Any]) -> None:
    """Keep what comes before an error, too."""
    for result in iterator:
        results.append(result)  # noqa: PERF402 (extend would lose them)


@every_call
def test_after_an_error_the_rest_is_yielded_and_no_more_is_begun(name):
    with talk(serve(failing(32, 48))) as (client, connection):
        results: list[Any] = []
        with pytest.raises(CommandError, match="at offset 32 failed"):
            collect(start(client, name, range(0, 1600, 16), depth=8), results)
        assert {0, 16, 64, 80, 96, 112} <= set(offsets_of(name, results))
        assert {32, 48}.isdisjoint(offsets_of(name, results))
        assert len(connection.requests) < 32
        assert client.phase is Phase.CONNECTED
        client.flush()


def test_an_error_in_one_piece_fails_its_item():
    with talk(serve(failing(1 << 16)), block_size=(1, 4096, 1 << 16)) as (client, _):
        results: list[Any] = []
        with pytest.raises(CommandError, match=f"at offset {1 << 16} failed"):
            collect(client.pread_many([(1 << 17, 8), (0, 1 << 17), (9, 8)]), results)
        assert sorted(offsets_of("pread_many", results)) == [9, 1 << 17]


@every_wrong_item
def test_a_wrong_item_is_told_when_those_before_it_are_done(item, said):
    with talk(serve(good)) as (client, _):
        results: list[Any] = []
        with pytest.raises(UsageError, match=said):
            collect(client.pread_many([(0, 8), (8, 8), item, (16, 8)]), results)
        assert offsets_of("pread_many", results) == [0, 8]
        client.flush()


def test_an_exception_of_the_input_comes_through_when_those_before_it_are_done():
    def ranges():
        yield 0, 8
        raise KeyError("mine")

    with talk(serve(good)) as (client, _):
        results: list[Any] = []
        with pytest.raises(KeyError, match="mine"):
            collect(client.pread_many(ranges()), results)
        assert offsets_of("pread_many", results) == [0]


@every_call
def test_wrong_arguments_are_told_at_the_call(name):
    client = Client()
    with pytest.raises(UsageError, match="newly created"):
        getattr(client, name)([])
    with talk(drain) as (client, _):
        for options in WRONG_OPTIONS:
            with pytest.raises(UsageError, match=r"depth|timeout"):
                getattr(client, name)([], **options)


@every_call
@every_wrong_input
def test_what_cannot_be_iterated_is_a_usage_error(name, wrong):
    with talk(drain) as (client, _), pytest.raises(UsageError, match=f"^{name}: pairs of offset and .* are needed"):
        list(getattr(client, name)(wrong))


@every_call
def test_a_server_that_dies_in_the_middle_ends_it(name):
    with talk(answer(good), answer(good)) as (client, _):
        results: list[Any] = []
        with pytest.raises(Disconnected):
            collect(start(client, name, range(0, 1600, 16), depth=8), results)
        assert offsets_of(name, results) == [0, 16]
        assert client.phase in (Phase.CLOSED, Phase.DEAD)


@every_call
def test_an_answer_that_came_before_the_server_died_counts_though_sending_fails_first(name):
    first_taken, dead = threading.Event(), threading.Event()
    with talk(dying(first_taken, dead)) as (client, _):
        results = start(client, name, range(0, 1600, 16), depth=8)
        taken = [next(results)]
        first_taken.set()
        assert dead.wait(PATIENCE)
        with pytest.raises(Disconnected):
            collect(results, taken)
        assert offsets_of(name, taken) == [0, 16]


@pytest.mark.parametrize("connections", [1, 2])
def test_what_another_caller_received_before_the_server_hung_up_is_still_yielded(connections):
    """Somebody else takes in the loop's answer, and the end behind it, while the loop is busy with its input."""
    go_on = threading.Event()

    def two_and_the_end(connection):
        requests = {request.offset: request for request in (connection.receive_request() for _ in range(3 - connections))}
        if 0 in requests:
            connection.send(good(requests[0]))
        if 16 in requests:
            wait_for(go_on)(connection)
            connection.send(good(requests[16]))
        half_close(connection)
        drain(connection)

    def items(disk):
        yield (0, 16)
        yield (16, 16)
        go_on.set()
        for _ in range(connections):
            assert isinstance(together(1, lambda _: disk.pread(1, 64))[0], Disconnected)
        yield (32, 16)

    offer = {"flags": TransmissionFlag.HAS_FLAGS | TransmissionFlag.CAN_MULTI_CONN}
    offsets = []
    with ScriptedServer(*[script(two_and_the_end, **offer)] * connections, patience=PATIENCE) as server:
        uri = f"nbd://127.0.0.1:{server.listen_tcp()}"
        with nbdcore.create_pool(uri, connections=connections, timeout=PATIENCE) as disk, pytest.raises(Disconnected):
            offsets.extend(offset for offset, _ in disk.pread_many(items(disk), depth=2, timeout=PATIENCE))
    assert sorted(offsets) == [0, 16]


@every_call
def test_a_client_that_another_thread_closes_ends_it(name):
    with talk(drain) as (client, _):
        with in_background(lambda: list(start(client, name, range(0, 160, 16)))) as outcome:
            while not client._engine.in_flight:
                pass
            client.close()
        assert isinstance(outcome[0], Disconnected)


# ---------------------------------------------------------------------------------------------- leaving


@pytest.mark.parametrize("how", ["break", "exception", "close", "dropped", "deadline"])
def test_leaving_early_touches_no_buffer_and_keeps_the_connection(how):
    event = threading.Event()
    buffers = [bytearray(1 << 16) for _ in range(8)]

    def leave(client: Client) -> None:
        reads = client.pread_into_many(enumerate(buffers), timeout=SHORT if how == "deadline" else None)
        if how == "break":
            for offset in reads:
                assert offset == 0
                break
            return  # the iterator goes with the frame
        assert next(reads) == 0
        if how == "close":
            reads.close()
            assert list(reads) == []
        elif how == "dropped":
            del reads
        elif how == "exception":
            raise KeyError
        else:
            with pytest.raises(DeadlineExceeded, match="read of 65536 bytes at offset 1"):
                next(reads)
            assert list(reads) == []

    with talk(first_only(event), answer(DONE, kind=CommandType.FLUSH), size=1 << 20) as (client, _):
        if how == "exception":
            with pytest.raises(KeyError):
                leave(client)
        else:
            leave(client)
        assert not any(map(held, buffers[1:]))
        event.set()
        client.flush(timeout=PATIENCE)
        assert buffers[0] == bytes(1 << 16)
        assert all(buffer == bytes(1 << 16) for buffer in buffers[1:])


def test_the_memory_of_what_was_yielded_is_free():
    with talk(serve(good)) as (client, _):
        buffers = [bytearray(64) for _ in range(8)]
        reads = client.pread_into_many((16 * n, buffer) for n, buffer in enumerate(buffers))
        for _ in buffers:
            next(reads)
        assert not any(map(held, buffers))
        assert list(reads) == []


def test_data_are_free_once_their_offset_was_yielded():
    with talk(serve(good)) as (client, _):
        blocks = [bytearray(1 << 16) for _ in range(8)]
        for number in client.pwrite_many(((number, block) for number, block in enumerate(blocks)), depth=4):
            assert not held(blocks[number])


def test_what_was_read_is_the_callers_alone():
    with talk(serve(good)) as (client, _):
        for _, data in client.pread_many([(number, 1 << 10) for number in range(50)], depth=4):
            assert [one for one in gc.get_referrers(data) if isinstance(one, Command)] == []


@pytest.mark.parametrize("name", ["pread_into_many", "pwrite_many"])
def test_the_memory_of_the_last_item_is_free_though_the_input_has_not_ended(name):
    with talk(serve(good)) as (client, _):
        buffers = [bytearray(64) for _ in range(4)]
        loop = getattr(client, name)(enumerate(buffers), depth=4)
        assert {next(loop) for _ in buffers} == {0, 1, 2, 3}
        assert not any(map(held, buffers))


@pytest.mark.parametrize("depth", [1, 2, 64])
@pytest.mark.parametrize("size", [64, 1500], ids=["whole", "in pieces"])
@pytest.mark.parametrize("call", ["pread_into_many", "pwrite_many"])
def test_no_buffer_is_held_once_its_offset_was_yielded(call, size, depth):
    with talk(serve(good), block_size=(1, 512, 512), size=1 << 16) as (client, _):
        buffers = {4096 * number: bytearray(size) for number in range(8)}
        for offset in getattr(client, call)(buffers.items(), depth=depth, timeout=PATIENCE):
            assert not held(buffers[offset])

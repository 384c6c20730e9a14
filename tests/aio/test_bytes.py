"""Every byte of every fast path: whatever form the answers have, however they are cut, and however many are asked at once."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest

from nbdcore.aio import AsyncClient
from nbdcore.protocol.constants import CommandType
from nbdcore.streams.base import Stream
from nbdcore.testing.choppy import ChoppyStream
from nbdcore.testing.scripted import Connection, Reply, Request, data, hole, serve, simple
from tests.aio.talking import DONE, PATIENCE, talk

SIZE = 1 << 20
#: The largest request that the server takes: larger ones come in pieces.
MAXIMUM = 1 << 17
SECTOR = 512
#: What is on the disk: no two places alike, and every third sector a hole.
CONTENTS = bytearray(random.Random(4).randbytes(SIZE))
for hole_at in range(0, SIZE, 3 * SECTOR):
    CONTENTS[hole_at : hole_at + SECTOR] = bytes(min(SECTOR, SIZE - hole_at))


def contents(request: Request) -> bytes:
    return bytes(CONTENTS[request.offset : request.offset + request.count])


def in_chunks(request: Request) -> bytes:
    """Answer in chunks of a sector at most, holes as such, in no order; nothing but the end comes in the last one."""
    parts: list[bytes] = []
    at, end = request.offset, request.offset + request.count
    while at < end:
        after = min(end, at - at % SECTOR + SECTOR)
        piece = CONTENTS[at:after]
        parts.append((data(bytes(piece), at, done=False) if any(piece) else hole(after - at, at, done=False))(request))
        at = after
    random.Random(request.cookie).shuffle(parts)
    return b"".join(parts) + DONE(request)


#: Name -> how a read is answered, and whether structured replies and extended headers are agreed on.
FORMS: dict[str, tuple[Reply, dict[str, Any]]] = {
    "simple": (lambda request: simple(contents(request))(request), {"structured": False}),
    "structured": (lambda request: data(contents(request))(request), {}),
    "structured, in chunks": (in_chunks, {}),
    "extended": (lambda request: data(contents(request))(request), {"extended": True}),
    "extended, in chunks": (in_chunks, {"extended": True}),
}
every_form = pytest.mark.parametrize("form", FORMS)


def out_of_order(reply: Reply) -> Callable[[Connection], None]:
    """Answer reads four at a time, the last one first, as long as the client has so many under way; then one at a time."""

    def step(connection: Connection) -> None:
        for _ in range(8):
            requests = [connection.receive_request() for _ in range(4)]
            connection.send(b"".join(reply(request) for request in reversed(requests)))
        serve(reply)(connection)

    return step


def ranges(count: int, seed: int) -> list[tuple[int, int]]:
    """Return (offset, count) pairs: mostly a few sectors, some large enough to be received in place, some to be split."""
    rng = random.Random(seed)
    sizes = [rng.choice([1, 7, 512, 4096, 4096, 4096, 5000, 1 << 15, 70_000, 2 * MAXIMUM + 77]) for _ in range(count)]
    return [(rng.randrange(SIZE - size), size) for size in sizes]


async def by_tasks(client: AsyncClient, wanted: list[tuple[int, int]]) -> list[tuple[int, bytes]]:
    left = iter(wanted)

    async def reader() -> list[tuple[int, bytes]]:
        return [(offset, await client.pread(count, offset, timeout=PATIENCE)) for offset, count in left]

    return [read for each in await asyncio.gather(*(reader() for _ in range(64))) for read in each]


async def by_tasks_into(client: AsyncClient, wanted: list[tuple[int, int]]) -> list[tuple[int, bytes]]:
    left = iter(wanted)

    async def reader() -> list[tuple[int, bytes]]:
        found = []
        for offset, count in left:
            buffer = bytearray(b"\xaa" * (count + 16))
            assert await client.pread_into(memoryview(buffer)[8:-8], offset) == count
            assert buffer[:8] == buffer[-8:] == b"\xaa" * 8
            found.append((offset, bytes(buffer[8:-8])))
        return found

    return [read for each in await asyncio.gather(*(reader() for _ in range(64))) for read in each]


async def by_a_loop(client: AsyncClient, wanted: list[tuple[int, int]]) -> list[tuple[int, bytes]]:
    return [read async for read in client.pread_many(wanted, timeout=PATIENCE)]


async def by_a_loop_into(client: AsyncClient, wanted: list[tuple[int, int]]) -> list[tuple[int, bytes]]:
    buffers = [(offset, bytearray(b"\xaa" * count)) for offset, count in wanted]
    done = [offset async for offset in client.pread_into_many(buffers, depth=20)]
    assert sorted(done) == sorted(offset for offset, _ in wanted)
    return [(offset, bytes(buffer)) for offset, buffer in buffers]


WAYS = {"tasks": by_tasks, "tasks, into": by_tasks_into, "a loop": by_a_loop, "a loop, into": by_a_loop_into}


def check(found: list[tuple[int, bytes]], wanted: list[tuple[int, int]]) -> None:
    assert sorted((offset, len(got)) for offset, got in found) == sorted(wanted)
    for offset, got in found:
        assert got == CONTENTS[offset : offset + len(got)], f"{len(got)} bytes at {offset}"


@every_form
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", ["in order", "out of order"])
def test_every_byte_of_many_reads_is_the_disk_s(run, way, form, order):
    reply, offer = FORMS[form]
    wanted = ranges(150, seed=1)

    async def main():
        play = serve(reply) if order == "in order" else out_of_order(reply)
        async with talk(play, size=SIZE, block_size=(1, 4096, MAXIMUM), **offer) as (client, _):
            check(await WAYS[way](client, wanted), wanted)

    run(main())


@every_form
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("most", [50, 3000])
def test_every_byte_arrives_over_a_stream_that_is_as_awkward_as_allowed(run, way, form, most):
    reply, offer = FORMS[form]
    wanted = [(offset, min(count, 60 * most)) for offset, count in ranges(20, seed=2)]

    def awkward(stream: Stream) -> Stream:
        return ChoppyStream(stream, most=most)

    async def main():
        async with talk(serve(reply), over=awkward, size=SIZE, block_size=(1, 4096, MAXIMUM), **offer) as (client, _):
            check(await WAYS[way](client, wanted), wanted)

    run(main())


def writing(disk: bytearray) -> Reply:
    """Keep what is written, and answer with success."""

    def reply(request: Request) -> bytes:
        if request.kind == CommandType.WRITE:
            disk[request.offset : request.offset + len(request.payload)] = request.payload
        return DONE(request)

    return reply


@pytest.mark.parametrize("most", [0, 3000])
@pytest.mark.parametrize("way", ["tasks", "a loop"])
def test_every_byte_of_many_writes_reaches_the_disk(run, way, most):
    disk = bytearray(SIZE)
    rng = random.Random(3)
    cuts = sorted({0, SIZE, *(rng.randrange(SIZE) for _ in range(60 if most else 400))})
    cuts = [cut for cut in cuts if cut <= (SIZE // 4 if most else SIZE)]
    items = [(begin, bytes(CONTENTS[begin:end])) for begin, end in itertools.pairwise(cuts)]
    rng.shuffle(items)

    def over(stream: Stream) -> Stream:
        return ChoppyStream(stream, most=most) if most else stream

    async def main():
        async with talk(serve(writing(disk)), over=over, size=SIZE, block_size=(1, 4096, MAXIMUM)) as (client, _):
            if way == "tasks":
                await asyncio.gather(*(client.pwrite(payload, offset) for offset, payload in items))
            else:
                done = [offset async for offset in client.pwrite_many(items)]
                assert sorted(done) == sorted(offset for offset, _ in items)

    run(main())
    assert disk[: cuts[-1]] == CONTENTS[: cuts[-1]]
    assert not any(disk[cuts[-1] :])

"""Extents with asyncio: walked with `async for`, or awaited as columns; the same as the blocking client's."""

from __future__ import annotations

import asyncio
import sys
import threading
from array import array

import numpy as np
import pytest

from nbdcore import (
    CombinedExtent,
    CombinedExtentColumns,
    CommandError,
    DeadlineExceeded,
    Extent,
    ExtentColumns,
    Phase,
    UsageError,
)
from nbdcore.protocol.constants import Chunk
from nbdcore.testing.scripted import answer, chunk, drain, goodbye, serve
from tests.aio.talking import PATIENCE, SHORT, everything, late, talk, until
from tests.clients.test_extents import BITMAP, KIB, SIZE, TWO, WHOLE, kib, not_done, of_map, replies

MERGED = [(0, 8, 0), (8, 24, 3), (32, 16, 0), (48, 16, 2)]


@pytest.fixture(params=[np.ndarray, array], ids=["numpy", "no numpy"])
def column(request, monkeypatch) -> type:
    """The type of a column, with numpy and as if it were not installed."""
    if request.param is array:
        monkeypatch.setitem(sys.modules, "numpy", None)
    return request.param


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("at_most", [1, 2, 100])
def test_a_walk_is_the_same_however_the_server_cuts_it(at_most, extended, column):
    async def main() -> None:
        async with talk(serve(of_map(WHOLE, at_most=at_most)), size=SIZE, extended=extended) as (client, _):
            merged = await everything(client.extents(timeout=PATIENCE))
            assert merged == [Extent(offset * KIB, length * KIB, flags) for offset, length, flags in MERGED]
            found = await client.extent_columns(timeout=PATIENCE)
            assert isinstance(found, ExtentColumns)
            assert {type(each) for each in (found.offsets, found.lengths, found.flags)} == {column}
            assert [Extent(*map(int, row)) for row in zip(found.offsets, found.lengths, found.flags, strict=True)] == merged
            part = await client.extent_columns(offset=10 * KIB, count=30 * KIB, timeout=PATIENCE)
            assert list(part.lengths) == [22 * KIB, 8 * KIB]

    asyncio.run(main())


def test_several_contexts_go_in_lock_step(column):
    other = kib((4, 1), (20, 0), (40, 1))
    both = replies(lambda request: not_done(of_map(WHOLE), request), of_map(other, context=7))

    async def main() -> None:
        async with talk(serve(both), size=SIZE, **TWO) as (client, _):
            merged = await everything(client.extents("base:allocation", BITMAP, timeout=PATIENCE))
            found = await client.extent_columns("base:allocation", BITMAP, timeout=PATIENCE)
            assert isinstance(found, CombinedExtentColumns)
            assert {type(each) for each in found.flags} == {column}
            rows = zip(found.offsets, found.lengths, zip(*found.flags, strict=True), strict=True)
            assert [CombinedExtent(int(offset), int(length), tuple(map(int, flags))) for offset, length, flags in rows] == merged
            assert len(merged) == 6

    asyncio.run(main())


def test_a_server_that_describes_nothing_is_an_error_and_no_endless_loop(column):
    async def main() -> None:
        async with talk(answer(chunk(Chunk.NONE)), size=SIZE) as (client, _):
            with pytest.raises(CommandError) as caught:
                await client.extent_columns(timeout=PATIENCE)
            assert caught.value.errno == 71
            assert client.phase is Phase.CONNECTED

    asyncio.run(main())


def test_the_timeout_is_for_each_request_of_columns():
    async def main() -> None:
        async with talk(answer(of_map(WHOLE, at_most=2)), drain, size=SIZE) as (client, _):
            with pytest.raises(DeadlineExceeded):
                await client.extent_columns(timeout=SHORT)

    asyncio.run(main())


def test_columns_that_are_given_up_leave_the_client_usable():
    asked, given_up = threading.Event(), threading.Event()

    async def main() -> None:
        late_one = late(given_up, of_map(WHOLE))

        def second(connection) -> None:
            asked.set()
            late_one(connection)

        async with talk(answer(of_map(WHOLE, at_most=2)), second, answer(of_map(WHOLE)), size=SIZE) as (client, _):
            task = asyncio.create_task(client.extent_columns())
            await until(asked.is_set, "the walk goes on")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            given_up.set()
            assert len(await client.extent_columns(timeout=PATIENCE)) == 4

    asyncio.run(main())


def test_a_wrong_range_is_a_usage_error_and_nothing_is_sent():
    async def main() -> None:
        async with talk(goodbye, size=SIZE) as (client, _):
            with pytest.raises(UsageError, match="no part of the export"):
                await client.extent_columns(offset=1, count=SIZE)
            await client.disconnect(timeout=PATIENCE)

    asyncio.run(main())

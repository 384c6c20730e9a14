"""A read takes as much memory as its data, in one request or in pieces, whatever the front end."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest

from nbdcore.protocol.transmission.memory import IS_COPIED
from nbdcore.server import BlockSizes, ExportSettings, Server
from tests.clients.talking import PATIENCE
from tests.clients.test_parity import connected, every_front_end

SIZE = 64 << 20


class Pattern:
    """A disk whose contents are made when they are read."""

    size = SIZE

    def pread(self, count, offset):
        return bytes([offset >> 20]) * count


@pytest.fixture
def uri():
    settings = ExportSettings(Pattern(), block_sizes=BlockSizes(minimum=1, preferred=4096, maximum=1 << 20))
    with Server(settings) as server:
        yield server.listen("tcp", host="127.0.0.1", port=0).address.uri()


async def read_in_loop(uri, front_end, name):
    """Return what was read, and the peak: what asyncio does with a result is another matter."""
    async with await connected(front_end, uri) as client:
        tracemalloc.start()
        data = await client.pread(SIZE, 0) if name == "pread" else (await anext(client.pread_many([(0, SIZE)])))[1]
        return [data, tracemalloc.get_traced_memory()[1]]


def read(uri, front_end, name):
    if front_end.startswith("Async"):
        return asyncio.run(asyncio.wait_for(read_in_loop(uri, front_end, name), PATIENCE))
    with connected(front_end, uri) as client:
        tracemalloc.start()
        data = client.pread(SIZE, 0) if name == "pread" else next(client.pread_many([(0, SIZE)]))[1]
        return data, tracemalloc.get_traced_memory()[1]


@every_front_end
@pytest.mark.parametrize("name", ["pread", "pread_many"])
def test_read_in_pieces_takes_no_more_memory_than_its_data(uri, front_end, name):
    try:
        data, peak = read(uri, front_end, name)
    finally:
        tracemalloc.stop()
    assert len(data) == SIZE
    assert all(data[at] == data[at + (1 << 20) - 1] == at >> 20 for at in range(0, SIZE, 1 << 20))
    assert peak < (2.5 if IS_COPIED else 1.5) * SIZE  # a few pieces of the server's are in it

from __future__ import annotations

import errno
import time
import tracemalloc

import pytest

from nbdcore.errors import UsageError
from nbdcore.protocol.constants import Chunk, CommandFlag, CommandType, ErrorNumber
from nbdcore.server import MemoryDisk, Server
from nbdcore.server.budget import PIECE, MemoryBudget, PayloadBuffer
from nbdcore.server.channel import QUEUE, SCRATCH
from tests.server.raw import PATIENCE

MEBIBYTE = 1 << 20
SIZE = 32 * MEBIBYTE


class Patterned:
    """A disk of pseudo-random bytes, which remembers how it was asked, and swallows what is written."""

    size = SIZE

    def __init__(self, *, fails_at=None):
        self.data = bytes(range(251)) * (SIZE // 251 + 1)
        self.reads = []
        self.writes = []
        self.fails_at = fails_at

    def _fail(self, count, offset):
        if self.fails_at is not None and offset <= self.fails_at < offset + count:
            raise OSError(errno.EIO, "a bad block")

    def pread(self, count, offset):
        self._fail(count, offset)
        self.reads.append(count)
        return self.data[offset : offset + count]

    def pwrite(self, data, offset):
        self._fail(len(data), offset)
        self.writes.append((len(data), offset, bytes(data[:16])))


def until(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


# ---------------------------------------------------------------------------------------------- the budget


def test_a_budget_gives_what_it_has_and_no_more():
    budget = MemoryBudget(100)
    assert budget.take(60)
    assert budget.scarce
    assert not budget.take(41)
    with budget.share(41, free=10) as count:
        assert count == 10
    with budget.share(40, free=10) as count:
        assert (count, budget.taken) == (40, 100)
    budget.give_back(60)
    assert (budget.taken, budget.scarce) == (0, False)


def test_a_small_buffer_is_kept_while_memory_is_plentiful_and_a_large_one_never():
    budget = MemoryBudget(4 * PIECE)
    buffer = PayloadBuffer(budget)
    assert len(buffer.take(PIECE)) == PIECE
    buffer.done()
    assert budget.taken == PIECE
    assert len(buffer.take(2 * PIECE)) == budget.taken == 2 * PIECE
    buffer.done()
    assert budget.taken == 0
    assert len(buffer.take(PIECE)) == PIECE
    assert budget.take(2 * PIECE)
    buffer.done()
    assert budget.taken == 2 * PIECE
    assert buffer.take(3 * PIECE) is None
    assert budget.taken == 2 * PIECE


def test_a_budget_that_cannot_be_is_refused():
    with pytest.raises(UsageError, match="memory_budget is -1"):
        Server(MemoryDisk(1), memory_budget=-1)


# ---------------------------------------------------------------------------------------------- writes


@pytest.mark.parametrize(
    ("budget", "pieces"), [(64 * MEBIBYTE, [SIZE]), (2 * MEBIBYTE, [PIECE] * 30 + [2 * PIECE]), (0, [SCRATCH] * 512)]
)
def test_a_write_that_does_not_fit_is_carried_out_in_pieces(ready_any, budget, pieces):
    disk = Patterned()
    client = ready_any(disk, memory_budget=budget)
    assert client.write(0, disk.data[:SIZE]).error == 0
    assert [count for count, _, _ in disk.writes] == pieces
    assert all(begin == disk.data[offset : offset + 16] for _, offset, begin in disk.writes)
    assert client.write(5, b"more").error == 0


def test_a_write_that_fails_in_a_piece_costs_itself_only(ready_any):
    disk = Patterned(fails_at=5 * MEBIBYTE)
    client = ready_any(disk, memory_budget=0)
    assert client.write(MEBIBYTE, bytes(8 * MEBIBYTE)).error == ErrorNumber.EIO
    assert client.write(0, bytes(MEBIBYTE)).error == 0


def test_clients_that_announce_large_writes_take_no_memory_before_they_send_them(serve, client_of):
    server = serve(Patterned())
    clients = [client_of(server) for _ in range(8)]
    for client in clients:
        client.greet()
        client.go()
        client.send(client.pack(CommandType.WRITE, 0, SIZE, payload=b"a little"))
    honest = client_of(server)
    honest.greet()
    honest.go()
    assert honest.write(0, bytes(MEBIBYTE)).error == 0
    until(lambda: server._budget.taken <= PIECE)


def test_many_large_writes_at_once_keep_to_the_budget(serve, client_of):
    """A dozen clients are in the middle of 32 MiB each, and nobody waits for them."""
    disk = Patterned()
    server = serve(disk, memory_budget=64 * MEBIBYTE)
    clients = [client_of(server) for _ in range(12)]
    tracemalloc.start()
    try:
        for client in clients:
            client.greet()
            client.go()
            client.send(client.pack(CommandType.WRITE, 0, SIZE, payload=bytes(2 * MEBIBYTE)))
        honest = client_of(server)
        honest.greet()
        honest.go()
        assert honest.write(0, bytes(4 * MEBIBYTE)).error == 0
        assert tracemalloc.get_traced_memory()[1] < 80 * MEBIBYTE
    finally:
        tracemalloc.stop()
    for client in clients:
        client.close()
    until(lambda: server._budget.taken <= PIECE)


# ---------------------------------------------------------------------------------------------- reads


@pytest.mark.parametrize("budget", [64 * MEBIBYTE, 2 * MEBIBYTE, 0])
@pytest.mark.parametrize("length", [SIZE - 5, QUEUE + 1])
def test_a_read_that_does_not_fit_is_carried_out_in_pieces(ready_any, budget, length):
    disk = Patterned()
    client = ready_any(disk, memory_budget=budget)
    assert client.read(5, length).contents() == disk.data[5 : 5 + length]
    assert max(disk.reads) <= max(budget, QUEUE)
    assert client.read(0, 10).contents() == disk.data[:10]


@pytest.mark.parametrize("extended", [False, True])
def test_df_gets_one_chunk_though_its_data_are_read_in_pieces(ready, extended):
    disk = Patterned()
    reply = ready(disk, extended=extended, memory_budget=0).read(0, SIZE, CommandFlag.DF)
    assert reply.chunks == [Chunk.OFFSET_DATA, Chunk.NONE]
    assert reply.contents() == disk.data[:SIZE]


def test_an_error_within_the_one_chunk_of_df_completes_it_with_zeroes_and_says_where(ready):
    disk = Patterned(fails_at=MEBIBYTE)
    client = ready(disk, memory_budget=0)
    reply = client.read(0, 2 * MEBIBYTE, CommandFlag.DF)
    assert reply.chunks == [Chunk.OFFSET_DATA, Chunk.ERROR_OFFSET]
    assert (reply.error, reply.at) == (ErrorNumber.EIO, MEBIBYTE)
    assert reply.contents() == disk.data[:MEBIBYTE] + bytes(MEBIBYTE)
    assert client.read(0, 10).error == 0


def test_an_error_within_a_simple_reply_ends_the_connection_since_nothing_else_can_tell(ready):
    client = ready(Patterned(fails_at=MEBIBYTE), structured=False, memory_budget=0)
    client.send(client.pack(CommandType.READ, 0, 2 * MEBIBYTE))
    assert len(client.exactly(16 + MEBIBYTE)) == 16 + MEBIBYTE
    assert client.hung_up()


def test_an_error_at_the_start_of_a_simple_reply_is_an_error_reply(ready):
    client = ready(Patterned(fails_at=0), structured=False, memory_budget=0)
    assert client.read(0, 2 * MEBIBYTE).error == ErrorNumber.EIO
    assert client.read(MEBIBYTE, 10).error == 0


def test_clients_that_do_not_take_what_they_read_keep_to_the_budget(serve, client_of):
    disk = Patterned()
    server = serve(disk, memory_budget=64 * MEBIBYTE)
    clients = [client_of(server) for _ in range(12)]
    tracemalloc.start()
    try:
        for client in clients:
            client.greet()
            client.go()
            client.send(client.pack(CommandType.READ, 0, SIZE))
        assert len(clients[0].reply(SIZE).contents()) == SIZE
        assert tracemalloc.get_traced_memory()[1] < 180 * MEBIBYTE  # of which 64 and some are what this client has read
    finally:
        tracemalloc.stop()

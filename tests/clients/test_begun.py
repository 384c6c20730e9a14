"""A read that has begun is asked for at once and waited for later, whoever uses the connection meanwhile."""

from __future__ import annotations

import errno
import random
import threading

import pytest

import nbdcore
from nbdcore import CommandError, Pool
from nbdcore.clients.blocking.begun import begin_read
from nbdcore.errors import Disconnected, UsageError
from nbdcore.server import MemoryDisk, Server
from tests.clients.talking import PATIENCE

MEBIBYTE = 1 << 20
SIZE = 4 * MEBIBYTE
CONTENTS = random.Random(1).randbytes(SIZE)
BAD = 3 * MEBIBYTE
GIVEN_UP = UsageError(errno.ECANCELED, "not wanted any more")


class Noting(MemoryDisk):
    """Notes where it is read, and fails at one place."""

    def __init__(self):
        super().__init__(SIZE)
        super().pwrite(CONTENTS, 0)
        self.asked = threading.Event()

    def pread(self, count, offset):
        self.asked.set()
        if offset == BAD:
            raise OSError(errno.EIO, "bad block")
        return super().pread(count, offset)


@pytest.fixture
def served():
    disk = Noting()
    server = Server(disk)
    address = server.listen("tcp", host="127.0.0.1", port=0)
    server.start()
    yield disk, server.uri(address)
    server.stop()


def test_the_server_works_on_it_before_it_is_waited_for(served):
    disk, uri = served
    with nbdcore.connect(uri, command_timeout=PATIENCE) as client:
        memory = memoryview(bytearray(MEBIBYTE))
        begun = begin_read(client, memory, 5)
        assert disk.asked.wait(PATIENCE)
        assert begun.finish() == MEBIBYTE
        assert memory == CONTENTS[5 : 5 + MEBIBYTE]


def test_others_use_the_connection_meanwhile_and_receive_for_it(served):
    _, uri = served
    with nbdcore.connect(uri, command_timeout=PATIENCE) as client:
        memories = [memoryview(bytearray(MEBIBYTE)) for _ in range(2)]
        begun = [begin_read(client, memory, number) for number, memory in enumerate(memories)]
        assert client.pread(3, 9) == CONTENTS[9:12]
        assert client.pread(MEBIBYTE, 9) == CONTENTS[9 : 9 + MEBIBYTE]
        client.pwrite(CONTENTS[:MEBIBYTE], 0)
        for number, (read, memory) in enumerate(zip(begun, memories, strict=True)):
            assert read.finish() == MEBIBYTE
            assert memory == CONTENTS[number : number + MEBIBYTE]


def test_what_was_given_up_is_not_written_to_and_the_connection_goes_on(served):
    _, uri = served
    with nbdcore.connect(uri, command_timeout=PATIENCE) as client:
        memory = memoryview(bytearray(MEBIBYTE))
        begin_read(client, memory, 0).give_up(GIVEN_UP)
        assert client.pread(MEBIBYTE, 9) == CONTENTS[9 : 9 + MEBIBYTE]
        assert not any(memory)


def test_its_error_is_its_own(served):
    _, uri = served
    with nbdcore.connect(uri, command_timeout=PATIENCE) as client:
        begun = begin_read(client, memoryview(bytearray(MEBIBYTE)), BAD)
        assert client.pread(3, 9) == CONTENTS[9:12]
        with pytest.raises(CommandError, match=f"read of {MEBIBYTE} bytes at offset {BAD}"):
            begun.finish()
        assert client.pread(3, 9) == CONTENTS[9:12]


def test_the_end_of_the_connection_is_its_error(served):
    _, uri = served
    with nbdcore.connect(uri, command_timeout=PATIENCE) as client:
        begun = begin_read(client, memoryview(bytearray(MEBIBYTE)), 0)
        client.close()
        with pytest.raises(Disconnected, match="closed by this program"):
            begun.finish()
        begun.give_up(GIVEN_UP)


def test_each_of_several_goes_to_a_connection_that_is_idle(served):
    _, uri = served
    with Pool(connections=2, command_timeout=PATIENCE).connect(uri) as pool:
        memories = [memoryview(bytearray(MEBIBYTE)) for _ in range(2)]
        begun = [begin_read(pool, memory, number) for number, memory in enumerate(memories)]
        assert begun[0]._connection is not begun[1]._connection
        for number in (1, 0):
            assert begun[number].finish() == MEBIBYTE
            assert memories[number] == CONTENTS[number : number + MEBIBYTE]

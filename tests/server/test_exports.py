# ruff: noqa: ARG002, ARG005  # back ends made for one test look at some of their arguments only

from __future__ import annotations

import errno
import logging

import pytest

from nbdcore.errors import UsageError
from nbdcore.protocol.constants import CommandFlag, CommandType, ErrorNumber, TransmissionFlag
from nbdcore.server import BlockSizes, ExportSettings, MemoryDisk, Server

FLAG = TransmissionFlag


class Zeroes:
    """The least that can be exported."""

    size = 1 << 20

    def pread(self, count, offset):
        return bytes(count)


class Writable(Zeroes):
    def __init__(self):
        self.content = bytearray(self.size)
        self.writes = []

    def pread(self, count, offset):
        return memoryview(self.content)[offset : offset + count]

    def pwrite(self, data, offset):
        self.writes.append((offset, len(data)))
        self.content[offset : offset + len(data)] = data


class Failing(Writable):
    """Fails with whatever it is given, where it is told to."""

    def __init__(self, problem, *methods):
        super().__init__()
        for method in methods:
            setattr(self, method, self.fail)
        self.problem = problem

    def fail(self, *arguments, **options):
        raise self.problem


# ---------------------------------------------------------------------------------------------- what is offered


def test_the_least_back_end_is_read_only_and_all_data(ready):
    client = ready(Zeroes())
    assert client.flags == FLAG.HAS_FLAGS | FLAG.READ_ONLY | FLAG.SEND_DF | FLAG.CAN_MULTI_CONN
    assert client.read(100, 50).contents() == bytes(50)
    assert client.read(0, 1 << 20).contents() == bytes(1 << 20)
    assert client.write(0, b"x").error == ErrorNumber.EPERM
    assert client.ask(CommandType.BLOCK_STATUS, 0, 1 << 20).extents == {1: [(1 << 20, 0)]}
    for command in (CommandType.FLUSH, CommandType.CACHE):
        assert client.ask(command).error == ErrorNumber.EINVAL


def test_without_flush_neither_flush_nor_fua_is_offered(ready):
    client = ready(Writable())
    assert client.flags == (FLAG.HAS_FLAGS | FLAG.SEND_DF | FLAG.CAN_MULTI_CONN | FLAG.SEND_WRITE_ZEROES | FLAG.SEND_FAST_ZERO)
    assert client.ask(CommandType.FLUSH).error == ErrorNumber.EINVAL
    assert client.ask(CommandType.TRIM, 0, 10).error == ErrorNumber.EINVAL
    assert client.write(0, b"x", CommandFlag.FUA).error == ErrorNumber.EINVAL
    assert client.write(0, b"x").error == 0


def test_a_memory_disk_offers_everything(ready):
    everything = (
        FLAG.HAS_FLAGS
        | FLAG.SEND_FLUSH
        | FLAG.SEND_FUA
        | FLAG.SEND_TRIM
        | FLAG.SEND_WRITE_ZEROES
        | FLAG.CAN_MULTI_CONN
        | FLAG.SEND_CACHE
        | FLAG.SEND_FAST_ZERO
    )
    assert ready(MemoryDisk(1 << 20), structured=False).flags == everything
    assert ready(MemoryDisk(1 << 20)).flags == everything | FLAG.SEND_DF
    assert ready(MemoryDisk(1 << 20), extended=True).flags == everything | FLAG.SEND_DF | FLAG.BLOCK_STATUS_PAYLOAD


@pytest.mark.parametrize("how", ["server", "settings", "back end"])
def test_a_read_only_export_refuses_every_change(ready, how):
    disk = MemoryDisk(1 << 20)
    given = ExportSettings(disk, read_only=True) if how == "settings" else disk
    if how == "back end":
        disk.read_only = True
    client = ready(given, read_only=how == "server")
    assert client.flags & FLAG.READ_ONLY
    assert not client.flags & (FLAG.SEND_FLUSH | FLAG.SEND_FUA | FLAG.SEND_TRIM | FLAG.SEND_WRITE_ZEROES | FLAG.SEND_FAST_ZERO)
    assert client.write(0, b"data" * 1000).error == ErrorNumber.EPERM
    assert client.ask(CommandType.TRIM, 0, 10).error == ErrorNumber.EPERM
    assert client.ask(CommandType.WRITE_ZEROES, 0, 10).error == ErrorNumber.EPERM
    assert client.read(0, 10).contents() == bytes(10)
    assert disk.allocated == 0


def test_settings_reach_the_client(ready):
    settings = ExportSettings(MemoryDisk(1 << 20), rotational=True, multi_conn=False)
    client = ready(settings)
    assert client.flags & FLAG.ROTATIONAL
    assert not client.flags & FLAG.CAN_MULTI_CONN


# ---------------------------------------------------------------------------------------------- zeroing


def test_zeroes_are_written_in_bounded_pieces_where_the_back_end_cannot(ready):
    disk = Writable()
    disk.content[:] = b"x" * disk.size
    disk.size = len(disk.content)
    client = ready(disk)
    assert client.ask(CommandType.WRITE_ZEROES, 1000, (1 << 20) - 2000).error == 0
    assert disk.content == b"x" * 1000 + bytes((1 << 20) - 2000) + b"x" * 1000
    assert max(length for _, length in disk.writes) <= 1 << 20


def test_a_fast_zero_that_would_be_slow_changes_nothing(ready):
    disk = Writable()
    client = ready(disk)
    assert client.ask(CommandType.WRITE_ZEROES, 0, 4096, CommandFlag.FAST_ZERO).error == ErrorNumber.ENOTSUP
    assert disk.writes == []
    memory = MemoryDisk(1 << 20)
    client = ready(memory)
    client.write(0, b"x" * 100000)
    refused = client.ask(CommandType.WRITE_ZEROES, 0, 100000, CommandFlag.FAST_ZERO | CommandFlag.NO_HOLE)
    assert refused.error == ErrorNumber.ENOTSUP
    assert memory.pread(5, 0) == b"xxxxx"
    assert client.ask(CommandType.WRITE_ZEROES, 0, 100000, CommandFlag.FAST_ZERO).error == 0
    assert memory.pread(100000, 0) == bytes(100000)


def test_zeroes_that_must_not_be_holes_are_allocated(ready):
    disk = MemoryDisk(1 << 20)
    client = ready(disk)
    assert client.ask(CommandType.WRITE_ZEROES, 0, 1 << 20, CommandFlag.NO_HOLE).error == 0
    assert disk.allocated == 1 << 20
    assert client.ask(CommandType.BLOCK_STATUS, 0, 1 << 20).extents == {1: [(1 << 20, 0)]}


# ---------------------------------------------------------------------------------------------- faults of a back end


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EPERM, ErrorNumber.EPERM),
        (errno.EACCES, ErrorNumber.EPERM),
        (errno.EROFS, ErrorNumber.EPERM),
        (errno.EIO, ErrorNumber.EIO),
        (errno.ENOMEM, ErrorNumber.ENOMEM),
        (errno.EINVAL, ErrorNumber.EINVAL),
        (errno.ENOSPC, ErrorNumber.ENOSPC),
        (errno.EDQUOT, ErrorNumber.ENOSPC),
        (errno.EFBIG, ErrorNumber.ENOSPC),
        (errno.EOVERFLOW, ErrorNumber.EINVAL),
        (errno.ENOTSUP, ErrorNumber.EINVAL),
        (errno.ESHUTDOWN, ErrorNumber.ESHUTDOWN),
        (errno.ECONNRESET, ErrorNumber.EIO),
        (None, ErrorNumber.EIO),
        (["no", "number"], ErrorNumber.EIO),
    ],
)
def test_an_oserror_becomes_the_wires_number(ready, number, expected):
    problem = OSError(number, "the tape tore") if number is not None else OSError("the tape tore")
    client = ready(Failing(problem, "pwrite", "flush", "trim", "cache", "zero"))
    asked = [
        client.write(0, b"x" * 100),
        client.ask(CommandType.FLUSH),
        client.ask(CommandType.TRIM, 0, 10),
        client.ask(CommandType.CACHE, 0, 10),
        client.ask(CommandType.WRITE_ZEROES, 0, 10),
    ]
    assert [reply.error for reply in asked] == [expected] * 5
    if number is not None:
        assert asked[0].text == "the tape tore"
    assert client.read(0, 10).contents() == bytes(10)


@pytest.mark.parametrize("said", [ValueError("the tape tore"), b"the tape tore", 7, ["the", "tape"]])
def test_an_oserror_whose_text_is_no_string_costs_the_request_only(ready_any, said):
    client = ready_any(Failing(OSError(errno.EIO, said), "pread", "flush"))
    for asked in ((CommandType.READ, 0, 10), (CommandType.FLUSH,)):
        reply = client.ask(*asked)
        assert (reply.error, reply.text) in {(ErrorNumber.EIO, str(said)), (ErrorNumber.EIO, "")}
    assert client.write(0, b"x").error == 0


def test_the_flush_of_fua_fails_the_write(ready):
    client = ready(Failing(OSError(errno.EIO, "no"), "flush"))
    assert client.write(0, b"x", CommandFlag.FUA).error == ErrorNumber.EIO
    assert client.ask(CommandType.WRITE_ZEROES, 0, 10, CommandFlag.FUA).error == ErrorNumber.EIO
    assert client.write(0, b"x").error == 0


@pytest.mark.parametrize("method", ["pread", "pwrite", "flush", "trim", "cache", "zero", "extents"])
def test_any_other_exception_is_eio_and_one_line_in_the_log(ready, caplog, method):
    client = ready(Failing(RuntimeError("a bug"), method))
    caplog.set_level(logging.WARNING, "nbdcore.server")
    requests = {
        "pread": (CommandType.READ, 0, 10),
        "pwrite": (CommandType.WRITE, 0, 3, 0, b"abc"),
        "flush": (CommandType.FLUSH,),
        "trim": (CommandType.TRIM, 0, 10),
        "cache": (CommandType.CACHE, 0, 10),
        "zero": (CommandType.WRITE_ZEROES, 0, 10),
        "extents": (CommandType.BLOCK_STATUS, 0, 10),
    }
    for _ in range(3):
        reply = client.ask(*requests[method])
        assert reply.error == ErrorNumber.EIO
        assert "bug" not in reply.text
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "a bug" in caplog.text


@pytest.mark.parametrize("returned", [b"short", bytes(11), None, 10, "ten chars!", [1, 2]])
def test_a_read_that_returns_something_else_is_eio(ready_any, returned):
    disk = Zeroes()
    disk.pread = lambda count, offset: returned
    client = ready_any(disk)
    assert client.read(0, 10).error == ErrorNumber.EIO
    assert client.read(0, 10).error == ErrorNumber.EIO


def test_a_buffer_that_the_back_end_uses_again_is_copied_in_time(ready):
    class Reusing(Zeroes):
        buffer = bytearray(10)

        def pread(self, count, offset):
            self.buffer[:] = bytes([offset]) * count
            return self.buffer

    client = ready(Reusing())
    client.send(b"".join(client.pack(CommandType.READ, offset, 10) for offset in range(20)))
    assert [client.reply().contents() for _ in range(20)] == [bytes([offset]) * 10 for offset in range(20)]


@pytest.mark.parametrize("told", [[], [(0, 0)], [(-5, 0)], [(10,)], None, [(1 << 20, "x")], [(2048.0, 0)], [("10", 0)]])
def test_extents_that_make_no_sense_are_eio(ready, told):
    disk = Zeroes()
    disk.extents = lambda count, offset: told
    client = ready(disk)
    assert client.ask(CommandType.BLOCK_STATUS, 0, 4096).error == ErrorNumber.EIO
    assert client.read(0, 1 << 17).contents() == bytes(1 << 17)


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("flags", [1 << 40, 0xFF << 56, -4, 1 << 64])
def test_bits_that_base_allocation_does_not_have_are_not_sent(ready, extended, flags):
    disk = Zeroes()
    disk.extents = lambda count, offset: [(4096, flags | 3), (count, flags)]
    client = ready(disk, extended=extended)
    assert client.ask(CommandType.BLOCK_STATUS, 0, 8192).extents == {1: [(4096, 3), (4096, 0)]}


def test_extents_without_end_are_cut(ready):
    def forever(count, offset):
        while True:
            yield 512, 3
            yield 512, 0

    disk = Zeroes()
    disk.extents = forever
    client = ready(disk)
    (extents,) = client.ask(CommandType.BLOCK_STATUS, 0, 1 << 20).extents.values()
    assert extents[:2] == [(512, 3), (512, 0)]
    assert len(extents) <= 8192


# ---------------------------------------------------------------------------------------------- settings that cannot be


@pytest.mark.parametrize(
    "sizes",
    [
        (0, 4096, 1 << 20),
        (3, 4096, 1 << 20),
        (1 << 17, 1 << 17, 1 << 20),
        (1, 256, 1 << 20),
        (4096, 512, 1 << 20),
        (512, 4096, 1000),
        (1, 4096, 1000),
        (1, 4096, 0),
        (1, 4096, 1 << 30),
    ],
)
def test_block_sizes_against_the_rules_are_refused(sizes):
    with pytest.raises(UsageError, match="block sizes"):
        Server(ExportSettings(MemoryDisk(1 << 20), block_sizes=sizes))


def test_a_size_that_is_no_multiple_of_the_minimum_is_refused():
    with pytest.raises(UsageError, match="multiple of the minimum"):
        Server(ExportSettings(MemoryDisk(1000), block_sizes=BlockSizes(512)))


@pytest.mark.parametrize("size", [-1, 1 << 63, "1M", None])
def test_a_size_that_cannot_be_sent_is_refused(size):
    disk = Zeroes()
    disk.size = size
    with pytest.raises(UsageError, match="size"):
        Server(disk)


@pytest.mark.parametrize("name", ["x" * 4097, "a\0b"])
def test_a_name_that_cannot_be_sent_is_refused(name):
    with pytest.raises(UsageError, match="name"):
        Server({name: Zeroes()})
    with pytest.raises(UsageError, match="description"):
        Server(ExportSettings(Zeroes(), description=name))


def test_a_server_of_nothing_is_refused():
    with pytest.raises(UsageError):
        Server({})

# ruff: noqa: ARG002  # back ends made for one test look at some of their arguments only

from __future__ import annotations

import errno
import struct

import pytest

from nbdcore.protocol import constants, wire
from nbdcore.protocol.constants import AllocationFlag, Chunk, CommandFlag, CommandType, ErrorNumber
from nbdcore.server import BlockSizes, ExportSettings, MemoryDisk

MEBIBYTE = 1 << 20
PAGE = 64 << 10
PAYLOAD_LEN = CommandFlag.PAYLOAD_LEN
EINVAL = ErrorNumber.EINVAL


@pytest.fixture
def disk():
    disk = MemoryDisk(4 * MEBIBYTE)
    disk.pwrite(bytes(range(256)) * 4096, MEBIBYTE)  # the second MiB
    return disk


class Recording(MemoryDisk):
    """Remembers what it was asked to do."""

    def __init__(self, size):
        super().__init__(size)
        self.calls = []

    def flush(self):
        self.calls.append("flush")

    def pwrite(self, data, offset):
        self.calls.append(("pwrite", len(data), offset))
        super().pwrite(data, offset)

    def cache(self, count, offset):
        self.calls.append(("cache", count, offset))

    def trim(self, count, offset):
        self.calls.append(("trim", count, offset))

    def zero(self, count, offset, *, may_trim):
        self.calls.append(("zero", count, offset, may_trim))


# ---------------------------------------------------------------------------------------------- every command


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1), (MEBIBYTE, 4096), (MEBIBYTE - 5, 10), (MEBIBYTE - 7, 3 * PAGE), (0, 4 * MEBIBYTE), (4 * MEBIBYTE - 1, 1), (7, 0)],
)
def test_a_read_returns_what_is_there(ready_any, disk, offset, length):
    assert ready_any(disk).read(offset, length).contents() == disk.pread(length, offset)


@pytest.mark.parametrize("length", [0, 1, 4096, 70000, 2 * MEBIBYTE])
def test_a_write_is_there_afterwards(ready_any, disk, length):
    client = ready_any(disk)
    data = bytes(range(1, 251)) * (length // 250 + 1)
    assert client.write(1000, data[:length]).error == 0
    assert disk.pread(length, 1000) == data[:length]
    assert client.read(1000, length).contents() == data[:length]


def test_many_requests_at_once_are_answered_one_by_one(ready_any):
    client = ready_any(MemoryDisk(MEBIBYTE))
    flags = PAYLOAD_LEN if client.extended else 0
    requests = []
    for number in range(200):
        data = bytes([number]) * 1000
        requests.append(client.pack(CommandType.WRITE, number * 1000, 1000, flags, data))
        requests.append(client.pack(CommandType.READ, number * 1000, 1000))
    client.send(b"".join(requests))
    for number in range(200):
        assert client.reply().cookie == 2 * number + 1
        reply = client.reply(1000)
        assert (reply.cookie, reply.contents()) == (2 * number + 2, bytes([number]) * 1000)


def test_requests_cut_anywhere_are_understood(ready_any):
    client = ready_any(MemoryDisk(MEBIBYTE))
    flags = PAYLOAD_LEN if client.extended else 0
    stream = client.pack(CommandType.WRITE, 5, 11, flags, b"hello world") + client.pack(CommandType.READ, 4, 13)
    for cut in range(1, len(stream)):
        client.send(stream[:cut])
        client.send(stream[cut:])
        assert client.reply().error == 0
        assert client.reply(13).contents() == b"\0hello world\0"


def test_each_command_reaches_the_back_end(ready_any):
    disk = Recording(MEBIBYTE)
    client = ready_any(disk)
    assert client.ask(CommandType.FLUSH).error == 0
    assert client.ask(CommandType.TRIM, 10, 20).error == 0
    assert client.ask(CommandType.CACHE, 30, 40).error == 0
    assert client.ask(CommandType.WRITE_ZEROES, 50, 60).error == 0
    assert client.ask(CommandType.WRITE_ZEROES, 70, 80, CommandFlag.NO_HOLE).error == 0
    assert client.write(90, b"abc").error == 0
    assert disk.calls == [
        "flush",
        ("trim", 20, 10),
        ("cache", 40, 30),
        ("zero", 60, 50, True),
        ("zero", 80, 70, False),
        ("pwrite", 3, 90),
    ]


def test_fua_flushes_before_the_answer_whatever_writes(ready_any):
    disk = Recording(MEBIBYTE)
    client = ready_any(disk)
    client.write(0, b"x", CommandFlag.FUA)
    client.ask(CommandType.TRIM, 0, 1, CommandFlag.FUA)
    client.ask(CommandType.WRITE_ZEROES, 0, 1, CommandFlag.FUA)
    assert disk.calls[1::2] == ["flush"] * 3
    disk.calls.clear()
    assert client.read(0, 1, CommandFlag.FUA).error == 0
    assert client.ask(CommandType.CACHE, 0, 1, CommandFlag.FUA).error == 0
    assert client.ask(CommandType.FLUSH, 0, 0, CommandFlag.FUA).error == 0
    assert disk.calls == [("cache", 1, 0), "flush"]


def test_requests_of_no_bytes_do_nothing_and_succeed(ready_any):
    disk = Recording(MEBIBYTE)
    client = ready_any(disk)
    for command in (CommandType.READ, CommandType.TRIM, CommandType.CACHE, CommandType.WRITE_ZEROES):
        assert client.ask(command, MEBIBYTE, 0).error == 0
    assert client.write(0, b"").error == 0
    assert disk.calls == []


def test_disc_ends_the_connection_after_the_answers_before_it(ready_any):
    client = ready_any(MemoryDisk(MEBIBYTE))
    client.send(client.pack(CommandType.READ, 0, 10) + client.pack(CommandType.DISC))
    assert client.reply(10).contents() == bytes(10)
    assert client.hung_up()


def test_a_client_that_stops_sending_still_gets_its_answers(ready_any):
    client = ready_any(MemoryDisk(MEBIBYTE))
    client.send(client.pack(CommandType.READ, 0, 10) * 3)
    client.sock.shutdown(1)
    assert [client.reply(10).contents() for _ in range(3)] == [bytes(10)] * 3
    assert client.hung_up()


# ---------------------------------------------------------------------------------------------- large reads and holes


def test_a_large_read_is_sent_in_pieces_with_its_holes(ready, disk):
    reply = ready(disk).read(0, 4 * MEBIBYTE)
    assert reply.holes == [(0, MEBIBYTE), (2 * MEBIBYTE, 2 * MEBIBYTE)]
    assert list(reply.data) == [MEBIBYTE]
    assert reply.contents() == disk.pread(4 * MEBIBYTE, 0)


def test_data_larger_than_a_piece_comes_in_several_chunks(ready):
    disk = MemoryDisk(4 * MEBIBYTE)
    disk.pwrite(b"x" * 3 * MEBIBYTE, 512)
    reply = ready(disk, extended=True).read(512, 3 * MEBIBYTE)
    assert reply.chunks == [Chunk.OFFSET_DATA] * 3
    assert reply.contents() == b"x" * 3 * MEBIBYTE


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("length", [4096, 3 * MEBIBYTE])
def test_df_gets_one_chunk_with_the_zeroes_in_it(ready, disk, length, extended):
    reply = ready(disk, extended=extended).read(MEBIBYTE // 2, length, CommandFlag.DF)
    assert reply.chunks == [Chunk.OFFSET_DATA]
    assert reply.contents() == disk.pread(length, MEBIBYTE // 2)


def test_holes_too_short_for_a_chunk_are_sent_as_data(ready):
    class Fragmented(MemoryDisk):
        def extents(self, count, offset):
            for _ in range(100):
                yield 100, 3
                yield 900, 0

    reply = ready(Fragmented(MEBIBYTE)).read(0, PAGE)
    assert reply.chunks == [Chunk.OFFSET_DATA]
    assert reply.contents() == bytes(PAGE)


@pytest.mark.parametrize("extended", [False, True])
def test_an_error_in_the_middle_of_a_large_read_says_where(ready, extended):
    class Scratched(MemoryDisk):
        def pread(self, count, offset):
            if offset >= 2 * MEBIBYTE:
                raise OSError(errno.EIO, "a scratch")
            return super().pread(count, offset)

        extents = None

    client = ready(Scratched(4 * MEBIBYTE), extended=extended)
    reply = client.read(0, 4 * MEBIBYTE)
    assert (reply.error, reply.text, reply.at) == (ErrorNumber.EIO, "a scratch", 2 * MEBIBYTE)
    assert sorted(reply.data) == [0, MEBIBYTE]
    assert client.read(0, 10).contents() == bytes(10)


def test_an_error_in_a_large_simple_read_has_no_data_before_it(ready):
    class Broken(MemoryDisk):
        def pread(self, count, offset):
            raise OSError(errno.EIO, "broken")

    client = ready(Broken(4 * MEBIBYTE), structured=False)
    for _ in range(2):
        assert client.read(0, 4 * MEBIBYTE).error == ErrorNumber.EIO


# ---------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (CommandType.READ, EINVAL),
        (CommandType.WRITE, ErrorNumber.ENOSPC),
        (CommandType.TRIM, EINVAL),
        (CommandType.CACHE, EINVAL),
        (CommandType.WRITE_ZEROES, ErrorNumber.ENOSPC),
        (CommandType.BLOCK_STATUS, EINVAL),
    ],
)
@pytest.mark.parametrize(
    ("offset", "length"), [(MEBIBYTE, 1), (MEBIBYTE - 1, 2), (2**64 - 1, 1), (2**64 - 512, 512), (0, MEBIBYTE + 1)]
)
def test_a_range_past_the_end_is_refused_and_the_connection_lives(ready_any, command, expected, offset, length):
    disk = Recording(MEBIBYTE)
    client = ready_any(disk)
    reply = client.write(offset, bytes(length)) if command == CommandType.WRITE else client.ask(command, offset, length)
    assert reply.error == expected
    if client.structured:
        assert str(MEBIBYTE) in reply.text
    assert disk.calls == []
    assert client.read(0, 10).contents() == bytes(10)


@pytest.mark.parametrize("command", [8, 99, 0xFFFF])
def test_an_unknown_command_is_invalid(ready_any, command):
    client = ready_any(MemoryDisk(MEBIBYTE))
    assert client.ask(command, 0, 10).error == EINVAL
    assert client.read(0, 10).contents() == bytes(10)


VALID = {
    CommandType.READ: CommandFlag.FUA | CommandFlag.DF,
    CommandType.WRITE: CommandFlag.FUA,
    CommandType.FLUSH: CommandFlag.FUA,
    CommandType.TRIM: CommandFlag.FUA,
    CommandType.CACHE: CommandFlag.FUA,
    CommandType.WRITE_ZEROES: CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
    CommandType.BLOCK_STATUS: CommandFlag.FUA | CommandFlag.REQ_ONE,
}


@pytest.mark.parametrize("command", VALID)
@pytest.mark.parametrize("bit", [0, 1, 2, 3, 4, 6, 7, 15])
def test_a_flag_is_taken_where_it_belongs_and_nowhere_else(ready, command, bit):
    disk = Recording(MEBIBYTE)
    client = ready(disk)
    length = 0 if command == CommandType.FLUSH else 4
    reply = client.ask(command, 0, length, 1 << bit, b"data" if command == CommandType.WRITE else b"")
    assert (reply.error == 0) == bool(VALID[command] & 1 << bit)
    if reply.error:
        assert reply.error == EINVAL
        assert disk.calls == []
    assert client.read(0, 10).error == 0


def test_df_without_structured_replies_is_invalid(ready):
    client = ready(MemoryDisk(MEBIBYTE), structured=False)
    assert client.read(0, 10, CommandFlag.DF).error == EINVAL
    assert client.read(0, 10).contents() == bytes(10)


@pytest.mark.parametrize(("offset", "length"), [(1, 0), (0, 1), (512, 512)])
def test_a_flush_with_a_range_is_invalid(ready_any, offset, length):
    disk = Recording(MEBIBYTE)
    assert ready_any(disk).ask(CommandType.FLUSH, offset, length).error == EINVAL
    assert disk.calls == []


@pytest.mark.parametrize(("offset", "length"), [(1, 512), (0, 511), (256, 256)])
@pytest.mark.parametrize("command", sorted(set(VALID) - {CommandType.FLUSH}))
def test_a_range_off_the_block_boundaries_is_invalid(ready, command, offset, length):
    disk = Recording(MEBIBYTE)
    client = ready(ExportSettings(disk, block_sizes=BlockSizes(512, 4096, MEBIBYTE)))
    payload = bytes(length) if command == CommandType.WRITE else b""
    assert client.ask(command, offset, length, payload=payload).error == EINVAL
    assert disk.calls == []
    assert client.ask(command, 512, 512, payload=payload and bytes(512)).error == 0


def test_more_than_the_maximum_block_size_is_invalid_where_it_carries_data(ready_any):
    client = ready_any(ExportSettings(MemoryDisk(16 * MEBIBYTE), block_sizes=BlockSizes(1, 4096, MEBIBYTE)))
    assert client.read(0, MEBIBYTE + 1).error == EINVAL
    assert client.write(0, bytes(MEBIBYTE + 1)).error == EINVAL
    assert client.ask(CommandType.TRIM, 0, 16 * MEBIBYTE).error == 0
    assert client.ask(CommandType.WRITE_ZEROES, 0, 16 * MEBIBYTE).error == 0
    assert client.ask(CommandType.CACHE, 0, 16 * MEBIBYTE).error == 0
    assert client.read(0, MEBIBYTE).contents() == bytes(MEBIBYTE)


def test_a_write_of_more_than_is_borne_ends_the_connection(ready_any):
    client = ready_any(MemoryDisk(1 << 40))
    flags = PAYLOAD_LEN if client.extended else 0
    client.send(client.pack(CommandType.WRITE, 0, (64 << 20) + 1, flags))
    assert client.reply().error == EINVAL
    assert client.hung_up()


@pytest.mark.parametrize("magic", [0, 0x25609514, 0x12560953, constants.EXTENDED_REQUEST_MAGIC])
def test_a_request_with_a_wrong_magic_ends_the_connection(ready, magic):
    client = ready(MemoryDisk(MEBIBYTE))
    client.send(client.pack(CommandType.READ, 0, 10))
    client.reply()
    client.send(struct.pack(">I", magic) + client.pack(CommandType.READ, 0, 10)[4:])
    assert client.hung_up()


# ---------------------------------------------------------------------------------------------- block status


@pytest.mark.parametrize("extended", [False, True])
def test_block_status_tells_data_and_holes_inside_the_range(ready, disk, extended):
    client = ready(disk, extended=extended)
    status = client.ask(CommandType.BLOCK_STATUS, 1000, 4 * MEBIBYTE - 1000)
    assert status.extents == {1: [(MEBIBYTE - 1000, 3), (MEBIBYTE, 0), (2 * MEBIBYTE, 3)]}
    assert status.chunks == [Chunk.BLOCK_STATUS_EXT if extended else Chunk.BLOCK_STATUS]
    one = client.ask(CommandType.BLOCK_STATUS, 1000, 4 * MEBIBYTE - 1000, CommandFlag.REQ_ONE)
    assert one.extents == {1: [(MEBIBYTE - 1000, 3)]}
    inside = client.ask(CommandType.BLOCK_STATUS, MEBIBYTE + 5, 10, CommandFlag.REQ_ONE)
    assert inside.extents == {1: [(10, 0)]}


def test_block_status_of_more_than_32_bits_in_one_extent(ready):
    client = ready(MemoryDisk(1 << 42), extended=True)
    assert client.ask(CommandType.BLOCK_STATUS, 0, 1 << 42).extents == {1: [(1 << 42, 3)]}


@pytest.mark.parametrize("length", [2**32 - 1, 2**32 - 512, 2**32 - 2**26])
def test_the_largest_compact_block_status_is_answered(ready, length):
    client = ready(MemoryDisk(1 << 42))
    assert client.ask(CommandType.BLOCK_STATUS, 0, length).extents == {1: [(length, 3)]}


def test_block_status_keeps_to_the_minimum_block_size(ready):
    class Odd(MemoryDisk):
        def extents(self, count, offset):
            yield from [(5000, 3), (200, 0), (count - 5200, 3)]

    client = ready(ExportSettings(Odd(MEBIBYTE), block_sizes=BlockSizes(4096)))
    assert client.ask(CommandType.BLOCK_STATUS, 0, MEBIBYTE).extents == {1: [(4096, 3), (4096, 0), (MEBIBYTE - 8192, 3)]}


def test_block_status_is_cut_at_sectors_but_for_the_ends_of_the_request(ready):
    class Ragged(MemoryDisk):
        def extents(self, count, offset):
            yield 700, AllocationFlag.HOLE | AllocationFlag.ZERO
            yield 900, AllocationFlag.ZERO
            yield count, 0

    client = ready(Ragged(MEBIBYTE))
    assert client.ask(CommandType.BLOCK_STATUS, 10, 3000).extents == {1: [(502, 3), (1024, 2), (1474, 0)]}


@pytest.mark.parametrize("budget", [0, 4 * MEBIBYTE])
def test_chunks_of_a_read_begin_at_sectors_but_for_the_first(ready, budget):
    disk = MemoryDisk(4 * MEBIBYTE)
    disk.pwrite(b"x" * (4 * MEBIBYTE), 0)
    reply = ready(disk, memory_budget=budget).read(100, 3 * MEBIBYTE)
    assert reply.contents() == b"x" * (3 * MEBIBYTE)
    assert [at % 512 for at in sorted(reply.data)[1:]] == [0] * (len(reply.data) - 1)


def test_the_text_of_a_back_ends_error_is_a_string(ready):
    class Wordy(MemoryDisk):
        def pread(self, count, offset):
            raise OSError(errno.EIO, "\0" + "\N{SNOWMAN}" * 5000)

    text = ready(Wordy(MEBIBYTE)).read(0, 1).text
    assert "\0" not in text
    assert 0 < len(text.encode()) <= 4096


@pytest.mark.parametrize("structured", [False, True])
def test_block_status_without_a_context_is_invalid(serve, client_of, structured):
    client = client_of(serve(MemoryDisk(MEBIBYTE)))
    client.greet()
    client.agree(structured=structured, allocation=False)
    client.go()
    assert client.ask(CommandType.BLOCK_STATUS, 0, 10).error == EINVAL
    assert client.read(0, 10).contents() == bytes(10)


def test_block_status_of_no_bytes_is_invalid(ready):
    assert ready(MemoryDisk(MEBIBYTE)).ask(CommandType.BLOCK_STATUS, 0, 0).error == EINVAL


# ---------------------------------------------------------------------------------------------- extended headers


def test_a_status_request_with_a_payload_names_its_contexts(ready, disk):
    client = ready(disk, extended=True)
    payload = struct.pack(">QI", 2 * MEBIBYTE, 1)
    status = client.ask(CommandType.BLOCK_STATUS, 0, len(payload), PAYLOAD_LEN, payload)
    assert status.extents == {1: [(MEBIBYTE, 3), (MEBIBYTE, 0)]}
    one = client.ask(CommandType.BLOCK_STATUS, 0, len(payload), PAYLOAD_LEN | CommandFlag.REQ_ONE, payload)
    assert one.extents == {1: [(MEBIBYTE, 3)]}


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"short",
        struct.pack(">Q", 10),
        struct.pack(">QI", 10, 2),
        struct.pack(">QI", 10, 0),
        struct.pack(">QII", 10, 1, 1),
        struct.pack(">QI", 2**64 - 1, 1),
        struct.pack(">QI", 4 * MEBIBYTE + 1, 1),
        struct.pack(">QI", 0, 1),
        bytes(100000),
    ],
)
def test_a_status_payload_that_makes_no_sense_is_invalid(ready, disk, payload):
    client = ready(disk, extended=True)
    assert client.ask(CommandType.BLOCK_STATUS, 0, len(payload), PAYLOAD_LEN, payload).error == EINVAL
    assert client.read(0, 10).contents() == bytes(10)


def test_a_write_without_its_payload_flag_is_carried_out_as_qemu_means_it(ready):
    client = ready(MemoryDisk(MEBIBYTE), extended=True)
    assert client.ask(CommandType.WRITE, 5, 4, 0, b"data").error == 0
    assert client.read(4, 6).contents() == b"\0data\0"


@pytest.mark.parametrize("command", [0, 3, 4, 5, 6, 99])
def test_a_payload_where_none_belongs_is_skipped_and_refused(ready, command):
    disk = Recording(MEBIBYTE)
    client = ready(disk, extended=True)
    client.send(client.pack(command, 0, 100, PAYLOAD_LEN, b"p" * 100))
    assert client.reply().error == EINVAL
    assert disk.calls == []
    assert client.read(0, 10).contents() == bytes(10)


def test_the_payload_flag_without_extended_headers_is_invalid(ready):
    disk = Recording(MEBIBYTE)
    client = ready(disk)
    assert client.ask(CommandType.WRITE, 0, 4, PAYLOAD_LEN, b"data").error == EINVAL
    assert client.ask(CommandType.BLOCK_STATUS, 0, 12, PAYLOAD_LEN).error == EINVAL
    assert disk.calls == []
    assert client.read(0, 10).contents() == bytes(10)


@pytest.mark.parametrize("command", [CommandType.TRIM, CommandType.WRITE_ZEROES, CommandType.CACHE])
def test_lengths_of_64_bits_are_carried_out_at_once(ready, command):
    disk = MemoryDisk(1 << 42)
    disk.pwrite(b"data", 1 << 41)
    client = ready(disk, extended=True)
    assert client.ask(command, 0, 1 << 42).error == 0
    assert disk.pread(4, 1 << 41) == (b"data" if command == CommandType.CACHE else bytes(4))


@pytest.mark.parametrize("length", [2**32, 2**63, 2**64 - 1])
def test_reads_of_absurd_length_are_refused(ready, length):
    client = ready(MemoryDisk(1 << 62), extended=True)
    assert client.read(0, length).error == EINVAL
    assert client.read(0, 10).contents() == bytes(10)


def test_every_reply_of_a_simple_client_is_simple(ready):
    client = ready(MemoryDisk(MEBIBYTE), structured=False)
    for command in CommandType:
        if command != CommandType.DISC:
            client.send(client.pack(command, 0, 0))
            assert client.unpack(wire.SIMPLE_REPLY)[0] == constants.SIMPLE_REPLY_MAGIC

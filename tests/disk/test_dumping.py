"""A dump against one made line by line, of disks with data, zeroes and repetitions at random; and what is not read for it."""

from __future__ import annotations

import contextlib
import random

import pytest

import nbdcore
from nbdcore.disk.dumping import dump
from nbdcore.errors import UsageError
from nbdcore.server import ExportSettings, MemoryDisk, Server
from tests.disk.disks import SilentDisk

PATIENCE = 30.0
CONTEXTS = [nbdcore.BASE_ALLOCATION]


class Counting(MemoryDisk):
    """A disk that remembers what was read of it."""

    def __init__(self, size):
        super().__init__(size)
        self.read = []

    def pread(self, count, offset):
        self.read.append((offset, count))
        return super().pread(count, offset)


@contextlib.contextmanager
def connected(disk, **options):
    with Server(disk) as server:
        uri = server.uri(server.listen("tcp", host="127.0.0.1", port=0))
        server.start()
        with nbdcore.connect(uri, timeout=PATIENCE, command_timeout=PATIENCE, **options) as client:
            yield client


def line(offset, data):
    digits = [f"{byte:02x}" for byte in data]
    letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data)
    return f"{offset:010x}: {' '.join(digits[:8]):23}  {' '.join(digits[8:]):23} |{letters:16}|"


def expected(contents, offset, end):
    """Yield the lines of a dump, each looked at by itself."""
    before, starred = None, False
    for at in range(offset, end, 16):
        data = contents[at : min(at + 16, end)]
        padded = data.ljust(16, b"\0")
        if padded == before and at + len(data) < len(contents):
            if not starred:
                yield "*"
            starred = True
            continue
        before, starred = padded, False
        yield line(at, data)


def random_contents(choose, size):
    """Make ranges of lines that repeat, of zeroes and of noise, which begin and end where lines do, and elsewhere."""
    contents = bytearray()
    while len(contents) < size:
        count = choose.choice([1, 15, 16, 48, 160, 4096, 70_000, 200_000])
        kind = choose.randrange(4)
        contents += (bytes(count), choose.randbytes(count), b"0123456789abcdef" * (count // 16), b"A" * count)[kind]
    return bytes(contents[:size])


@pytest.mark.parametrize("contexts", [CONTEXTS, []], ids=["block status", "none"])
@pytest.mark.parametrize("seed", range(6))
def test_random_disk_is_dumped_like_line_by_line(seed, contexts):
    choose = random.Random(seed)
    contents = random_contents(choose, 600_000 + choose.randrange(17))
    offset = choose.choice([0, 16, 7, 70_001])
    count = choose.choice([None, 100, 300_000, len(contents)])
    end = len(contents) if count is None else min(len(contents), offset + count)
    disk = MemoryDisk(len(contents))
    for at in range(0, len(contents), 4096):
        if any(contents[at : at + 4096]):  # elsewhere holes stay
            disk.pwrite(contents[at : at + 4096], at)
    with connected(disk, contexts=contexts) as client:
        said = "".join(dump(client, offset=offset, count=count))
    assert said.splitlines() == list(expected(contents, offset, end))
    assert not said or said.endswith("\n")


def test_what_the_server_calls_zero_is_not_read():
    disk = Counting(1 << 40)
    disk.pwrite(b"data", 1 << 39)
    with connected(disk, contexts=CONTEXTS) as client:
        lines = "".join(dump(client)).splitlines()
    assert [words.partition(":")[0] for words in lines] == ["0000000000", "*", "8000000000", "8000000010", "*", "fffffffff0"]
    assert 0 < sum(count for _, count in disk.read) < 1 << 20


def test_offsets_grow_by_a_digit_where_they_need_one():
    disk = MemoryDisk((1 << 40) + 4096)
    noise = random.Random(1).randbytes(8192)
    disk.pwrite(noise, (1 << 40) - 4096)
    with connected(disk) as client:
        lines = "".join(dump(client, offset=(1 << 40) - 4096)).splitlines()
    assert lines == [line((1 << 40) - 4096 + at, noise[at : at + 16]) for at in range(0, 8192, 16)]


def test_nothing_is_dumped_of_nothing():
    with connected(MemoryDisk(0), contexts=CONTEXTS) as client:
        assert list(dump(client)) == []
    with connected(MemoryDisk(100)) as client:
        assert list(dump(client, count=0)) == list(dump(client, offset=100)) == []


@pytest.mark.parametrize("wrong", [{"offset": 101}, {"offset": -1}, {"count": -1}], ids=str)
def test_wrong_range_is_refused_before_anything_is_read(wrong):
    disk = Counting(100)
    with connected(disk) as client, pytest.raises(UsageError, match="the disk has 100 bytes"):
        dump(client, **wrong)
    assert disk.read == []


class Untold(Counting):
    """A disk that fails to tell what is zero."""

    def extents(self, count, offset):
        raise OSError(5, f"no map of {count} bytes at {offset}")


@pytest.mark.parametrize(("offset", "count"), [(5, 20), (4090, 10_000), (19_000, None), (1, None)])
def test_range_that_begins_inside_a_block_of_the_server_is_dumped(offset, count):
    contents = random.Random(1).randbytes(20_480)
    disk = MemoryDisk(len(contents))
    disk.pwrite(contents, 0)
    with connected(ExportSettings(disk, block_sizes=(4096, 4096, 1 << 20)), contexts=CONTEXTS) as client:
        said = "".join(dump(client, offset=offset, count=count))
    end = len(contents) if count is None else offset + count
    assert said.splitlines() == list(expected(contents, offset, end))


def test_disk_whose_server_fails_to_tell_what_is_zero_is_read():
    disk = Untold(1 << 20)
    disk.pwrite(b"data", 4096)
    with connected(disk, contexts=CONTEXTS) as client:
        assert "".join(dump(client)).splitlines() == list(expected(b"data".rjust(4100, b"\0").ljust(1 << 20, b"\0"), 0, 1 << 20))


def test_first_line_does_not_wait_for_much():
    disk = SilentDisk(bytes(32 << 20), [])
    with connected(disk) as client:
        next(dump(client))
    assert disk.read == [(0, 64 << 10)]

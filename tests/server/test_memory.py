from __future__ import annotations

import errno
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdcore.errors import UsageError
from nbdcore.protocol.constants import AllocationFlag
from nbdcore.server import MemoryDisk

PAGE = 64 << 10
HOLE = AllocationFlag.HOLE | AllocationFlag.ZERO
SIZE = 5 * PAGE + 1000

ranges = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda pair: (min(pair), max(pair)))
actions = st.lists(st.tuples(st.sampled_from(["write", "trim", "zero"]), ranges, st.integers(1, 255)), max_size=12)


@settings(deadline=None)
@given(actions, ranges)
def test_any_sequence_of_writes_and_holes_reads_like_plain_bytes(sequence, asked):
    disk, plain = MemoryDisk(SIZE), bytearray(SIZE)
    for what, (start, end), fill in sequence:
        content = bytes([fill if what == "write" else 0]) * (end - start)
        plain[start:end] = content
        if what == "write":
            disk.pwrite(content, start)
        elif what == "trim":
            disk.trim(end - start, start)
        else:
            disk.zero(end - start, start, may_trim=True)
    start, end = asked
    assert disk.pread(end - start, start) == plain[start:end]
    assert disk.pread(SIZE, 0) == plain
    offset = start
    for length, flags in disk.extents(end - start, start):
        assert length > 0
        assert flags in (0, HOLE)
        if flags:
            assert not any(plain[offset : offset + length])
        offset += length
    assert offset == end


def test_a_terabyte_of_nothing_is_one_extent_and_no_memory():
    disk = MemoryDisk(1 << 40)
    assert list(disk.extents(1 << 40, 0)) == [(1 << 40, HOLE)]
    disk.trim(1 << 40, 0)
    assert disk.allocated == 0


def test_extents_follow_what_is_written_far_apart():
    disk = MemoryDisk(1 << 40)
    far = 1 << 39
    disk.pwrite(b"x" * (2 * PAGE), far)
    assert list(disk.extents(1 << 40, 0)) == [(far, HOLE), (2 * PAGE, 0), (far - 2 * PAGE, HOLE)]
    assert disk.allocated == 2 * PAGE
    assert list(disk.extents(PAGE, far + PAGE)) == [(PAGE, 0)]


def test_trim_frees_the_pages_it_covers():
    disk = MemoryDisk(10 * PAGE)
    disk.pwrite(b"x" * (10 * PAGE), 0)
    disk.trim(5 * PAGE, PAGE // 2)
    assert disk.allocated == 6 * PAGE
    assert disk.pread(5 * PAGE, PAGE // 2) == bytes(5 * PAGE)
    assert disk.pread(PAGE // 2, 0) == b"x" * (PAGE // 2)


def test_zeroing_without_a_hole_is_left_to_writes():
    disk = MemoryDisk(PAGE)
    disk.pwrite(b"data", 0)
    with pytest.raises(OSError, match="not faster") as caught:
        disk.zero(4, 0, may_trim=False)
    assert caught.value.errno == errno.ENOTSUP
    assert disk.pread(4, 0) == b"data"


@pytest.mark.parametrize(("count", "offset"), [(1, PAGE), (PAGE + 1, 0), (1, -1), (-1, 0)])
@pytest.mark.parametrize("method", ["pread", "trim", "cache", "extents"])
def test_a_range_outside_the_disk_is_refused(method, count, offset):
    disk = MemoryDisk(PAGE)
    with pytest.raises(UsageError):
        list(getattr(disk, method)(count, offset))


@pytest.mark.parametrize(("count", "offset"), [(1, PAGE), (PAGE + 1, 0), (1, -1)])
def test_a_write_outside_the_disk_is_refused_whole(count, offset):
    disk = MemoryDisk(PAGE)
    with pytest.raises(UsageError):
        disk.pwrite(b"x" * count, offset)
    assert disk.allocated == 0


@pytest.mark.parametrize("size", [-1, 1 << 63])
def test_an_impossible_size_is_refused(size):
    with pytest.raises(UsageError):
        MemoryDisk(size)


def test_threads_that_write_and_trim_neighbouring_ranges_do_not_disturb_each_other():
    disk = MemoryDisk(64 * PAGE)
    failures = []

    def work(number: int) -> None:
        for turn in range(50):
            for page in range(number, 64, 4):
                disk.pwrite(bytes([number + 1]) * PAGE, page * PAGE)
            if any(disk.pread(PAGE, page * PAGE) != bytes([number + 1]) * PAGE for page in range(number, 64, 4)):
                failures.append((number, turn))
            if turn % 2:
                for page in range(number, 64, 4):
                    disk.trim(PAGE, page * PAGE)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert disk.allocated == 0

"""Two disks compared: true to the byte, whatever each knows of its zeroes, and unread where both know."""

from __future__ import annotations

import os
import random
import sys
import threading
import tracemalloc
from contextlib import ExitStack, contextmanager
from itertools import groupby

import pytest

import nbdcore
from nbdcore.disk import Difference, compare
from nbdcore.disk.differences import Differences, differing
from nbdcore.errors import CommandError, Disconnected, UsageError
from nbdcore.server import MemoryDisk
from tests.disk.disks import SilentDisk, ToldDisk, random_disk, served
from tests.interop.programs import run
from tests.interop.servers import nbdkit, qemu_nbd

PATIENCE = 20.0
SIZE = 3_000_000

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="its disks are served on unix sockets"),
    pytest.mark.usefixtures("nothing_left_behind"),
]


@contextmanager
def both(first, second, folder, **settings):
    with ExitStack() as stack:
        yield [stack.enter_context(served(disk, folder / name, **settings)) for disk, name in ((first, "a"), (second, "b"))]


def differences(first, second, granularity):
    """What differs, found block by block; the shorter one goes on with zeroes."""
    size = max(len(first), len(second))
    first, second = first.ljust(size, b"\0"), second.ljust(size, b"\0")
    blocks = [
        (at, min(at + granularity, size), first[at : at + granularity] != second[at : at + granularity])
        for at in range(0, size, granularity)
    ]
    groups = [list(group) for different, group in groupby(blocks, key=lambda block: block[2]) if different]
    return tuple(Difference(group[0][0], group[-1][1] - group[0][0]) for group in groups)


def changed(disk, seed, size):
    """The same disk, of another size, and with some bytes changed; what it tells of its zeroes stays true."""
    numbers = random.Random(seed)
    contents = bytearray(disk.contents[:size].ljust(size, b"\0"))
    for _ in range(numbers.choice([0, 1, 5])):
        at = numbers.randrange(size)
        contents[at] ^= numbers.choice([1, 255])
    zeroes = [(low, min(high, size)) for low, high in disk.zeroes if not any(contents[low:high])]
    return ToldDisk(bytes(contents), numbers.sample(zeroes, numbers.randrange(len(zeroes) + 1)))


@pytest.mark.parametrize("seed", range(8))
def test_it_finds_what_comparing_each_byte_finds(seed, short_folder):
    numbers = random.Random(seed)
    disk = random_disk(seed, SIZE)
    other = changed(disk, seed, SIZE + numbers.choice([0, 0, -1, 1, 700_001, -700_001]))
    granularity = numbers.choice([512, 4096, 65536, 1 << 20])
    wanted = differences(disk.contents, other.contents, granularity)
    with both(disk, other, short_folder) as uris:
        numbers.shuffle(uris)
        options = {"granularity": granularity, "connections": numbers.choice([1, 3]), "timeout": PATIENCE}
        found = compare(*uris, all_differences=True, **options)
        first = compare(*uris, **options)
    assert found.differences == wanted
    assert found.same == first.same == (not wanted)
    assert found.first_difference == first.first_difference == first_byte(disk.contents, other.contents, wanted)
    assert first.differences == ()


@pytest.mark.parametrize("seed", range(6))
def test_it_finds_what_differs_in_a_range(seed, short_folder):
    numbers = random.Random(seed)
    disk = random_disk(seed, SIZE)
    other = changed(disk, seed, SIZE + numbers.choice([0, 1, -700_001]))
    size = max(disk.size, other.size)
    offset = numbers.choice([1, 4096, 70_001, SIZE - 300_000])
    length = numbers.choice([None, 0, 1, 100_000, size - offset])
    end = size if length is None else offset + length
    parts = [one.contents.ljust(size, b"\0")[offset:end] for one in (disk, other)]
    wanted = tuple(Difference(one.offset + offset, one.length) for one in differences(*parts, 4096))
    with both(disk, other, short_folder) as uris:
        found = compare(*uris, offset=offset, length=length, all_differences=True, timeout=PATIENCE)
    assert (found.differences, found.same) == (wanted, not wanted)
    assert not any(end <= low for low, _ in disk.read)


def test_a_great_many_differences_take_little_memory():
    size = 64 << 10
    found = Differences()
    tracemalloc.start()
    try:
        first, borders = differing(memoryview(bytes(size)), memoryview(b"\0\1" * (size // 2)), 1)
        found.add(borders, 1 << 40)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (first, len(found), found[-1]) == (1, size // 2, Difference((1 << 40) + size - 1, 1))
    assert found[1:3] == (Difference((1 << 40) + 3, 1), Difference((1 << 40) + 5, 1))
    assert most < 24 * size // 2 + 8 * size  # of a range: a share of the two lists; and of a byte, what it is found with


def test_differences_are_equal_where_all_ranges_are(tmp_path):
    for name, contents in (("a", b"\0\0\0"), ("b", b"\1\0\1"), ("c", b"\2\0\2")):
        (tmp_path / name).write_bytes(contents)
    one, other, none = (compare(tmp_path / "a", tmp_path / name, all_differences=True, granularity=1) for name in "bca")
    assert one == other != none
    assert len({one, other, none}) == 2
    assert len({one.differences, (Difference(0, 1), Difference(2, 1))}) == 1
    assert repr(one.differences) == "<2 differences>"


def test_range_beyond_both_disks_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(bytes(10))
    (tmp_path / "b").write_bytes(bytes(20))
    assert compare(tmp_path / "a", tmp_path / "b", offset=15, length=5).same
    for wrong in ({"offset": 21}, {"offset": 15, "length": 6}, {"offset": -1}, {"length": -1}):
        with pytest.raises(UsageError, match="the disk has 20 bytes, and no"):
            compare(tmp_path / "a", tmp_path / "b", **wrong)


def test_with_strict_both_disks_have_the_whole_range(tmp_path):
    (tmp_path / "a").write_bytes(bytes(10))
    (tmp_path / "b").write_bytes(bytes(20))
    assert compare(tmp_path / "a", tmp_path / "b", strict=True, length=10).same
    assert not compare(tmp_path / "a", tmp_path / "b", strict=True, length=11).same


def first_byte(first, second, wanted):
    if not wanted:
        return None
    at = wanted[0].offset
    while first[at : at + 1].ljust(1, b"\0") == second[at : at + 1].ljust(1, b"\0"):
        at += 1
    return at


def test_what_both_know_to_be_zero_is_not_read(short_folder):
    disks = MemoryDisk(1 << 40), MemoryDisk(1 << 41)
    for disk in disks:
        disk.pread = None
    with both(*disks, short_folder) as uris:
        assert compare(*uris, timeout=PATIENCE).same


@pytest.mark.interop("nbdkit")
def test_what_one_knows_to_be_zero_is_read_of_the_other_only(tmp_path):
    size = 4 << 20
    sparse, full = tmp_path / "sparse", tmp_path / "full"
    sparse.write_bytes(b"")
    os.truncate(sparse, size)
    full.write_bytes(bytes(size))
    with logging_reads(sparse) as (one, of_sparse), logging_reads(full) as (two, of_full):
        assert compare(one, two, timeout=PATIENCE).same
    assert of_sparse.read_text().count(" Read ") == 0
    assert of_full.read_text().count(" Read ") == 2


@contextmanager
def logging_reads(path):
    log = path.with_suffix(".log")
    with nbdkit("file", str(path), f"logfile={log}", filters=["log"]) as server:
        yield server.uri, log


def test_it_stops_at_the_first_difference(short_folder):
    size = 256 << 20
    first, second = MemoryDisk(size), MemoryDisk(size)
    for disk, data in ((first, b"a"), (second, b"b")):
        for at in range(0, size, 1 << 20):
            disk.pwrite(data, at)
    told = []
    with both(first, second, short_folder) as uris:
        found = compare(*uris, progress=lambda *now: told.append(now), timeout=PATIENCE)
    assert (found.same, found.first_difference, told) == (False, 0, [])


@pytest.mark.parametrize("sizes", [(0, 0), (0, 1), (1, 0), (511, 513), (65536, 1 << 30)])
def test_the_rest_of_a_larger_disk_is_the_same_where_it_is_zero(sizes, short_folder):
    with both(*(MemoryDisk(size) for size in sizes), short_folder) as uris:
        found = compare(*uris, timeout=PATIENCE)
        assert (found.same, found.sizes) == (True, sizes)
        assert compare(*uris, strict=True, timeout=PATIENCE).same == (sizes[0] == sizes[1])


def test_a_byte_in_the_rest_of_a_larger_disk_is_a_difference(short_folder):
    with both(ToldDisk(bytes(1000), []), ToldDisk(bytes(5000) + b"x", []), short_folder) as uris:
        assert compare(*uris, timeout=PATIENCE).first_difference == 5000


def test_a_server_with_large_blocks_and_another_with_none(short_folder):
    disk = random_disk(3, 4096 * 300, smallest=4096)
    other = SilentDisk(disk.contents + b"y", [])
    with served(disk, short_folder / "a", block_sizes=(4096, 4096, 1 << 20)) as one, served(other, short_folder / "b") as two:
        found = compare(one, two, all_differences=True, granularity=512, timeout=PATIENCE)
    assert found.differences == (Difference(4096 * 300, 1),)


def test_clients_of_the_callers_stay_open_and_files_have_no_server(short_folder, tmp_path):
    disk = random_disk(4, SIZE)
    path = tmp_path / "disk"
    path.write_bytes(disk.contents)
    with served(disk, short_folder / "a") as uri, nbdcore.connect(uri, timeout=PATIENCE) as client:
        assert compare(client, path).same
        assert compare(path, client, all_differences=True).same
        with path.open("r+b") as file:
            file.write(b"\xaa" if disk.contents[0] != 0xAA else b"\xbb")
        assert compare(client, path).first_difference == 0
        assert client.pread(1, 0) == disk.contents[:1]


@pytest.mark.parametrize("granularity", [0, -4096, 3, 2 << 20])
def test_a_granularity_that_no_piece_can_be_cut_into_is_refused(granularity):
    with pytest.raises(UsageError, match="a power of two up to 1048576 bytes"):
        compare("a", "b", granularity=granularity)


def test_a_second_disk_that_cannot_be_opened_leaves_the_first_closed(short_folder, tmp_path):
    with served(ToldDisk(b"x", []), short_folder / "a") as uri, pytest.raises(FileNotFoundError):
        compare(uri, tmp_path / "nothing", timeout=PATIENCE)


class FailingDisk(SilentDisk):
    """Cannot be read in the middle."""

    def pread(self, count, offset):
        if offset >= 2 << 20:
            raise OSError(5, "bad sector")
        return super().pread(count, offset)


def test_an_error_of_either_disk_is_raised_unless_a_difference_comes_first(short_folder):
    size = 4 << 20
    with both(FailingDisk(bytes(size), []), SilentDisk(bytes(size), []), short_folder) as uris:
        for pair in (uris, uris[::-1]):
            with pytest.raises(CommandError, match="bad sector"):
                compare(*pair, timeout=PATIENCE)
    with both(FailingDisk(bytes(size), []), SilentDisk(b"x" + bytes(size - 1), []), short_folder) as uris:
        assert compare(*uris, timeout=PATIENCE).first_difference == 0


@pytest.mark.interop("nbdkit")
def test_a_server_that_dies_in_the_middle_ends_it(short_folder):
    with (
        nbdkit("pattern", "64M", "rdelay=60", filters=["delay"]) as server,
        served(ToldDisk(b"x", []), short_folder / "a") as uri,
    ):
        timer = threading.Timer(0.3, server.kill)
        timer.start()
        try:
            with pytest.raises(Disconnected):
                compare(uri, server.uri, timeout=PATIENCE)
        finally:
            timer.join()


@pytest.mark.interop("nbdkit", "qemu-nbd", "qemu-img")
def test_an_image_and_its_overlay_differ_where_was_written(tmp_path):
    base, overlay = tmp_path / "base", tmp_path / "overlay"
    base.write_bytes(os.urandom(1 << 20))
    os.truncate(base, 64 << 20)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(overlay))
    with nbdkit("file", str(base)) as one, qemu_nbd(overlay, format="qcow2") as two:
        assert compare(one.uri, two.uri, timeout=PATIENCE).same
        with nbdcore.connect(two.uri, timeout=PATIENCE) as disk:
            disk.pwrite(b"\1", 50_000_000)
            disk.zero(65536, 0)
        found = compare(one.uri, two.uri, all_differences=True, timeout=PATIENCE)
    assert found.differences == (Difference(0, 65536), Difference(50_000_000 // 4096 * 4096, 4096))

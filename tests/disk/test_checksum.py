"""A disk's checksum: the same whatever is known of its zeroes and however many connections read it, and true errors."""

from __future__ import annotations

import contextlib
import io
import os
import random
import sys
import threading
import time

import pytest

import nbdcore
from nbdcore.disk import BlockHash, checksum, checksum_of_stream
from nbdcore.errors import CommandError, Disconnected, Error, UsageError
from nbdcore.server import MemoryDisk
from tests.disk.disks import SilentDisk, ToldDisk, block_hash, random_disk, served
from tests.interop.servers import nbdkit, qemu_nbd

PATIENCE = 20.0
SIZE = 5_000_000

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="its disks are served on unix sockets"),
    pytest.mark.usefixtures("nothing_left_behind"),
]


@pytest.mark.parametrize("seed", range(10))
def test_it_depends_on_nothing_but_the_contents(seed, socket_path):
    numbers = random.Random(seed)
    disk = random_disk(seed, SIZE + numbers.randrange(1000))
    how = BlockHash(*numbers.choice([("sha256", 65536), ("md5", 4096), ("sha1", 512), ("blake2s", 2 << 20)]))
    offset = numbers.choice([0, 0, 65536, 12345])
    length = numbers.choice([None, None, 3_000_001, 0])
    range_size = numbers.choice([None, 2 << 20])
    wanted = disk.contents[offset:] if length is None else disk.contents[offset : offset + length]
    with served(disk, socket_path) as uri:
        found = checksum(
            uri,
            block_hash=how,
            offset=offset,
            length=length,
            range_size=range_size,
            connections=numbers.choice([1, 2, 5]),
            timeout=PATIENCE,
        )
    assert found.digest == block_hash(wanted, how.algorithm, how.block_size)
    assert (found.offset, found.length) == (offset, len(wanted))
    if range_size is not None:
        parts = [wanted[at : at + range_size] for at in range(0, len(wanted), range_size)]
        assert [one.digest for one in found.ranges] == [block_hash(part, how.algorithm, how.block_size) for part in parts]
        assert [(one.offset, one.length) for one in found.ranges] == [
            (offset + at * range_size, len(part)) for at, part in enumerate(parts)
        ]
    assert found.zeroes == told_zeroes(disk, offset, len(wanted), how.block_size)


def told_zeroes(disk, offset, length, block_size):
    """How many bytes need not be read: those of blocks of which the disk says that they are zero as a whole."""
    unknown = bytearray(b"?") * disk.size
    for low, high in disk.zeroes:
        unknown[low:high] = bytes(high - low)
    for at in range(0, disk.size, 512):  # the server's extents are made of sectors
        if b"?" in unknown[at : at + 512]:
            unknown[at : at + 512] = b"?" * len(unknown[at : at + 512])
    part = unknown[offset : offset + length]
    blocks = [part[at : at + block_size] for at in range(0, length, block_size)]
    return sum(len(block) for block in blocks if b"?" not in block)


def test_a_disk_of_nothing_but_zeroes_is_not_read(socket_path):
    disk = MemoryDisk(1 << 40)
    disk.pread = None
    with served(disk, socket_path) as uri:
        found = checksum(uri, block_hash=BlockHash("md5", 32 << 20), timeout=PATIENCE)
    assert found.zeroes == found.length == 1 << 40


@pytest.mark.parametrize("size", [0, 1, 511, 65536, 65537])
def test_an_odd_size_is_hashed_to_its_last_byte(size, socket_path):
    data = random.Random(size).randbytes(size)
    with served(SilentDisk(data, []), socket_path) as uri:
        assert checksum(uri, timeout=PATIENCE).digest == block_hash(data)


def test_a_server_with_large_blocks_is_asked_in_multiples_of_them(socket_path):
    disk = random_disk(3, 4096 * 500, smallest=4096)
    with served(disk, socket_path, block_sizes=(4096, 4096, 1 << 20)) as uri:
        found = checksum(uri, block_hash=BlockHash("sha256", 512), offset=777, length=1_500_000, timeout=PATIENCE)
    assert found.digest == block_hash(disk.contents[777 : 777 + 1_500_000], "sha256", 512)
    assert all(begin % 4096 == end % 4096 == 0 for begin, end in disk.read)


def test_a_client_of_the_callers_is_used_and_stays_open(socket_path):
    disk = random_disk(4, SIZE)
    with served(disk, socket_path) as uri, nbdcore.connect(uri, contexts=(), timeout=PATIENCE) as client:
        assert checksum(client).digest == checksum(client, connections=1).digest == block_hash(disk.contents)
        assert client.pread(10, 0) == disk.contents[:10]


class FailingDisk(ToldDisk):
    """Cannot read one place."""

    def pread(self, count, offset):
        if offset <= 2_500_000 < offset + count:
            raise OSError(5, "bad sector")
        return super().pread(count, offset)


def test_an_error_in_the_middle_is_raised_and_the_callers_client_lives(socket_path):
    disk = FailingDisk(bytes(SIZE), [])
    with served(disk, socket_path) as uri:
        with pytest.raises(CommandError, match="bad sector"):
            checksum(uri, timeout=PATIENCE)
        with nbdcore.connect(uri, timeout=PATIENCE) as client:
            with pytest.raises(CommandError, match="bad sector"):
                checksum(client)
            assert client.pread(1, 0) == b"\0"


class UntellingDisk(ToldDisk):
    """Knows where its data are, up to a place from which on it fails to tell."""

    def extents(self, count, offset):
        if offset >= 2_000_000:
            raise OSError(5, "the map is lost")
        yield from super().extents(min(count, 2_000_000 - offset), offset)


def test_where_the_server_fails_to_tell_everything_is_read(socket_path):
    disk = random_disk(5, SIZE)
    disk = UntellingDisk(disk.contents, [(0, 65536)] if not any(disk.contents[:65536]) else [])
    with served(disk, socket_path) as uri:
        assert checksum(uri, timeout=PATIENCE).digest == block_hash(disk.contents)


class HangingDisk(ToldDisk):
    """Answers nothing until it is told to."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.asked = threading.Event()
        self.go_on = threading.Event()

    def pread(self, count, offset):
        if offset:
            self.asked.set()
            self.go_on.wait(PATIENCE)
        return super().pread(count, offset)


def test_what_progress_raises_ends_requests_that_are_not_answered(socket_path):
    disk = HangingDisk(bytes(SIZE), [])

    def enough(done, total):
        disk.asked.wait(PATIENCE)
        raise KeyboardInterrupt

    with served(disk, socket_path) as uri:
        with pytest.raises(KeyboardInterrupt):
            checksum(uri, progress=enough, timeout=PATIENCE)
        disk.go_on.set()


def test_progress_ends_with_all_bytes(socket_path):
    told = []
    with served(random_disk(6, SIZE), socket_path) as uri:
        checksum(uri, progress=lambda *now: told.append(now), offset=1, timeout=PATIENCE)
    assert told == sorted(told)
    assert told[-1] == (SIZE - 1, SIZE - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offset": SIZE + 1}, "the disk has 5000000 bytes, and no offset 5000001"),
        ({"offset": 1, "length": SIZE}, "and no 5000000 bytes at offset 1"),
        ({"offset": -1}, "no offset -1"),
        ({"length": -1}, "no -1 bytes"),
        ({"range_size": 65537}, "a multiple of 65536 bytes"),
        ({"connections": 0}, "1 to 128"),
    ],
)
def test_a_range_that_is_not_on_the_disk_is_refused(options, message, socket_path):
    with served(ToldDisk(bytes(SIZE), []), socket_path) as uri, pytest.raises(UsageError, match=message):
        checksum(uri, timeout=PATIENCE, **options)


# ---------------------------------------------------------------------------------------------- other people's servers


@pytest.mark.interop("nbdkit")
@pytest.mark.parametrize(
    "arguments",
    [
        ("--filter=noextents",),
        ("--filter=noparallel",),
        ("--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-error-policy=error"),
        ("--no-sr",),
    ],
    ids=lambda arguments: arguments[0],
)
def test_nbdkits_disks_have_their_files_checksum(arguments, tmp_path):
    path, data = sparse_file(tmp_path)
    options = [one for one in arguments if one.startswith("--")]
    parameters = [one for one in arguments if not one.startswith("--")]
    with nbdkit(*options, "file", str(path), *parameters) as server:
        assert checksum(server.uri, timeout=PATIENCE).digest == block_hash(data)


@pytest.mark.interop("nbdkit")
def test_an_error_of_nbdkit_in_the_middle_is_raised(tmp_path):
    path, _ = sparse_file(tmp_path)
    failing = nbdkit("file", str(path), "error-pread=EIO", "error-pread-rate=60%", filters=["error"])
    with failing as server, pytest.raises(CommandError):
        checksum(server.uri, block_hash=BlockHash("sha256", 512), timeout=PATIENCE)


@pytest.mark.interop("nbdkit")
def test_a_server_that_dies_in_the_middle_ends_it(tmp_path):
    path, _ = sparse_file(tmp_path)
    with contextlib.suppress(AssertionError), nbdkit("file", str(path), "rdelay=60", filters=["delay"]) as server:
        timer = threading.Timer(0.3, server.kill)
        timer.start()
        try:
            with pytest.raises((Disconnected, Error)):
                checksum(server.uri, timeout=PATIENCE)
        finally:
            timer.join()


@pytest.mark.interop("qemu-nbd")
def test_qemus_disk_has_its_files_checksum(tmp_path):
    path, data = sparse_file(tmp_path)
    with qemu_nbd(path) as server:
        found = checksum(server.uri, timeout=PATIENCE)
    assert found.digest == block_hash(data)


# ---------------------------------------------------------------------------------------------- files and streams


def sparse_file(folder):
    path = folder / "disk"
    contents = random_disk(7, 8 << 20).contents
    with path.open("wb") as file:
        file.truncate(len(contents))
        for at in range(0, len(contents), 4096):
            if any(contents[at : at + 4096]):
                file.seek(at)
                file.write(contents[at : at + 4096])
    return path, contents


def test_a_files_holes_are_not_read(tmp_path):
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(1 << 30)
        file.seek(1 << 29)
        file.write(b"data")
    found = checksum(path)
    assert found.zeroes > found.length - (1 << 20)
    path, data = sparse_file(tmp_path)
    assert checksum(path).digest == checksum(str(path), connections=9).digest == block_hash(data)


def test_a_file_that_becomes_shorter_is_an_error_not_zeroes(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(b"data" * (10 << 20))
    with pytest.raises(OSError, match="became shorter"):
        checksum(path, connections=2, progress=lambda *_: os.truncate(path, 100))


def test_what_is_no_disk_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        checksum(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        checksum(tmp_path)
    with pytest.raises(UsageError, match="is no file or block device"):
        checksum("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="can only be read from its beginning"):
        checksum(tmp_path / "pipe")


@pytest.mark.parametrize("late", [False, True])
def test_a_client_that_was_connected_for_it_is_closed_though_its_disk_cannot_be_used(late, socket_path):
    opened = []

    def connect():
        opened.append(nbdcore.connect(uri, timeout=PATIENCE))
        if not late:
            opened[0].close()
        return opened[0]

    with served(ToldDisk(bytes(10), []), socket_path) as uri, pytest.raises(UsageError):
        checksum(connect, offset=11)
    assert opened[0].phase is nbdcore.Phase.CLOSED


class Dribble(io.RawIOBase):
    """A pipe from a slow writer: some bytes at a time."""

    def __init__(self, data):
        self._data = io.BytesIO(data)

    def readable(self):
        return True

    def readinto(self, memory):
        return self._data.readinto(memoryview(memory)[:7777])


@pytest.mark.parametrize(("offset", "length"), [(0, None), (100_000, 1_500_000), (0, 0), (2_000_000, None), (12_345, 65536)])
def test_a_streams_checksum_is_that_of_the_same_bytes_on_a_disk(offset, length):
    data = random.Random(8).randbytes(2_000_000)
    found = checksum_of_stream(Dribble(data), offset=offset, length=length, range_size=1 << 16)
    wanted = data[offset:] if length is None else data[offset : offset + length]
    assert found.digest == block_hash(wanted)
    assert [one.digest for one in found.ranges] == [block_hash(wanted[at : at + 65536]) for at in range(0, len(wanted), 65536)]


@pytest.mark.parametrize(("offset", "length"), [(11, None), (5, 6), (0, 11), (-1, None), (0, -1)])
def test_a_stream_that_ends_too_soon_is_refused(offset, length):
    with pytest.raises(UsageError, match=r"the stream ended after 10 bytes|0 or more"):
        checksum_of_stream(Dribble(b"0123456789"), offset=offset, length=length)


def test_stream_that_has_nothing_yet_is_waited_for():
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    later = threading.Timer(0.1, lambda: (os.write(writer, b"one"), time.sleep(0.05), os.write(writer, b"two"), os.close(writer)))
    later.start()
    with os.fdopen(reader, "rb", buffering=0) as stream:
        assert checksum_of_stream(stream).digest == block_hash(b"onetwo")
    later.join()

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from nbdcore import holes
from nbdcore.errors import UsageError
from nbdcore.protocol.constants import AllocationFlag, CommandFlag, CommandType, ErrorNumber
from nbdcore.server import FileDisk
from nbdcore.server.files import own_description

try:
    import fcntl
except ImportError:  # as on Windows
    fcntl = None

HOLE = AllocationFlag.HOLE | AllocationFlag.ZERO
MEBIBYTE = 1 << 20
PATIENCE = 30.0


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "disk"
    file.touch()
    os.truncate(file, 8 * MEBIBYTE)
    return file


@pytest.fixture(params=["everything", "no pread", "no SEEK_DATA", "no fallocate", "no fdatasync", "nothing"])
def disk(request, path, monkeypatch):
    """A disk on a platform that has everything, or lacks something."""
    lacking = {
        "everything": [],
        "no pread": ["pread", "pwrite"],
        "no SEEK_DATA": ["SEEK_DATA", "SEEK_HOLE"],
        "no fallocate": [],
        "no fdatasync": ["fdatasync", "posix_fadvise"],
        "nothing": ["pread", "pwrite", "preadv", "pwritev", "SEEK_DATA", "SEEK_HOLE", "fdatasync", "posix_fadvise", "O_CLOEXEC"],
    }
    for name in lacking[request.param]:
        monkeypatch.delattr(os, name, raising=False)
    if request.param in {"no fallocate", "nothing"}:
        monkeypatch.setattr(holes, "_function", lambda: None)
    disk = FileDisk(path)
    yield disk
    disk.close()
    disk.close()


def test_what_is_written_is_read_and_in_the_file(disk, path):
    disk.pwrite(b"begin", 0)
    disk.pwrite(memoryview(b"end!"), 8 * MEBIBYTE - 4)
    disk.flush()
    disk.cache(MEBIBYTE, 0)
    assert disk.size == 8 * MEBIBYTE
    assert disk.pread(7, 0) == b"begin\0\0"
    assert disk.pread(4, 8 * MEBIBYTE - 4) == b"end!"
    assert path.read_bytes()[:5] == b"begin"


def zeroed(disk, may_trim: bool) -> bool:
    """Zero the second MiB; return whether that can be done (else the server writes)."""
    try:
        disk.zero(MEBIBYTE, MEBIBYTE, may_trim=may_trim)
    except OSError as problem:
        if problem.errno == errno.ENOTSUP:
            return False
        raise
    return True


def test_trimming_and_zeroing_leave_the_rest_alone(disk):
    disk.pwrite(b"x" * (3 * MEBIBYTE), 0)
    disk.trim(MEBIBYTE, MEBIBYTE)
    for may_trim in (True, False):
        if zeroed(disk, may_trim):
            assert disk.pread(MEBIBYTE, MEBIBYTE) == bytes(MEBIBYTE)
    assert disk.pread(MEBIBYTE, 0) == b"x" * MEBIBYTE
    assert disk.pread(MEBIBYTE, 2 * MEBIBYTE) == b"x" * MEBIBYTE


def test_extents_cover_the_range_and_call_no_data_a_hole(disk):
    disk.pwrite(b"x" * MEBIBYTE, MEBIBYTE)
    offset = 1000
    for length, flags in disk.extents(8 * MEBIBYTE - 1000, offset):
        assert length > 0
        if flags & AllocationFlag.ZERO:
            assert disk.pread(length, offset) == bytes(length)
        offset += length
    assert offset == 8 * MEBIBYTE


if sys.platform == "linux" and hasattr(os, "SEEK_DATA"):  # elsewhere holes are the file system's secret, or of another size

    def test_holes_are_told_where_the_file_system_knows_them(path):
        disk = FileDisk(path)
        try:
            disk.pwrite(b"x" * MEBIBYTE, 2 * MEBIBYTE)
            assert list(disk.extents(8 * MEBIBYTE, 0)) == [(2 * MEBIBYTE, HOLE), (MEBIBYTE, 0), (5 * MEBIBYTE, HOLE)]
            assert list(disk.extents(10, 2 * MEBIBYTE - 5)) == [(5, HOLE), (5, 0)]
            disk.trim(MEBIBYTE, 2 * MEBIBYTE)
            assert list(disk.extents(8 * MEBIBYTE, 0)) == [(8 * MEBIBYTE, HOLE)]
        finally:
            disk.close()


def test_a_file_that_became_shorter_is_an_error_and_not_zeroes(disk, path):
    os.truncate(path, MEBIBYTE)
    with pytest.raises(OSError, match="the file ends at 1048576") as caught:
        disk.pread(4096, MEBIBYTE - 100)
    assert caught.value.errno == errno.EIO


def test_what_lies_beyond_the_end_of_a_file_that_became_shorter_is_no_hole(disk, path):
    os.truncate(path, MEBIBYTE)
    told = list(disk.extents(2 * MEBIBYTE, MEBIBYTE - 4096))
    assert sum(length for length, _ in told) == 2 * MEBIBYTE
    assert sum(length for length, flags in told if not flags) >= 2 * MEBIBYTE - 4096
    assert not any(flags for _, flags in disk.extents(MEBIBYTE, 2 * MEBIBYTE))


@pytest.mark.parametrize(("offset", "length"), [(MEBIBYTE, 4096), (MEBIBYTE, 131072), (MEBIBYTE - 65636, 131072)])
def test_a_client_that_reads_where_a_file_became_shorter_gets_eio_and_not_zeroes(ready, disk, path, offset, length):
    path.write_bytes(b"x" * 8 * MEBIBYTE)
    client = ready(disk)
    os.truncate(path, MEBIBYTE)
    assert client.read(offset, length).error == ErrorNumber.EIO
    assert client.read(0, 65536).contents() == b"x" * 65536


def test_a_file_opened_read_only_cannot_be_written(path):
    disk = FileDisk(path, read_only=True)
    try:
        assert disk.read_only
        with pytest.raises(OSError, match="Bad file descriptor"):
            disk.pwrite(b"x", 0)
    finally:
        disk.close()


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    with pytest.raises(UsageError):
        FileDisk(tmp_path)
    with pytest.raises(FileNotFoundError):
        FileDisk(tmp_path / "missing")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(UsageError):
            FileDisk(tmp_path / "pipe")


# ---------------------------------------------------------------------------------------------- flushing


class Storage:
    """What syncs files in place of the operating system: it tells each failure once, as Linux does."""

    def __init__(self, monkeypatch):
        self.calls = 0
        self.failures = []
        self.before = lambda: None
        monkeypatch.setattr(os, "fdatasync" if hasattr(os, "fdatasync") else "fsync", self.sync)

    def sync(self, _):
        self.calls += 1
        failure = self.failures.pop() if self.failures else 0
        self.before()
        if failure:
            raise OSError(failure, os.strerror(failure))


@pytest.fixture
def storage(monkeypatch):
    return Storage(monkeypatch)


def test_data_that_were_lost_fail_every_later_flush(ready_any, path, storage):
    disk = FileDisk(path)
    one = ready_any(disk)
    one.write(0, b"x" * 4096)
    storage.failures.append(errno.EIO)
    assert [one.ask(CommandType.FLUSH).error for _ in range(3)] == [ErrorNumber.EIO] * 3
    assert one.write(0, b"x", CommandFlag.FUA).error == ErrorNumber.EIO
    assert one.write(0, b"x").error == 0
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
        disk.flush()
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_flush_that_found_no_room_can_succeed_later(ready, path, storage, number):
    client = ready(FileDisk(path))
    storage.failures.append(number)
    assert client.ask(CommandType.FLUSH).error == ErrorNumber.ENOSPC
    assert client.ask(CommandType.FLUSH).error == 0


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_flush_beside_one_that_fails_fails_too(path, storage, number):
    disk = FileDisk(path)
    try:
        inside, go_on = threading.Event(), threading.Event()

        def hold():
            if storage.calls == 1:  # the error has been told to this flush, and no other will hear of it
                inside.set()
                assert go_on.wait(PATIENCE)

        storage.failures.append(number)
        storage.before = hold
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(disk.flush)
            assert inside.wait(PATIENCE)
            second = threads.submit(disk.flush)
            done, _ = wait([second], 0.2)  # it may end before the other only by failing
            go_on.set()
            assert isinstance(first.exception(PATIENCE), OSError)
            assert isinstance(second.exception(PATIENCE), OSError)
            assert not done
        assert storage.calls == 1
    finally:
        disk.close()


def test_flushes_that_wait_for_another_share_the_next(path, storage):
    disk = FileDisk(path)
    try:
        end = time.monotonic() + PATIENCE
        while calls_for_flushes_behind_one(disk, storage) > 2:  # one of them was late
            assert time.monotonic() < end, "it never came to pass"
    finally:
        disk.close()


def calls_for_flushes_behind_one(disk, storage) -> int:
    """Flush in eight threads while another flush is under way; return how often the operating system was asked."""
    inside, go_on = threading.Event(), threading.Event()

    def hold():
        inside.set()
        assert go_on.wait(PATIENCE)

    storage.calls, storage.before = 0, hold
    with ThreadPoolExecutor(9) as threads:
        flushes = [threads.submit(disk.flush)]
        assert inside.wait(PATIENCE)
        flushes += [threads.submit(disk.flush) for _ in range(8)]
        wait(flushes, 0.1)
        go_on.set()
        for flush in flushes:
            flush.result(PATIENCE)
    assert storage.calls >= 2  # the first does not cover what was written after it had begun
    return storage.calls


if sys.platform == "linux" and fcntl is not None:

    @pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR | os.O_DSYNC])
    def test_a_file_opened_again_has_the_first_ones_flags(path, flags):
        first = os.open(path, flags)
        want = fcntl.fcntl(first, fcntl.F_GETFL)
        again = own_description(first)
        try:
            assert fcntl.fcntl(again, fcntl.F_GETFL) == want
            assert not os.get_inheritable(again)
        finally:
            os.close(again)
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.close(first)

    def test_a_file_that_cannot_be_opened_again_stays_as_it_is(path, monkeypatch):
        def refuse(*_):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        first = os.open(path, os.O_RDWR)
        monkeypatch.setattr(os, "open", refuse)
        assert own_description(first) == first
        os.close(first)

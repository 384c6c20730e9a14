"""A disk in memory that processes share: sparse, and the same in each process that has it."""

from __future__ import annotations

import errno
import multiprocessing
import os

import pytest

import nbdcore
from nbdcore.server import SharedMemoryDisk

pytestmark = pytest.mark.skipif(
    not hasattr(os, "memfd_create") or not hasattr(os, "SEEK_DATA"), reason="other systems have no files in memory with holes"
)

SIZE = 1 << 20
PATIENCE = 30.0


@pytest.fixture
def disk():
    disk = SharedMemoryDisk(SIZE)
    yield disk
    disk.close()


def test_new_disk_is_one_hole(disk):
    assert disk.size == SIZE
    assert [*disk.extents(SIZE, 0)] == [(SIZE, 3)]
    assert disk.pread(SIZE, 0) == bytes(SIZE)


def test_what_is_written_is_there_and_takes_pages(disk):
    disk.pwrite(b"hello", 5000)
    assert disk.pread(7, 4999) == b"\0hello\0"
    assert [*disk.extents(SIZE, 0)] == [(4096, 3), (4096, 0), (SIZE - 8192, 3)]


@pytest.mark.parametrize("how", ["trim", "zero"])
def test_what_is_freed_reads_as_zeroes(disk, how):
    disk.pwrite(b"x" * 65536, 0)
    if how == "trim":
        disk.trim(65536, 0)
    else:
        disk.zero(65536, 0, may_trim=True)
    assert disk.pread(65536, 0) == bytes(65536)
    assert [*disk.extents(SIZE, 0)] == [(SIZE, 3)]


def test_zeroes_that_must_be_allocated_are_not_quick(disk):
    with pytest.raises(OSError, match="not faster") as caught:
        disk.zero(4096, 0, may_trim=False)
    assert caught.value.errno == errno.ENOTSUP


@pytest.mark.parametrize("size", [-1, 1 << 63])
def test_size_that_cannot_be_is_refused(size):
    with pytest.raises(nbdcore.UsageError):
        SharedMemoryDisk(size)


def write(disk):
    disk.pwrite(b"from another process", 4096)
    disk.close()


def test_another_process_has_the_same_disk(disk):
    process = multiprocessing.get_context("spawn").Process(target=write, args=(disk,))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0
    process.close()
    assert disk.pread(20, 4096) == b"from another process"
    multiprocessing.resource_tracker._resource_tracker._stop()

"""A disk that is a Python object, in memory, as a plugin of nbdkit's, which runs this file and calls its functions."""

from __future__ import annotations

API_VERSION = 2

disk = bytearray()


def config(key: str, value: str) -> None:
    if key == "size":
        disk.extend(bytes(int(value)))


def open(_read_only: bool) -> int:  # noqa: A001 (the name that nbdkit calls)
    return 1


def get_size(_handle: int) -> int:
    return len(disk)


def pread(_handle: int, room: bytearray, offset: int, _flags: int) -> None:
    room[:] = disk[offset : offset + len(room)]


def pwrite(_handle: int, data: bytearray, offset: int, _flags: int) -> None:
    disk[offset : offset + len(data)] = data

"""What the workers of the tests do: functions of a module, as another process can import them."""

from __future__ import annotations

import errno
import os
import signal
import time
import zlib

from nbdcore.errors import Disconnected


def checksum(disk, offset, count):
    return zlib.crc32(disk.pread(count, offset))


def read_into(disk, offset, count, memory):
    disk.pread_into(memory[:count], offset)
    return count


def connections(disk, _offset, _count):
    return disk.connections


def process(_disk, _offset, _count):
    time.sleep(0.01)
    return os.getpid()


def waits_for_others(disk, offset, _count):
    """The first range ends when a few others have: they leave a mark, each in the last bytes of the disk."""
    until = time.monotonic() + 20
    if offset:
        disk.pwrite(b"x", disk.size - 1 - offset // 4096 % 8)
    while offset == 0 and disk.pread(8, disk.size - 8).count(b"x") < 8 and time.monotonic() < until:
        time.sleep(0.001)
    return os.getpid()


def fails_in_the_middle(_disk, offset, _count):
    if offset == 4096:
        raise ValueError("not this one")
    return offset


def loses_the_connection(_disk, _offset, _count):
    raise Disconnected(errno.ENOTCONN, "the server closed the connection")


def is_killed_in_the_middle(_disk, offset, _count):
    if offset == 4096:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)


def never_ends(_disk, _offset, _count):
    time.sleep(1000)


class Peculiar(Exception):
    """Cannot be made again from what it was pickled to."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def raises_what_cannot_be_sent(_disk, _offset, _count):
    raise Peculiar("one", "other")


def returns_what_cannot_be_sent(_disk, _offset, _count):
    return lambda: None

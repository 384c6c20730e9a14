"""Holes and zeroes in files and on block devices: made without writing them, and found without reading them.

They are made by Linux's fallocate(2), which Python's `os` lacks. Everywhere else, and where the file system or device cannot do
it, that is an OSError (ENOTSUP): the caller has another way. They are found by SEEK_DATA and SEEK_HOLE, where those exist.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["allocate", "next_data", "next_hole", "punch_hole", "zero_range"]

# linux/falloc.h
_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_ZERO_RANGE = 0x10

# What kernels and file systems say when they cannot; EINVAL is a block device's word for a range that its sectors do not fit.
_CANNOT = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV})


def punch_hole(fd: int, count: int, offset: int) -> None:
    """Free `count` bytes at `offset`: they read as zeroes. Raises OSError, ENOTSUP where that cannot be done."""
    _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, count)


def zero_range(fd: int, count: int, offset: int) -> None:
    """Turn `count` bytes at `offset` into allocated zeroes. Raises OSError, ENOTSUP where that cannot be done."""
    _fallocate(fd, _ZERO_RANGE | _KEEP_SIZE, offset, count)


def allocate(fd: int, count: int, offset: int) -> None:
    """Give `count` bytes at `offset` room; what is in them stays. Raises OSError, ENOTSUP where that cannot be done."""
    _fallocate(fd, _KEEP_SIZE, offset, count)


def next_data(fd: int, offset: int) -> int | None:
    """Return where data begin, at `offset` or behind it: `offset` itself where nobody can tell, None where none follow."""
    return _seek(fd, offset, getattr(os, "SEEK_DATA", None), unknown=offset)


def next_hole(fd: int, offset: int) -> int | None:
    """Return where the next hole begins at `offset` or behind it: None where nobody can tell, and where the file has ended."""
    return _seek(fd, offset, getattr(os, "SEEK_HOLE", None), unknown=None)


def _seek(fd: int, offset: int, what: int | None, *, unknown: int | None) -> int | None:
    if what is None:
        return unknown
    try:
        return os.lseek(fd, offset, what)
    except OSError as problem:
        if problem.errno == errno.ENXIO:
            return None
        if problem.errno in {errno.EINVAL, errno.ENOTSUP}:  # block devices; file systems that do not keep it
            return unknown
        raise


def _fallocate(fd: int, mode: int, offset: int, count: int) -> None:
    import ctypes  # a fortieth of what a command takes to begin, and few of them make a hole

    function = _function()
    if function is None:
        raise OSError(errno.ENOTSUP, "no fallocate() on this platform")
    while function(fd, mode, offset, count) != 0:
        number = ctypes.get_errno()
        if number in _CANNOT:
            raise OSError(errno.ENOTSUP, os.strerror(number))
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


@functools.cache
def _function() -> Callable[..., Any] | None:
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    # glibc has the 64-bit variant under its own name, which is what matters where off_t has 32 bits; musl has only one.
    function = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)
        function.restype = ctypes.c_int
    return function

"""Linux's fallocate(2), which Python's `os` lacks: holes and zeroes in files and block devices without writing them.

Everywhere else, and where the file system or device cannot do it, OSError (ENOTSUP): the caller has another way.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["punch_hole", "zero_range"]

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


def _fallocate(fd: int, mode: int, offset: int, count: int) -> None:
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
    library = ctypes.CDLL(None, use_errno=True)
    # glibc has the 64-bit variant under its own name, which is what matters where off_t has 32 bits; musl has only one.
    function = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)
        function.restype = ctypes.c_int
    return function

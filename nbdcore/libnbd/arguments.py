"""What callers pass, checked and converted as libnbd's Python module does it.

A wrong type is a TypeError, text with a NUL a ValueError, a C int out of range an OverflowError. Where libnbd silently wraps a
number into 32 or 64 bits, it is refused here instead.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from operator import index
from typing import Any

from nbdcore.errors import UsageError
from nbdcore.libnbd.buffer import Buffer, flat, zeroes
from nbdcore.protocol.constants import MAX_STRING

_MOST_INT = (1 << 31) - 1
_MOST_32 = (1 << 32) - 1
_MOST_64 = (1 << 64) - 1


def c_int(value: object, name: str) -> int:
    """Return a C int. Raises OverflowError for one that does not fit."""
    number = index(value)  # type: ignore[arg-type]
    if not -_MOST_INT - 1 <= number <= _MOST_INT:
        raise OverflowError(f"{name}: signed integer is {'greater than maximum' if number > 0 else 'less than minimum'}")
    return number


def unsigned_32(value: object, name: str) -> int:
    """Return an unsigned number of 32 bits. Raises UsageError for one that does not fit."""
    return _unsigned(value, name, _MOST_32)


def unsigned_64(value: object, name: str) -> int:
    """Return an unsigned number of 64 bits. Raises UsageError for one that does not fit."""
    return _unsigned(value, name, _MOST_64)


def _unsigned(value: object, name: str, most: int) -> int:
    number = index(value)  # type: ignore[arg-type]
    if not 0 <= number <= most:
        raise UsageError(errno.EINVAL, f"{name}: {number} is not a number from 0 to {most}")
    return number


def private(value: object) -> int:
    """Return the low 32 bits of a number: all that libnbd's Python module keeps of private data."""
    return index(value) & _MOST_32  # type: ignore[arg-type]


def flags(value: object, known: int, name: str = "flags") -> int:
    """Return a number of flag bits. Raises UsageError (EINVAL) for bits that are not `known`."""
    number = index(value)  # type: ignore[arg-type]
    if number & ~known:
        raise UsageError(errno.EINVAL, f"{name}: invalid value for flag: {number:#x}")
    return number


def enumerated(value: object, known: range, name: str) -> int:
    """Return a number of an enumeration. Raises UsageError (EINVAL) for any other."""
    number = c_int(value, name)
    if number not in known:
        raise UsageError(errno.EINVAL, f"{name}: invalid value for parameter: {number}")
    return number


def text(value: object, name: str) -> str:
    """Return a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be str, not {type(value).__name__}")
    if "\0" in value:
        raise ValueError(f"{name}: embedded null character")
    return value


def protocol_string(value: object, name: str, what: str) -> str:
    """Return a string that the protocol can carry. Raises UsageError (ENAMETOOLONG) for a longer one."""
    string = text(value, name)
    if len(string.encode("utf-8", "surrogateescape")) > MAX_STRING:
        raise UsageError(errno.ENAMETOOLONG, f"{what} too long for the NBD protocol, which allows {MAX_STRING} bytes")
    return string


def path(value: Any) -> str:
    """Return a path given as str, bytes or an object with __fspath__."""
    name = os.fsdecode(value)
    if "\0" in name:
        raise ValueError("embedded null byte")
    return name


def strings(value: object, name: str) -> list[str]:
    """Return a list of strings; nothing but a list is taken for one."""
    if not isinstance(value, list):
        raise TypeError(f"{name}: expecting a list parameter")
    return [text(item, name) for item in value]


def callback(value: Any, name: str) -> Callable[..., Any]:
    """Return something callable."""
    if not callable(value):
        raise TypeError(f"callback parameter {name} is not callable")
    return value  # type: ignore[no-any-return]  # what it takes and returns is the program's business


def completion(value: Any) -> Callable[..., Any] | None:
    """Return a completion callback, or None."""
    return None if value is None else callback(value, "completion")


def payload(value: Any) -> memoryview:
    """Return the bytes of a synchronous write: of any bytes-like object, but not of an `nbd.Buffer`."""
    return flat(value)


def source(value: Any) -> memoryview:
    """Return the bytes of an asynchronous write: of an `nbd.Buffer`, or any buffer; memory in several pieces is copied."""
    if isinstance(value, Buffer):
        return value.readable()
    if isinstance(value, memoryview) and not value.c_contiguous:
        return memoryview(value.tobytes())
    return _view(value)


def target(value: Any, *, clear: bool) -> memoryview:
    """Return the memory that an asynchronous read fills: an `nbd.Buffer`'s, or that of any writable buffer.

    `clear` makes zeroes of what it holds, so that a failed read leaves nothing older behind.
    """
    if isinstance(value, Buffer):
        return value.writable(clear=clear)
    view = _view(value)
    if view.readonly:
        raise BufferError("Object is not writable.")
    if clear:
        view[:] = zeroes(len(view))
    return view


def _view(value: Any) -> memoryview:
    try:
        return flat(value)
    except TypeError as exc:
        raise TypeError("aio_buffer: expecting buffer or nbd.Buffer instance") from exc

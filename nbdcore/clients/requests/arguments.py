"""What callers pass in, made into what the core works with, or a UsageError that says what is wrong. It knows nothing of NBD.

What is of the wrong type is an ArgumentTypeError, which is a UsageError and Python's TypeError.
Python would find most of these mistakes by itself, deep inside and in its own words, some of them only after half a message was
packed; `True` as an offset it would take.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Iterable
from operator import index
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias

from nbdcore.errors import ArgumentTypeError, UsageError
from nbdcore.streams.waiting import NEVER, Deadline

# What a type checker takes for memory to read or write. Python has the name from 3.12 on; typing_extensions is no dependency.
if not TYPE_CHECKING:
    Buffer = bytes | bytearray | memoryview
elif sys.version_info >= (3, 12):
    from collections.abc import Buffer as Buffer  # noqa: PLC0414  # said twice, so that others may import it from here
else:
    from typing_extensions import Buffer as Buffer  # noqa: PLC0414  # said twice, so that others may import it from here

#: A path of the file system, as Python's own functions take it; its bytes are taken as well where it says so.
StrPath: TypeAlias = str | PathLike[str]
#: A socket, by a name of its own where a parameter is called `socket`.
Socket: TypeAlias = socket.socket


def deadline_after(timeout: float | None) -> Deadline:
    """Return the deadline `timeout` seconds from now; None: never."""
    if timeout is None:
        return NEVER
    try:
        return Deadline.after(timeout)
    except TypeError:
        raise ArgumentTypeError(errno.EINVAL, f"a timeout is a number of seconds, or None: not {timeout!r}") from None


def whole_numbers(call: str, count: Any, offset: Any) -> tuple[int, int]:
    """Return count and offset as plain integers, whatever their size and sign."""
    if type(count) is int and type(offset) is int:
        return count, offset
    return whole_number(call, "count", count), whole_number(call, "offset", offset)


def whole_number(call: str, name: str, value: Any) -> int:
    """Return a plain integer."""
    if isinstance(value, bool):
        raise ArgumentTypeError(errno.EINVAL, f"{call}: {name} is an integer, and {value} was given")
    try:
        return index(value)
    except TypeError:
        raise ArgumentTypeError(
            errno.EINVAL, f"{call}: {name} is an integer, not {type(value).__name__} ({value!r:.40})"
        ) from None


def text(what: str, value: Any) -> str:
    """Return a string."""
    if not isinstance(value, str):
        raise ArgumentTypeError(errno.EINVAL, f"{what} is a string, not {type(value).__name__} ({value!r:.40})")
    return value


def texts(what: str, values: Iterable[Any]) -> tuple[str, ...]:
    """Return several strings; one string alone, which Python takes for many of one letter, is a mistake."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ArgumentTypeError(errno.EINVAL, f"{what} are a list of strings, not {type(values).__name__} ({values!r:.40})")
    return tuple(text(f"each of the {what}", value) for value in values)


def bytes_view(call: str, data: Any, *, writable: bool) -> memoryview:
    """Return a flat view of the memory of a buffer, whatever its items are."""
    try:
        view = memoryview(data)
    except TypeError:
        hint = "; encode it first" if isinstance(data, str) else ""
        raise ArgumentTypeError(errno.EINVAL, f"{call}: a bytes-like object is needed, not {type(data).__name__}{hint}") from None
    if writable and view.readonly:
        raise UsageError(errno.EINVAL, f"{call}: the buffer must be writable, and this {type(data).__name__} is not")
    if not view.c_contiguous:
        raise UsageError(errno.EINVAL, f"{call}: the buffer must be contiguous")
    if view.format == "B" and view.ndim == 1:
        return view
    # memoryview.cast refuses the formats of ctypes and of foreign byte orders.
    from pickle import PickleBuffer

    return PickleBuffer(view).raw()

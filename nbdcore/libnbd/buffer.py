"""`nbd.Buffer`: memory that asynchronous commands read into and write from."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pickle import PickleBuffer
from typing import Any, SupportsIndex, overload

__all__ = ["Buffer", "flat", "zeroes"]

# Reads of 64 KiB and less, which are many, find their zeroes here.
_ZEROES = memoryview(bytes(1 << 16))


def zeroes(count: int) -> memoryview | bytes:
    """Return `count` zero bytes."""
    return _ZEROES[:count] if count <= len(_ZEROES) else bytes(count)


class Buffer:
    """A buffer of `len` bytes, zero until a command has read into it.

    It is no bytes-like object itself: `to_buffer` gives one that shares its memory, `to_bytearray` a copy.

    As in libnbd's own, the attribute `_init` is True once the memory was given to somebody, and is missing before: programs ask
    it whether the buffer holds anything.
    """

    _init: bool

    def __init__(self, len: int) -> None:  # noqa: A002 (libnbd's name)
        if len < 0:
            raise ValueError(f"the length of a buffer cannot be negative ({len})")
        try:
            self._memory: Any = bytearray(len)
        except (MemoryError, OverflowError) as exc:
            raise MemoryError(errno.ENOMEM, f"no memory for a buffer of {len} bytes") from exc
        self._fresh = True  # zero, for certain: nobody else has had its memory

    @classmethod
    def from_bytearray(cls, ba: Any) -> Buffer:
        """Return a buffer with a copy of a bytearray's contents, or of anything that `bytearray` makes one of."""
        return cls.from_buffer(bytearray(ba))

    @classmethod
    def from_buffer(cls, buf: Any) -> Buffer:
        """Return a buffer that shares the memory of a bytes-like object. Raises TypeError for anything else."""
        buffer = cls.__new__(cls)
        flat(buf)  # raises for what is no buffer; a view is held only while a command needs one, so that a bytearray can grow
        buffer._memory = buf  # noqa: SLF001 (its own class's)
        buffer._give()  # noqa: SLF001
        return buffer

    def _give(self) -> None:
        self._fresh, self._init = False, True

    def to_bytearray(self) -> bytearray:
        """Return a copy of the contents."""
        return bytearray(flat(self._memory))

    def to_buffer(self) -> Any:
        """Return the object whose memory this is, shared: the very object given to `from_buffer`, else a bytearray."""
        self._give()
        return self._memory

    def size(self) -> int:
        """Return the number of bytes."""
        return flat(self._memory).nbytes

    def __len__(self) -> int:
        return flat(self._memory).nbytes

    def __bytes__(self) -> bytes:
        return bytes(flat(self._memory))

    def __iter__(self) -> Iterator[int]:
        return iter(flat(self._memory))

    @overload
    def __getitem__(self, key: SupportsIndex) -> int: ...

    @overload
    def __getitem__(self, key: slice) -> bytearray: ...

    def __getitem__(self, key: SupportsIndex | slice) -> int | bytearray:
        """Return one byte as a number, or a slice as a copy."""
        found = flat(self._memory)[key]
        return found if isinstance(found, int) else bytearray(found)

    def __setitem__(self, key: SupportsIndex | slice, value: Any) -> None:
        """Set one byte, or as many as the slice has."""
        self._give()
        flat(self._memory)[key] = value

    def is_zero(self, offset: int = 0, size: int = -1) -> bool:
        """Return whether `size` bytes at `offset` (-1: all from there) are zero.

        Raises IndexError for a range that is not within the buffer; no bytes at all are zero wherever they are.
        """
        view = flat(self._memory)
        length = len(view)
        if size == 0:
            return True
        if not 0 <= offset <= length:
            raise IndexError("offset out of range")
        if size < -1 or size > length - offset:
            raise IndexError("size out of range")
        after = length if size == -1 else offset + size
        return not any(view[offset:after])

    # ------------------------------------------------------------------------------------------ for commands

    def readable(self) -> memoryview:
        """Return the bytes to write."""
        self._give()
        return flat(self._memory)

    def writable(self, *, clear: bool) -> memoryview:
        """Return the memory to read into. Raises BufferError where it is read-only, as that of bytes is."""
        if self._fresh:
            self._fresh, self._init = False, True  # not by a call: a program may read each block into a new buffer
            return memoryview(self._memory)
        view = flat(self._memory)
        if view.readonly:
            raise BufferError("Object is not writable.")
        if clear:
            view[:] = zeroes(len(view))
        return view


def flat(source: Any) -> memoryview:
    """Return a view of the bytes of a buffer. Raises TypeError for what is none, BufferError for memory in several pieces."""
    view = memoryview(source)
    if view.format == "B" and view.ndim == 1 and view.c_contiguous:
        return view
    if not view.c_contiguous:
        raise BufferError("memoryview: underlying buffer is not C-contiguous")
    # memoryview.cast refuses the formats of ctypes and of foreign byte orders.
    return PickleBuffer(view).raw()

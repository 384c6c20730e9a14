"""Memory for data that are read: filled through a view, then handed out as bytes without a copy.

`io.BytesIO` keeps its contents in a bytes object, and gives out writable views of it. While there is no view it can return the
object itself. So a read needs as much memory as its data, and no more. A bytearray would have to be copied to become bytes. That
takes twice the memory; to fill it and copy it took 590 us for 1 MiB, and this takes 50, since the system gives new memory slowly.

CPython 3.12.0 and 3.12.1 crash when the garbage collector finds such a view in a circle (CPython issue 111049), and a client that
is dropped in the middle of a read may be in one. There it is a bytearray all the same.
"""

from __future__ import annotations

import io
import sys


class _File(io.BytesIO):
    # Whatever ends a file calls its `close`. In Python that would be code that runs wherever the last reference to data goes, and
    # a Ctrl-C that comes in the middle of such code is lost. Where the garbage collector finds a view as well, a file cannot be
    # closed, which CPython 3.13 and later tell the program on its standard error. Memory needs no closing: this does nothing.
    close = tuple  # type: ignore[assignment]


#: what is read is copied once, and so takes twice its size for a moment
IS_COPIED = (3, 12) <= sys.version_info < (3, 12, 2)


def new_memory(count: int) -> Memory:
    """Return room for so many bytes, all zero at first."""
    return _Copied(count) if IS_COPIED else Memory(count)


class Memory:
    """Room for so many bytes, all zero at first. `new_memory` makes one.

    Args:
        count: bytes.
    """

    __slots__ = ("_count", "_file")

    def __init__(self, count: int) -> None:
        self._count = count
        self._file = _File()
        if count:
            self._file.seek(count - 1)
            self._file.write(b"\0")

    def view(self) -> memoryview:
        """Return a writable view of it all."""
        return self._file.getbuffer()

    def take(self) -> bytes:
        """Return the contents. They are copied only where somebody still has a view."""
        try:
            self._file.truncate(self._count)  # changes nothing, and is refused while there is a view
        except BufferError:
            return bytes(self._file.getbuffer())
        return self._file.getvalue()


class _Copied(Memory):
    """The same for CPython 3.12.0 and 3.12.1."""

    __slots__ = ("_data",)

    def __init__(self, count: int) -> None:
        self._data = bytearray(count)

    def view(self) -> memoryview:
        return memoryview(self._data)

    def take(self) -> bytes:
        return bytes(self._data)

"""Pipes, sockets, terminals and other things without offsets as the ends of a copy: standard input and output among them.

They are used from their beginning to their end, by the thread that copies.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import sys

from nbdcore.disk.copying.ends import UNLIMITED, Destination, End, Source
from nbdcore.disk.copying.files import number_of
from nbdcore.disk.offsets import FLAGS
from nbdcore.errors import UsageError

__all__ = ["StreamDestination", "StreamSource", "standard_input", "standard_output"]

# Milliseconds between two calls of `waiting`.
_GLANCE = 100


def standard_input() -> int:
    """Return the descriptor of standard input. Raises UsageError where this process was started without one."""
    if sys.__stdin__ is None:  # what has its number now, if anything, is something else
        raise UsageError(errno.EBADF, "standard input is closed, so there is no disk in it: send one there, or name a file")
    return sys.__stdin__.fileno()


def standard_output() -> int:
    """Return the descriptor of standard output. Raises UsageError where this process was started without one."""
    if sys.__stdout__ is None:
        raise UsageError(errno.EBADF, "standard output is closed, so a disk would be lost there: send it on, or name a file")
    return sys.__stdout__.fileno()


def _opened_anew(pipe: int) -> int:
    """Return a descriptor for the same pipe that does not block; where the system gives none, the same one.

    The one there is may be shared with other processes, for which nothing may change, and which may outlive this one.
    """
    try:
        return os.open(f"/proc/self/fd/{pipe}", os.O_WRONLY | os.O_NONBLOCK | FLAGS)
    except OSError:  # it is no Linux, or nobody reads from it any more
        return pipe


class _Stream(End):
    """What both ends share.

    Args:
        name: what messages call it.
        fd: the descriptor.
        owned: whether to close it at the end.
    """

    kind = "stream"
    in_order = True

    def __init__(self, name: str, fd: int, *, owned: bool) -> None:
        self.name = name
        # The shell may have made a standard stream of the very file that is at the other end.
        self.number: tuple[int, int] | None = number_of(fd)
        self._fd = fd
        self._owned = owned
        self._offset = 0

    def _wait(self, *, writing: bool) -> None:
        """Wait until the descriptor can be read or written, and call `waiting` meanwhile.

        Where there is no poll(), as on Windows, it returns at once: the system call waits then, and nothing is called.
        """
        if not hasattr(select, "poll"):
            return
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT if writing else select.POLLIN)
        while not poll.poll(_GLANCE):
            if self.waiting is not None:
                self.waiting()

    def close(self) -> None:
        """Close the descriptor, if it is the copy's."""
        if self._owned:
            self._owned = False
            os.close(self._fd)


class StreamSource(_Stream, Source):
    """A descriptor that is read to its end."""

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill the view as far as the stream goes. Raises OSError."""
        assert offset == self._offset, "a stream is read in order"
        got = 0
        while got < len(view):
            more = self._some(view[got:])
            if not more:
                break
            got += more
        self._offset += got
        return got

    def _some(self, view: memoryview) -> int:
        while True:
            self._wait(writing=False)
            try:
                if hasattr(os, "readv"):
                    return os.readv(self._fd, (view,))
                data = os.read(self._fd, len(view))  # Windows
            except BlockingIOError:  # another process reads from it as well, and was faster
                continue
            view[: len(data)] = data
            return len(data)


class StreamDestination(_Stream, Destination):
    """A descriptor that is written to from the beginning on.

    No write waits for a reader, since nothing could break that off but a signal; `_wait` does.
    """

    def __init__(self, name: str, fd: int, *, owned: bool) -> None:
        super().__init__(name, fd, owned=owned)
        self._writer = fd
        self._most = UNLIMITED
        kind = os.fstat(fd).st_mode
        if not hasattr(select, "poll") or not (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind) or stat.S_ISCHR(kind)):
            return  # a disk takes what it is given
        if owned:
            os.set_blocking(fd, False)
        elif stat.S_ISFIFO(kind):
            self._writer = _opened_anew(fd)
        if os.get_blocking(self._writer):
            self._most = select.PIPE_BUF  # a write of more may wait, though there is room for some

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of the view. Raises OSError."""
        assert offset == self._offset, "a stream is written in order"
        written = 0
        while written < len(view):
            if self._most != UNLIMITED:
                self._wait(writing=True)
            try:
                written += os.write(self._writer, view[written : written + self._most])
            except BlockingIOError:
                self._wait(writing=True)
        self._offset += written

    def close(self) -> None:
        """Close what was opened here, and the descriptor, if it is the copy's."""
        if self._writer != self._fd:
            os.close(self._writer)
            self._writer = self._fd
        super().close()

    def zero(self, count: int, offset: int, *, allocated: bool) -> bool:  # noqa: ARG002 (the base's signature)
        """Say that zeroes must be written."""
        return False

    def flush(self) -> None:
        """Do nothing: whoever reads the stream has it from here on."""

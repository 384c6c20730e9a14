"""The unix-socket transport: `nbd+unix:///EXPORT?socket=PATH`.

A socket is a file (`path`) or, on Linux, a name in the abstract namespace, which has no file and no permissions: written as a
path whose first character is NUL, in a URI as `%00`. A listener never takes a live server's file away: it replaces a file only
when nobody listens on it any more, and removes its own only while it still is its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from nbdcore.errors import TransportError, TransportUnavailable, UsageError, printable
from nbdcore.plugins.spec import Connecting, Listener, Transport, hookimpl
from nbdcore.streams.connecting import connect_socket
from nbdcore.streams.sockets import SocketListener, SocketStream, transport_errors
from nbdcore.uri import URI, format_uri

if TYPE_CHECKING:
    from pathlib import Path  # at run time where something is listened on only: connecting needs none, and it takes 5 ms

if not hasattr(socket, "AF_UNIX"):
    raise TransportUnavailable("this Python has no unix sockets (socket.AF_UNIX)")

#: Bytes in sun_path: 108 on Linux (unix(7)), 104 on the BSDs and macOS. A path needs one of them for its closing NUL.
_SUN_PATH = 108 if sys.platform == "linux" else 104
_HINTS = {
    errno.ENOENT: "there is no such socket: is the server running?",
    errno.ECONNREFUSED: "no server listens on it (any more)",
}


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """Where a server is on this machine.

    Attributes:
        path: the socket's file; with a leading NUL a Linux abstract name. Bytes that are no UTF-8 are surrogate escapes, as
            `os.fsdecode` makes them.
    """

    path: str

    def __post_init__(self) -> None:
        if not self.path.removeprefix("\0"):
            raise UsageError(errno.EINVAL, "a unix socket needs a path, or a name in the abstract namespace: it is empty")
        if self.abstract:
            if sys.platform != "linux":
                raise UsageError(errno.ENOTSUP, f"{self}: only Linux has abstract socket names")
        elif "\0" in self.path:
            raise UsageError(errno.EINVAL, f"{self}: a path cannot hold a NUL character")
        limit = _SUN_PATH if self.abstract else _SUN_PATH - 1
        length = len(self.name)
        if length > limit:
            raise UsageError(
                errno.ENAMETOOLONG,
                f"{self}: {length} bytes are too long for a unix socket, {limit} is the limit; choose a shorter one",
            )

    @property
    def abstract(self) -> bool:
        """Whether it is a name of the Linux abstract namespace rather than a file."""
        return self.path.startswith("\0")

    @property
    def name(self) -> bytes:
        """The name as the operating system takes it."""
        return os.fsencode(self.path)

    def __str__(self) -> str:
        # "@" for the NUL is how Linux's own tools (ss, /proc/net/unix) write it.
        return f"unix socket {printable('@' + self.path[1:] if self.abstract else self.path)}"

    def uri(self, export: str = "") -> str:
        """Return `nbd+unix:///EXPORT?socket=PATH`. Raises UsageError for an abstract name that has a second NUL."""
        return format_uri("nbd+unix", export=export, query=(("socket", self.path),))


class UnixTransport(Transport):
    """NBD over a unix socket: the usual way between programs of one machine."""

    name: ClassVar[str] = "unix"
    schemes: ClassVar[tuple[str, ...]] = ("nbd+unix",)
    parameters: ClassVar[tuple[str, ...]] = ("socket",)

    def address(self, **parts: Any) -> UnixAddress:
        """Return the address of either `path` (str, bytes or path-like) or `abstract` (str or bytes, without the NUL)."""
        if parts.keys() not in ({"path"}, {"abstract"}):
            given = ", ".join(parts) or "nothing"
            raise UsageError(errno.EINVAL, f"a unix socket is named by a path or by an abstract name; given: {given}")
        (part, value), *_ = parts.items()
        try:
            path = os.fsdecode(value)
        except TypeError as exc:
            raise UsageError(errno.EINVAL, f"the {part} of a unix socket is text, bytes or a path, not {value!r}") from exc
        return UnixAddress(path if part == "path" else "\0" + path)

    def parse(self, uri: URI) -> UnixAddress:
        """Return the address that the `socket` parameter names. The authority means nothing here (doc/uri.md) and is ignored."""
        path = uri.parameter("socket")
        if path is None:
            raise UsageError(errno.EINVAL, f"{uri}: name the socket, as in nbd+unix:///EXPORT?socket=PATH")
        return UnixAddress(path)

    def connect(self, address: UnixAddress, *, timeout: float | None = None) -> Connecting:  # noqa: ARG002 (the kernel has no limit)
        """Connect, waiting while the server's backlog is full."""
        sock = yield from connect_socket(_socket(f"connect to {address}"), address.name, str(address), _HINTS)
        return SocketStream(sock, peer=str(address))

    def listen(self, address: UnixAddress) -> Listener:
        """Listen at `address`. A file that nobody listens on any more is replaced; any other one is an error (EADDRINUSE)."""
        doing = f"listen on {address}"
        sock = _socket(doing)
        try:
            with transport_errors(doing, _listen_hints(address)):
                try:
                    sock.bind(address.name)
                except OSError as exc:
                    if exc.errno != errno.EADDRINUSE or address.abstract:
                        raise
                    _remove_stale(address)
                    sock.bind(address.name)
                sock.listen()
                return _UnixListener(sock, address)
        except BaseException:
            sock.close()
            raise


class _UnixListener(SocketListener):
    """Remembers which file is its own, by its absolute path, device and inode: the name alone may be somebody else's by now."""

    def __init__(self, sock: socket.socket, address: UnixAddress) -> None:
        from pathlib import Path

        super().__init__(sock, address)
        self._path = None if address.abstract else Path(address.path).absolute()
        self._file = None if self._path is None else _identity(self._path)

    def stream(self, sock: socket.socket, name: Any) -> SocketStream:  # noqa: ARG002 (clients of unix sockets have no names)
        return SocketStream(sock, peer=f"a client of {self.address}")

    def close(self) -> None:
        # First the file, while the open socket keeps its inode number from being given to another.
        with contextlib.suppress(OSError):
            if self._path is not None and _identity(self._path) == self._file:
                self._path.unlink()
        self._path = None
        super().close()


def _socket(doing: str) -> socket.socket:
    with transport_errors(doing):
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


def _listen_hints(address: UnixAddress) -> dict[int, str]:
    """Return what errors of listening mean: where a file cannot be made, that is the fault of its folder."""
    from pathlib import Path

    if address.abstract:
        return {errno.EADDRINUSE: "another server does; stop that one, or choose another name"}
    folder = printable(str(Path(address.path).parent))
    return {
        errno.ENOENT: f"there is no folder {folder}; make it, or choose a path in another",
        errno.ENOTDIR: f"{folder} is no folder; choose a path in another",
        errno.EACCES: f"this user may not make files in {folder}; choose a path in another folder",
        errno.EROFS: f"nothing can be written in {folder}; choose a path in another folder",
    }


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


def _remove_stale(address: UnixAddress) -> None:
    """Remove the socket file of a server that is gone. Raises TransportError (EADDRINUSE) if it is anything else."""
    from pathlib import Path

    path = Path(address.path)
    before = path.lstat()
    if not stat.S_ISSOCK(before.st_mode):
        raise TransportError(
            errno.EADDRINUSE, f"cannot listen on {address}: a file that is no socket is there; choose another path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # A full backlog must not hold us up: it is a live server's.
        probe.setblocking(False)
        answer = probe.connect_ex(address.name)
    if answer == errno.ENOENT:
        return
    if answer != errno.ECONNREFUSED or _identity(path) != (before.st_dev, before.st_ino):
        raise TransportError(
            errno.EADDRINUSE, f"cannot listen on {address}: another server does; stop that one, or choose another path"
        )
    path.unlink()


@hookimpl
def nbdcore_transports() -> Iterable[Transport]:
    """Return the one transport of this plugin."""
    return (UnixTransport(),)

"""From what the caller names to the end of a copy. Nothing is changed here but that a missing file is created, empty."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from nbdcore.clients.blocking.client import Client
from nbdcore.clients.blocking.pool import Pool
from nbdcore.clients.connect.options import ClientOptions
from nbdcore.clients.requests.arguments import StrPath
from nbdcore.disk.copying.ends import Destination, Null, NullDestination, Source
from nbdcore.disk.copying.files import FileDestination, FileSource, open_source_file
from nbdcore.disk.copying.servers import Disk, ServerDestination, ServerSource
from nbdcore.disk.copying.streams import StreamDestination, StreamSource, standard_input, standard_output
from nbdcore.disk.naming import name_of
from nbdcore.disk.offsets import FLAGS
from nbdcore.errors import UsageError
from nbdcore.protocol.constants import BASE_ALLOCATION
from nbdcore.uri import is_uri

__all__ = ["Place", "open_destination", "open_source"]

#: What can be an end of a copy: a URI or a path, "-", "null:", an open client, or the command line of a server to start.
Place: TypeAlias = str | os.PathLike[str] | Client | Pool | Sequence[str] | Null

_STANDARD = "-"
# The standard streams by their paths. Where one is closed, something else has its number, and would be copied without a word.
_INPUT = frozenset({"/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"})
_OUTPUT = frozenset({"/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"})
_NULL = "null:"
# Of a file that a copy creates, before the umask; as with nbdcopy.
_MODE = 0o644


def open_source(
    place: Place,
    *,
    connections: int,
    use_extents: bool,
    bitmap: str,
    apply: StrPath | None,
    timeout: float | None,
    options: ClientOptions,
) -> Source:
    """Open what is copied from. Raises UsageError, OSError, and what connecting raises.

    Args:
        place: what the caller named.
        connections: for a URI.
        use_extents: whether to ask a server which parts are zero.
        bitmap: the metadata context of a dirty bitmap, or "".
        apply: the map of a file of changes.
        timeout: seconds for connecting.
        options: for the client.
    """
    contexts = [name for name in (BASE_ALLOCATION if use_extents else "", bitmap) if name]
    if isinstance(place, Null) or place == _NULL:
        raise UsageError(errno.EINVAL, "null: is a destination, and no source")
    disk = _connected(place, connections=connections, contexts=contexts, timeout=timeout, options=options)
    if disk is not None:
        with _closed_on_failure(disk, place):
            if apply is not None:
                raise UsageError(errno.EINVAL, f"{_named(place)} is a server: a map of changes is for a local file")
            return ServerSource(disk, _named(place), owned=disk is not place, use_extents=use_extents, bitmap=bitmap)
    if bitmap:
        raise UsageError(errno.EINVAL, f"{place} is no server: a dirty bitmap is what a server has")
    if place == _STANDARD:
        return StreamSource("standard input", standard_input(), owned=False)
    path = os.fspath(place)  # type: ignore[arg-type] # all else was dealt with
    if path in _INPUT:
        standard_input()
    fd, mode = open_source_file(path)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        if apply is not None:
            from nbdcore.disk.copying.changes import ChangesSource

            found: Source = ChangesSource(path, fd, apply)
        elif stat.S_ISREG(mode) or stat.S_ISBLK(mode):
            found = FileSource(path, fd, use_extents=use_extents)
        else:
            found = StreamSource(path, fd, owned=True)
        undo.pop_all()
    return found


def open_destination(
    place: Place, *, connections: int, keep: bool, use_extents: bool, timeout: float | None, options: ClientOptions
) -> Destination:
    """Open what is copied to. Raises UsageError, OSError, and what connecting raises.

    Args:
        place: what the caller named.
        connections: for a URI.
        keep: whether what is in a file stays.
        use_extents: whether it will be asked which parts are zero: where it is read back.
        timeout: seconds for connecting.
        options: for the client.
    """
    if isinstance(place, Null) or place == _NULL:
        return NullDestination()
    contexts = (BASE_ALLOCATION,) if use_extents else ()
    disk = _connected(place, connections=connections, contexts=contexts, timeout=timeout, options=options)
    if disk is not None:
        with _closed_on_failure(disk, place):
            return ServerDestination(disk, _named(place), owned=disk is not place)
    if place == _STANDARD:
        fd = standard_output()
        _refuse_terminal(fd, "standard output")
        return StreamDestination("standard output", fd, owned=False)
    return _local_destination(os.fspath(place), keep=keep)  # type: ignore[arg-type] # as above


def _local_destination(path: str, *, keep: bool) -> Destination:
    if path in _OUTPUT:
        standard_output()
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | FLAGS, _MODE)
        return FileDestination(path, fd, created=True, keep=keep)
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return FileDestination(path, os.open(path, os.O_RDWR | FLAGS), keep=keep)
    fd = os.open(path, os.O_WRONLY | FLAGS)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        _refuse_terminal(fd, path)
        undo.pop_all()
    return StreamDestination(path, fd, owned=True)


def _refuse_terminal(fd: int, name: str) -> None:
    if os.isatty(fd):
        raise UsageError(errno.EINVAL, f"{name} is a terminal, and a disk is nothing to look at: send it to a file or a pipe")


@contextlib.contextmanager
def _closed_on_failure(disk: Disk, place: Place) -> Iterator[None]:
    """Close a client that was opened here, if it turns out to be of no use."""
    try:
        yield
    except BaseException:
        if disk is not place:
            disk.close()
        raise


def _connected(
    place: Place, *, connections: int, contexts: Sequence[str], timeout: float | None, options: ClientOptions
) -> Disk | None:
    """Return a connected client for a place that is a server; None for another one."""
    if isinstance(place, Client | Pool):
        return place
    options = {**options, "contexts": contexts}
    if isinstance(place, str):
        if not is_uri(place):
            return None
        if connections == 1:
            return Client(**options).connect(place, timeout=timeout)
        return Pool(connections=connections, **options).connect(place, timeout=timeout)
    if isinstance(place, os.PathLike) or not isinstance(place, Sequence):
        return None
    return Client(**options).connect_socket_activation(place, timeout=timeout)


def _named(place: Place) -> str:
    """Return what messages call a server."""
    if isinstance(place, str):
        return place
    if isinstance(place, Client | Pool):
        return name_of(place)
    return " ".join(["[", *place, "]"])  # type: ignore[misc] # a command line: all else was dealt with

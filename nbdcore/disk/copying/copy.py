"""Copy a disk: what a caller may say, checked, and both ends opened. How it is done is in `task`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Unpack

from nbdcore.clients.connect.options import CONNECTIONS, ClientOptions
from nbdcore.clients.requests.arguments import StrPath
from nbdcore.disk.blockhash import BlockHash
from nbdcore.disk.copying.opening import Place, open_destination, open_source
from nbdcore.disk.copying.result import CopyProgress, CopyResult, CopySettings
from nbdcore.disk.copying.settling import Wishes
from nbdcore.disk.copying.task import CopyTask

if TYPE_CHECKING:
    from nbdcore.disk.copying.manifest import Manifest

__all__ = ["copy"]

# Bytes of a request. Reading 1 GiB from a server of the same machine over 4 connections takes 1.3 times as long with 256 KiB.
_REQUEST_SIZE = 1 << 20
# Bytes under way at a time, of which each takes as much memory. Where an answer takes 10 ms, that is 3 GB a second.
_QUEUE_SIZE = 32 << 20
# Requests under way at a time on each connection, and the granule in which zeroes are looked for: as with nbdcopy.
_REQUESTS, _SPARSE = 64, 4096
# Where QEMU has its dirty bitmaps among the metadata contexts.
_BITMAPS = "qemu:dirty-bitmap:"


def copy(  # noqa: PLR0913 (they are nbdcopy's options, each by its name)
    source: Place,
    destination: Place,
    *,
    connections: int = CONNECTIONS,
    requests: int = _REQUESTS,
    request_size: int = _REQUEST_SIZE,
    queue_size: int = _QUEUE_SIZE,
    threads: int = 0,
    sparse: int = _SPARSE,
    allocated: bool = False,
    destination_is_zero: bool = False,
    extents: bool = True,
    flush: bool = False,
    synchronous: bool = False,
    verify: bool = False,
    checksum: BlockHash | str | None = None,
    resume: StrPath | None = None,
    bitmap: str = "",
    changes: StrPath | None = None,
    apply: StrPath | None = None,
    started: Callable[[CopySettings], object] | None = None,
    progress: Callable[[CopyProgress], object] | None = None,
    timeout: float | None = None,
    **options: Unpack[ClientOptions],
) -> CopyResult:
    """Copy a disk, from one file, block device, pipe or NBD server to another one.

    Either end is an NBD URI, a path, "-" for standard input or output, an open `Client` or `Pool`, or a list of words: the
    command line of a server to start. A destination may also be `NULL` ("null:"), which keeps nothing. A path that looks like one
    of the others is said as a `pathlib.Path`.

    A regular file is made, if it is not there, and has the source's size at the end. Until all else is written it is shorter than
    that, so that nobody takes what was left by a copy that was killed for a disk. Any other destination must be as large as the
    source; what is behind it there stays as it is. Holes and zeroes of the source become holes of the destination.

    Args:
        source: what to copy.
        destination: where to.
        connections: how many to open to a URI, if the server can do with several.
        requests: the most requests under way on each connection.
        request_size: the most bytes of one request. It is raised to the preferred block size of both ends, and lowered to what
            they take.
        queue_size: the most bytes under way, all connections together; so much memory is used at most.
        threads: the most threads that copy; 0: as many as make it faster.
        sparse: data are looked at in granules of so many bytes, and granules of zeroes are not written: 0, which is not to look,
            or a power of two of 512 or more. It is raised to the destination's preferred block size.
        allocated: have zeroes take up room at the destination.
        destination_is_zero: all of the destination reads as zeroes already, so zeroes need not be written.
        extents: ask the source which parts are zero; False: read all of it. A server is asked by base:allocation, which an open
            client must have among its contexts.
        flush: return when the destination has put all on permanent storage.
        synchronous: copy in order, one request at a time. Pipes and their kind are always copied so.
        verify: read the destination back when all is written, and compare it with the source, which is read again.
        checksum: compute the block hash of the source in the same pass: the name of an algorithm, or a `BlockHash`.
        resume: the path of a manifest. Where there is none it is written, and removed when the copy is complete; meanwhile it
            lists what the destination has put on permanent storage. Where there is one the copy goes on behind what it lists.
        bitmap: copy only what this dirty bitmap of a server names, onto a full copy: the name that qemu-nbd --bitmap has for it,
            or that of a metadata context.
        changes: where to write the map of what the bitmap names; the destination is a file of changes then, and no full copy.
        apply: the map of a file of changes, which is the source: only what it names is copied, onto a full copy.
        started: called once, when both ends are open and nothing has been changed.
        progress: called in this thread several times a second, and at the end. What it raises ends the copy.
        timeout: seconds for connecting. How long an answer may take is `command_timeout`.
        options: of the clients that are made for URIs and command lines, as of `nbdcore.Client`.

    Returns what was done. Raises UsageError, with nothing changed, for wrong arguments, and for a destination that is read-only,
    too small or a terminal; OSError and what connecting raises likewise. Raises CopyError for what fails after that; it names the
    range, and says what the destination is then: a regular file that this call created is removed, unless it can be resumed.
    Ctrl-C stops the copy likewise, and has a note that says the same.
    """
    wishes = Wishes(
        connections=connections,
        requests=requests,
        request_size=request_size,
        queue_size=queue_size,
        threads=threads,
        sparse=sparse,
        allocated=allocated,
        blank=destination_is_zero,
        flush=flush,
        in_order=synchronous,
        verify=verify,
        block_hash=BlockHash(checksum) if isinstance(checksum, str) else checksum,
        manifest=None if resume is None else _manifest(resume),
        bitmap=bitmap if ":" in bitmap or not bitmap else f"{_BITMAPS}{bitmap}",
        changes=changes,
        apply=apply,
        started=started,
        progress=progress,
    )
    with contextlib.ExitStack() as opened:
        reader = open_source(
            source,
            connections=connections,
            use_extents=extents,
            bitmap=wishes.bitmap,
            apply=apply,
            timeout=timeout,
            options=options,
        )
        opened.callback(reader.close)
        writer = open_destination(
            destination, connections=connections, keep=wishes.keep, use_extents=verify, timeout=timeout, options=options
        )
        opened.callback(writer.close)
        task = CopyTask(reader, writer, wishes)
        try:
            return task.run()
        finally:
            if not task.ended:  # a thread still uses them: to close a descriptor under it would be worse than to keep it
                opened.pop_all()


def _manifest(path: StrPath) -> Manifest:
    from nbdcore.disk.copying.manifest import Manifest  # most copies need none, nor what it stands on

    return Manifest(path)

"""What the caller wants of a copy, held against what both ends can do: refused, or settled in numbers. It changes nothing."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nbdcore.clients.requests.arguments import StrPath
from nbdcore.disk.copying.ends import Destination, End, Source
from nbdcore.disk.copying.files import FileDestination
from nbdcore.disk.copying.moving import Rules
from nbdcore.disk.copying.result import CopyEnd, CopyProgress, CopySettings
from nbdcore.errors import UsageError
from nbdcore.processes import available_processors

if TYPE_CHECKING:
    from nbdcore.disk.blockhash import BlockHash
    from nbdcore.disk.copying.manifest import Manifest

__all__ = ["SMALLEST_GRANULE", "Wishes", "checked", "settled"]

#: Bytes: a sector, the smallest block that a disk has.
SMALLEST_GRANULE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the caller wants; see `copy`."""

    connections: int
    requests: int
    request_size: int
    queue_size: int
    threads: int
    sparse: int
    allocated: bool
    blank: bool
    flush: bool
    in_order: bool
    verify: bool
    block_hash: BlockHash | None
    manifest: Manifest | None
    bitmap: str
    changes: StrPath | None
    apply: StrPath | None
    started: Callable[[CopySettings], object] | None
    progress: Callable[[CopyProgress], object] | None

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_together()

    @property
    def partial(self) -> bool:
        """Whether only parts of the disk are copied."""
        return bool(self.bitmap) or self.apply is not None

    @property
    def patches(self) -> bool:
        """Whether they are put onto a full copy."""
        return self.partial and self.changes is None

    @property
    def keep(self) -> bool:
        """Whether what is in a regular file stays."""
        return self.blank or self.patches or (self.manifest is not None and self.manifest.found)

    def _check_numbers(self) -> None:
        for name in ("connections", "requests", "queue_size"):
            if getattr(self, name) < 1:
                raise UsageError(errno.EINVAL, f"{name} must be 1 or more: not {getattr(self, name)}")
        if self.threads < 0:
            raise UsageError(errno.EINVAL, f"threads must be 0 or more: not {self.threads}")
        if self.request_size < SMALLEST_GRANULE:
            raise UsageError(errno.EINVAL, f"request_size must be {SMALLEST_GRANULE} or more: not {self.request_size}")
        sparse = self.sparse
        if sparse and (sparse < SMALLEST_GRANULE or sparse & (sparse - 1)):
            raise UsageError(errno.EINVAL, f"sparse must be 0, or a power of two of {SMALLEST_GRANULE} or more: not {sparse}")

    def _check_together(self) -> None:
        if self.changes is not None and not self.bitmap:
            raise UsageError(errno.EINVAL, "changes are what a bitmap names: name one")
        if self.bitmap and self.apply is not None:
            raise UsageError(errno.EINVAL, "a bitmap makes changes, and a map of changes applies them: use one of both")
        if self.block_hash is not None and (self.partial or self.manifest is not None):
            why = "only a part of the disk is read" if self.partial else "a copy that goes on reads a part of the disk only"
            raise UsageError(errno.EINVAL, f"there is no checksum of this copy, since {why}; compute it of the whole afterwards")
        if self.verify and (self.changes is not None or self.apply is not None):
            raise UsageError(errno.EINVAL, "a file of changes is not equal to the disk, and cannot be verified against it")


def checked(source: Source, destination: Destination, wishes: Wishes) -> None:
    """Raise UsageError where the destination cannot become what is wanted of it."""
    if destination.read_only:
        raise UsageError(errno.EROFS, f"{destination.name} is read-only: nothing can be copied to it")
    if wishes.patches and isinstance(destination, FileDestination):
        room: int | None = destination.found
    else:
        room = destination.size
    if source.number is not None and source.number == destination.number:
        raise UsageError(errno.EINVAL, f"{destination.name} is the same file as {source.name}: name another destination")
    for path in (wishes.changes, None if wishes.manifest is None else wishes.manifest.path):
        if path is not None and any(_same(path, end) for end in (source, destination)):
            raise UsageError(errno.EINVAL, f"{path} is an end of the copy, and would be overwritten: name another file")
    if source.size is not None and room is not None and room < source.size:
        said = f"{destination.name} has {room} bytes, fewer than {source.name}, which has {source.size}"
        advice = "changes are put onto a full copy" if wishes.patches else "name a destination as large as the source"
        raise UsageError(errno.ENOSPC, f"{said}: {advice}")
    if wishes.apply is not None and source.edges % destination.minimum:
        said = f"{destination.name} takes blocks of {destination.minimum} bytes, and the changes begin or end within some"
        raise UsageError(errno.EINVAL, f"{said}: apply them over a server that takes less")
    if wishes.verify:
        _check_can_verify(source, destination)
    if wishes.manifest is not None:
        wishes.manifest.check(source, destination, f"{wishes.bitmap}{'' if wishes.apply is None else wishes.apply}")


def _same(path: StrPath, end: End) -> bool:
    """Return whether an end is the file of this path."""
    return end.kind == "file" and Path(path).exists() and Path(path).samefile(end.name)


def _check_can_verify(source: Source, destination: Destination) -> None:
    for end in (source, destination):
        if end.readable is None:
            raise UsageError(errno.ESPIPE, f"{end.name} cannot be read again, so the copy cannot be verified")


def settled(
    source: Source,
    destination: Destination,
    wishes: Wishes,
    look: Callable[[int, int, memoryview | None], None] | None,
) -> tuple[Rules, CopySettings]:
    """Return how pieces are moved, and what the copy is about to do."""
    block = math.lcm(source.minimum, destination.minimum, 1 if wishes.block_hash is None else wishes.block_hash.block_size)
    size = _request_size(source, destination, wishes, block)
    granule = max(wishes.sparse, destination.preferred, block) if wishes.sparse else 0
    rules = Rules(size=size, granule=granule, allocated=wishes.allocated, look=look, remember=wishes.manifest is not None)
    have = max(source.connections, destination.connections) or wishes.connections
    in_order = wishes.in_order or source.in_order or destination.in_order
    most = min(have * wishes.requests, max(wishes.queue_size // size, 1))
    if wishes.threads:
        most = min(most, wishes.threads)
    settings = CopySettings(
        source=_shown(source),
        destination=_shown(destination),
        connections=have,
        requests=1 if in_order else most,
        request_size=size,
        sparse=granule,
        block=block,
        # Two at least: one writes while the other reads.
        threads=1 if in_order else min(max(min(have, available_processors()), 2), most),
        in_order=in_order,
    )
    return rules, settings


def _request_size(source: Source, destination: Destination, wishes: Wishes, block: int) -> int:
    most = min(source.maximum, destination.maximum)
    size = min(max(wishes.request_size, source.preferred, destination.preferred), most)
    if source.size is not None:
        size = min(size, source.size)
    up = size + -size % block
    return max(up if up <= most else size - size % block, block)


def _shown(end: End) -> CopyEnd:
    return CopyEnd(kind=end.kind, name=end.name, size=end.size, preferred=end.preferred)

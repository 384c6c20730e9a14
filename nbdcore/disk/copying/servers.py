"""NBD servers as the ends of a copy, over a client or a pool of connections."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from nbdcore.clients.blocking.client import Client
from nbdcore.clients.blocking.pool import Pool
from nbdcore.disk.copying.ends import Destination, End, Range, Source
from nbdcore.errors import Error
from nbdcore.protocol.constants import BASE_ALLOCATION

__all__ = ["Disk", "ServerDestination", "ServerSource"]

#: A connection to a server, or several.
Disk = Client | Pool

# Seconds that the server has to hang up after the goodbye.
_GOODBYE = 5.0


class _Server(End):
    """What both ends share.

    Args:
        disk: connected.
        name: what messages call it.
        owned: whether to close it at the end.
    """

    kind = "server"

    def __init__(self, disk: Disk, name: str, *, owned: bool) -> None:
        self._disk = disk
        self._owned = owned
        self.name = name
        self.size: int = disk.size
        block = disk.block_size
        self.minimum, self.preferred = block.minimum, max(block.preferred, block.minimum)
        self.maximum = max(min(block.maximum, block.payload), block.minimum)
        self.connections = disk.connections if isinstance(disk, Pool) else 1

    def cancel(self) -> None:
        """Have calls that wait in other threads fail now. A client that the caller brought is left as it is."""
        if self._owned:
            self._disk.close()

    def close(self) -> None:
        """Say goodbye, and close what the copy opened."""
        if self._owned:
            try:
                self._disk.disconnect(timeout=_GOODBYE)
            except Error:  # the server did not take leave: every request before had its own outcome
                self._disk.close()


class ServerSource(_Server, Source):
    """An export that is copied from. `use_extents`: whether to ask which parts of it are zero."""

    def __init__(self, disk: Disk, name: str, *, owned: bool, use_extents: bool) -> None:
        super().__init__(disk, name, owned=owned)
        self._use_extents = use_extents and BASE_ALLOCATION in disk.contexts

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill the view. Raises Error."""
        return self._disk.pread_into(view, offset)

    def extents(self) -> Iterator[Range]:
        """Yield what base:allocation says. Raises Error where the server cannot answer."""
        if not self._use_extents or not self.size:
            yield from Source.extents(self)
            return
        for extent in self._disk.extents(BASE_ALLOCATION):
            yield Range(extent.offset, extent.length, zero=extent.zero)


class ServerDestination(_Server, Destination):
    """An export that is copied to."""

    def __init__(self, disk: Disk, name: str, *, owned: bool) -> None:
        super().__init__(disk, name, owned=owned)
        self.read_only = disk.read_only
        self._edge = threading.Lock()

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of the view. Raises Error."""
        beyond = len(view) % self.minimum
        if not beyond:
            self._disk.pwrite(view, offset)
            return
        whole = len(view) - beyond
        if whole:
            self._disk.pwrite(view[:whole], offset)
        self._write_edge(view[whole:], offset + whole)

    def _write_edge(self, rest: memoryview, offset: int) -> None:
        """Write the end of a source that ends within a block of this: the rest of the block stays what it is."""
        with self._edge:
            block = bytearray(self._disk.pread(self.minimum, offset))
            block[: len(rest)] = rest
            self._disk.pwrite(block, offset)

    def zero(self, count: int, offset: int, *, allocated: bool) -> bool:
        """Write zeroes without sending them, where the server can do that. Raises Error."""
        if not self._disk.can_zero:
            return False
        self._disk.zero(count, offset, no_hole=allocated)
        return True

    def flush(self) -> None:
        """Wait until the server has put all on permanent storage, if it can. Raises Error."""
        if self._disk.can_flush:
            self._disk.flush()

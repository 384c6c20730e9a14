"""Checksums and comparisons for asyncio: the same work, in a thread of the loop's, that ends when the task is cancelled.

The work has threads of its own, so nothing would be gained by doing it in the loop. What a loop needs is that cancelling does not
wait for a server: the connections are closed, under whoever connects or reads, and the task goes on when no thread is left.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, Unpack

from nbdcore.clients.blocking.client import Client
from nbdcore.clients.blocking.pool import Pool
from nbdcore.clients.connect.options import CONNECTIONS, ClientOptions
from nbdcore.disk import checksums, comparing
from nbdcore.disk.blockhash import BlockHash
from nbdcore.disk.checksums import Checksum, Progress
from nbdcore.disk.comparing import Comparison
from nbdcore.disk.sources import AnySource
from nbdcore.errors import Disconnected
from nbdcore.uri import is_uri

__all__ = ["checksum", "compare"]

Value = TypeVar("Value")


async def checksum(
    source: AnySource,
    *,
    block_hash: BlockHash | None = None,
    offset: int = 0,
    length: int | None = None,
    range_size: int | None = None,
    connections: int = CONNECTIONS,
    progress: Progress | None = None,
    timeout: float | None = None,
    **options: Unpack[ClientOptions],
) -> Checksum:
    """Return the block hash of a disk. See `nbdcore.disk.checksum`; `progress` is called in the loop's thread.

    When the task is cancelled the work ends at once. A client of the caller's, which is a blocking one, stays open: what it reads
    just then is waited for.
    """
    work = _Work(connections, timeout, options)
    wanted: dict[str, Any] = {"block_hash": block_hash, "offset": offset, "length": length, "range_size": range_size}
    return await work.run(partial(checksums.checksum, work.source(source), connections=connections, **wanted), progress)


async def compare(  # noqa: PLR0913 (as `nbdcore.disk.compare`)
    first: AnySource,
    second: AnySource,
    *,
    offset: int = 0,
    length: int | None = None,
    strict: bool = False,
    all_differences: bool = False,
    granularity: int = comparing.GRANULARITY,
    connections: int = CONNECTIONS,
    progress: Progress | None = None,
    timeout: float | None = None,
    **options: Unpack[ClientOptions],
) -> Comparison:
    """Compare two disks. See `nbdcore.disk.compare`; for `progress` and cancelling see `checksum`."""
    work = _Work(connections, timeout, options)
    wanted: dict[str, Any] = {"offset": offset, "length": length, "strict": strict}
    wanted |= {"all_differences": all_differences, "granularity": granularity}
    sources = (work.source(first), work.source(second))
    return await work.run(partial(comparing.compare, *sources, connections=connections, **wanted), progress)


class _Work:
    """A call in a thread, and what must be closed for it to end."""

    def __init__(self, connections: int, timeout: float | None, options: ClientOptions) -> None:
        self._connections = connections
        self._timeout = timeout
        self._options = options
        self._opened: list[Client | Pool] = []
        self._unwanted = False

    def source(self, source: AnySource) -> AnySource:
        """Return a source that is closed when the work is not wanted any more."""
        if isinstance(source, str) and is_uri(source):
            return partial(self._connect, source)
        if callable(source) and not isinstance(source, Client | Pool):
            return partial(self._call, source)
        return source

    def _connect(self, uri: str) -> Pool:
        pool = Pool(connections=self._connections, **self._options)
        self._opened.append(pool)  # before it connects, which may take long
        self._check_wanted()
        return pool.connect(uri, timeout=self._timeout)

    def _call(self, connect: Callable[[], Client | Pool]) -> Client | Pool:
        self._check_wanted()
        client = connect()
        self._opened.append(client)
        if self._unwanted:
            client.close()  # it came too late for `_stop`
        return client

    def _check_wanted(self) -> None:
        if self._unwanted:
            raise Disconnected(errno.ECONNABORTED, "given up by the program")

    def _stop(self) -> None:
        self._unwanted = True
        for client in self._opened:
            client.close()

    async def run(self, work: Callable[..., Value], progress: Progress | None) -> Value:
        """Run it to its end; when it is cancelled, until it has ended."""
        loop = asyncio.get_running_loop()

        def told(*now: Any) -> None:
            self._check_wanted()
            if progress is not None:
                loop.call_soon_threadsafe(progress, *now)

        thread = asyncio.ensure_future(asyncio.to_thread(work, progress=told))
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            self._stop()
            await asyncio.wait([thread])
            thread.exception()  # it has been looked at: that it was given up is no news
            raise

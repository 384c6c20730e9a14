"""The calls that work on many ranges, for blocking clients: their shape only. What they do is in `batches` and `pipeline`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from operator import attrgetter
from typing import TypeVar

from nbdcore.clients.blocking.pipeline import run_many
from nbdcore.clients.blocking.several import Shared
from nbdcore.clients.requests import batches
from nbdcore.clients.requests.arguments import Buffer, deadline_after
from nbdcore.clients.requests.batches import DEPTH, SplitRequest
from nbdcore.protocol.transmission.commands import Command, Limits

_OFFSET = attrgetter("offset")

Item = TypeVar("Item")


class ManyCalls(ABC):
    """Requests for many ranges at a time. Base of every blocking client.

    They cost a fraction of as many single calls, and keep the server busy. Outcomes come in the order in which requests finish.
    Up to `depth` requests are under way at a time, and no more than that are ahead of the loop, which consumes its input bit by
    bit; so memory is bounded by `depth` requests. After an error no more is asked; what is under way is waited for and yielded,
    then the error is raised. Leaving the loop gives up what is under way, and the client stays usable. `timeout` is in seconds,
    for each step. Ctrl-C while bytes are being moved, which is most of the time in a busy loop, ends the connection.
    """

    _command_timeout: float | None

    @abstractmethod
    def _connected(self, call: str) -> Limits: ...

    @abstractmethod
    def _session(self) -> Shared: ...

    def pread_many(
        self, ranges: Iterable[tuple[int, int]], *, depth: int = DEPTH, timeout: float | None = None
    ) -> Iterator[tuple[int, bytes]]:
        """Read many ranges: `for offset, data in disk.pread_many([(offset, count), ...])`, as they come in."""
        fresh = batches.reads(self._connected("pread"), ranges)
        return self._many("pread_many", fresh, _offset_and_data, depth, timeout)

    def pread_into_many(
        self, items: Iterable[tuple[int, Buffer]], *, depth: int = DEPTH, timeout: float | None = None
    ) -> Iterator[int]:
        """Read into many (offset, buffer) pairs; yields the offset of each buffer that has been filled. See `pread_many`.

        Once the loop has ended, or was left, no buffer is written to any more.
        """
        fresh = batches.reads_into(self._connected("pread_into"), items)
        return self._many("pread_into_many", fresh, _OFFSET, depth, timeout)

    def pwrite_many(
        self, items: Iterable[tuple[int, Buffer]], *, fua: bool = False, depth: int = DEPTH, timeout: float | None = None
    ) -> Iterator[int]:
        """Write many (offset, data) pairs; yields the offset of each that has been written. See `pread_many`.

        Data must not be changed before their offset has been yielded. Ranges that overlap are written in no defined order.
        """
        fresh = batches.writes(self._connected("pwrite"), items, fua=fua)
        return self._many("pwrite_many", fresh, _OFFSET, depth, timeout)

    def zero_many(
        self,
        ranges: Iterable[tuple[int, int]],
        *,
        fua: bool = False,
        no_hole: bool = False,
        fast_zero: bool = False,
        depth: int = DEPTH,
        timeout: float | None = None,
    ) -> Iterator[int]:
        """Write zeroes to many (offset, count) ranges; yields the offset of each that is done. See `zero` and `pread_many`."""
        fresh = batches.zeroes(self._connected("zero"), ranges, fua=fua, no_hole=no_hole, fast_zero=fast_zero)
        return self._many("zero_many", fresh, _OFFSET, depth, timeout)

    def trim_many(
        self, ranges: Iterable[tuple[int, int]], *, fua: bool = False, depth: int = DEPTH, timeout: float | None = None
    ) -> Iterator[int]:
        """Trim many (offset, count) ranges; yields the offset of each that is done. See `trim` and `pread_many`."""
        return self._many("trim_many", batches.trims(self._connected("trim"), ranges, fua=fua), _OFFSET, depth, timeout)

    def _many(
        self,
        call: str,
        fresh: Generator[Command],
        pick: Callable[[Command | SplitRequest], Item],
        depth: int,
        timeout: float | None,
    ) -> Iterator[Item]:
        seconds = self._command_timeout if timeout is None else timeout
        deadline_after(seconds)  # a wrong one shows now, not at the first step
        return run_many(self._session(), fresh, pick, depth=batches.checked_depth(call, depth), seconds=seconds, held=self)


def _offset_and_data(done: Command | SplitRequest) -> tuple[int, bytes]:
    return done.offset, done.result()

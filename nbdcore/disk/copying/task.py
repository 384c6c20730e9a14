"""One copy, between two ends that are open: check them, plan, move, and end in order.

    source ── extents ──▶ plan ── pieces ──▶ threads ── read, look for zeroes, write ──▶ destination

**Never finished in looks only.** A regular file has the source's size only when everything else is written: the piece at the end
of the disk is moved last, when all threads are done, and zeroes at the end become part of the file by its size alone. When the
copy fails, a file that it created is removed; whatever else the destination is, the error says that it is incomplete.
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nbdcore.disk.copying import plan
from nbdcore.disk.copying.ends import Destination, End, Range, Source
from nbdcore.disk.copying.errors import CopyError, described
from nbdcore.disk.copying.moving import Crew, Mover, Rules
from nbdcore.disk.copying.result import CopyEnd, CopyProgress, CopyResult, CopySettings
from nbdcore.errors import Error, UsageError

__all__ = ["CopyTask", "Wishes"]

# Seconds that threads get to end after an error, where what they wait for cannot be broken off.
_PATIENCE = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the caller wants; see `copy`."""

    requests: int
    request_size: int
    queue_size: int
    threads: int
    sparse: int
    allocated: bool
    blank: bool
    flush: bool
    in_order: bool
    started: Callable[[CopySettings], object] | None
    progress: Callable[[CopyProgress], object] | None


class CopyTask:
    """One copy.

    Attributes:
        ended: whether no thread of the copy uses the ends any more.
    """

    def __init__(self, source: Source, destination: Destination, wishes: Wishes, connections: int) -> None:
        self.ended = True
        self._source = source
        self._destination = destination
        self._wishes = wishes
        self._block = math.lcm(source.minimum, destination.minimum)
        self._rules = self._settled_rules()
        self._settings = self._settled(connections)
        self._movers: list[Mover] = []
        self._began = time.monotonic()

    def run(self) -> CopyResult:
        """Copy. Raises as `copy` does."""
        try:
            self._check()
            if self._wishes.started is not None:
                self._wishes.started(self._settings)
        except BaseException:
            self._discard()
            raise
        try:
            size = self._move()
            if self._wishes.flush:
                self._flush()
            self._tell(size)
        except CopyError as problem:
            problem.message = f"{problem.message}; {self._leave()}"
            raise
        except BaseException as problem:
            problem.add_note(self._leave())
            raise
        copied, zeroes = self._counts()
        return CopyResult(size=size, copied=copied, zeroes=zeroes, seconds=time.monotonic() - self._began)

    # ------------------------------------------------------------------------------------------ before

    def _settled_rules(self) -> Rules:
        source, destination, wishes = self._source, self._destination, self._wishes
        size = min(max(wishes.request_size, source.preferred, destination.preferred), source.maximum, destination.maximum)
        if source.size is not None:
            size = min(size, source.size)
        size = max(size + -size % self._block, self._block)
        if size > min(source.maximum, destination.maximum):
            size -= self._block
        granule = max(wishes.sparse, destination.preferred, self._block) if wishes.sparse else 0
        return Rules(size=size, granule=granule, allocated=wishes.allocated)

    def _settled(self, connections: int) -> CopySettings:
        source, destination, wishes = self._source, self._destination, self._wishes
        have = max(source.connections, destination.connections) or connections
        in_order = wishes.in_order or source.in_order or destination.in_order
        most = have * min(wishes.requests, max(wishes.queue_size // self._rules.size, 1))
        if wishes.threads:
            most = min(most, wishes.threads)
        return CopySettings(
            source=_shown(source),
            destination=_shown(destination),
            connections=have,
            requests=1 if in_order else most,
            request_size=self._rules.size,
            sparse=self._rules.granule,
            threads=1 if in_order else min(max(have, 2), most),
            in_order=in_order,
        )

    def _check(self) -> None:
        """Raise UsageError where the destination cannot become a copy of the source."""
        source, destination = self._source, self._destination
        if destination.read_only:
            raise UsageError(errno.EROFS, f"{destination.name} is read-only: nothing can be copied to it")
        if source.size is not None and destination.size is not None and destination.size < source.size:
            raise UsageError(
                errno.ENOSPC,
                f"{destination.name} has {destination.size} bytes, fewer than {source.name}, which has {source.size}: "
                "name a destination as large as the source",
            )

    # ------------------------------------------------------------------------------------------ the copy

    def _move(self) -> int:
        """Move everything. Returns how many bytes the source has."""
        source, destination = self._source, self._destination
        try:
            destination.begin(source.size)
        except OSError as problem:
            raise CopyError(problem.errno or 0, f"cannot begin to write {destination.name}: {described(problem)}") from problem
        destination.blank = destination.blank or self._wishes.blank
        if source.size is None:
            size = self._move_stream()
        else:
            size = source.size
            self._move_disk(size)
        try:
            destination.finish(size)
        except OSError as problem:
            raise CopyError(problem.errno or 0, f"cannot give {destination.name} its size: {described(problem)}") from problem
        return size

    def _move_disk(self, size: int) -> None:
        last: list[Range] = []
        pieces = plan.but_last(self._pieces(size), last)
        if self._settings.in_order:
            mover = self._mover()
            for piece in pieces:
                mover.move(piece)
                self._tell(size)
        else:
            self._move_side_by_side(pieces, size)
            mover = self._movers[0]
        for piece in last:
            mover.move(piece)

    def _move_side_by_side(self, pieces: Iterator[Range], size: int) -> None:
        crew = Crew(pieces, self._mover, self._settings.threads, self._settings.requests)
        try:
            crew.run(lambda: self._tell(size))
        except BaseException:
            if not crew.wait(0):
                self._source.cancel()
                self._destination.cancel()
                self.ended = crew.wait(_PATIENCE)
            raise

    def _pieces(self, size: int) -> Iterator[Range]:
        try:
            yield from plan.cut(plan.aligned(self._source.extents(), self._block, size), self._rules.size)
        except (OSError, Error) as problem:
            said = f"{self._source.name} does not tell which parts of it hold data: {described(problem)}"
            raise CopyError(
                problem.errno or 0, f"{said}; to copy without asking, say extents=False, or --no-extents"
            ) from problem

    def _move_stream(self) -> int:
        """Move what has no size before it ends. Returns how many bytes it had."""
        mover = self._mover()
        room = self._destination.size
        at = 0
        while room is None or at < room:
            count = self._rules.size if room is None else min(self._rules.size, room - at)
            got = mover.move(Range(at, count, zero=False))
            at += got
            self._tell(None)
            if got < count:
                return at
        if mover.has_more(at):
            said = f"{self._source.name} has more bytes than {self._destination.name}, which has {room}"
            raise CopyError(errno.ENOSPC, said)
        return at

    def _mover(self) -> Mover:
        mover = Mover(self._source, self._destination, self._rules)
        self._movers.append(mover)
        return mover

    # ------------------------------------------------------------------------------------------ telling, and the end

    def _counts(self) -> tuple[int, int]:
        counts = [mover.counts for mover in self._movers]
        return sum(count.copied for count in counts), sum(count.zeroes for count in counts)

    def _tell(self, size: int | None) -> None:
        if self._wishes.progress is None:
            return
        copied, zeroes = self._counts()
        seconds = time.monotonic() - self._began
        self._wishes.progress(CopyProgress(size=size, done=copied + zeroes, copied=copied, zeroes=zeroes, seconds=seconds))

    def _flush(self) -> None:
        try:
            self._destination.flush()
        except (OSError, Error) as problem:
            raise CopyError(problem.errno or 0, f"cannot flush {self._destination.name}: {described(problem)}") from problem

    def _leave(self) -> str:
        """The copy has failed: leave nothing that looks finished. Returns what the destination is now."""
        name = self._destination.name
        return f"{name}, which this copy had made, is removed" if self._discard() else f"{name} is incomplete"

    def _discard(self) -> bool:
        """Remove what the copy created. Returns whether it is gone."""
        if not self._destination.created:
            return False
        try:
            self._destination.discard()
        except OSError:
            return False
        return True


def _shown(end: End) -> CopyEnd:
    return CopyEnd(kind=end.kind, name=end.name, size=end.size, preferred=end.preferred)

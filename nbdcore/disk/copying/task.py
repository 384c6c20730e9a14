"""One copy, between two ends that are open: check them, plan, move, and end in order.

    source ── extents ──▶ plan ── pieces ──▶ threads ── read, look for zeroes, write ──▶ destination

**Never finished in looks only.** A regular file has the source's size only when everything else is written: the piece at the end
of the disk is moved last, when all threads are done, and zeroes at the end become part of the file by its size alone. When the
copy fails, a file that it created is removed, unless a manifest says how to go on; whatever else the destination is, the error
says that it is no complete copy.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Generator, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from nbdcore.disk.copying import plan
from nbdcore.disk.copying.ends import Destination, Range, Source
from nbdcore.disk.copying.errors import CopyError, described
from nbdcore.disk.copying.moving import Crew, Mover
from nbdcore.disk.copying.result import CopyProgress, CopyResult
from nbdcore.disk.copying.settling import Wishes, checked, settled
from nbdcore.errors import Disconnected, Error

if TYPE_CHECKING:
    from nbdcore.disk.blockhash import BlockHash
    from nbdcore.disk.copying.digests import Digests

__all__ = ["CopyTask"]

# Seconds that threads get to end after an error: by themselves, since a piece takes no longer as a rule, and then, when what they
# wait for has been broken off.
_GRACE, _PATIENCE = 0.5, 5.0


class CopyTask:
    """One copy.

    Attributes:
        ended: whether no thread of the copy uses the ends any more.
    """

    def __init__(self, source: Source, destination: Destination, wishes: Wishes) -> None:
        self.ended: bool = True
        self._source = source
        self._destination = destination
        self._wishes = wishes
        self._digests = None if wishes.block_hash is None else _digests(wishes.block_hash)
        self._manifest = wishes.manifest
        self._resumed = 0
        self._differs = False  # whether the destination was read back, and is not equal
        self._planned: list[Range] = []  # where only a part of the disk is copied: all of it
        self._total = source.size
        source.waiting = destination.waiting = self._tell
        self._movers: list[Mover] = []
        self._began = time.monotonic()

    def run(self) -> CopyResult:
        """Copy. Raises as `copy` does."""
        wishes = self._wishes
        try:
            checked(self._source, self._destination, wishes)
            self._rules, self._settings = settled(
                self._source, self._destination, wishes, None if self._digests is None else self._digests.add
            )
            if wishes.started is not None:
                wishes.started(self._settings)
        except BaseException:
            self._discard()
            raise
        try:
            size = self._move()
            self._conclude(size)
            verified = self._verify() if wishes.verify else 0
        except CopyError as problem:
            problem.message = f"{problem.message}; {self._leave()}"
            raise
        except BaseException as problem:
            problem.add_note(self._leave())
            raise
        if self._manifest is not None:
            self._manifest.remove()
        copied, zeroes = self._counts()
        return CopyResult(
            size=size,
            copied=copied,
            zeroes=zeroes,
            resumed=self._resumed,
            unchanged=size - copied - zeroes - self._resumed,
            seconds=time.monotonic() - self._began,
            digest="" if self._digests is None else self._digests.checksum(),
            verified=verified,
        )

    # ------------------------------------------------------------------------------------------ the copy

    def _move(self) -> int:
        """Move everything. Returns how many bytes the source has."""
        source, destination = self._source, self._destination
        with self._doing("begin to write"):
            if self._wishes.changes is not None:  # of an earlier file of changes: what is written now must not be taken for that
                Path(self._wishes.changes).unlink(missing_ok=True)
            destination.begin()
            destination.blank = destination.blank or self._wishes.blank
            if self._manifest is not None:
                self._manifest.write((), destination)
                self._resumed = self._manifest.finished.total()
        if source.size is None:
            size = self._move_stream()
        else:
            size = source.size
            self._move_disk()
        if not self._wishes.patches:
            with self._doing("give its size to"):
                destination.finish(size)
        return size

    def _move_disk(self) -> None:
        last: list[Range] = []
        pieces = plan.but_last(self._pieces(), last)
        if not self._settings.in_order:
            self._move_side_by_side(pieces)
        mover = self._mover()
        for piece in chain(pieces, last):
            mover.move(piece)
            self._glance()
        mover.release()

    def _move_side_by_side(self, pieces: Generator[Range]) -> None:
        crew = Crew(pieces, self._mover, self._settings.threads, self._settings.requests)
        self.ended = False
        try:
            crew.run(self._glance)
            self.ended = True
        except BaseException:
            self._stop(crew)
            if self.ended:
                pieces.close()
            raise

    def _stop(self, crew: Crew) -> None:
        """Wait for the threads to end. A second Ctrl-C breaks off what they wait for, a third one leaves them behind."""
        try:
            self.ended = crew.wait(_GRACE)
        finally:
            if not self.ended:
                self._source.cancel()
                self._destination.cancel()
                self.ended = crew.wait(_PATIENCE)

    def _pieces(self) -> Iterator[Range]:
        size = self._source.size
        assert size is not None, "a stream has no plan"
        try:
            ranges = plan.aligned(self._source.extents(), self._settings.block, size)
            if self._wishes.partial:
                self._planned = [*ranges]
                self._total = sum(one.count for one in self._planned)
                ranges = iter(self._planned)
            if self._manifest is not None:
                ranges = self._manifest.finished.left_of(ranges)
            yield from plan.cut(ranges, self._rules.size)
        except (OSError, Error) as problem:
            said = f"{self._source.name} does not tell which parts of it hold data: {described(problem)}"
            if not isinstance(problem, Disconnected):
                said += "; to copy without asking, say extents=False, or --no-extents"
            raise CopyError(problem.errno or 0, said) from problem

    def _move_stream(self) -> int:
        """Move what has no size before it ends. Returns how many bytes it had."""
        mover = self._mover()
        room = self._destination.size
        at = 0
        while room is None or at < room:
            count = self._rules.size if room is None else min(self._rules.size, room - at)
            got = mover.move(Range(at, count, zero=False))
            at += got
            self._glance()
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

    def _conclude(self, size: int) -> None:
        """All has been moved: flush, if that is wanted, and write the map of a file of changes."""
        if self._manifest is not None:  # when it is gone nothing is left to do: so all is on permanent storage before that
            with self._doing("flush"):
                self._list_finished()
        elif self._wishes.flush:
            with self._doing("flush"):
                self._destination.flush()
        if self._wishes.changes is not None:
            from nbdcore.disk.copying.changes import write_map

            try:
                write_map(self._wishes.changes, size=size, bitmap=self._wishes.bitmap, ranges=self._planned)
            except OSError as problem:
                raise CopyError(problem.errno or 0, f"cannot write {self._wishes.changes}: {described(problem)}") from problem
        self._tell()

    def _verify(self) -> int:
        from nbdcore.disk.copying.verifying import verify

        try:
            return verify(self._source, self._destination, self._settings.connections)
        except CopyError as problem:
            self._differs = problem.offset is not None
            if self._manifest is not None and self._differs:  # all is listed: to go on from there would end at once, in success
                self._manifest.remove()
            raise

    # ------------------------------------------------------------------------------------------ telling, and the end

    def _counts(self) -> tuple[int, int]:
        counts = [mover.counts for mover in self._movers]
        return sum(count.copied for count in counts), sum(count.zeroes for count in counts)

    def _glance(self) -> None:
        """What is done now and then while pieces are moved."""
        self._tell()
        if self._manifest is not None and self._manifest.due():
            with self._doing("keep a manifest for"):
                self._list_finished()

    def _tell(self) -> None:
        if self._wishes.progress is None:
            return
        copied, zeroes = self._counts()
        done, seconds = copied + zeroes + self._resumed, time.monotonic() - self._began
        now = CopyProgress(size=self._total, done=done, copied=copied, zeroes=zeroes, seconds=seconds)
        self._wishes.progress(now)

    def _list_finished(self) -> None:
        """List in the manifest what has been moved."""
        assert self._manifest is not None, "there is one"
        finished = []
        for mover in self._movers[:]:
            waiting = mover.counts.finished
            finished += [waiting.popleft() for _ in range(len(waiting))]
        self._manifest.write(finished, self._destination)

    @contextlib.contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        """Give what the destination raises outside of any range the shape of a copy's error."""
        try:
            yield
        except CopyError:
            raise
        except (OSError, Error) as problem:
            raise CopyError(problem.errno or 0, f"cannot {what} {self._destination.name}: {described(problem)}") from problem

    def _leave(self) -> str:
        """The copy has failed: leave nothing that looks finished. Returns what the destination is now."""
        name = self._destination.name
        if self._manifest is not None and not self._differs:
            if self.ended:  # else a thread still waits for an end, and a flush might wait as well
                with contextlib.suppress(OSError, Error):  # what it lists already stays true
                    self._list_finished()
            return f"{name} is no complete copy; the same copy with the manifest {self._manifest.path} goes on from here"
        return f"{name}, which this copy had made, is removed" if self._discard() else f"{name} is no complete copy"

    def _discard(self) -> bool:
        """Remove what the copy created. Returns whether it is gone."""
        if not self._destination.created:
            return False
        try:
            self._destination.discard()
        except OSError:
            return False
        return True


# What most copies do without is imported when it is wanted: a small copy takes no longer than to import all.
def _digests(block_hash: BlockHash) -> Digests:
    from nbdcore.disk.copying.digests import Digests

    return Digests(block_hash)

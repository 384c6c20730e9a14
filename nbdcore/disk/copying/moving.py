"""The moving of a copy: threads that take pieces of the plan, and read, look for zeroes, and write each.

A thread has one buffer and one request under way. It reads into the buffer and writes from it, so data are in the processor's
cache in between, and the interpreter's lock is free while the kernel moves them. At first there is a thread for each processor,
and none without a connection. Where pieces take long twice as many are tried, up to the caller's limits, and kept where that is
faster: so over a slow network many requests are under way, and on a fast machine no more threads than do something.

The caller's thread waits, and tells of progress. After the first error nothing more is begun.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from nbdcore.disk.copying import zeroes
from nbdcore.disk.copying.ends import Destination, Range, Source
from nbdcore.disk.copying.errors import failed
from nbdcore.errors import Error

__all__ = ["Counts", "Crew", "Mover", "Rules"]

# Seconds for a piece, from which on it is worth a try to have more under way: 1 MiB from one server to another takes 4 ms.
_LONG = 0.008
# Pieces for each thread by which a number of threads is judged, and how much faster twice as many must be.
_TRIAL, _WORTH_IT = 4, 1.2
# Seconds between two looks at how far the threads are.
_GLANCE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How pieces are moved.

    Attributes:
        size: the most bytes of a piece of data.
        granule: data are looked at for zeroes in granules of so many bytes; 0: not at all.
        allocated: whether zeroes must take up room at the destination.
        look: called with each piece, from any thread: its offset, its length, and its data, or None for zeroes.
        remember: whether to list the pieces that are moved.
    """

    size: int
    granule: int
    allocated: bool
    look: Callable[[int, int, memoryview | None], None] | None = None
    remember: bool = False


@dataclass(slots=True)
class Counts:
    """What one mover has done.

    Attributes:
        copied, zeroes: in bytes; see `CopyResult`.
        finished: offset and length of pieces, where they are to be remembered; whoever reads them takes them out.
    """

    copied: int = 0
    zeroes: int = 0
    finished: deque[tuple[int, int]] = field(default_factory=deque)


class Mover:
    """Moves one piece after the other, in a buffer of its own."""

    def __init__(self, source: Source, destination: Destination, rules: Rules) -> None:
        self._source = source
        self._destination = destination
        self._rules = rules
        self._nothing = b""
        self._memory = bytearray(rules.size + -rules.size % max(rules.granule, 8))
        self._view = memoryview(self._memory)
        self.counts: Counts = Counts()

    def move(self, piece: Range) -> int:
        """Move a piece. Returns its length; less where a source that is read in order has ended. Raises CopyError."""
        if piece.zero:
            if self._rules.look is not None:
                self._rules.look(piece.offset, piece.count, None)
            self._zero(piece.offset, piece.count)
            got = piece.count
        else:
            got = self._copy(piece.offset, piece.count)
        if self._rules.remember:
            self.counts.finished.append((piece.offset, got))
        return got

    def release(self) -> None:
        """Free the buffer: nothing more is moved."""
        self._view.release()
        self._memory = bytearray()

    def has_more(self, offset: int) -> bool:
        """Return whether a source that is read in order goes on at `offset`. Raises CopyError."""
        try:
            return bool(self._source.read_into(self._view[:1], offset))
        except (OSError, Error) as problem:
            raise failed("read", 1, offset, self._source.name, problem) from problem

    def _copy(self, offset: int, count: int) -> int:
        view = self._view if count == len(self._view) else self._view[:count]
        try:
            got = self._source.read_into(view, offset)
        except (OSError, Error) as problem:
            raise failed("read", count, offset, self._source.name, problem) from problem
        if got < count:
            view = view[:got]
        if self._rules.look is not None:
            self._rules.look(offset, got, view)
        granule = self._rules.granule
        if not granule:
            self._write(view, offset)
            return got
        for at, length, zero in zeroes.runs(self._memory, got, granule):
            if zero:
                self._zero(offset + at, length)
            else:
                self._write(view[at : at + length], offset + at)
        return got

    def _write(self, view: memoryview, offset: int) -> None:
        try:
            self._destination.write(view, offset)
        except (OSError, Error) as problem:
            raise failed("write", len(view), offset, self._destination.name, problem) from problem
        self.counts.copied += len(view)

    def _zero(self, offset: int, count: int) -> None:
        """Have a range of the destination read as zeroes: it does so, or it is made to, or they are written."""
        destination, allocated = self._destination, self._rules.allocated
        if not destination.blank or allocated:
            whole = count - count % destination.minimum
            try:
                done = whole if whole and destination.zero(whole, offset, allocated=allocated) else 0
            except (OSError, Error) as problem:
                raise failed("zero", whole, offset, destination.name, problem) from problem
            self._write_zeroes(offset + done, count - done)
        self.counts.zeroes += count

    def _write_zeroes(self, offset: int, count: int) -> None:
        copied = self.counts.copied
        while count:
            if not self._nothing:
                self._nothing = bytes(self._rules.size)
            part = min(count, self._rules.size)
            self._write(memoryview(self._nothing)[:part], offset)
            offset, count = offset + part, count - part
        self.counts.copied = copied


class Crew:
    """All threads of one copy.

    Args:
        pieces: the plan; threads take from it in turn.
        mover: makes a mover for a thread.
        threads: how many to begin with.
        most: how many there may be, where answers take long.
    """

    def __init__(self, pieces: Iterator[Range], mover: Callable[[], Mover], threads: int, most: int) -> None:
        self._pieces = pieces
        self._mover = mover
        self._pace = _Pace(threads, most)
        self._failure: BaseException | None = None
        self._stopped = False
        self._plan = threading.Lock()
        self._idle = threading.Condition()
        self._working = 0

    def run(self, glance: Callable[[], None]) -> None:
        """Move all pieces, and call `glance` now and then. Raises the first error; threads may go on for a moment, see `wait`."""
        try:
            self._start(self._pace.threads)
            while not self.wait(_GLANCE) and self._failure is None:
                glance()
        finally:
            self._stopped = True
        if self._failure is not None:
            raise self._failure

    def wait(self, seconds: float) -> bool:
        """Wait until every thread has ended. Returns whether that is so."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._working, seconds)

    def _start(self, threads: int) -> None:
        """Start more threads. Raises RuntimeError where the system has no more, and there is none yet."""
        for _ in range(threads):
            thread = threading.Thread(target=self._work, args=(self._mover(),), name="nbdcore-copy", daemon=True)
            with self._idle:
                self._working += 1
            try:
                thread.start()
            except RuntimeError:
                with self._idle:
                    self._working -= 1
                    if not self._working:
                        raise
                return

    def _work(self, mover: Mover) -> None:
        try:
            while not self._stopped:
                with self._plan:
                    piece = next(self._pieces, None)
                if piece is None:
                    break
                mover.move(piece)
                more = 0 if piece.zero else self._pace.more(piece.count)
                if more < 0:
                    break
                self._start(more)
        except BaseException as problem:  # noqa: BLE001 (raised again by the thread that waits)
            self._stopped = True
            with self._idle:  # not `_plan`, which another thread has while it waits for the source to tell its extents
                self._failure = self._failure or problem
        finally:
            mover.release()
            with self._idle:
                self._working -= 1
                self._idle.notify_all()


class _Pace:
    """Finds out how many threads are enough: twice as many are tried where pieces take long, and kept where that was faster."""

    def __init__(self, threads: int, most: int) -> None:
        self.threads: int = threads
        self._most = most
        self._settled = threads >= most
        self._superfluous = 0
        self._lock = threading.Lock()
        self._since = time.monotonic()
        self._moved = self._pieces = 0
        self._before = (0.0, threads)  # bytes a second, and by how many threads

    def more(self, count: int) -> int:
        """A piece of so many bytes is there. Returns how many more threads to start; -1: the one that asks is to end."""
        if self._settled and not self._superfluous:
            return 0
        with self._lock:
            if self._settled:
                ends = min(self._superfluous, 1)
                self._superfluous -= ends
                return -ends
            self._moved += count
            self._pieces += 1
            return self._judged() if self._pieces >= _TRIAL * self.threads else 0

    def _judged(self) -> int:
        now = time.monotonic()
        seconds = max(now - self._since, 1e-6)
        rate, long = self._moved / seconds, seconds * self.threads / self._pieces > _LONG
        self._since, self._moved, self._pieces = now, 0, 0
        before, fewer = self._before
        if not long or rate < _WORTH_IT * before:
            self._settled = True
            self._superfluous = self.threads - fewer if long else 0
            return 0
        more = min(self.threads, self._most - self.threads)
        self._before = (rate, self.threads)
        self.threads += more
        self._settled = self.threads >= self._most
        return more

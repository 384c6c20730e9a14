"""The worker processes of one `map_ranges`, as the program sees them: what each has to do, what it said, and how it ended."""

from __future__ import annotations

import errno
import multiprocessing
import pickle
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from nbdcore.disk.shared import SharedMemory
from nbdcore.disk.worker import Connected, Failure, Task, work
from nbdcore.errors import Error
from nbdcore.processes import how_it_ended

__all__ = ["Crew", "Range", "WorkerLost"]

# Ranges at each worker: one that it works on, and one that it finds when it is done, instead of waiting for the program.
_AT_A_WORKER = 2
# Seconds that a worker gets to end when nothing more is wanted of it, and when it was told to.
_PATIENCE = 5.0


class WorkerLost(Error, OSError):
    """A process that worked on a range ended without an answer: it was killed, or crashed.

    Whether it had done anything with the range is unknown. The others have been ended.

    Attributes:
        offset, count: the range, in bytes; both 0 where the process had none yet.
        status: its exit status; negative: the number of the signal that killed it.
    """

    def __init__(self, errno: int, message: str, *, offset: int = 0, count: int = 0, status: int | None = None) -> None:
        super().__init__(errno, message)
        self.offset = offset
        self.count = count
        self.status = status

    def __reduce__(self) -> tuple[object, ...]:
        attributes = {"offset": self.offset, "count": self.count, "status": self.status}
        return (type(self), (self.errno, self.message), attributes)


@dataclass(slots=True, eq=False)
class Range:
    """One range, from when it is dealt out until the loop has had its outcome."""

    number: int
    offset: int
    count: int
    worker: Worker | None = None
    room: int = 0
    value: Any = None
    memory: memoryview | None = None


class Crew:
    """All workers of one call."""

    def __init__(self, task: Task, workers: int, room: int) -> None:
        self._task = task
        self._workers = [Worker(_AT_A_WORKER, room) for _ in range(workers)]

    def start(self) -> None:
        """Start them all, each as soon as it can. Raises OSError where the system has no more processes."""
        for worker in self._workers:
            worker.start(self._task)

    def size(self) -> int:
        """Return the size of the disk, which the first worker tells that is connected."""
        while True:
            for worker in self._workers:
                if worker.size is not None:
                    return worker.size
            for worker in self._heard():
                worker.take()

    @property
    def free(self) -> int:
        """How many ranges may begin now."""
        return sum(len(worker.rooms) for worker in self._workers)

    def begin(self, one: Range) -> None:
        """Give a range to the worker that has the fewest."""
        max(self._workers, key=lambda worker: len(worker.rooms)).begin(one)

    def wait(self) -> list[Range]:
        """Wait for outcomes, and return ranges that have theirs. Raises what a worker raised, and for one that has ended."""
        while True:
            finished = [one for worker in self._heard() for one in worker.take()]
            if finished:
                return finished

    def release(self, one: Range) -> None:
        """The loop has had the outcome of a range: its room is free."""
        assert one.worker is not None, "it was begun"
        one.worker.release(one)

    def _heard(self) -> list[Worker]:
        """Wait until a worker has said something, or ended; return those. A pipe is readable at its end as well."""
        ready = wait([worker.pipe for worker in self._workers if worker.pipe is not None])
        return [worker for worker in self._workers if worker.pipe in ready]

    def close(self) -> None:
        """End all workers, whatever they do."""
        for worker in self._workers:
            worker.tell_to_end()
        for worker in self._workers:
            worker.close()


class Worker:
    """One process, seen from the program."""

    def __init__(self, ranges: int, room: int) -> None:
        self.rooms: deque[int] = deque(range(ranges))
        self.size: int | None = None
        self._room = room
        self._shared: SharedMemory | None = None
        self._begun: dict[int, Range] = {}
        self._process: BaseProcess | None = None
        self.pipe: Connection | None = None

    def start(self, task: Task) -> None:
        """Start the process. Raises OSError where the system has none left; then `close` frees what there is of it."""
        context = multiprocessing.get_context("spawn")
        self.pipe, far = context.Pipe()
        with far:
            if self._room:
                self._shared = SharedMemory(self._room * len(self.rooms))
            name = None if self._shared is None else self._shared.path
            process = context.Process(target=work, args=(far, task, name, self._room), name="nbdcore-worker", daemon=True)
            process.start()
            self._process = process

    def begin(self, one: Range) -> None:
        one.worker, one.room = self, self.rooms.popleft()
        self._begun[one.number] = one
        assert self.pipe is not None, "it was started"
        with suppress(BrokenPipeError):  # it has ended: `take` says how
            self.pipe.send((one.number, one.offset, one.count, one.room))

    def take(self) -> list[Range]:
        """Take what the worker has said."""
        assert self.pipe is not None, "it was started"
        try:
            said = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self._lost() from None
        if isinstance(said, Failure):
            raise _raised_by(said)
        if isinstance(said, Connected):
            self.size = said.size
            if self._shared is not None:
                self._shared.forget_name()
            return []
        number, value = said
        one = self._begun.pop(number)
        one.value = value
        if self._shared is None:
            self.rooms.append(one.room)
        else:
            one.memory = self._shared.view(one.room * self._room, (one.room + 1) * self._room)
        return [one]

    def release(self, one: Range) -> None:
        """The loop has had the outcome of a range: its room, if it was given one, is free."""
        if one.memory is not None:
            one.memory.release()
            self.rooms.append(one.room)

    def _lost(self) -> WorkerLost:
        assert self._process is not None, "it was started"
        self._process.join(_PATIENCE)
        status = self._process.exitcode
        how = how_it_ended(status)
        one = next(iter(self._begun.values()), None)  # it works on the first that it was given
        if one is None:
            return WorkerLost(errno.ECHILD, f"a worker {how} before it had a range", status=status)
        return WorkerLost(
            errno.ECHILD,
            f"the worker of {one.count} bytes at offset {one.offset} {how}",
            offset=one.offset,
            count=one.count,
            status=status,
        )

    def tell_to_end(self) -> None:
        """Have the process end: by itself, with a goodbye to the server, or at once where it works on something."""
        if self.pipe is not None:
            self.pipe.close()
        if self._process is not None and (self._begun or self.size is None):
            self._process.terminate()

    def close(self) -> None:
        """Reap the process, and free what was shared with it."""
        if self._process is not None:
            self._process.join(_PATIENCE)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._process.close()
        if self._shared is not None:
            self._shared.close()


def _raised_by(failure: Failure) -> BaseException:
    """Return what to raise for what was raised in a worker."""
    if failure.pickled is None:
        return WorkerLost(errno.ECHILD, f"a worker raised what cannot be brought here:\n{failure.text}")
    error: BaseException = pickle.loads(failure.pickled)  # noqa: S301 (of a process that this one started)
    error.add_note(f"In a worker process:\n{failure.text}")
    return error

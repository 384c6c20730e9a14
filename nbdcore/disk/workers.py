"""A disk's ranges, worked on by several processes: each has a connection of its own, and its own interpreter.

One process of Python does one thing at a time; several do as many as there are processors. The program's process deals the
ranges out, a few to each worker, so that none waits for more, and takes small results back through a pipe. Large ones do not go
through it: a worker puts them into memory that both processes have, a room for each range that is under way.

Workers are spawned, so they hold nothing of the program's but what is sent to them, and no lock that another thread had. They
leave Ctrl-C to the program, which ends them all. A worker whose program is gone finds its pipe closed, and ends too.

    program                             worker
    ranges ── (number, range, room) ──▶ function(disk, offset, count[, memory])
    loop  ◀── (number, value) ───────── its value, or what it raised
"""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar, Unpack

from nbdcore.clients.connect.options import ClientOptions
from nbdcore.disk.crew import Crew, Range
from nbdcore.disk.worker import Task
from nbdcore.errors import UsageError
from nbdcore.processes import available_processors

__all__ = ["Outcome", "map_ranges"]

# Ranges of a whole disk, where the caller names none: large enough that dealing one out costs nothing, and enough of them that
# workers end at about the same time.
_SHARE = 16 << 20
# Outcomes for each worker that may wait for one before them: a range that takes long holds up no other worker until then.
_MOST_WAITING = 16

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Value]):
    """What became of one range.

    Attributes:
        offset: where it begins, in bytes.
        count: how many bytes it has.
        value: what the function returned.
        memory: the range's room, where `room` was asked for: valid until the loop goes on.
    """

    offset: int
    count: int
    value: Value
    memory: memoryview | None = None


def map_ranges(
    uri: str,
    function: Callable[..., Value],
    ranges: Iterable[tuple[int, int]] | None = None,
    *,
    workers: int | None = None,
    connections: int = 1,
    ordered: bool = True,
    room: int = 0,
    timeout: float | None = None,
    **options: Unpack[ClientOptions],
) -> Iterator[Outcome[Value]]:
    """Call `function(disk, offset, count)` for each range of a disk, in several processes, and yield what it returns.

    `disk` is a `Client` that the process opened with `uri` and `options`, or a `Pool` where `connections` is more than 1.
    Function, options and values are pickled: the function is one of a module, and values are best small. For large results say
    how many bytes a range has in `room`: then `function(disk, offset, count, memory=view)` is called, with memory that program
    and worker share, into which it may read; the loop gets the same memory as `Outcome.memory`, valid until it goes on.

    A program that calls this must be importable, as for any process of `multiprocessing`: its own work stands behind
    `if __name__ == "__main__":`.

    Args:
        uri: of the export, as for `nbdcore.connect`.
        function: what to call in the workers.
        ranges: (offset, count) in bytes, consumed only as fast as they are worked on; None: the whole disk, in pieces.
        workers: how many processes; None: as many as this one has processors.
        connections: how many each process opens.
        ordered: yield in the order of `ranges`; else as they come.
        room: bytes of shared memory for each range.
        timeout: seconds for connecting, in each worker.

    Raises, with every worker ended: what the function raised, with its traceback in the worker as a note; what connecting
    raised; WorkerLost for a worker that was killed; UsageError for wrong arguments. Leaving the loop ends the workers too.
    """
    if workers is None:
        workers = available_processors()
    if workers < 1 or connections < 1 or room < 0:
        raise UsageError(
            errno.EINVAL, f"workers and connections are 1 or more, room is 0 or more: not {workers}, {connections}, {room}"
        )
    task = Task(uri, function, connections, timeout, dict(options))
    try:
        pickle.dumps(task)
    except (pickle.PicklingError, AttributeError, TypeError) as exc:
        raise UsageError(
            errno.EINVAL, f"function and options must be picklable, for another process to have them: {exc}"
        ) from exc
    return _run(Crew(task, workers, room), ranges, ordered=ordered, most=_MOST_WAITING * workers)


def _run(crew: Crew, ranges: Iterable[tuple[int, int]] | None, *, ordered: bool, most: int) -> Iterator[Outcome[Any]]:
    """Deal the ranges out and yield their outcomes; no more than `most` wait for one before them."""
    with closing(crew):
        crew.start()
        waiting = iter(_whole(crew.size()) if ranges is None else ranges)
        begun = yielded = 0
        finished: dict[int, Range] = {}
        while True:
            for offset, count in islice(waiting, max(0, min(crew.free, most - len(finished)))):
                crew.begin(Range(begun, offset, count))
                begun += 1
            if yielded == begun:
                return
            for one in crew.wait():
                finished[one.number] = one
            while finished:
                number = yielded if ordered else next(iter(finished))
                if number not in finished:
                    break
                one = finished.pop(number)
                yielded += 1
                yield Outcome(one.offset, one.count, one.value, one.memory)
                crew.release(one)


def _whole(size: int) -> Iterator[tuple[int, int]]:
    for offset in range(0, size, _SHARE):
        yield offset, min(_SHARE, size - offset)

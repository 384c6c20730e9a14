"""What a worker process of `map_ranges` does: it connects, works on one range after the other, and says what came of it."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from nbdcore.clients.blocking.functions import connect, create_pool
from nbdcore.disk.naming import disk_named
from nbdcore.disk.shared import mapped
from nbdcore.errors import UsageError

__all__ = ["Connected", "Failure", "Task", "work"]


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is to do."""

    uri: str
    function: Callable[..., Any]
    connections: int
    timeout: float | None
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Connected:
    """A worker's first word."""

    size: int


@dataclass(frozen=True, slots=True)
class Failure:
    """A worker's last word: what was raised there, pickled, and its traceback as text."""

    pickled: bytes | None
    text: str

    @classmethod
    def of(cls, raised: BaseException) -> Failure:
        """Return it for what was raised."""
        text = "".join(traceback.format_exception(raised))
        try:
            pickled = pickle.dumps(raised)
            pickle.loads(pickled)  # noqa: S301 (one's own) # some can be pickled, and not made again
        except Exception:  # noqa: BLE001 (whatever a stranger's exception raises then: its text must do)
            return cls(None, text)
        return cls(pickled, text)


def work(pipe: Connection, task: Task, shared: str | None, room: int) -> None:
    """Work on what comes through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program ends its workers
    threading.Thread(target=_end_with_the_program, name="nbdcore-watch", daemon=True).start()
    try:
        _serve(pipe, task, shared, room)
    except BaseException as exc:  # noqa: BLE001 (the program raises it)
        with suppress(OSError):
            pipe.send(Failure.of(exc))


def _serve(pipe: Connection, task: Task, shared: str | None, room: int) -> None:
    options: Any = dict(task.options)
    if task.connections == 1:
        disk: Any = connect(task.uri, timeout=task.timeout, **options)
    else:
        disk = create_pool(task.uri, connections=task.connections, timeout=task.timeout, **options)
    memory = None if shared is None else memoryview(mapped(shared))
    with disk:
        pipe.send(Connected(disk.size))
        while (work := _next(pipe)) is not None:
            number, offset, count, place = work
            with disk_named("working on", count, offset, task.uri):
                if memory is None:
                    value = task.function(disk, offset, count)
                else:
                    with memory[place * room : (place + 1) * room] as view:
                        value = task.function(disk, offset, count, memory=view)
            try:
                pipe.send((number, value))
            except (pickle.PicklingError, AttributeError, TypeError) as exc:
                what = f"what the function returned for {count} bytes at offset {offset}"
                raise UsageError(errno.EINVAL, f"{what} must be picklable, for the program to have it: {exc}") from exc


def _end_with_the_program() -> None:
    """Whatever the worker is busy with: a program that was killed told nobody to end."""
    program = multiprocessing.parent_process()
    assert program is not None, "workers are started by a program"
    wait([program.sentinel])
    os._exit(1)


def _next(pipe: Connection) -> tuple[int, int, int, int] | None:
    """Return the next range, with its number and room; None where the program wants nothing more, or is gone."""
    try:
        work: tuple[int, int, int, int] = pipe.recv()
    except (EOFError, ConnectionResetError):
        return None
    return work

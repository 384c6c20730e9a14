"""What the measured programs have in common: what to read, what must be there, the clock, and the answer.

A measured program is a script of its own: it gets its settings as JSON in its one argument, and prints its answer as JSON in its
last line. It must start under any Python that has the module it is about, so all else it knows is the standard library and the
files beside it.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

#: A small request, in bytes, and the part of the disk that small requests go to: large enough that no processor keeps it in its
#: nearest cache, small enough for every offset to come up in a measurement of a second.
SMALL = 4096
AREA = 64 << 20

PERIOD = 1 << 20
# Seconds after which a trial run tells how fast the machine is.
_TRIAL = 0.1


# ---------------------------------------------------------------------------------------------- what is on the disk


@cache
def noise(seed: int) -> bytes:
    """Return `PERIOD` bytes that no compression makes smaller."""
    return random.Random(seed).randbytes(PERIOD)


def contents(offset: int, count: int) -> bytes:
    """Return what the benchmark's disks have there: noise, and at the begin of each small block its own offset."""
    begin = offset % PERIOD
    data = bytearray((noise(1) * ((begin + count) // PERIOD + 1))[begin : begin + count])
    for at in range(-offset % SMALL, count - 7, SMALL):
        data[at : at + 8] = (offset + at).to_bytes(8, "big")
    return bytes(data)


def to_be_written(offset: int) -> bytes:
    """Return the small block that the programs write at an offset: one of a few, so that they take no memory to speak of."""
    return _written()[offset % PERIOD // SMALL]


@cache
def _written() -> list[bytes]:
    return [noise(2)[at : at + SMALL] for at in range(0, PERIOD, SMALL)]


def offsets() -> list[int]:
    """Return the offsets of all small blocks of the area, in an order of chance that is the same for each program."""
    found = list(range(0, AREA, SMALL))
    random.Random(7).shuffle(found)
    return found


def endless(items: list[Any], count: int) -> Any:
    """Return an iterator over `count` items, from the first again when all have come."""
    return islice(cycle(items), count)


def compare(offset: int, data: Any, expected: Callable[[int, int], bytes] = contents) -> None:
    """End the program unless these are the disk's data, every byte."""
    if bytes(data) != expected(offset, len(data)):
        raise SystemExit(f"wrong data: {len(data)} bytes at offset {offset}")


def compare_written(offset: int, data: Any) -> None:
    """End the program unless these are the data that it wrote."""
    compare(offset, data, lambda at, _: to_be_written(at))


def check_extents(offsets: Sequence[int], size: int, count: int) -> None:
    """End the program unless so many extents were found, all of one length."""
    if len(offsets) != count or list(offsets) != list(range(0, size, size // count)):
        raise SystemExit(f"wrong extents: {len(offsets)}, the last at {offsets[-1]}")


# ---------------------------------------------------------------------------------------------- how long it takes


def settings() -> SimpleNamespace:
    """Return what the program is to do."""
    return SimpleNamespace(**json.loads(sys.argv[1]))


def steady(run: Callable[[int], object], seconds: float) -> None:
    """Run `run(count)` with a count that takes about `seconds`, and report it; trial runs before that find the count."""
    count, took = 250, 0.0
    while took < _TRIAL:
        count *= 2
        took, _ = cost(partial(run, count))
    count = max(count, int(count / took * seconds))
    timed(partial(run, count), count)


def timed(run: Callable[[], object], work: int) -> None:
    """Run once, and report it as so much work."""
    report(work, *cost(run))


def report(work: int, seconds: float, cpu: float, **more: int) -> None:
    """Print the program's answer."""
    print(json.dumps({"work": work, "seconds": seconds, "cpu": cpu, "memory": _memory("VmHWM"), **more}))


def cost(run: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that it takes, and those of a processor."""
    cpu, began = _cpu_seconds(), time.perf_counter()
    run()
    return time.perf_counter() - began, _cpu_seconds() - cpu


def resident() -> int:
    """Return how many bytes of the program are in memory now."""
    return _memory("VmRSS")


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _memory(field: str) -> int:
    # Not getrusage's figure: a new program inherits that from whoever started it.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise LookupError(field)

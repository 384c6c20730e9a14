"""nbdcore's blocking client at work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import measuring
from measuring import SMALL, endless

import nbdcore
from nbdcore.disk import map_ranges

# Each thread that shares a client, as the table has it.
_THREADS = 16


def connect(settings: SimpleNamespace, connections: int = 1) -> Any:
    options = {"allow_local_files": True, "timeout": 30, "structured_replies": getattr(settings, "structured_replies", True)}
    if connections == 1:
        return nbdcore.connect(settings.uri, **options)
    return nbdcore.create_pool(settings.uri, connections=connections, **options)


def reads(disk: Any, settings: SimpleNamespace) -> None:
    ranges = [(offset, SMALL) for offset in measuring.offsets()]

    def run(count: int, use: Callable[[int, bytes], None] | None = None) -> None:
        for offset, data in disk.pread_many(endless(ranges, count), depth=settings.depth):
            if use is not None:
                use(offset, data)

    if settings.verify:
        run(len(ranges), measuring.compare)
    measuring.steady(run, settings.seconds)


def writes(disk: Any, settings: SimpleNamespace) -> None:
    items = [(offset, measuring.to_be_written(offset)) for offset in measuring.offsets()]

    def run(count: int) -> None:
        for _ in disk.pwrite_many(endless(items, count), depth=settings.depth):
            pass

    if settings.verify:
        run(len(items))
        for offset, _ in items:
            measuring.compare_written(offset, disk.pread(SMALL, offset))
    measuring.steady(run, settings.seconds)


def one_by_one(disk: Any, settings: SimpleNamespace) -> None:
    offsets = measuring.offsets()

    def run(count: int, use: Callable[[int, bytes], None] | None = None) -> None:
        for offset in endless(offsets, count):
            data = disk.pread(SMALL, offset)
            if use is not None:
                use(offset, data)

    if settings.verify:
        run(len(offsets), measuring.compare)
    measuring.steady(run, settings.seconds)


def write_one_by_one(disk: Any, settings: SimpleNamespace) -> None:
    items = [(offset, measuring.to_be_written(offset)) for offset in measuring.offsets()]

    def run(count: int) -> None:
        for offset, data in endless(items, count):
            disk.pwrite(data, offset)

    if settings.verify:
        run(len(items))
        for offset, _ in items:
            measuring.compare_written(offset, disk.pread(SMALL, offset))
    measuring.steady(run, settings.seconds)


def threads(disk: Any, settings: SimpleNamespace) -> None:
    offsets = measuring.offsets()
    shares = [offsets[number::_THREADS] for number in range(_THREADS)]

    def read(share: list[int], count: int, use: Callable[[int, bytes], None] | None) -> None:
        for offset in endless(share, count):
            data = disk.pread(SMALL, offset)
            if use is not None:
                use(offset, data)

    with ThreadPoolExecutor(_THREADS) as pool:

        def run(count: int, use: Callable[[int, bytes], None] | None = None) -> None:
            list(pool.map(lambda share: read(share, count // _THREADS, use), shares))

        if settings.verify:
            run(len(offsets), measuring.compare)
        measuring.steady(run, settings.seconds)


Use = Callable[[int, memoryview], None]


def read_into_few(disk: Any, begin: int, end: int, settings: SimpleNamespace, use: Use | None = None) -> None:
    """Read a range of the disk into a few buffers that are used again and again."""
    if settings.depth == 1:
        read_one_by_one(disk, begin, end, settings, use)
        return
    unused = [memoryview(bytearray(settings.request)) for _ in range(settings.depth)]
    used: dict[int, memoryview] = {}

    def items() -> Any:
        for offset in range(begin, end, settings.request):
            used[offset] = buffer = unused.pop()[: end - offset]
            yield offset, buffer

    for offset in disk.pread_into_many(items(), depth=settings.depth):
        buffer = used.pop(offset)
        if use is not None:
            use(offset, buffer)
        unused.append(buffer)


def read_one_by_one(disk: Any, begin: int, end: int, settings: SimpleNamespace, use: Use | None) -> None:
    """Read a range of the disk into one buffer, again and again."""
    whole = memoryview(bytearray(settings.request))
    for offset in range(begin, end, settings.request):
        buffer = whole[: end - offset]
        disk.pread_into(buffer, offset)
        if use is not None:
            use(offset, buffer)


def copy(settings: SimpleNamespace) -> None:
    """Read the whole disk, from connecting to having closed; each thread a share, with its own client."""
    with connect(settings) as disk:  # what is imported at the first connection is no part of the copy
        size = disk.size
    share = -(-size // settings.request // settings.threads) * settings.request

    def run(use: Use | None = None) -> None:
        with ThreadPoolExecutor(settings.threads) as pool:
            list(pool.map(lambda begin: read(begin, use), range(0, size, share)))

    def read(begin: int, use: Use | None) -> None:
        with connect(settings, settings.connections) as disk:
            read_into_few(disk, begin, min(begin + share, size), settings, use)

    if settings.verify:
        run(measuring.compare)
    measuring.timed(run, size >> 20)


def pool(settings: SimpleNamespace) -> None:
    """Read the whole disk through one pool, each thread a share."""
    with connect(settings) as disk:
        size = disk.size
    share = -(-size // settings.request // settings.connections) * settings.request

    def run(use: Use | None = None) -> None:
        with connect(settings, settings.connections) as disk, ThreadPoolExecutor(settings.connections) as threads:

            def read(begin: int) -> None:
                read_into_few(disk, begin, min(begin + share, size), settings, use)

            list(threads.map(read, range(0, size, share)))

    if settings.verify:
        run(measuring.compare)
    measuring.timed(run, size >> 20)


# What each process of `processes` reads at once: enough that dealing ranges out costs nothing.
_RANGE = 32 << 20
# Seconds until all processes are there, and so many more for each of them.
_START, _START_EACH = 1.0, 0.25


def read_range(disk: Any, offset: int, count: int, *, settings: SimpleNamespace, start: float) -> float:
    """Read a range, in a worker, and not before `start`. Return the seconds of a processor that it took."""
    time.sleep(max(0.0, start - time.monotonic()))
    before = time.process_time()
    read_into_few(disk, offset, offset + count, settings, measuring.compare if settings.verify else None)
    return time.process_time() - before


def processes(settings: SimpleNamespace) -> None:
    """Read the whole disk with several processes. They all begin at a moment at which they are there."""
    with connect(settings) as disk:
        size = disk.size
    workers = settings.connections

    def run() -> None:
        start = ended = time.monotonic() + _START + _START_EACH * workers
        function = partial(read_range, settings=settings, start=start)
        ranges = ((offset, min(_RANGE, size - offset)) for offset in range(0, size, _RANGE))
        cpu = 0.0
        for outcome in map_ranges(settings.uri, function, ranges, workers=workers, ordered=False, allow_local_files=True):
            cpu += outcome.value
            ended = time.monotonic()  # before the processes end: they could go on with other work
        measuring.report(size >> 20, ended - start, cpu)

    if settings.verify:
        run()
        settings.verify = False
    run()  # the last report counts


def extents(settings: SimpleNamespace, *, columns: bool) -> None:
    """Walk all extents of the disk, and keep them."""
    if not settings.numpy:
        sys.modules["numpy"] = None  # as if it were not installed
    with nbdcore.connect(settings.uri, contexts=["base:allocation"], timeout=30) as disk:
        found: list[Any] = []

        def run(count: int | None = None) -> None:
            found.append(disk.extent_columns(count=count) if columns else list(disk.extents(count=count)))

        run(1)  # what the first brings in, numpy above all, is no part of it
        measuring.timed(run, settings.extents)
        offsets = found[1].offsets if columns else [extent.offset for extent in found[1]]
        measuring.check_extents(offsets, disk.size, settings.extents)


def main() -> None:
    settings = measuring.settings()
    on_one_connection = {
        "reads": reads,
        "writes": writes,
        "one_by_one": one_by_one,
        "write_one_by_one": write_one_by_one,
        "threads": threads,
    }
    whole_disk = {"copy": copy, "pool": pool, "processes": processes}
    if settings.work in whole_disk:
        whole_disk[settings.work](settings)
    elif settings.work.startswith("extents"):
        extents(settings, columns=settings.work == "extents_columns")
    else:
        with connect(settings) as disk:
            on_one_connection[settings.work](disk, settings)


if __name__ == "__main__":
    main()

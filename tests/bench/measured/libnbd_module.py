"""A program written for libnbd's Python module at work, over that module or over `nbdcore.libnbd`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import measuring
from measuring import SMALL, endless

_THREADS = 16
# The longest range that 32 bits can ask for, in whole extents of the benchmark's disk (64 KiB).
_LONGEST = (1 << 32) - (1 << 16)

Use = Callable[[int, Any], None] | None


class Pipeline:
    """Keeps commands in flight, as programs for this module do: a loop that fills up, and polls."""

    def __init__(self, nbd: Any, handle: Any, depth: int) -> None:
        self.nbd = nbd
        self.handle = handle
        self.depth = depth

    def with_completions(self, start: Callable[[int, Callable[[Any], int]], None], count: int) -> None:
        """Start commands that have a callback each."""
        handle = self.handle
        left = endless(measuring.offsets(), count)
        submitted = finished = 0

        def completed(error: Any) -> int:
            nonlocal finished
            if error.value:
                raise SystemExit(f"a command failed with {error.value}")
            finished += 1
            return 1

        while finished < count:
            while submitted < count and handle.aio_in_flight() < self.depth:
                start(next(left), completed)
                submitted += 1
            handle.poll(-1)

    def by_cookies(self, start: Callable[[int], object], count: int) -> None:
        """Start commands without callbacks; ask which are done, and retire them."""
        handle = self.handle
        left = endless(measuring.offsets(), count)
        submitted = retired = 0
        while retired < count:
            while submitted < count and submitted - retired < self.depth:
                start(next(left))
                submitted += 1
            handle.poll(-1)
            while retired < submitted and (cookie := handle.aio_peek_command_completed()):
                if not handle.aio_command_completed(cookie):
                    raise SystemExit(f"command {cookie} is not completed")
                retired += 1


def reads(nbd: Any, handle: Any, settings: SimpleNamespace) -> None:
    pipeline = Pipeline(nbd, handle, settings.depth)

    def run(count: int, use: Use = None) -> None:
        # A new buffer and a function a command, as migration tools have it.
        def read(offset: int, completed: Callable[[Any], int]) -> None:
            buffer = nbd.Buffer(SMALL)

            def done(error: Any) -> int:
                if use is not None:
                    use(offset, buffer.to_bytearray())
                return completed(error)

            handle.aio_pread(buffer, offset, done)

        pipeline.with_completions(read, count)

    if settings.verify:
        run(measuring.AREA // SMALL, measuring.compare)
    measuring.steady(run, settings.seconds)


def writes(nbd: Any, handle: Any, settings: SimpleNamespace) -> None:
    pipeline = Pipeline(nbd, handle, settings.depth)
    blocks = [nbd.Buffer.from_bytearray(bytearray(measuring.to_be_written(at))) for at in range(0, measuring.PERIOD, SMALL)]

    def write(offset: int, completed: Callable[[Any], int]) -> None:
        handle.aio_pwrite(blocks[offset % measuring.PERIOD // SMALL], offset, completed)

    def run(count: int) -> None:
        pipeline.with_completions(write, count)

    if settings.verify:
        run(measuring.AREA // SMALL)
        for offset in measuring.offsets():
            measuring.compare_written(offset, handle.pread(SMALL, offset))
    measuring.steady(run, settings.seconds)


def reads_by_cookies(nbd: Any, handle: Any, settings: SimpleNamespace) -> None:
    pipeline = Pipeline(nbd, handle, settings.depth)

    def run(count: int) -> None:
        pipeline.by_cookies(lambda offset: handle.aio_pread(nbd.Buffer(SMALL), offset), count)

    measuring.steady(run, settings.seconds)


def one_by_one(_: Any, handle: Any, settings: SimpleNamespace) -> None:
    def run(count: int, use: Use = None) -> None:
        for offset in endless(offsets, count):
            data = handle.pread(SMALL, offset)
            if use is not None:
                use(offset, data)

    offsets = measuring.offsets()
    if settings.verify:
        run(len(offsets), measuring.compare)
    measuring.steady(run, settings.seconds)


def write_one_by_one(_: Any, handle: Any, settings: SimpleNamespace) -> None:
    items = [(offset, measuring.to_be_written(offset)) for offset in measuring.offsets()]

    def run(count: int) -> None:
        for offset, data in endless(items, count):
            handle.pwrite(data, offset)

    if settings.verify:
        run(len(items))
        for offset, _data in items:
            measuring.compare_written(offset, handle.pread(SMALL, offset))
    measuring.steady(run, settings.seconds)


def threads(_: Any, handle: Any, settings: SimpleNamespace) -> None:
    offsets = measuring.offsets()
    shares = [offsets[number::_THREADS] for number in range(_THREADS)]

    def read(share: list[int], count: int, use: Use) -> None:
        for offset in endless(share, count):
            data = handle.pread(SMALL, offset)
            if use is not None:
                use(offset, data)

    with ThreadPoolExecutor(_THREADS) as pool:

        def run(count: int, use: Use = None) -> None:
            list(pool.map(lambda share: read(share, count // _THREADS, use), shares))

        if settings.verify:
            run(len(offsets), measuring.compare)
        measuring.steady(run, settings.seconds)


def extents_columns(_: Any, handle: Any, settings: SimpleNamespace) -> None:
    """Keep offsets, lengths and flags in a list each: the least that a program can do with this module."""
    columns: tuple[list[int], list[int], list[int]] = ([], [], [])
    offsets, lengths, flags = columns

    def keep(offset: int, entries: list[int]) -> int:
        new = entries[::2]
        lengths.extend(new)
        flags.extend(entries[1::2])
        return offset + sum(new)

    def run() -> None:
        _ask_all(handle, keep)
        offsets.extend(accumulate(lengths[:-1], initial=0))

    measuring.timed(run, settings.extents)
    measuring.check_extents(offsets, handle.get_size(), settings.extents)


def extents_tuples(_: Any, handle: Any, settings: SimpleNamespace) -> None:
    """Keep a tuple for each extent."""
    found: list[tuple[int, int, int]] = []

    def keep(offset: int, entries: list[int]) -> int:
        for length, flags in zip(entries[::2], entries[1::2], strict=True):
            found.append((offset, length, flags))
            offset += length
        return offset

    measuring.timed(lambda: _ask_all(handle, keep), settings.extents)
    measuring.check_extents([offset for offset, _, _ in found], handle.get_size(), settings.extents)


def _ask_all(handle: Any, keep: Callable[[int, list[int]], int]) -> None:
    """Call `keep` with the offset and the entries of each reply; it returns where they end."""
    position, end = 0, handle.get_size()

    def described(_context: str, offset: int, entries: list[int], _error: Any) -> int:
        nonlocal position
        position = keep(offset, entries)
        return 0

    while position < end:
        handle.block_status(min(end - position, _LONGEST), position, described)


WORKS = {
    "reads": reads,
    "writes": writes,
    "reads_by_cookies": reads_by_cookies,
    "one_by_one": one_by_one,
    "write_one_by_one": write_one_by_one,
    "threads": threads,
    "extents_columns": extents_columns,
    "extents_tuples": extents_tuples,
}


def main() -> None:
    settings = measuring.settings()
    nbd = importlib.import_module(settings.module)
    handle = nbd.NBD()
    if settings.work.startswith("extents"):
        handle.add_meta_context("base:allocation")
    handle.connect_uri(settings.uri)
    WORKS[settings.work](nbd, handle, settings)
    handle.shutdown()


if __name__ == "__main__":
    main()

"""nbdcore's asyncio client at work."""

from __future__ import annotations

import asyncio
import gc
import importlib
import resource
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import measuring
from measuring import SMALL, endless

import nbdcore.aio

# Connections that are opened at a time: fewer than a server's queue of newcomers holds.
_AT_ONCE = 32


def connect(settings: SimpleNamespace) -> Any:
    return nbdcore.aio.connect(settings.uri, allow_local_files=True, timeout=30)


def reads_of_tasks(runner: asyncio.Runner, settings: SimpleNamespace) -> None:
    """Many tasks on one connection, each of which reads one small block after the other."""
    offsets = measuring.offsets()

    async def opened() -> Any:
        return await connect(settings)

    async def read(disk: Any, left: Iterator[int], use: Callable[[int, bytes], None] | None) -> None:
        for offset in left:
            data = await disk.pread(SMALL, offset)
            if use is not None:
                use(offset, data)

    async def all_tasks(count: int, use: Callable[[int, bytes], None] | None = None) -> None:
        left = endless(offsets, count)
        async with asyncio.TaskGroup() as group:
            for _ in range(settings.depth):
                group.create_task(read(disk, left, use))

    disk = runner.run(opened())
    if settings.verify:
        runner.run(all_tasks(len(offsets), measuring.compare))
    measuring.steady(lambda count: runner.run(all_tasks(count)), settings.seconds)
    runner.run(disk.disconnect())


def idle(runner: asyncio.Runner, settings: SimpleNamespace) -> None:
    """Open many connections, read a block on each, and see how much the program has grown by all of them."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files[1], files[1]))

    async def open_one(disks: list[Any], turns: asyncio.Semaphore) -> None:
        async with turns:
            disk = await connect(settings)
            await disk.pread(SMALL, 0)
            disks.append(disk)

    async def open_many(count: int) -> list[Any]:
        disks: list[Any] = []
        turns = asyncio.Semaphore(_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(open_one(disks, turns))
        return disks

    async def close_all(disks: list[Any]) -> None:
        await asyncio.gather(*(disk.close() for disk in disks))

    runner.run(close_all(runner.run(open_many(2))))  # what a program's first connections bring in stays outside
    gc.collect()
    before = measuring.resident()
    disks: list[Any] = []
    seconds, cpu = measuring.cost(lambda: disks.extend(runner.run(open_many(settings.connections))))
    gc.collect()
    measuring.report(settings.connections, seconds, cpu, growth=measuring.resident() - before)
    runner.run(close_all(disks))


def main() -> None:
    settings = measuring.settings()
    loops = importlib.import_module(getattr(settings, "loop", "asyncio"))
    with asyncio.Runner(loop_factory=loops.new_event_loop) as runner:
        {"tasks": reads_of_tasks, "idle": idle}[settings.work](runner, settings)


if __name__ == "__main__":
    main()

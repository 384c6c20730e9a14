"""A user's mistakes: a type checker must report each line marked so, and no other."""

from __future__ import annotations

import nbdcore
from nbdcore import aio


def blocking(disk: nbdcore.Client) -> None:
    disk.pwrite(12345, 0)  # wrong
    disk.pwrite("text", 0)  # wrong
    disk.pread_into("x", 0)  # wrong
    disk.pread("512", 0)  # wrong
    list(disk.pwrite_many([(0, "text")]))  # wrong
    list(disk.pread_into_many([(0, 512)]))  # wrong
    disk.pread(512, 0, fua=True)  # wrong


async def tasks(disk: aio.AsyncClient) -> None:
    await disk.pwrite(12345, 0)  # wrong
    await disk.pread_into("x", 0)  # wrong
    await disk.pread(512, 0, timeout="5")  # wrong

"""A user's program that a type checker must find nothing in."""

from __future__ import annotations

import mmap
from array import array

import nbdcore
from nbdcore import aio


def blocking(uri: str) -> bytes:
    with nbdcore.connect(uri, timeout=5) as disk:
        disk.pwrite(b"data", 0, fua=True)
        disk.pwrite(array("I", [1, 2]), 512)
        disk.pread_into(bytearray(512), 0)
        filled: int = disk.pread_into(mmap.mmap(-1, 4096), 0)
        for offset, data in disk.pread_many([(0, 512)]):
            print(offset + filled, data.hex())
        return disk.pread(512, 0)


async def tasks(uri: str) -> bytes:
    async with aio.connect(uri) as disk:
        await disk.pwrite(memoryview(b"data"), 0)
        await disk.pread_into(bytearray(512), 0)
        return await disk.pread(512, 0)

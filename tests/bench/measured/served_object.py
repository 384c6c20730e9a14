"""Serves the disk of `python_object.py` with nbdcore, on a unix socket, until it is ended."""

from __future__ import annotations

import sys

import python_object

from nbdcore.server import Server


class Disk:
    """What nbdkit's plugin does, as a back end of nbdcore's."""

    def __init__(self) -> None:
        self.size = python_object.get_size(0)

    def pread(self, count: int, offset: int) -> bytes:
        return bytes(python_object.disk[offset : offset + count])

    def pwrite(self, data: memoryview, offset: int) -> None:
        python_object.disk[offset : offset + len(data)] = data


def main() -> None:
    size, _, path = sys.argv[1:]
    python_object.config("size", size)
    with Server(Disk()) as server:
        server.listen("unix", path=path)
        server.serve_forever()


if __name__ == "__main__":
    main()

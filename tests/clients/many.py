"""What the tests of the calls on many ranges share, whatever the front end: the calls, what servers answer, and what is wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from nbdcore.server import BlockSizes, ExportSettings, MemoryDisk
from nbdcore.testing.scripted import Connection, Reply, Step, error
from tests.clients.talking import DISK, PATIENCE, good

#: Name -> what to pass for a place on the disk.
CALLS: dict[str, Callable[[int, int], tuple[int, Any]]] = {
    "pread_many": lambda offset, count: (offset, count),
    "pread_into_many": lambda offset, count: (offset, bytearray(count)),
    "pwrite_many": lambda offset, count: (offset, bytes(count)),
    "zero_many": lambda offset, count: (offset, count),
    "trim_many": lambda offset, count: (offset, count),
}
every_call = pytest.mark.parametrize("name", CALLS)


def start(client: Any, name: str, offsets: Iterable[int], count: int = 16, **options: Any) -> Any:
    """Begin a loop of `count` bytes at each offset."""
    return getattr(client, name)((CALLS[name](offset, count) for offset in offsets), **options)


def offsets_of(name: str, results: list[Any]) -> list[int]:
    return [result[0] for result in results] if name == "pread_many" else results


# ---------------------------------------------------------------------------------------------- what servers answer


def failing(*offsets: int) -> Reply:
    return lambda request: (error(28, "no room") if request.offset in offsets else good)(request)


def backwards(connection: Connection) -> None:
    """Answer ten requests, the last one first."""
    requests = [connection.receive_request() for _ in range(10)]
    connection.send(b"".join(good(request) for request in reversed(requests)))


def in_fours(counts: list[int]) -> Step:
    """Answer four requests together, five times, and append how many they were. No fifth may come before the answers."""

    def step(connection: Connection) -> None:
        for _ in range(5):
            requests = [connection.receive_request() for _ in range(4)]
            counts.append(len(requests))
            connection._sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection._sock.recv(1)
            connection.send(b"".join(good(request) for request in requests))

    return step


def first_only(event: threading.Event) -> Step:
    """Answer the first of eight requests; the others when the event has happened."""

    def step(connection: Connection) -> None:
        requests = [connection.receive_request() for _ in range(8)]
        connection.send(good(requests[0]))
        assert event.wait(PATIENCE)
        connection.send(b"".join(good(request) for request in requests[1:]))

    return step


def dying(first_taken: threading.Event, dead: threading.Event) -> Step:
    """Answer the first of eight requests; when that was taken, the second one, and hang up."""

    def step(connection: Connection) -> None:
        requests = [connection.receive_request() for _ in range(8)]
        connection.send(good(requests[0]))
        assert first_taken.wait(PATIENCE)
        connection.send(good(requests[1]))
        connection.close()
        dead.set()

    return step


# ---------------------------------------------------------------------------------------------- a disk in pieces

SIZE = 1 << 20
CONTENTS = bytes(range(256)) * (SIZE // 256)
#: The whole disk, in ranges that are larger than `in_small_pieces` takes.
RANGES = [(offset, min(50_000, SIZE - offset)) for offset in range(0, SIZE, 50_000)]


def in_small_pieces() -> ExportSettings:
    """A disk that must be asked for 16 KiB at most."""
    return ExportSettings(MemoryDisk(SIZE), block_sizes=BlockSizes(minimum=1, preferred=4096, maximum=1 << 14))


# ---------------------------------------------------------------------------------------------- what is wrong

every_wrong_item = pytest.mark.parametrize(
    ("item", "said"),
    [
        ((DISK, 1), "past the end"),
        ((0, "8"), "pread_many: count is an integer"),
        ((0,), "pread_many: each item is a pair"),
        (5, "pread_many: each item is a pair"),
    ],
)
every_wrong_input = pytest.mark.parametrize("wrong", [None, 4096, lambda: [(0, 4096)]], ids=["None", "a number", "a function"])
WRONG_OPTIONS: list[dict[str, Any]] = [
    {"depth": 0},
    {"depth": -1},
    {"depth": "5"},
    {"depth": True},
    {"timeout": -1},
    {"timeout": "1"},
]

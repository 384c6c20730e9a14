"""One trial of the demo: a server and a client of our own over one transport, and every byte that comes back compared.

A trial says what it found and prints nothing. It takes a bounded time on any machine: what is measured is measured for a moment,
not for an amount of data, and every call has a deadline.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbdcore import Client, DeadlineExceeded, Error, Extent, TransportError, UsageError
from nbdcore.plugins.spec import Transport
from nbdcore.server import MemoryDisk, Server
from nbdcore.streams.base import Address

__all__ = ["LENGTH", "SIZE", "Outcome", "pattern", "run_trial"]

#: Bytes of the disk that is served.
SIZE = 64 << 20
#: Most bytes that are written and read back, and where. Not on a block's border, as a file system's data would be: harder.
LENGTH = 24 << 20
_START = (8 << 20) + 512

# Large enough that bandwidth is what is measured, small enough that a slow machine finishes one in time.
_PIECE = 1 << 20
_SMALL = 4096
# What is zeroed again in the middle of what was written: whole pages of the server's, so that they must become a hole.
_HOLE = 256 << 10

# Seconds. Connecting to our own server takes a millisecond, or it does not work.
_CONNECTING = 1.0
_ANSWER = 2.0
_STOPPING = 1.0


@dataclass(slots=True)
class Outcome:
    """What came of a trial.

    Attributes:
        transport: its name.
        reason: why it could not be tried; "" where it was.
        fault: what was wrong; "" where nothing was.
        compared: bytes read back and compared.
        extents: how many extents the disk had in the end.
        writing, reading: bytes a second.
        small_reads: reads of 4 KiB a second, one after another.
    """

    transport: str
    reason: str = ""
    fault: str = ""
    compared: int = 0
    extents: int = 0
    writing: float = 0.0
    reading: float = 0.0
    small_reads: float = 0.0


class _WrongError(Exception):
    """The disk is not what it must be. The message says how."""


def pattern() -> bytes:
    """Return the bytes to write: no two pieces alike, so that none can stand in another's place. The same in every run."""
    return random.Random(10809).randbytes(LENGTH)  # noqa: S311 (made to be the same again, and no secret)


def run_trial(transport: Transport, parts: dict[str, Any], data: bytes, moment: float) -> Outcome:
    """Serve a disk over `transport` at the address that `parts` name, and try it, measuring three things for `moment` seconds."""
    outcome = Outcome(transport.name)
    server = Server(MemoryDisk(SIZE))
    try:
        address = _listening(server, transport, parts)
        server.start()
        with _connected(address) as client:
            _Trial(client, data, moment, outcome).run()
    except TransportError as error:  # it cannot listen here, or there is no way to where it does
        outcome.reason = str(error)
    except (Error, _WrongError) as error:
        outcome.fault = str(error)
    except Exception as error:  # noqa: BLE001 (a third party's transport may raise anything, and the others are to be tried too)
        outcome.fault = f"{type(error).__name__}: {error}"
    finally:
        server.stop(_STOPPING)
    return outcome


def _listening(server: Server, transport: Transport, parts: dict[str, Any]) -> Address:
    try:
        return server.listen(transport.name, **parts).address
    except UsageError as error:  # how a transport says that it only connects
        raise TransportError(error.errno or 0, error.message) from error


def _connected(address: Address) -> Client:
    """Connect as a user would who was given the URI."""
    try:
        return Client().connect(address.uri(), timeout=_CONNECTING)
    except DeadlineExceeded as error:
        raise TransportError(error.errno or 0, f"connecting to {address} took more than {_CONNECTING:.0f} second") from error


class _Trial:
    """What is done over one connection."""

    def __init__(self, client: Client, data: bytes, moment: float, outcome: Outcome) -> None:
        self._client = client
        self._data = memoryview(data)
        self._moment = moment
        self._outcome = outcome

    def run(self) -> None:
        """Write, read back, read in small pieces, zero a part, walk the extents. Raises _WrongError, or what the client does."""
        if self._client.size != SIZE:
            raise _WrongError(f"the disk has {self._client.size} bytes, not {SIZE}")
        written = self._write()
        self._read(written)
        self._read_small(written)
        hole = self._zero(written)
        self._walk(written, hole)

    def _write(self) -> int:
        def write(index: int) -> None:
            at = index * _PIECE
            self._client.pwrite(self._data[at : at + _PIECE], _START + at, timeout=_ANSWER)

        pieces, rate = self._measured(LENGTH // _PIECE, write)
        self._outcome.writing = rate * _PIECE
        self._client.flush(timeout=_ANSWER)
        return pieces * _PIECE

    def _read(self, written: int) -> None:
        view = memoryview(bytearray(written))
        begun = time.perf_counter()
        for at in range(0, written, _PIECE):
            self._client.pread_into(view[at : at + _PIECE], _START + at, timeout=_ANSWER)
        self._outcome.reading = written / (time.perf_counter() - begun)
        if view != self._data[:written]:
            raise _WrongError(f"what was read is not what was written ({written} bytes from offset {_START} on)")
        self._outcome.compared = written

    def _read_small(self, written: int) -> None:
        choose = random.Random(_SMALL)  # noqa: S311 (places to read at, and no secret)
        places = [choose.randrange(written - _SMALL) for _ in range(1024)]

        def read(index: int) -> None:
            at = places[index % len(places)]
            if self._client.pread(_SMALL, _START + at, timeout=_ANSWER) != self._data[at : at + _SMALL]:
                raise _WrongError(f"{_SMALL} bytes read at offset {_START + at} are not what was written there")

        _, self._outcome.small_reads = self._measured(1 << 30, read)

    def _zero(self, written: int) -> range:
        begin = (_START + written // 2) // _HOLE * _HOLE
        self._client.zero(_HOLE, begin, timeout=_ANSWER)
        return range(begin, begin + _HOLE)

    def _walk(self, written: int, hole: range) -> None:
        """Hold the extents against what was done: all of the disk, no data called zero, and the hole found again."""
        extents = list(self._client.extents(timeout=_ANSWER))
        self._outcome.extents = len(extents)
        if [extent.offset for extent in extents] + [SIZE] != [0, *(extent.end for extent in extents)]:
            raise _WrongError(f"the extents do not cover the disk: {extents}")
        called_zero = [extent for extent in extents if extent.zero]
        if any(_overlap(extent, part) for extent in called_zero for part in _around(hole, written)):
            raise _WrongError(f"an extent with data is said to be zero: {called_zero}")
        if not any(extent.offset <= hole.start and hole.stop <= extent.end for extent in called_zero):
            raise _WrongError(f"the range that was zeroed is not among those said to be zero: {called_zero}")
        if any(self._client.pread(_HOLE, hole.start, timeout=_ANSWER)):
            raise _WrongError(f"the range that was zeroed does not read as zeroes ({_HOLE} bytes from offset {hole.start} on)")

    def _measured(self, most: int, act: Callable[[int], None]) -> tuple[int, float]:
        """Act for a moment, or `most` times. Returns how often, and how often a second."""
        begun = now = time.perf_counter()
        done = 0
        while done < most and (not done or now - begun < self._moment):
            act(done)
            done += 1
            now = time.perf_counter()
        return done, done / (now - begun)


def _around(hole: range, written: int) -> tuple[range, range]:
    return range(_START, hole.start), range(hole.stop, _START + written)


def _overlap(extent: Extent, part: range) -> bool:
    return extent.offset < part.stop and part.start < extent.end

"""Bytes moved through streams by who checks them, until all have arrived; every wait has a deadline.

It knows the Stream contract only: what does not come, or does not end, raises ContractBroken.
"""

from __future__ import annotations

import threading

from nbdcore.streams.base import Stream, Want
from nbdcore.streams.waiting import Deadline, wait, wait_any
from nbdcore.testing import ContractBroken, require

__all__ = ["PATIENCE", "Waiting", "finish", "receive", "receive_all", "send", "send_some", "transfer"]

#: Seconds that a single wait may take on a busy machine.
PATIENCE = 30.0


def _pause(stream: Stream, want: Want, deadline: Deadline, message: str) -> None:
    if not (want & Want.READ and stream.buffered()):
        try:
            wait(stream.fileno(), want | stream.wants(), deadline, message)
        except TimeoutError as exc:
            raise ContractBroken(message) from exc


def send_some(stream: Stream, parts: list[memoryview]) -> int:
    """Send something from the front of `parts`; returns how many bytes."""
    deadline = Deadline.after(PATIENCE)
    while (count := stream.send(parts)) is None:
        _pause(stream, Want.WRITE, deadline, "the descriptor becomes writable when there is room")
        require(not deadline.expired, "send() takes bytes once the descriptor is writable")
    return count


def send(stream: Stream, data: bytes) -> None:
    """Send all of it; for amounts that fit the buffers on the way."""
    rest = memoryview(data)
    while rest:
        rest = rest[send_some(stream, [rest]) :]


def receive(stream: Stream, room: memoryview, sender: Stream | None = None) -> int:
    """Receive something; 0 is the end. `sender` is given a chance to get rid of what it still owes."""
    deadline = Deadline.after(PATIENCE)
    while (count := stream.recv_into(room)) is None:
        if sender is not None and sender.wants() & Want.WRITE:
            sender.send([])
        _pause(stream, Want.READ, deadline, "the descriptor becomes readable when bytes have come")
        require(not deadline.expired, "recv_into() returns bytes once the descriptor is readable")
    return count


def receive_all(stream: Stream) -> bytes:
    """Receive until the end."""
    received = bytearray()
    room = bytearray(1 << 16)
    while count := receive(stream, memoryview(room)):
        received += room[:count]
    return bytes(received)


def finish(stream: Stream) -> None:
    """Half-close, however often that must be asked for."""
    deadline = Deadline.after(PATIENCE)
    while not stream.finish_sending():
        _pause(stream, Want.WRITE, deadline, "finish_sending() returns True some time")


class Waiting(threading.Thread):
    """A thread in `stream.wait()`."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(daemon=True)
        self.answer: object = None
        self._stream = stream
        self.start()

    def run(self) -> None:
        """Wait, and keep the answer."""
        self.answer = self._stream.wait()

    def ends(self, clause: str) -> None:
        """Require that the wait ends, within PATIENCE."""
        self.join(PATIENCE)
        require(not self.is_alive(), clause)
        require(isinstance(self.answer, bool), "wait() returns a bool, and raises nothing")


class _Way:
    """Bytes on their way from one stream to the other."""

    def __init__(self, source: Stream, target: Stream, parts: list[memoryview]) -> None:
        self.source, self.target = source, target
        self.parts = parts
        self.total = sum(map(len, parts))
        self.received = bytearray()
        self._room = memoryview(bytearray(1 << 16))

    def arrived(self) -> bool:
        return len(self.received) >= self.total

    def step(self) -> bool:
        """Send and receive what can be; tell whether anything moved."""
        moved = False
        if (self.parts or self.source.wants() & Want.WRITE) and (sent := self.source.send(self.parts)) is not None:
            moved = bool(sent)
            while self.parts and sent >= len(self.parts[0]):
                sent -= len(self.parts.pop(0))
            if sent:
                self.parts[0] = self.parts[0][sent:]
        if not self.arrived():
            count = self.target.recv_into(self._room)
            require(count != 0, "recv_into() answers 0 only when the peer has finished")
            self.received += self._room[: count or 0]
            moved = moved or bool(count)
        return moved

    def waiting(self) -> list[tuple[int, Want]]:
        sending = Want.WRITE if self.parts else Want.NOTHING
        receiving = Want.NOTHING if self.arrived() else Want.READ
        return [
            (self.source.fileno(), sending | self.source.wants()),
            (self.target.fileno(), receiving | self.target.wants()),
        ]


def transfer(near: Stream, far: Stream, there: bytes | list[memoryview], back: bytes) -> tuple[bytes, bytes]:
    """Send `there` from near to far and `back` the other way, at the same time, and return what arrived."""
    deadline = Deadline.after(PATIENCE)
    parts = [memoryview(there)] if isinstance(there, bytes) else list(there)
    ways = (_Way(near, far, [part for part in parts if there]), _Way(far, near, [memoryview(back)] if back else []))
    while not all(way.arrived() for way in ways):
        require(not deadline.expired, "bytes arrive")
        # Both take a turn, whether or not the first one moves.
        moved = [way.step() for way in ways]
        if not any(moved) and not any(way.target.buffered() for way in ways):
            wait_any([pair for way in ways for pair in way.waiting()], deadline)
    return bytes(ways[0].received), bytes(ways[1].received)

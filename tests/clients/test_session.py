"""A session over a stream that does what the test says: nothing that was received is lost, whatever happens meanwhile."""

from __future__ import annotations

import errno

import pytest

from nbdcore.clients.session.session import Session
from nbdcore.protocol.transmission import commands
from nbdcore.protocol.transmission.decoder import LARGE
from nbdcore.streams.base import Stream
from tests.protocol.harness import connected, success

DATA = bytes(number * 7 % 251 for number in range(LARGE))


class Told(Stream):
    """Has what it was told to have for each receive, and takes what is sent until it is broken."""

    def __init__(self):
        self.data = b""
        self.broken = False

    def recv_into(self, room):
        if not self.data:
            return 0 if self.broken else None
        count = min(len(room), len(self.data))
        room[:count], self.data = self.data[:count], self.data[count:]
        return count

    def send(self, parts):
        if self.broken:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return sum(map(len, parts))

    def fill(self, room, taken, seconds=None, *, whole=False):  # noqa: ARG002 (the stream's)
        taken.append(self.recv_into(room))
        return True

    def fileno(self):
        return -1

    def finish_sending(self):
        return True

    def close(self):
        """There is nothing to close."""


@pytest.mark.parametrize("begin", [20, 28])
@pytest.mark.parametrize("when", ["another caller had sent", "what others queued is sent"])
def test_part_of_a_large_payload_is_counted_before_the_rest_is_received(begin, when):
    """The server has hung up, which sending finds out: what it sent before counts, behind what was received already."""
    engine, stream = connected("structured").engine, Told()
    session = Session(engine, stream)
    target = bytearray(LARGE)
    reading = commands.read(engine.limits, LARGE, 0, target=memoryview(target))
    assert session.send_alone(reading)
    answer = success("structured", reading, DATA)

    def receive(room, taken, part):
        stream.data = part
        session.fill(room, taken, whole=True)

    taken, part = [], 1000
    room = engine.room()
    receive(room, taken, answer[:begin])
    rooms = session.take_in_alone(reading, room, taken)
    session.filling = True
    small, other = commands.read(engine.limits, 512, 0), commands.read(engine.limits, 512, 0)
    engine.submit(small)
    session.send()
    if begin == 20:
        receive(rooms[0], taken, answer[20:28])
    receive(rooms[-1], taken, answer[28 : 28 + part])
    stream.data = answer[28 + part :] + success("structured", small, b"Z" * 512)
    stream.broken = True
    engine.submit(other)
    if when == "another caller had sent":
        session.send()
    session.filling = False
    session.take_in_payload(reading, rooms, taken)
    assert reading.done
    assert reading.error is None
    assert target == DATA
    assert small.result() == b"Z" * 512
    assert other.error is not None

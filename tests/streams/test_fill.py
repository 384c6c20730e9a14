"""Receiving with one call that waits: what came is counted, whatever happens meanwhile."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from nbdcore import Disconnected
from nbdcore.streams import sockets
from nbdcore.streams.sockets import SocketStream, connected_pair
from tests.alarms import alarm_after

PATIENCE = 10.0

pytestmark = pytest.mark.skipif(not sockets._DONT_WAIT, reason="there, streams have no way of their own to wait")


@pytest.fixture
def room():
    return memoryview(bytearray(8))


def later(*calls):
    """Make calls in another thread, one after the other, with a pause before each."""

    def make():
        for call in calls:
            time.sleep(0.02)
            call()

    thread = threading.Thread(target=make)
    thread.start()
    return thread


def test_it_waits_for_the_first_bytes(ends, room):
    stream, far = ends
    taken = []
    thread = later(lambda: far.send(b"abc"))
    assert stream.fill(room, taken)
    assert (taken, bytes(room[:3])) == ([3], b"abc")
    thread.join(PATIENCE)


def test_whole_waits_until_the_room_is_full(ends, room):
    stream, far = ends
    taken = []
    thread = later(lambda: far.send(b"abc"), lambda: far.send(b"defghi"))
    assert stream.fill(room, taken, whole=True)
    assert (taken, bytes(room)) == ([8], b"abcdefgh")
    thread.join(PATIENCE)
    assert stream.recv_into(room) == 1


def test_deadline_ends_it_after_a_moment_with_what_has_come(ends, room):
    stream, far = ends
    taken = []
    assert not stream.fill(room, taken, 1.0)
    far.send(b"abc")
    assert stream.fill(room, taken, 1.0, whole=True)
    assert (taken, bytes(room[:3])) == ([3], b"abc")


def test_no_time_left_is_no_time_to_wait(ends, room):
    stream, far = ends
    far.send(b"abc")
    taken = []
    assert not stream.fill(room, taken, 0.0)
    assert not taken
    assert stream.recv_into(room) == 3


def test_end_is_for_the_next_receive_to_tell(ends, room):
    stream, far = ends
    far.close()
    taken = []
    assert stream.fill(room, taken)
    assert not any(taken)
    assert stream.recv_into(room) == 0


def test_broken_connection_is_for_the_next_receive_to_tell(ends, room):
    stream, far = ends
    stream.send([memoryview(b"unread")])
    far.close()
    taken = []
    assert stream.fill(room, taken)
    assert not any(taken)
    with pytest.raises(Disconnected):
        stream.recv_into(room)


def test_hanging_up_ends_it(ends, room):
    stream, _ = ends
    taken = []
    thread = later(stream.hang_up)
    assert stream.fill(room, taken, whole=True)
    assert not any(taken)
    thread.join(PATIENCE)


class HandlerError(Exception):
    """Raised by a signal handler."""


def test_what_came_before_a_handler_raised_is_counted(ends, room):
    stream, far = ends
    far.send(b"abc")
    taken = []

    def handler(*_):
        raise HandlerError

    with pytest.raises(HandlerError), alarm_after(0.02, handler):
        stream.fill(room, taken, whole=True)
    assert (taken, bytes(room[:3])) == ([3], b"abc")


def test_handler_that_raises_while_nothing_has_come_loses_nothing(ends, room):
    stream, far = ends
    taken = []

    def handler(*_):
        raise TimeoutError("the program's own")

    with pytest.raises(TimeoutError, match="the program's own"), alarm_after(0.02, handler):
        stream.fill(room, taken)
    assert not taken
    far.send(b"abc")
    assert stream.fill(room, taken)
    assert taken == [3]


def test_handler_that_returns_disturbs_nothing(ends, room):
    stream, far = ends
    seen, taken = [], []
    with alarm_after(0.02, lambda number, _: seen.append(number)):
        thread = later(lambda: None, lambda: None, lambda: far.send(b"abcdefgh"))
        while sum(taken) < 8:
            assert stream.fill(room[sum(taken) :], taken, whole=True)
    thread.join(PATIENCE)
    assert seen == [signal.SIGALRM]
    assert bytes(room) == b"abcdefgh"


class Counting(SocketStream):
    """A stranger's stream, which has something to do with every byte."""

    def recv_into(self, room):
        return super().recv_into(room)


def test_stream_that_receives_in_its_own_way_is_asked_for_every_byte(room):
    near, far = connected_pair()
    stream = Counting(near)
    far.send(b"abc")
    assert not stream.fill(room, [])
    assert stream.recv_into(room) == 3
    stream.close()
    far.close()

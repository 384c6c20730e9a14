"""Sending with one call that waits: what was sent is counted, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
import threading
import time

import pytest

from nbdcore import Disconnected
from nbdcore.streams import sockets
from nbdcore.streams.sockets import SocketStream, connected_pair
from tests.alarms import alarm_after, watchdog

PATIENCE = 10.0
#: More than any system keeps for a peer that does not receive.
MUCH = 16 << 20

pytestmark = pytest.mark.skipif(not sockets._DONT_WAIT, reason="there, streams have no way of their own to wait")


def receive(far, count):
    """Receive so many bytes, or those that come before the end."""
    received = bytearray()
    while len(received) < count and (some := far.recv(1 << 20)):
        received += some
    return received


def receiver(far, count, into):
    """Receive in another thread, after a pause."""

    def run():
        time.sleep(0.02)
        into.append(receive(far, count))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def send_everything(stream, parts, sent):
    """Go on until all is sent, where it comes back early."""
    whole = memoryview(b"".join(parts))
    stream.send_all(parts, sent)
    while sum(sent) < len(whole):
        stream.send_all([whole[sum(sent) :]], sent)


def test_it_waits_until_everything_is_sent(ends):
    stream, far = ends
    head, payload = os.urandom(28), os.urandom(MUCH)
    sent, received = [], []
    thread = receiver(far, 28 + MUCH, received)
    send_everything(stream, [memoryview(head), memoryview(payload)], sent)
    thread.join(PATIENCE)
    assert received == [head + payload]


@pytest.mark.parametrize("seconds", [None, PATIENCE])
def test_peer_that_does_not_receive_ends_it_after_a_moment_with_what_it_took(ends, seconds):
    stream, far = ends
    payload = os.urandom(MUCH)
    sent = []
    assert stream.send_all([memoryview(payload)], sent, seconds)
    assert 0 < sent[0] < MUCH
    assert receive(far, sent[0]) == payload[: sent[0]]


@pytest.mark.parametrize("seconds", [None, PATIENCE])
def test_nothing_sent_in_a_moment_is_false(ends, seconds):
    stream, _ = ends
    payload = memoryview(bytes(MUCH))
    while stream.send([payload]) is not None:
        pass
    sent = []
    assert not stream.send_all([payload], sent, seconds)
    assert not sent


def test_no_time_left_is_no_time_to_wait(ends):
    stream, _ = ends
    sent = []
    assert not stream.send_all([memoryview(b"abc")], sent, 0.0)
    assert not sent


def test_broken_connection_is_for_the_next_send_to_tell(ends):
    stream, far = ends
    far.close()
    sent = []
    assert stream.send_all([memoryview(b"abc")], sent)
    while sent:  # over TCP the first bytes find out
        sent.clear()
        assert stream.send_all([memoryview(b"abc")], sent)
    with pytest.raises(Disconnected):
        stream.send([memoryview(b"abc")])


def test_what_broke_the_connection_is_told_by_the_next_send_though_the_system_tells_it_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    stream = SocketStream(near)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.close()  # with a reset
    assert select.select([near], [], [], PATIENCE)[0]
    sent = []
    assert stream.send_all([memoryview(b"abc")], sent)
    assert not sent
    with pytest.raises(Disconnected) as caught:
        stream.send([memoryview(b"abc")])
    assert caught.value.errno == errno.ECONNRESET
    stream.close()


def test_timer_that_fires_often_does_not_keep_it_waiting(ends):
    """Python begins a call that a signal interrupts anew, with all of its time."""
    stream, _ = ends
    payload = memoryview(bytes(MUCH))
    while stream.send([payload]) is not None:
        pass
    with watchdog():
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        try:
            assert not stream.send_all([payload], [])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def test_hanging_up_ends_it(ends):
    stream, _ = ends
    thread = threading.Timer(0.02, stream.hang_up)
    thread.start()
    sent = []
    assert stream.send_all([memoryview(bytes(MUCH))], sent)
    thread.join(PATIENCE)
    with pytest.raises(Disconnected, match="closed by this program"):
        stream.send([memoryview(b"abc")])


class HandlerError(Exception):
    """Raised by a signal handler."""


def test_what_was_sent_before_a_handler_raised_is_counted(ends):
    stream, far = ends
    payload = os.urandom(MUCH)
    sent = []

    def handler(*_):
        raise HandlerError

    with pytest.raises(HandlerError), alarm_after(0.02, handler):
        send_everything(stream, [memoryview(payload)], sent)
    assert receive(far, sum(sent)) == payload[: sum(sent)]
    far.setblocking(False)
    with pytest.raises(BlockingIOError):
        far.recv(1)


def test_handler_that_raises_while_nothing_can_be_sent_loses_nothing(ends):
    stream, _ = ends
    payload = memoryview(bytes(MUCH))
    while stream.send([payload]) is not None:
        pass
    sent = []

    def handler(*_):
        raise TimeoutError("the program's own")

    with pytest.raises(TimeoutError, match="the program's own"), alarm_after(0.02, handler):
        send_everything(stream, [payload], sent)
    assert not sent


def test_handler_that_returns_disturbs_nothing(ends):
    stream, far = ends
    payload = os.urandom(MUCH)
    seen, sent, received = [], [], []
    with alarm_after(0.01, lambda number, _: seen.append(number)):
        thread = receiver(far, MUCH, received)
        send_everything(stream, [memoryview(payload)], sent)
    thread.join(PATIENCE)
    assert seen == [signal.SIGALRM]
    assert received == [payload]


class Counting(SocketStream):
    """A stranger's stream, which has something to do with every byte."""

    def send(self, parts):
        return super().send(parts)


def test_stream_that_sends_in_its_own_way_is_asked_for_every_byte():
    near, far = connected_pair()
    stream = Counting(near)
    assert not stream.send_all([memoryview(b"abc")], [])
    assert stream.send([memoryview(b"abc")]) == 3
    stream.close()
    far.close()

"""Waiting: readiness, deadlines and drivers, with poll and with select (the one that Windows has)."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import signal
import threading
import time

import pytest

from nbdcore.errors import DeadlineExceeded, Disconnected, UsageError
from nbdcore.streams import waiting
from nbdcore.streams.base import Want
from nbdcore.streams.sockets import connected_pair
from nbdcore.streams.waiting import NEVER, Deadline, Watch, drive, wait, wait_any

SOON = 30.0
BOTH = Want.READ | Want.WRITE


@pytest.fixture(params=["poll", "select"] if hasattr(select, "poll") else ["select"])
def _system_call(request, monkeypatch):
    if request.param == "select":
        monkeypatch.setattr(waiting, "_ready", waiting._by_select)


pytestmark = pytest.mark.usefixtures("_system_call")


@pytest.fixture
def pair():
    near, far = connected_pair()
    near.setblocking(False)
    yield near, far
    near.close()
    far.close()


@pytest.fixture
def full(pair):
    """A socket that has no room to send, and its peer."""
    near, far = pair
    with contextlib.suppress(BlockingIOError):
        while True:
            near.send(bytes(4096))
    return near, far


# --- deadlines ---


@pytest.mark.parametrize("seconds", [-1, -0.001, math.nan, -math.inf])
def test_impossible_timeout_is_refused(seconds):
    with pytest.raises(UsageError) as caught:
        Deadline.after(seconds)
    assert caught.value.errno == errno.EINVAL


def test_deadline_without_timeout_never_comes():
    assert Deadline.after(None) is NEVER
    assert NEVER.remaining() is None
    assert not NEVER.expired


def test_deadline_after_nothing_is_here_already():
    deadline = Deadline.after(0)
    assert deadline.expired
    assert deadline.remaining() == 0


def test_deadline_ahead_counts_down_on_the_monotonic_clock():
    before = time.monotonic()
    deadline = Deadline.after(1000)
    assert before + 1000 <= deadline.at <= time.monotonic() + 1000
    assert 0 < deadline.remaining() <= 1000
    assert not deadline.expired


# --- one descriptor ---


def test_readable_descriptor_is_ready(pair):
    near, far = pair
    far.send(b"x")
    assert wait(near.fileno(), Want.READ, Deadline.after(SOON), "late") == Want.READ


def test_only_what_is_ready_is_reported(pair):
    near, far = pair
    assert wait(near.fileno(), BOTH, Deadline.after(SOON), "late") == Want.WRITE
    far.send(b"x")
    assert wait(near.fileno(), BOTH, Deadline.after(SOON), "late") == BOTH


def test_full_socket_is_readable_only(full):
    near, far = full
    far.send(b"x")
    assert wait(near.fileno(), BOTH, Deadline.after(SOON), "late") == Want.READ


@pytest.mark.parametrize("timeout", [0, 0.01])
def test_deadline_that_passes_says_what_the_caller_said(pair, timeout):
    with pytest.raises(DeadlineExceeded) as caught:
        wait(pair[0].fileno(), Want.READ, Deadline.after(timeout), "reading took too long")
    assert caught.value.message == "reading took too long"
    assert caught.value.errno == errno.ETIMEDOUT


def test_deadline_that_has_passed_still_looks_once(pair):
    near, far = pair
    far.send(b"x")
    assert wait(near.fileno(), Want.READ, Deadline.after(0), "late") == Want.READ


@pytest.mark.parametrize("want", [Want.READ, BOTH])
def test_hang_up_counts_as_ready(pair, want):
    near, far = pair
    far.close()
    assert wait(near.fileno(), want, Deadline.after(SOON), "late") == want


def test_error_counts_as_writable(full):
    near, far = full
    far.close()
    assert wait(near.fileno(), Want.WRITE, Deadline.after(SOON), "late") == Want.WRITE


def test_closed_descriptor_is_a_disconnect(pair):
    near, _ = pair
    fd = near.fileno()
    near.close()
    with pytest.raises(Disconnected, match="closed by this program"):
        wait(fd, Want.READ, Deadline.after(SOON), "late")


def test_stream_that_is_closed_already_is_a_disconnect():
    with pytest.raises(Disconnected):
        wait(-1, Want.READ, NEVER, "late")


@pytest.mark.parametrize("timeout", [None, 1e12, math.inf])
def test_wait_of_any_length_ends_with_the_bytes(pair, timeout):
    near, far = pair
    sender = threading.Timer(0.02, far.send, [b"x"])
    sender.start()
    assert wait(near.fileno(), Want.READ, Deadline.after(timeout), "late") == Want.READ
    sender.join()


def test_longest_single_wait_is_not_the_end(pair, monkeypatch):
    monkeypatch.setattr(waiting, "_LONGEST", 0.005)
    near, far = pair
    sender = threading.Timer(0.05, far.send, [b"x"])
    sender.start()
    assert wait(near.fileno(), Want.READ, NEVER, "late") == Want.READ
    sender.join()


def test_signals_do_not_end_a_wait(pair):
    near, far = pair
    ticks = []

    def tick(number, frame):
        ticks.append(number)
        if len(ticks) == 3:
            far.send(b"x")

    before = signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        assert wait(near.fileno(), Want.READ, Deadline.after(SOON), "late") == Want.READ
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(ticks) >= 3


# --- many descriptors ---


def test_all_ready_descriptors_are_reported_and_no_others(pair, full):
    pairs = [connected_pair() for _ in range(3)]
    pairs[0][1].send(b"x")
    pairs[2][1].send(b"x")
    ready = wait_any([(near.fileno(), Want.READ) for near, _ in pairs], Deadline.after(SOON))
    assert sorted(ready) == sorted([(pairs[0][0].fileno(), Want.READ), (pairs[2][0].fileno(), Want.READ)])
    for near, far in pairs:
        near.close()
        far.close()


def test_descriptor_named_twice_waits_for_both(pair):
    near, far = pair
    far.send(b"x")
    ready = wait_any([(near.fileno(), Want.WRITE), (near.fileno(), Want.READ)], Deadline.after(SOON))
    assert ready == [(near.fileno(), BOTH)]


def test_nothing_ready_until_the_deadline_is_an_empty_list(pair):
    assert wait_any([(pair[0].fileno(), Want.READ)], Deadline.after(0.01)) == []


def test_no_descriptors_wait_for_the_deadline():
    assert wait_any([], Deadline.after(0.01)) == []


def test_descriptor_of_which_nothing_is_wanted_is_left_out(pair):
    near, far = pair
    far.close()
    assert wait_any([(near.fileno(), Want.NOTHING)], Deadline.after(0.01)) == []


@pytest.mark.parametrize("pairs", [[], [(0, Want.NOTHING)]])
def test_waiting_for_nothing_for_ever_is_refused(pairs):
    with pytest.raises(ValueError, match="no descriptor"):
        wait_any(pairs, NEVER)


@pytest.mark.parametrize("number", ["closed", "negative"])
def test_descriptor_that_is_not_open_counts_as_ready(pair, number):
    near, _ = pair
    gone = os.dup(near.fileno())
    os.close(gone)
    fd = gone if number == "closed" else -1
    assert wait_any([(near.fileno(), Want.READ), (fd, BOTH)], Deadline.after(SOON)) == [(fd, BOTH)]


# --- generators ---


def test_driven_generator_waits_for_what_it_says_and_returns_its_result(pair):
    near, far = pair

    def conversation():
        yield near.fileno(), Want.WRITE
        far.send(b"x")
        yield near.fileno(), Want.READ
        return near.recv(10)

    assert drive(conversation(), Deadline.after(SOON), "late") == b"x"


def test_generator_that_fails_is_closed(pair):
    def conversation():
        yield pair[0].fileno(), Want.WRITE
        raise ConnectionRefusedError

    generator = conversation()
    with pytest.raises(ConnectionRefusedError):
        drive(generator, Deadline.after(SOON), "late")
    assert generator.gi_frame is None


def test_generator_whose_deadline_passes_frees_what_it_had_opened(pair):
    freed = []

    def conversation():
        try:
            yield pair[0].fileno(), Want.READ
        finally:
            freed.append(True)

    with pytest.raises(DeadlineExceeded, match="connecting took too long"):
        drive(conversation(), Deadline.after(0.01), "connecting took too long")
    assert freed


# --- many descriptors in a process (poll only: select has 1024 at most) ---


def test_descriptor_numbers_above_1024_work(pair, request):
    if request.node.callspec.params["_system_call"] == "select":
        # What select cannot do it says, rather than waits for the wrong thing.
        with pytest.raises(ValueError, match="out of range"):
            wait(5000, Want.READ, Deadline.after(0), "late")
        return
    import resource  # unix only, as poll is

    near, far = pair
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    os.dup2(near.fileno(), 2000)
    try:
        far.send(b"x")
        assert wait(2000, Want.READ, Deadline.after(SOON), "late") == Want.READ
        assert wait_any([(2000, Want.READ)], Deadline.after(SOON)) == [(2000, Want.READ)]
    finally:
        os.close(2000)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- watching again and again ---


@pytest.fixture
def watch(monkeypatch):
    if waiting._ready is waiting._by_select:
        monkeypatch.setattr(waiting, "_HAS_POLL", False)
    return Watch()


def test_each_of_many_watches_ends_when_there_is_something(pair, watch):
    near, far = pair
    for number in range(300):
        far.send(bytes([number % 256]))
        assert watch.wait((near.fileno(),), NEVER) == [near.fileno()]
        assert near.recv(1) == bytes([number % 256])


def test_a_watch_ends_when_something_comes_late(pair, watch):
    near, far = pair
    for _ in range(5):
        timer = threading.Timer(0.02, far.send, (b"x",))
        timer.start()
        watch.wait((near.fileno(),), Deadline.after(SOON))
        assert near.recv(1) == b"x"
        timer.join()


def test_a_watch_ends_at_its_deadline(pair, watch):
    near, _ = pair
    begin = time.monotonic()
    for _ in range(3):
        assert watch.wait((near.fileno(),), Deadline.after(0.05)) == []
    assert time.monotonic() - begin >= 0.15


def test_a_watch_that_may_not_wait_returns(pair, watch):
    near, _ = pair
    for _ in range(100):
        assert watch.wait((near.fileno(),), Deadline.after(0)) == []


def test_a_watch_ends_when_the_peer_hangs_up(pair, watch):
    near, far = pair
    far.close()
    watch.wait((near.fileno(),), NEVER)
    assert near.recv(1) == b""


def test_a_descriptor_that_is_not_open_ends_a_watch(pair, watch):
    near, far = pair
    far.send(b"x")
    watch.wait((near.fileno(),), NEVER)
    assert -1 in watch.wait((near.fileno(), -1), NEVER)


def test_a_watch_follows_other_descriptors(pair, watch):
    near, far = pair
    far.send(b"x")
    assert watch.wait((near.fileno(),), NEVER) == [near.fileno()]
    near.send(b"y")
    assert watch.wait((far.fileno(),), NEVER) == [far.fileno()]
    assert near.recv(1) == b"x"
    assert watch.wait((near.fileno(), far.fileno()), NEVER) == [far.fileno()]
    assert far.recv(1) == b"y"

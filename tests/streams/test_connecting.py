"""Generators that open connections: what they wait for, and that nothing stays open when they fail or are given up."""

from __future__ import annotations

import errno
import socket
import threading

import pytest

from nbdcore.errors import TransportError
from nbdcore.streams import connecting
from nbdcore.streams.base import Want
from nbdcore.streams.connecting import connect_socket, first_of, in_thread
from nbdcore.streams.waiting import Deadline, drive
from tests.leaks import open_descriptors

SOON = 30.0


def run(generator):
    return drive(generator, Deadline.after(SOON), "late")


@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


# --- sockets ---


def test_connected_socket_does_not_block(server):
    sock = run(connect_socket(socket.socket(), server.getsockname(), "the server"))
    with sock:
        assert sock.gettimeout() == 0
        assert sock.getpeername() == server.getsockname()


def test_refused_connection_closes_the_socket_and_says_to_whom(server):
    name = server.getsockname()
    server.close()
    sock = socket.socket()
    with pytest.raises(TransportError, match="cannot connect to the server: Connection refused") as caught:
        run(connect_socket(sock, name, "the server"))
    assert caught.value.errno == errno.ECONNREFUSED
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert sock.fileno() == -1


def test_hint_explains_a_refused_connection(server):
    name = server.getsockname()
    server.close()
    with pytest.raises(TransportError, match="cannot connect to the server: nobody is there"):
        run(connect_socket(socket.socket(), name, "the server", {errno.ECONNREFUSED: "nobody is there"}))


def test_connect_given_up_closes_the_socket(server):
    sock = socket.socket()
    generator = connect_socket(sock, server.getsockname(), "the server")
    assert next(generator) == (sock.fileno(), Want.WRITE)
    generator.close()
    assert sock.fileno() == -1


def test_socket_name_of_the_wrong_kind_closes_the_socket():
    sock = socket.socket()
    with pytest.raises(TypeError):
        run(connect_socket(sock, "no pair", "the server"))
    assert sock.fileno() == -1


# --- threads ---


def test_result_of_a_blocking_call_comes_back():
    assert run(in_thread(lambda: threading.current_thread().name)) == "nbdcore-connecting"


@pytest.mark.parametrize("error", [ConnectionRefusedError(errno.ECONNREFUSED, "no"), KeyError("k"), SystemExit(3)])
def test_error_of_a_blocking_call_is_raised_to_who_asked(error):
    def call():
        raise error

    with pytest.raises(type(error)) as caught:
        run(in_thread(call))
    assert caught.value is error


def test_result_that_comes_too_late_is_discarded(eventually):
    go, discarded = threading.Event(), []

    def call():
        assert go.wait(SOON)
        return "result"

    generator = in_thread(call, discard=discarded.append)
    next(generator)
    generator.close()
    assert not discarded
    go.set()
    eventually(lambda: discarded == ["result"], "the late result was discarded")


def test_result_that_nobody_took_is_discarded(eventually):
    go, discarded = threading.Event(), []

    def call():
        assert go.wait(SOON)
        return "result"

    generator = in_thread(call, discard=discarded.append)
    next(generator)
    go.set()
    eventually(no_thread_left, "the thread ended")
    generator.close()
    assert discarded == ["result"]


def test_result_that_was_taken_is_not_discarded():
    discarded = []
    assert run(in_thread(lambda: "result", discard=discarded.append)) == "result"
    assert not discarded


def test_late_result_without_discard_harms_nothing(eventually):
    go = threading.Event()
    generator = in_thread(lambda: go.wait(SOON))
    next(generator)
    generator.close()
    go.set()
    eventually(no_thread_left, "the thread ended")


def no_thread_left() -> bool:
    return all(thread.name != "nbdcore-connecting" for thread in threading.enumerate())


def test_thread_that_cannot_start_is_a_transport_error_and_leaves_nothing_open(monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    before = open_descriptors()
    with pytest.raises(TransportError, match="can't start new thread") as caught:
        run(in_thread(lambda: None))
    assert caught.value.errno == errno.EAGAIN
    assert open_descriptors() == before


def test_lack_of_descriptors_for_a_thread_is_a_transport_error(monkeypatch):
    def none_left():
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(connecting, "connected_pair", none_left)
    with pytest.raises(TransportError, match="Too many open files") as caught:
        run(in_thread(lambda: None))
    assert caught.value.errno == errno.EMFILE


# --- several attempts side by side ---


def steps(log, name, *wanted, outcome):
    """An attempt that waits for each of `wanted`, then returns its outcome, or raises it."""
    log.append(f"{name} begun")
    try:
        for each in wanted:
            _ = yield each
        if isinstance(outcome, Exception):
            raise outcome
        return outcome
    finally:
        log.append(f"{name} ended")


class Opened(str):
    """What an attempt has opened, known by its name."""

    __slots__ = ("closed",)

    def __init__(self, _):
        self.closed = False

    def close(self):
        self.closed = True


def refused(text):
    return TransportError(errno.ECONNREFUSED, text)


def played(generator, *answers):
    """Send the answers one by one; returns what was waited for, and the result."""
    waited = [next(generator)]
    for answer in answers:
        try:
            waited += [generator.send(frozenset(answer))]
        except StopIteration as end:
            return waited, end.value
    return waited, None


def test_second_attempt_is_begun_at_once_when_the_first_fails():
    log = []
    first = first_of([steps(log, "a", outcome=refused("a")), steps(log, "b", (7, Want.WRITE), outcome=Opened("b"))])
    waited, result = played(first, {7})
    assert result == "b"
    assert [request.waiting for request in waited] == [((7, Want.WRITE),)]
    assert waited[0].seconds is None  # there is no third one
    assert log == ["a begun", "a ended", "b begun", "b ended"]


def test_second_attempt_is_begun_beside_the_first_when_that_takes_long():
    log = []
    slow, fast = (
        steps(log, "slow", (5, Want.WRITE), outcome=Opened("slow")),
        steps(log, "fast", (6, Want.WRITE), outcome=Opened("fast")),
    )
    waited, result = played(first_of([slow, fast], delay=0), {6})
    assert result == "fast"
    assert waited[0].waiting == ((5, Want.WRITE), (6, Want.WRITE))
    assert log == ["slow begun", "fast begun", "fast ended", "slow ended"]


def test_first_attempt_may_still_win_when_the_second_has_begun():
    log = []
    slow, fast = (
        steps(log, "slow", (5, Want.WRITE), outcome=Opened("slow")),
        steps(log, "fast", (6, Want.WRITE), outcome=Opened("fast")),
    )
    _, result = played(first_of([slow, fast], delay=0), {5, 6})
    assert result == "slow"
    assert log[-1] == "fast ended"


def test_second_of_two_attempts_that_succeed_at_once_is_closed():
    results = [Opened("one"), Opened("other")]
    attempts = [steps([], result, (number, Want.WRITE), outcome=result) for number, result in enumerate(results)]
    _, result = played(first_of(attempts, delay=0), {0, 1})
    assert [result, *(one.closed for one in results)] == ["one", False, True]


def test_all_attempts_failed_is_the_first_ones_error_with_the_words_of_all():
    log = []
    attempts = [steps(log, name, outcome=TransportError(number, name)) for name, number in (("a", 111), ("b", 113))]
    with pytest.raises(TransportError, match="a; b") as caught:
        played(first_of(attempts))
    assert caught.value.errno == 111


def test_attempts_that_are_given_up_are_closed():
    log = []
    first = first_of([steps(log, "a", (5, Want.WRITE), outcome=Opened("a")), steps(log, "b", outcome=Opened("b"))])
    next(first)
    first.close()
    assert log == ["a begun", "a ended"]


def test_second_attempt_waits_for_its_turn():
    log = []
    first = first_of([steps(log, "a", (5, Want.WRITE), outcome=Opened("a")), steps(log, "b", outcome=Opened("b"))], delay=100)
    waited, result = played(first, {5})
    assert 99 < waited[0].seconds <= 100
    assert (result, log) == ("a", ["a begun", "a ended"])

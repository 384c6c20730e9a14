"""A signal handler closes the client whose call it interrupted: the call ends at once, wherever it was, and nothing deadlocks."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import signal
import threading

import pytest

import nbdcore
from nbdcore.server import MemoryDisk, Server
from tests.clients.talking import PATIENCE, in_background

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")

RANGES = [(index * 4096 % (1 << 20), 4096) for index in range(20_000)]
ROUNDS = 40


@pytest.fixture
def uri():
    with Server(MemoryDisk(1 << 20)) as server:
        yield server.listen("tcp", host="127.0.0.1", port=0).address.uri()


@contextlib.contextmanager
def alarm_after(seconds, handler):
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def watchdog():
    """Break a deadlock of the main thread, which a handler of Python's would not."""
    faulthandler.dump_traceback_later(3 * PATIENCE, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def read_many(client):
    for _ in client.pread_many(RANGES, depth=64):
        pass


def read_one_by_one(client):
    for offset, count in RANGES:
        client.pread(count, offset)


@pytest.mark.parametrize("connect", [nbdcore.connect, nbdcore.create_pool])
@pytest.mark.parametrize("work", [read_many, read_one_by_one])
def test_close_in_a_handler_ends_the_interrupted_call(uri, work, connect):
    with watchdog():
        for number in range(ROUNDS):
            client = connect(uri, timeout=PATIENCE)
            with alarm_after(0.001 + number / 10_000, lambda *_: client.close()), pytest.raises(nbdcore.Error):  # noqa: B023
                work(client)
            assert client.phase in (nbdcore.Phase.CLOSED, nbdcore.Phase.DEAD)
            with pytest.raises(nbdcore.Error):
                client.pread(512, 0, timeout=PATIENCE)
            client.close()


def test_close_in_a_handler_ends_the_calls_of_other_threads_too(uri):
    with watchdog():
        for number in range(ROUNDS // 4):
            client = nbdcore.connect(uri, timeout=PATIENCE)
            ended = threading.Event()

            def work(client=client, ended=ended):
                try:
                    read_many(client)
                finally:
                    ended.set()

            with in_background(work) as outcome:
                with alarm_after(0.002 + number / 5000, lambda *_: client.close()), pytest.raises(nbdcore.Error):  # noqa: B023
                    read_many(client)
                assert ended.wait(PATIENCE)
            assert isinstance(outcome[0], nbdcore.Error)


def test_other_calls_in_a_handler_fail_and_the_interrupted_one_goes_on(uri):
    outcomes = []

    def handler(*_):
        try:
            outcomes.append(client.pread(512, 0, timeout=0.01))
        except nbdcore.UsageError as exc:
            outcomes.append(exc.errno)
        except nbdcore.DeadlineExceeded:
            outcomes.append(None)
        signal.setitimer(signal.ITIMER_REAL, 0.001)  # once more: a timer that repeats could interrupt this handler for ever

    with watchdog(), nbdcore.connect(uri, timeout=PATIENCE) as client, alarm_after(0.001, handler):
        assert len(list(client.pread_many(RANGES, depth=64))) == len(RANGES)
    assert errno.EDEADLK in outcomes

"""Several threads on one handle: each gets its own answer, and none keeps what another asks from being sent with its own."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

import nbdcore.libnbd as nbd
from nbdcore.testing.scripted import Connection, Negotiation, ScriptedServer, Step, data, drain, greeting, serve, wait_for

SIZE = 1 << 20
PATIENCE = 30


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def in_threads(work: Callable[[int], object]) -> None:
    """Run it in four threads, which get a number each."""
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, number) for number in range(4)]:
            done.result(PATIENCE)


def late(event: threading.Event) -> Step:
    """Answer a read when the event has happened."""

    def step(connection: Connection) -> None:
        request = connection.receive_request()
        wait_for(event)(connection)
        connection.send(data(b"first")(request))

    return step


@contextlib.contextmanager
def talk(handles, *steps: Step) -> Iterator[tuple[nbd.NBD, Connection, Future[Any], ThreadPoolExecutor]]:
    """Have a thread read, and wait for the answer; then the others are to come."""
    with ScriptedServer([greeting(), Negotiation(size=SIZE), *steps]) as server, ThreadPoolExecutor(4) as pool:
        handle = handles()
        handle.connect_socket(server.socket().detach())
        connection = server.connections[0]
        first = pool.submit(handle.pread, 5, 0)
        until(lambda: connection.requests)
        yield handle, connection, first, pool
        with contextlib.suppress(nbd.ClosedHandle):
            handle.close()


def test_reads_and_writes_of_several_threads_are_each_one_s_own(connected):
    def work(number: int) -> None:
        mine = bytes([number]) * 512
        for _ in range(50):
            connected.pwrite(mine, number * 512)
            assert connected.pread(512, number * 512) == mine

    in_threads(work)


def test_a_wrong_call_of_a_thread_harms_no_other(connected):
    def work(number: int) -> None:
        for turn in range(100):
            if (turn + number) % 2:
                with pytest.raises(nbd.Error):
                    connected.pread(512, SIZE)
            else:
                assert connected.pread(512, 0) == bytes(512)

    in_threads(work)


def test_what_threads_ask_while_another_waits_is_sent_together(handles):
    event = threading.Event()

    def three_at_once(connection: Connection) -> None:
        requests = [connection.receive_request() for _ in range(3)]
        connection.send(b"".join(data(bytes([request.offset]) * 5)(request) for request in reversed(requests)))

    with talk(handles, late(event), three_at_once, drain) as (handle, connection, first, pool):
        others = [pool.submit(handle.pread, 5, offset) for offset in (5, 10, 15)]
        until(lambda: len(handle._inbox) == 3)
        assert len(connection.requests) == 1
        event.set()
        assert first.result(PATIENCE) == b"first"
        assert [other.result(PATIENCE) for other in others] == [bytes([offset]) * 5 for offset in (5, 10, 15)]
        assert handle.aio_in_flight() == 0
        with pytest.raises(nbd.Error, match="no commands are in flight"):
            handle.aio_peek_command_completed()


def test_the_end_of_the_connection_ends_the_calls_of_all_threads(handles):
    event = threading.Event()

    def hang_up_late(connection: Connection) -> None:
        connection.receive_request()
        wait_for(event)(connection)

    with talk(handles, hang_up_late) as (handle, _, first, pool):
        others = [pool.submit(handle.pread, 5, 0), pool.submit(handle.pwrite, b"12345", 0)]
        until(lambda: len(handle._inbox) == 2)
        event.set()
        with pytest.raises(nbd.Error, match="nbd_pread: read: command failed"):
            first.result(PATIENCE)
        for other, name in zip(others, ("nbd_pread", "nbd_pwrite"), strict=True):
            with pytest.raises(nbd.Error, match=f"{name}: invalid state: CLOSED"):
                other.result(PATIENCE)


def test_a_handle_that_another_thread_closes_takes_no_calls(handles):
    event = threading.Event()
    with talk(handles, late(event), serve(data(b"other"))) as (handle, _, first, pool):
        closing = pool.submit(handle.close)
        other = pool.submit(handle.pread, 5, 5)
        until(lambda: handle._inbox)
        event.set()
        assert first.result(PATIENCE) == b"first"
        assert closing.result(PATIENCE) is None
        # Which of the two had the handle first is chance.
        error = other.exception(PATIENCE)
        assert isinstance(error, nbd.ClosedHandle) or other.result() == b"other"
        assert not handle._inbox


def test_ctrl_c_while_another_thread_has_the_handle_takes_the_call_back(handles):
    event = threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        until(lambda: handle._inbox)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    try:
        with talk(handles, late(event), serve(data(b"after"))) as (handle, connection, first, pool):
            interrupting = pool.submit(interrupt)
            with pytest.raises(KeyboardInterrupt):
                handle.pread(5, 5)
            interrupting.result(PATIENCE)
            assert not handle._inbox
            event.set()
            assert first.result(PATIENCE) == b"first"
            assert handle.pread(5, 10) == b"after"
            assert [request.offset for request in connection.requests] == [0, 10]
    finally:
        signal.signal(signal.SIGINT, before)


def test_call_that_an_interrupted_thread_had_taken_over_is_sent_all_the_same(handles):
    class Interrupted(deque):
        """Ctrl-C comes right after the first command was taken out, to be submitted."""

        armed = True

        def popleft(self):
            command = super().popleft()
            if self.armed:
                self.armed = False
                raise KeyboardInterrupt
            return command

    with ScriptedServer([greeting(), Negotiation(size=SIZE), serve(data(b"other"))]) as server, ThreadPoolExecutor(1) as pool:
        handle = handles()
        handle._inbox = Interrupted()
        handle.connect_socket(server.socket().detach())
        with handle._lock:
            other = pool.submit(handle.pread, 5, 5)
            until(lambda: handle._inbox)
            command, _ = nbd.NBD.pread.__wrapped__(handle, 5, 0)  # the call itself would find that this thread has the lock
            with pytest.raises(KeyboardInterrupt):
                handle._run_with_others(handle._connection, command)
        assert other.result(PATIENCE) == b"other"
        handle.close()

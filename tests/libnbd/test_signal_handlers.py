"""A signal handler comes in the middle of a call: it may close the handle, whose call then ends, and what it raises comes out."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
import threading
import time

import pytest

import nbdcore.libnbd as nbd
from nbdcore.server import MemoryDisk, Server
from nbdcore.testing.scripted import Negotiation, ScriptedServer, data, drain, greeting, serve, wait_for
from tests.alarms import alarm_after, needs_alarms, watchdog
from tests.forks import SERVER

pytestmark = needs_alarms

PATIENCE = 20
ROUNDS = 60


@pytest.fixture(autouse=True)
def _a_deadlock_ends_the_test_run():
    with watchdog():
        yield


def read_one_by_one(handle):
    for _ in range(16):
        handle.pread(4096, 0)


def start_many(handle):
    buffer = nbd.Buffer(4096)
    for _ in range(16):
        handle.aio_pread(buffer, 0, lambda _: 1)
    while handle.aio_in_flight():
        handle.poll(-1)


def keep_on(work, handle, until=lambda: False):
    end = time.monotonic() + PATIENCE
    while not until() and time.monotonic() < end:
        work(handle)


@pytest.mark.parametrize("work", [read_one_by_one, start_many])
def test_close_in_a_handler_ends_the_interrupted_call(work, handles, server):
    for number in range(ROUNDS):
        handle = handles()
        handle.connect_tcp("127.0.0.1", server)
        with (
            alarm_after(0.001 + number / 20_000, lambda *_, handle=handle: handle.close()),
            pytest.raises((nbd.Error, nbd.ClosedHandle)),
        ):
            keep_on(work, handle)
        with pytest.raises(nbd.ClosedHandle):
            handle.pread(512, 0)
        with pytest.raises(nbd.ClosedHandle):
            handle.close()


@pytest.mark.parametrize("work", [read_one_by_one, start_many])
def test_shutdown_in_a_handler_ends_the_interrupted_call(work, handles, server):
    for number in range(ROUNDS):
        handle = handles()
        handle.connect_tcp("127.0.0.1", server)
        with alarm_after(0.001 + number / 20_000, lambda *_, handle=handle: handle.shutdown()), pytest.raises(nbd.Error):
            keep_on(work, handle)
        assert handle.aio_is_dead() or handle.aio_is_closed()
        handle.close()


@pytest.mark.parametrize("end", ["close", "shutdown"])
def test_end_in_a_handler_wakes_a_call_whose_server_never_answers(end, handles):
    with ScriptedServer([greeting(), Negotiation(size=1 << 20), drain]) as silent:
        handle = handles()
        handle.connect_socket(silent.socket().detach())
        done = []
        handle.aio_pread(nbd.Buffer(512), 0, lambda error: done.append(error.value))
        with (
            alarm_after(0.1, lambda *_: getattr(handle, end)()),
            pytest.raises(nbd.Error, match="nbd_pread: read: command failed") as caught,
        ):
            handle.pread(512, 512)
        assert caught.value.errnum == errno.ENOTCONN
        assert done == [errno.ENOTCONN]


def test_close_in_a_handler_ends_a_handshake_that_the_server_never_begins(handles):
    near, far = socket.socketpair()
    with far:
        handle = handles()
        with alarm_after(0.1, lambda *_: handle.close()), pytest.raises(nbd.Error, match="nbd_connect_socket"):
            handle.connect_socket(near.detach())
        with pytest.raises(nbd.ClosedHandle):
            handle.close()
        assert far.recv(1) == b"", "the descriptor is closed"


def connect_blocking(handle, uri):
    handle.connect_uri(uri)


def connect_in_a_loop(handle, uri):
    handle.aio_connect_uri(uri)
    handle.poll(-1)


@pytest.mark.parametrize("connect", [connect_blocking, connect_in_a_loop])
def test_close_in_a_handler_ends_a_connect_that_gets_no_answer(connect, handles):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        with contextlib.ExitStack() as others:
            for _ in range(2):  # what the kernel queues; it leaves the next without an answer
                others.enter_context(sock := socket.socket()).setblocking(False)
                sock.connect_ex(address)
            handle = handles()
            with alarm_after(0.2, lambda *_: handle.close()), pytest.raises(nbd.Error):
                connect(handle, f"nbd://127.0.0.1:{address[1]}")
            with pytest.raises(nbd.ClosedHandle):
                handle.close()


def test_other_commands_in_a_handler_are_refused_and_the_interrupted_call_goes_on(connected):
    outcomes = []

    def handler(*_):
        try:
            outcomes.append(len(connected.pread(512, 0)))
        except nbd.Error as exc:
            outcomes.append(exc.errnum)
        signal.setitimer(signal.ITIMER_REAL, 0.001)

    with alarm_after(0.001, handler):
        for _ in range(5000):
            assert connected.pread(4096, 0) == bytes(4096)
    assert set(outcomes) <= {512, errno.EDEADLK}
    assert errno.EDEADLK in outcomes


def outcome(call, *arguments):
    """Return the errno of a call, 0 where it succeeds."""
    try:
        call(*arguments)
    except nbd.Error as exc:
        return exc.errnum
    return 0


LOOP_CALLS = {"poll": (0,), "poll2": (-1, 0), "aio_notify_read": (), "aio_notify_write": ()}


@pytest.mark.parametrize("name", LOOP_CALLS)
def test_loops_call_in_a_handler_is_refused_and_the_interrupted_call_goes_on(name, handles):
    asked, outcomes = threading.Event(), []
    steps = [greeting(), Negotiation(size=1 << 20), wait_for(asked), serve(data(bytes(512)))]
    with ScriptedServer(steps) as server:
        handle = handles()
        handle.connect_socket(server.socket().detach())

        def handler(*_):
            outcomes.append(outcome(getattr(handle, name), *LOOP_CALLS[name]))
            asked.set()

        with alarm_after(0.1, handler):
            assert handle.pread(512, 0) == bytes(512)
        handle.close()
    assert outcomes == [errno.EDEADLK]


class InterruptedPath:
    """A path that a signal comes in the middle of the naming of."""

    def __init__(self, path):
        self._path = path

    def __fspath__(self):
        signal.raise_signal(signal.SIGALRM)
        return str(self._path)


CONNECT_CALLS = {
    "uri": lambda path: f"nbd+unix:///?socket={path}",
    "unix": str,
    "command": lambda _: SERVER,
    "systemd_socket_activation": lambda _: SERVER,
}


@pytest.mark.parametrize("form", ["connect", "aio_connect"])
@pytest.mark.parametrize("name", CONNECT_CALLS)
def test_connect_call_in_a_handler_is_refused_and_the_interrupted_one_goes_on(name, form, handles, socket_path):
    outcomes = []
    with Server(MemoryDisk(1 << 20)) as server:
        server.listen("unix", path=str(socket_path))
        handle = handles()

        def handler(*_):
            outcomes.append(outcome(getattr(handle, f"{form}_{name}"), CONNECT_CALLS[name](socket_path)))

        with alarm_after(PATIENCE, handler):
            handle.connect_unix(InterruptedPath(socket_path))
        assert outcomes == [errno.EDEADLK]
        assert handle.pread(512, 0) == bytes(512)
        handle.close()


def test_handler_may_kill_the_process_whose_answer_the_interrupted_call_waits_for(handles):
    handle = handles()
    handle.connect_command(SERVER)
    handle.kill_subprocess(signal.SIGSTOP)
    os.waitid(os.P_PID, handle.get_subprocess_pid(), os.WSTOPPED | os.WNOWAIT)
    outcomes = []
    with alarm_after(0.1, lambda *_: outcomes.append(outcome(handle.kill_subprocess, signal.SIGKILL))), pytest.raises(nbd.Error):
        handle.pread(512, 0)
    assert outcomes == [0]


def test_close_in_a_completion_takes_effect_when_the_call_ends(handles, server):
    handle = handles()
    handle.connect_tcp("127.0.0.1", server)
    told = []

    def completion(error):
        told.append(error.value)
        if len(told) == 1:
            handle.close()

    for _ in range(3):
        handle.aio_pread(nbd.Buffer(512), 0, completion)
    with contextlib.suppress(nbd.Error):
        handle.poll(-1)
    assert len(told) == 3
    with pytest.raises(nbd.ClosedHandle):
        handle.poll(-1)


class SlowNumber:
    """A count that another thread is asked for while a handler closes the handle."""

    def __init__(self):
        self.asked, self.answer = threading.Event(), threading.Event()

    def __index__(self):
        self.asked.set()
        assert self.answer.wait(PATIENCE)
        return -1


def test_wrong_call_of_another_thread_leaves_closing_to_the_interrupted_call(handles):
    count, order = SlowNumber(), []
    with ScriptedServer([greeting(), Negotiation(size=1 << 20), drain]) as silent:
        handle = handles()
        handle.connect_socket(silent.socket().detach())
        handle.add_close_callback(lambda: order.append("closed"))
        other = threading.Thread(target=outcome, args=(handle.pread, count, 0))
        other.start()
        assert count.asked.wait(PATIENCE)

        def handler(*_):
            handle.close()
            count.answer.set()
            other.join(0.5)
            order.append("the handler has returned")

        with alarm_after(0.1, handler), pytest.raises(nbd.Error):
            handle.pread(512, 512)
        other.join(PATIENCE)
    assert order == ["the handler has returned", "closed"]


@contextlib.contextmanager
def handler_at_line(number, function, handler):
    """Call a handler where a signal's might come: before the line of a function that is its number-th to be run."""
    lines = iter(range(1000))

    def trace_lines(_frame, event, _):
        if event == "line" and next(lines) == number:
            handler()
        return trace_lines

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: trace_lines if frame.f_code is function else None)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("number", range(8))
def test_close_in_a_handler_that_interrupts_close_closes_once(number, handles, server):
    handle, told = handles(), []
    handle.connect_tcp("127.0.0.1", server)
    fd = handle.aio_get_fd()
    handle.aio_pread(nbd.Buffer(512), 0, lambda error: told.append(error.value))
    handle.add_close_callback(lambda: told.append("closing"))

    def close():
        with contextlib.suppress(nbd.ClosedHandle):
            handle.close()

    with handler_at_line(number, nbd.NBD.close.__wrapped__.__code__, close):
        close()
    assert told == ["closing", errno.ENOTCONN]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


class AlarmError(TimeoutError):
    """What many programs raise in a handler of SIGALRM: an OSError, like those of a socket."""


def alarmed(*_):
    raise AlarmError("the program's own")


@pytest.mark.parametrize("work", [read_one_by_one, start_many])
def test_what_a_handler_raises_comes_out_as_it_is(work, handles, server, monkeypatch):
    in_callbacks = []
    monkeypatch.setattr("sys.excepthook", lambda *raised: in_callbacks.append(raised[1]))
    # Where nothing may be raised, in a weak reference's callback, Python says it here and goes on.
    monkeypatch.setattr("sys.unraisablehook", lambda raised: in_callbacks.append(raised.exc_value))
    for number in range(ROUNDS):
        handle = handles()
        handle.connect_tcp("127.0.0.1", server)
        try:
            with alarm_after(0.001 + number / 20_000, alarmed):
                keep_on(work, handle, lambda: in_callbacks)
        except AlarmError:
            continue
        assert isinstance(in_callbacks.pop(), AlarmError), "what is raised in the middle of a callback is the callback's"


class HandlerError(Exception):
    """What the handler raises."""


def interrupted(*_):
    raise HandlerError


def test_memory_of_a_write_that_was_interrupted_is_the_callers_again(handles):
    go_on, payloads = threading.Event(), []

    def slow(connection):
        wait_for(go_on)(connection)
        payloads.append(connection.receive_request().payload)

    with ScriptedServer([greeting(), Negotiation(size=1 << 26), slow], patience=PATIENCE) as server:
        handle = handles()
        handle.connect_socket(server.socket().detach())
        memory = bytearray(b"A") * (8 << 20)
        with alarm_after(0.1, interrupted), pytest.raises(HandlerError):
            handle.pwrite(memory, 0)
        memory[:] = bytes(len(memory))
        memory.append(0)  # nobody has a view of it
        go_on.set()
        end = time.monotonic() + PATIENCE
        while not payloads and time.monotonic() < end:
            with contextlib.suppress(nbd.Error):  # the server hangs up then
                handle.poll(100)
        assert payloads == [b"A" * (8 << 20)]


def test_callback_of_a_call_that_was_interrupted_is_not_called_any_more(handles):
    go_on = threading.Event()

    def late(connection):
        first = connection.receive_request()
        wait_for(go_on)(connection)
        connection.send(data(bytes(512))(first))
        connection.send(data(bytes(512))(connection.receive_request()))
        drain(connection)

    with ScriptedServer([greeting(), Negotiation(size=1 << 20), late], patience=PATIENCE) as server:
        handle, called = handles(), []
        handle.connect_socket(server.socket().detach())
        with alarm_after(0.1, interrupted), pytest.raises(HandlerError):
            handle.pread_structured(512, 0, lambda *_: called.append(1))
        go_on.set()
        assert handle.pread(512, 512) == bytes(512)
        assert not called
        handle.close()

"""Ctrl-C and other signals: a call that waits gives its command up; in the middle of moving bytes the connection ends."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

import nbdcore
from nbdcore import Client, Disconnected, Phase
from nbdcore.clients.blocking.moving import Mover
from nbdcore.clients.blocking.threads import SharedSession
from nbdcore.clients.session.session import Session
from nbdcore.protocol.constants import CommandType
from nbdcore.server import MemoryDisk, Server
from nbdcore.streams.sockets import SocketStream
from nbdcore.testing.scripted import (
    Connection,
    Negotiation,
    ScriptedServer,
    answer,
    data,
    drain,
    greeting,
    serve,
    unless_gone,
    wait_for,
)
from tests.clients.talking import CALLS, DONE, OPTION_CALLS, OPTION_MODE, PATIENCE, in_background, ready_for_options, script, talk
from tests.interruptions import interrupted_at, interrupted_at_each_step

MAIN = threading.main_thread().ident
MUCH = 256 << 10


@contextlib.contextmanager
def ctrl_c_when(condition: Callable[[], object]) -> Iterator[None]:
    """Send SIGINT to the main thread, as soon as the condition holds."""

    def send() -> None:
        while not condition():
            time.sleep(0.001)
        time.sleep(0.02)  # the main thread gets to where it waits
        signal.pthread_kill(MAIN, signal.SIGINT)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    yield
    thread.join(PATIENCE)


@pytest.fixture(autouse=True)
def _python_handles_sigint() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, whatever the shell that runs the tests has made of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", CALLS)
def test_ctrl_c_while_a_call_waits_leaves_the_connection_usable(name):
    event = threading.Event()

    def late(connection: Connection) -> None:
        request = connection.receive_request()
        wait_for(event)(connection)
        connection.send(CALLS[name].chunks(request))

    with talk(late, answer(DONE)) as (client, connection):
        with ctrl_c_when(lambda: connection.requests), pytest.raises(KeyboardInterrupt):
            CALLS[name].make(client)
        assert client.phase is Phase.CONNECTED
        event.set()
        client.flush(timeout=PATIENCE)


def test_ctrl_c_leaves_the_buffer_of_the_read_alone():
    event = threading.Event()

    def late(connection: Connection) -> None:
        request = connection.receive_request()
        wait_for(event)(connection)
        connection.send(data(b"x" * 100_000)(request))

    with talk(late, answer(DONE)) as (client, connection):
        buffer = bytearray(100_000)
        with ctrl_c_when(lambda: connection.requests), pytest.raises(KeyboardInterrupt):
            client.pread_into(buffer, 0)
        event.set()
        client.flush(timeout=PATIENCE)
        assert buffer == bytes(100_000)


def test_ctrl_c_in_the_thread_that_polls_hands_the_polling_over():
    event = threading.Event()

    def the_other_one(connection: Connection) -> None:
        connection.receive_request()
        other = connection.receive_request()
        wait_for(event)(connection)
        connection.send(data(b"2")(other))

    with talk(the_other_one, answer(DONE)) as (client, connection):

        def second() -> bytes:
            while not connection.requests:
                time.sleep(0.001)
            return client.pread(1, 2)

        with in_background(second) as outcome:
            with ctrl_c_when(lambda: len(connection.requests) == 2), pytest.raises(KeyboardInterrupt):
                client.pread(1, 1)
            event.set()
        assert outcome == [b"2"]
        client.flush(timeout=PATIENCE)


def test_ctrl_c_in_a_thread_that_sleeps_disturbs_nobody():
    event = threading.Event()

    def the_first_one(connection: Connection) -> None:
        one = connection.receive_request()
        connection.receive_request()
        wait_for(event)(connection)
        connection.send(data(b"1")(one))

    with talk(the_first_one, answer(DONE)) as (client, connection):
        with in_background(lambda: client.pread(1, 1)) as outcome:
            while not connection.requests:
                time.sleep(0.001)
            with ctrl_c_when(lambda: len(connection.requests) == 2), pytest.raises(KeyboardInterrupt):
                client.pread(1, 2)
            event.set()
        assert outcome == [b"1"]
        client.flush(timeout=PATIENCE)


def test_ctrl_c_in_a_split_call_gives_all_its_pieces_up():
    event = threading.Event()

    def late(connection: Connection) -> None:
        requests = [connection.receive_request() for _ in range(4)]
        wait_for(event)(connection)
        connection.send(b"".join(DONE(request) for request in requests))

    with talk(late, answer(DONE), block_size=(1, 4096, 1 << 16)) as (client, connection):
        with ctrl_c_when(lambda: len(connection.requests) == 4), pytest.raises(KeyboardInterrupt):
            client.cache(1 << 20, 0)
        event.set()
        client.flush(timeout=PATIENCE)
        assert len(connection.requests) == 5


class Interrupted(SocketStream):
    """Is interrupted right after bytes have moved, and before anybody has taken note of them."""

    when = ""

    def recv_into(self, room: memoryview) -> int | None:
        count = super().recv_into(room)
        if self.when == "receiving" and count:
            signal.raise_signal(signal.SIGINT)
        return count

    def send(self, parts) -> int | None:
        count = super().send(parts)
        if self.when == "sending":
            signal.raise_signal(signal.SIGINT)
        return count


@pytest.mark.parametrize("when", ["sending", "receiving"])
def test_ctrl_c_in_the_middle_of_moving_bytes_ends_the_connection_rather_than_garble_it(when):
    with ScriptedServer(script(unless_gone(serve(data(b"x"))))) as server:
        stream = Interrupted(server.socket())
        client = Client(stream, timeout=PATIENCE)
        stream.when = when
        with pytest.raises(KeyboardInterrupt):
            client.pread(1, 0)
        assert client.phase is Phase.DEAD
        assert stream.fileno() == -1
        assert isinstance(client._engine.error, Disconnected)
        assert "in the middle of moving bytes" in str(client._engine.error)


def test_ctrl_c_in_the_handshake_ends_the_connection():
    connected = threading.Event()
    with ScriptedServer([lambda _: connected.set(), drain]) as server:
        client = Client()
        with ctrl_c_when(connected.is_set), pytest.raises(KeyboardInterrupt):
            client.connect_stream(server.stream())
        assert client.phase is Phase.DEAD


@pytest.mark.parametrize("name", OPTION_CALLS)
def test_ctrl_c_in_an_option_ends_the_connection(name):
    make, _ = OPTION_CALLS[name]
    with ScriptedServer([ready_for_options, lambda c: c.receive_option(), drain]) as server:
        client = Client(server.stream(), timeout=PATIENCE, start_tls=lambda stream: stream, **OPTION_MODE)
        with ctrl_c_when(lambda: server.connections[0].options), pytest.raises(KeyboardInterrupt):
            make(client)
        assert client.phase is Phase.DEAD


def test_ctrl_c_while_the_transport_connects_ends_the_client(socket_path):
    import socket

    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first_in_line:
        listener.bind(str(socket_path))
        listener.listen(0)
        first_in_line.connect(str(socket_path))
        client = Client()
        with ctrl_c_when(lambda: client.phase is Phase.CONNECTING), pytest.raises(KeyboardInterrupt):
            client.connect_unix(socket_path)
        assert client.phase is Phase.DEAD
    socket_path.unlink()


def test_a_signal_handler_that_returns_disturbs_nothing():
    handled = []
    before = signal.signal(signal.SIGUSR1, lambda *_: handled.append(1))
    try:
        event = threading.Event()

        def late(connection: Connection) -> None:
            request = connection.receive_request()
            for _ in range(5):
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.01)
            connection.send(data(b"x")(request))
            event.set()

        with talk(late) as (client, _):
            assert client.pread(1, 0, timeout=PATIENCE) == b"x"
        assert handled
    finally:
        signal.signal(signal.SIGUSR1, before)


def whole_disk(connection: Connection) -> None:
    """Serve a disk that tells offsets, until the client is gone, wherever it stands."""
    connection.send(greeting())
    Negotiation()(connection)
    serve(lambda request: data(b"%08d" % request.offset)(request))(connection)


def read_for_ever(client: Client, armed: list[bool]) -> None:
    armed.append(True)
    for number in itertools.count():
        assert client.pread(8, number % 100, timeout=PATIENCE) == b"%08d" % (number % 100)


def read_much_for_ever(client: Client, armed: list[bool]) -> None:
    armed.append(True)
    buffer = bytearray(MUCH)
    for number in itertools.count():
        client.pread_into(buffer, number % 100, timeout=PATIENCE if number % 2 else None)
        assert buffer[:8] == buffer[-8:] == b"%08d" % (number % 100)


def large_disk(connection: Connection) -> None:
    """Serve the same disk to large reads. A header comes by itself, with the offset of the data or without."""
    connection.send(greeting())
    Negotiation()(connection)
    while True:
        request = connection.receive_request()
        reply = (data(b"%08d" % request.offset * (request.count // 8)) if request.kind == CommandType.READ else DONE)(request)
        cut = 20 if request.offset % 3 else 28
        connection.send(reply[:cut])
        connection.send(reply[cut:])


@pytest.mark.parametrize(("read", "disk"), [(read_for_ever, whole_disk), (read_much_for_ever, large_disk)])
def test_ctrl_c_at_any_moment_leaves_a_working_or_an_ended_connection(read, disk):
    """A storm of interrupts over a busy client: every read is right, and nothing hangs. What ended is made anew."""
    armed: list[bool] = []  # no lock that a signal handler could run into
    done = threading.Event()

    def handler(*_: object) -> None:
        if armed:
            armed.clear()
            raise KeyboardInterrupt

    def storm() -> None:
        while not done.wait(0.002):
            signal.pthread_kill(MAIN, signal.SIGINT)

    signal.signal(signal.SIGINT, handler)
    with ScriptedServer(*([unless_gone(disk)] for _ in range(100))) as server, contextlib.ExitStack() as stack:
        client = stack.enter_context(contextlib.closing(Client(server.stream(), timeout=PATIENCE)))
        thread = threading.Thread(target=storm, daemon=True)
        thread.start()
        for _ in range(99):
            with pytest.raises(KeyboardInterrupt):
                read(client, armed)
            assert client.phase in (Phase.CONNECTED, Phase.DEAD)
            if client.phase is Phase.DEAD:
                client = stack.enter_context(contextlib.closing(Client(server.stream(), timeout=PATIENCE)))
        done.set()
        thread.join(PATIENCE)
        while server._played < 100:
            server.socket().close()


# ---------------------------------------------------------------------------------------------- at chosen places


def read_little(client: Client) -> None:
    assert client.pread(8, 5, timeout=PATIENCE) == b"%08d" % 5


def read_much(client: Client) -> None:
    buffer = bytearray(MUCH)
    client.pread_into(buffer, 6, timeout=PATIENCE)
    assert buffer == b"%08d" % 6 * (MUCH // 8)


def write_little(client: Client) -> None:
    client.pwrite(b"x", 7, timeout=PATIENCE)


def write_much(client: Client) -> None:
    client.pwrite(bytes(MUCH), 8, timeout=PATIENCE)


@pytest.mark.parametrize("work", [read_little, read_much, write_little, write_much])
def test_ctrl_c_at_each_step_of_a_call_leaves_a_working_or_an_ended_connection(work):
    with ScriptedServer(*([unless_gone(large_disk)] for _ in range(500))) as server, contextlib.ExitStack() as stack:
        clients: list[Client] = []

        def connect() -> None:
            clients.append(stack.enter_context(contextlib.closing(Client(server.stream(), timeout=PATIENCE))))

        connect()
        for outcome in interrupted_at_each_step(lambda: work(clients[-1])):
            assert outcome is None or isinstance(outcome, KeyboardInterrupt)
            client = clients[-1]
            assert not client._shared._session.waited_for
            if client.phase is not Phase.CONNECTED:
                assert client.phase is Phase.DEAD
                connect()
            for other in (read_little, read_much, write_little):
                other(clients[-1])
        while server._played < 500:
            server.socket().close()


def test_ctrl_c_while_a_caller_leaves_hands_over_all_the_same():
    """Another caller has parked meanwhile. Nobody but the one that leaves would wake it."""
    go_on = threading.Event()

    def late(connection: Connection) -> None:
        flushing, reading = connection.receive_request(), connection.receive_request()
        connection.send(DONE(flushing))
        wait_for(go_on)(connection)
        connection.send(data(b"12345678")(reading))

    with talk(late) as (client, connection):

        def read() -> bytes:
            while not connection.requests:
                time.sleep(0.001)
            return client.pread(8, 0, timeout=PATIENCE)

        with in_background(read) as outcome:
            with pytest.raises(KeyboardInterrupt), interrupted_at(Mover.hand_over):
                client.flush(timeout=PATIENCE)
            go_on.set()
        assert outcome == [b"12345678"]


@pytest.mark.parametrize("function", [SharedSession.stop, Mover.stop, Session.stop_watching, Mover.hand_over])
def test_ctrl_c_while_a_pool_s_loop_leaves_its_connections_leaves_none_of_them_watched(function, socket_path):
    with Server(MemoryDisk(1 << 20)) as server:
        uri = server.listen("unix", path=str(socket_path)).address.uri()
        with nbdcore.create_pool(uri, connections=4, timeout=PATIENCE) as pool:
            ranges = [(index * 512, 512) for index in range(16)]

            def keep_reading():
                for _ in range(10_000):
                    list(pool.pread_many(ranges, depth=16, timeout=PATIENCE))

            with pytest.raises(KeyboardInterrupt), interrupted_at(function, in_a_wait_on_several):
                keep_reading()
            assert [one._session.waited_for for one in pool._shared._connections] == [0] * 4
            assert len([*pool.pread_many(ranges, timeout=PATIENCE)]) == len(ranges)


def in_a_wait_on_several(frame: FrameType | None) -> bool:
    """Whether a frame is of a step that ends the wait of a pool's loop."""
    while frame is not None:
        if frame.f_code is SharedSession.stop.__code__:
            return True
        frame = frame.f_back
    return False

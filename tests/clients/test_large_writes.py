"""Large writes are sent with the connection unlocked: whatever happens in the middle of one, no byte is lost or misplaced."""

from __future__ import annotations

import errno
import random
import signal
import threading
import time

import pytest

import nbdcore
from nbdcore import CommandError, DeadlineExceeded, Disconnected, Phase
from nbdcore.clients.session.session import Session
from nbdcore.protocol import wire
from nbdcore.protocol.constants import CommandType, ErrorNumber
from nbdcore.protocol.engine import Engine
from nbdcore.protocol.transmission import commands
from nbdcore.server import MemoryDisk, Server
from nbdcore.streams.waiting import LOOK_AGAIN
from nbdcore.testing.scripted import Request, answer, error, hang_up, reset, serve, unless_gone, wait_for
from tests.alarms import needs_alarms
from tests.clients.talking import DONE, PATIENCE, SHORT, expected, good, in_background, slow_to_receive, talk, together
from tests.clients.test_interrupts import ctrl_c_when
from tests.interruptions import interrupted_at

#: More than any system keeps for a server that does not receive.
LARGE = 8 << 20
SIZE = 2 * LARGE


@pytest.fixture
def go_on():
    return threading.Event()


@pytest.fixture
def data():
    return random.Random(1).randbytes(LARGE)


def write(client, data, **options):
    client.pwrite(data, 7, **options)


def write_in_a_loop(client, data, **options):
    list(client.pwrite_many([(7, data)], **options))


ways = pytest.mark.parametrize("way", [write, write_in_a_loop])


def begun(client):
    """Return a condition: a part of the write has been sent, and the rest waits for the server."""
    before = client._engine.traffic.bytes_sent
    return lambda: client._engine.traffic.bytes_sent > before


@needs_alarms
@ways
def test_ctrl_c_in_the_middle_of_a_payload_leaves_the_connection_usable(way, go_on, data):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    payloads = []
    try:
        with talk(slow_to_receive(go_on, payloads), serve(good), size=SIZE) as (client, _):
            with ctrl_c_when(begun(client)), pytest.raises(KeyboardInterrupt):
                way(client, data)
            assert client.phase is Phase.CONNECTED
            go_on.set()
            assert client.pread(9, 9, timeout=PATIENCE) == expected(9, 9)
            assert payloads == [data]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("function", [Session.count_sent, Engine.sent])
def test_ctrl_c_before_what_was_sent_is_counted_ends_the_connection(function, data):
    """To go on would send some of it twice, and the server would take payload for requests."""
    received = []

    def take_all(connection):
        while True:
            received.append(connection.receive_request().payload)

    def sent_by_waiting(frame):
        return frame.f_locals.get("sent") or frame.f_back.f_code is Session.count_sent.__code__

    with talk(unless_gone(take_all), size=SIZE) as (client, _):
        with pytest.raises(KeyboardInterrupt), interrupted_at(function, sent_by_waiting):
            client.pwrite(data, 0)
        with pytest.raises(Disconnected):
            client.flush(timeout=PATIENCE)
    assert received in ([], [data])


@ways
def test_deadline_in_the_middle_of_a_payload_leaves_the_connection_usable_and_the_buffer_alone(way, go_on, data):
    payloads, memory = [], bytearray(data)
    with talk(slow_to_receive(go_on, payloads), serve(good), size=SIZE) as (client, _):
        with pytest.raises(DeadlineExceeded):
            way(client, memory, timeout=SHORT)
        memory[:] = bytes(LARGE)  # the caller's own again
        go_on.set()
        assert client.pread(9, 9, timeout=PATIENCE) == expected(9, 9)
        assert payloads == [data]


@ways
@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_closing_in_the_middle_of_a_payload_ends_the_call(way, go_on, timeout, data):
    with talk(unless_gone(slow_to_receive(go_on, [])), size=SIZE) as (client, _):
        started = begun(client)
        with in_background(lambda: way(client, data, timeout=timeout)) as outcome:
            while not started():
                time.sleep(0.001)
            client.close()
        assert isinstance(outcome[0], Disconnected)
        assert "closed by this program" in str(outcome[0])
        go_on.set()


@ways
@pytest.mark.parametrize("end", [hang_up, reset])
def test_server_that_goes_in_the_middle_of_a_payload_ends_the_call(way, end, data):
    def half(connection):
        connection.receive(LARGE // 2)
        end(connection)

    with talk(half, size=SIZE) as (client, _):
        outcome = together(1, lambda _: way(client, data))
        assert isinstance(outcome[0], Disconnected)


def test_answer_in_the_middle_of_a_payload_is_taken_and_the_rest_still_sent(go_on, data):
    """The server refuses a write of which it has seen the header only, and then receives the payload all the same."""
    payloads = []

    def refuse_at_once(connection):
        _, flags, kind, cookie, offset, count = wire.REQUEST.unpack(connection.receive(wire.REQUEST.size))
        connection.send(error(ErrorNumber.ENOSPC, "full")(Request(kind, flags, cookie, offset, count)))
        wait_for(go_on)(connection)
        payloads.append(connection.receive(count))

    with talk(refuse_at_once, serve(good), size=SIZE) as (client, _):
        with in_background(lambda: write(client, data, timeout=PATIENCE)) as outcome:
            while not outcome:
                time.sleep(0.001)
            go_on.set()
        assert isinstance(outcome[0], CommandError)
        assert outcome[0].errno == errno.ENOSPC
        assert client.pread(9, 9, timeout=PATIENCE) == expected(9, 9)
        assert payloads == [data]


def test_late_answer_to_a_read_that_was_given_up_is_taken_before_the_server_receives_more(go_on, data):
    """A server that sends a large answer, and reads nothing before it is received, is not waited for in vain."""
    payloads = []

    def answer_before_receiving(connection):
        reading = connection.receive_request()
        wait_for(go_on)(connection)
        connection.send(good(reading))
        slow_to_receive(go_on, payloads)(connection)

    with talk(answer_before_receiving, serve(good), size=SIZE) as (client, _):
        with pytest.raises(DeadlineExceeded):
            client.pread(LARGE, 3, timeout=SHORT)
        go_on.set()
        write(client, data, timeout=PATIENCE)
        assert payloads == [data]


def test_others_are_answered_while_a_payload_waits_for_the_server(go_on, data):
    """The answers to what was asked before are received by their callers, whoever sends meanwhile."""

    def answer_before_receiving(connection):
        flushing = connection.receive_request()
        assert flushing.kind == CommandType.FLUSH
        wait_for(go_on)(connection)
        connection.send(DONE(flushing))
        answer(DONE, kind=CommandType.WRITE)(connection)

    with talk(answer_before_receiving, serve(good), size=SIZE) as (client, connection):
        with in_background(client.flush) as flushed:
            while not connection.requests:
                time.sleep(0.001)
            started = begun(client)
            with in_background(lambda: write(client, data)) as written:
                while not started():
                    time.sleep(0.001)
                go_on.set()
        assert flushed == [None]
        assert written == [None]


def test_caller_behind_a_payload_never_sends_it_from_memory_that_is_somebody_elses_again(go_on, data):
    """A write has begun, and before its caller waits, another with a large write comes by; then the first one gives up."""
    payloads, memory = [], bytearray(data)
    with talk(slow_to_receive(go_on, payloads), slow_to_receive(go_on, payloads), size=SIZE) as (client, _):
        shared = client._shared
        first = commands.write(client._engine.limits, memoryview(memory), 0)
        with shared._lock:
            client._engine.submit(first)
            shared._session.send()
        with in_background(lambda: client.pwrite(data, 0, timeout=PATIENCE)) as other:
            while not shared._session.waited_for:
                time.sleep(0.001)
            shared.abandon((first,), DeadlineExceeded(errno.ETIMEDOUT, "no answer in time"))
            memory[:] = bytes(LARGE)
            memory.append(0)  # nobody has a view of it
            go_on.set()
        assert other == [None]
        assert payloads == [data, data]


def test_caller_behind_a_payload_sends_the_rest_of_it_when_its_sender_has_given_up(go_on, data):
    payloads = []
    with talk(slow_to_receive(go_on, payloads), serve(good), size=SIZE) as (client, _):
        started = begun(client)
        with in_background(lambda: write(client, data, timeout=10 * SHORT)) as written:
            while not started():
                time.sleep(0.001)
            with in_background(lambda: client.flush(timeout=PATIENCE)) as flushed:
                while not written:
                    time.sleep(0.001)
                go_on.set()
        assert isinstance(written[0], DeadlineExceeded)
        assert flushed == [None]
        assert payloads == [data]


@pytest.mark.parametrize("connections", [1, 4])
def test_every_byte_of_many_threads_is_right(connections, socket_path):
    """Sizes on both sides of every limit, from threads that share connections, some of them with a deadline."""
    share, threads, sizes = 4 << 20, 8, [1, 4096, 1 << 17, 1 << 20, 3 << 20]
    with Server(MemoryDisk(share * threads)) as server:
        uri = server.listen("unix", path=str(socket_path)).address.uri()
        pool = nbdcore.create_pool(uri, connections=connections, timeout=PATIENCE)

        def work(number):
            rng, base = random.Random(number), number * share
            wanted = bytearray(share)
            for _ in range(30):
                offset = rng.randrange(share)
                payload = rng.randbytes(min(rng.choice(sizes), share - offset))
                pool.pwrite(payload, base + offset, timeout=rng.choice([None, PATIENCE]))
                wanted[offset : offset + len(payload)] = payload
            return pool.pread(share, base) == wanted

        with pool:
            assert together(threads, work) == [True] * threads


# ---------------------------------------------------------------------------------------------- others come in between

SOME = bytes(512 << 10)


class Flush:
    """A flush of another thread, and how long it took."""

    def __init__(self, client):
        self.seconds = None
        self._client = client
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        begin = time.monotonic()
        self._client.flush(timeout=PATIENCE)
        self.seconds = time.monotonic() - begin

    def join(self):
        self._thread.join(PATIENCE)


def test_what_others_queued_while_a_payload_was_sent_goes_out_with_its_last_byte(monkeypatch):
    with talk(serve(good)) as (client, _):
        session = client._shared._session
        real, flushes = session.send_all, []

        def send_all(*arguments):
            outcome = real(*arguments)
            flushes.append(Flush(client))
            time.sleep(0.03)  # it takes the answer to the write in
            return outcome

        monkeypatch.setattr(session, "send_all", send_all)
        client.pwrite(SOME, 0, timeout=PATIENCE)
        for flush in flushes:
            flush.join()
            assert flush.seconds < LOOK_AGAIN

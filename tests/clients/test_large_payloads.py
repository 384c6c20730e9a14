"""Large reads are received with the connection unlocked: whatever happens in the middle of one, no byte is lost or misplaced."""

from __future__ import annotations

import itertools
import random
import signal
import threading
import time

import pytest

import nbdcore
from nbdcore import DeadlineExceeded, Disconnected, Phase
from nbdcore.protocol.constants import CommandType
from nbdcore.server import MemoryDisk, Server
from nbdcore.testing.scripted import ScriptedServer, hang_up, reset, serve, unless_gone, wait_for
from tests.alarms import needs_alarms
from tests.clients.talking import DISK, DONE, PATIENCE, SHORT, expected, good, in_background, in_two_parts, script, talk, together
from tests.clients.test_interrupts import ctrl_c_when

LARGE = DISK // 2
HALF = LARGE // 2


@pytest.fixture
def go_on():
    return threading.Event()


def halfway(buffer):
    """Return a condition: the first half of the data has been put into the buffer, and so the rest is waited for."""
    return lambda: buffer[HALF - 1000] != 0


def read(client, buffer, **options):
    return client.pread_into(buffer, 7, **options)


def read_in_a_loop(client, buffer, **options):
    return [*client.pread_into_many([(7, buffer)], **options)]


ways = pytest.mark.parametrize("way", [read, read_in_a_loop])


#: Bytes of a reply that come before the server stands still: in the header, behind it, and about the offset of the data.
CUTS = [1, 20, 24, 28, 29]


def check_ctrl_c(way, cut, go_on, condition):
    """Press Ctrl-C when so much of the reply has come: `condition(client, buffer)` returns what tells so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with talk(in_two_parts(good, cut, go_on), serve(good)) as (client, _):
            buffer = bytearray(LARGE)
            with ctrl_c_when(condition(client, buffer)), pytest.raises(KeyboardInterrupt):
                way(client, buffer)
            assert client.phase is Phase.CONNECTED
            given_up = bytes(buffer)
            go_on.set()
            assert client.pread(LARGE, 9, timeout=PATIENCE) == expected(9, LARGE)
            assert buffer == given_up
    finally:
        signal.signal(signal.SIGINT, before)


@needs_alarms
@ways
def test_ctrl_c_in_the_middle_of_a_payload_leaves_the_connection_usable(way, go_on):
    check_ctrl_c(way, HALF, go_on, lambda _, buffer: halfway(buffer))


@needs_alarms
@pytest.mark.parametrize("cut", CUTS)
def test_ctrl_c_at_the_beginning_of_a_payload_leaves_the_connection_usable(cut, go_on):
    def begun(client, _):
        traffic = client._engine.traffic
        heard = traffic.bytes_received + min(cut, 20)
        return lambda: traffic.bytes_received >= heard

    check_ctrl_c(read, cut, go_on, begun)


@pytest.mark.parametrize("cut", CUTS)
def test_deadline_at_the_beginning_of_a_payload_leaves_the_connection_usable(cut, go_on):
    with talk(in_two_parts(good, cut, go_on), serve(good)) as (client, _):
        with pytest.raises(DeadlineExceeded):
            read(client, bytearray(LARGE), timeout=SHORT)
        go_on.set()
        assert client.pread(LARGE, 9, timeout=PATIENCE) == expected(9, LARGE)


@pytest.mark.parametrize("cut", CUTS)
def test_payload_that_stands_still_at_its_beginning_comes_whole(cut, go_on):
    with talk(in_two_parts(good, cut, go_on), serve(good)) as (client, _):
        buffer = bytearray(LARGE)
        with in_background(lambda: read(client, buffer)):
            time.sleep(SHORT)
            go_on.set()
        assert buffer == expected(7, LARGE)


@ways
def test_deadline_in_the_middle_of_a_payload_leaves_the_connection_usable_and_the_buffer_alone(way, go_on):
    with talk(in_two_parts(good, HALF, go_on), serve(good)) as (client, _):
        buffer = bytearray(LARGE)
        with pytest.raises(DeadlineExceeded):
            way(client, buffer, timeout=SHORT)
        given_up = bytes(buffer)
        go_on.set()
        assert client.pread(LARGE, 9, timeout=PATIENCE) == expected(9, LARGE)
        assert buffer == given_up


@ways
@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_closing_in_the_middle_of_a_payload_ends_the_call(way, go_on, timeout):
    with talk(unless_gone(in_two_parts(good, HALF, go_on))) as (client, _):
        buffer = bytearray(LARGE)
        with in_background(lambda: way(client, buffer, timeout=timeout)) as outcome:
            while not halfway(buffer)():
                time.sleep(0.001)
            client.close()
        assert isinstance(outcome[0], Disconnected)
        assert "closed by this program" in str(outcome[0])
        go_on.set()


@ways
@pytest.mark.parametrize("end", [hang_up, reset])
def test_server_that_goes_in_the_middle_of_a_payload_ends_the_call(way, end):
    def half(connection):
        request = connection.receive_request()
        connection.send(good(request)[:HALF])
        end(connection)

    with talk(half) as (client, _):
        outcome = together(1, lambda _: way(client, bytearray(LARGE)))
        assert isinstance(outcome[0], Disconnected)


@pytest.mark.parametrize("cut", [20, 28])
def test_connection_that_breaks_between_header_and_payload_is_the_outcome_of_the_call(cut):
    """Over TCP the end of a connection is an error of its own, and not the end of what was sent."""
    received = threading.Event()

    def header_only(connection):
        connection.send(good(connection.receive_request())[:cut])
        wait_for(received)(connection)
        connection.reset()

    with ScriptedServer(script(header_only), patience=PATIENCE) as server:
        client = nbdcore.connect_tcp("127.0.0.1", server.listen_tcp(), timeout=PATIENCE)
        with in_background(lambda: read(client, bytearray(LARGE))) as outcome:
            time.sleep(SHORT)  # it gets to where it waits for the payload
            received.set()
        assert isinstance(outcome[0], Disconnected)
        assert client.closed


def test_others_send_while_a_payload_is_waited_for(go_on):
    def until_another_has_written(connection):
        reading = connection.receive_request()
        reply = good(reading)
        connection.send(reply[:HALF])
        writing = connection.receive_request()
        assert writing.kind == CommandType.WRITE
        connection.send(reply[HALF:])
        wait_for(go_on)(connection)
        connection.send(DONE(writing))

    with talk(until_another_has_written) as (client, _):
        buffer = bytearray(LARGE)
        with in_background(lambda: read(client, buffer)) as outcome:
            while not halfway(buffer)():
                time.sleep(0.001)
            with in_background(lambda: client.pwrite(bytes(LARGE), 0)) as written:
                while not outcome:
                    time.sleep(0.001)
                assert outcome == [LARGE]
                go_on.set()
        assert written == [None]
        assert buffer == expected(7, LARGE)


def test_caller_that_cannot_send_leaves_the_end_to_the_one_that_receives(go_on):
    def half(connection):
        reply = good(connection.receive_request())
        connection.send(reply[:HALF])
        wait_for(go_on)(connection)
        connection.send(reply[HALF:])
        hang_up(connection)

    with talk(half) as (client, _):
        buffer = bytearray(LARGE)
        with in_background(lambda: read(client, buffer)) as outcome:
            while not halfway(buffer)():
                time.sleep(0.001)
            go_on.set()
            errors = together(4, lambda _: [client.pwrite(bytes(LARGE), 0) for _ in range(100)])
        assert {type(error) for error in errors} == {Disconnected}
        assert outcome == [LARGE] or isinstance(outcome[0], Disconnected)
        if outcome == [LARGE]:
            assert buffer == expected(7, LARGE)


def test_payload_of_another_caller_is_not_received_after_that_one_has_given_up(go_on):
    """Two reads of two callers: the one that receives must not have the memory of the other when that one has gone."""

    def second_first(connection):
        first = connection.receive_request()
        second = connection.receive_request()
        reply = good(second)
        connection.send(reply[:HALF])
        wait_for(go_on)(connection)
        connection.send(reply[HALF:])
        connection.send(good(first))

    with talk(second_first, serve(good)) as (client, connection):
        with in_background(lambda: client.pread(LARGE, 3)) as outcome:
            while not connection.requests:
                time.sleep(0.001)
            buffer = bytearray(LARGE)
            with pytest.raises(DeadlineExceeded):
                client.pread_into(buffer, 5, timeout=2 * SHORT)
            given_up = bytes(buffer)
            go_on.set()
        assert outcome == [expected(3, LARGE)]
        assert buffer == given_up


# ---------------------------------------------------------------------------------------------- pools


@pytest.mark.parametrize("work", [read, read_in_a_loop])
def test_payload_that_stands_still_on_one_connection_holds_up_no_other(work, go_on):
    stuck = script(in_two_parts(good, HALF, go_on), serve(good))
    with ScriptedServer(stuck, script(serve(good)), patience=PATIENCE) as server:
        port = server.listen_tcp()
        with nbdcore.create_pool(f"nbd://127.0.0.1:{port}", connections=2, timeout=PATIENCE) as pool:
            buffer = bytearray(LARGE)
            with in_background(lambda: work(pool, buffer)) as outcome:
                while not halfway(buffer)():
                    time.sleep(0.001)
                for number in range(20):
                    assert pool.pread(LARGE, number, timeout=PATIENCE) == expected(number, LARGE)
                    assert [*pool.pread_many([(number, 8)] * 5, timeout=PATIENCE)] == [(number, expected(number, 8))] * 5
                go_on.set()
            assert outcome in ([LARGE], [[7]])
            assert buffer == expected(7, LARGE)


SIZES = [1, 512, 4096, 20_000, 130_000, 300_000]


def shares_of_a_disk(disk, number, share):
    """Write and read random ranges of one's own share in every way that there is, giving some up; compare every byte."""
    generator = random.Random(number)
    base, mirror = number * share, bytearray(share)
    for turn in range(40):
        ranges = []
        for _ in range(generator.randrange(1, 6)):
            count = generator.choice(SIZES)
            ranges.append((generator.randrange(share - count + 1), count))
        if turn % 3 == 0:
            items = []
            for at, count in ranges:
                if all(at >= other + length or at + count <= other for other, length in items):
                    items.append((at, count))
                    mirror[at : at + count] = generator.randbytes(count)
            done = [*disk.pwrite_many(((base + at, bytes(mirror[at : at + count])) for at, count in items), depth=3)]
            assert sorted(done) == sorted(base + at for at, _ in items)
        elif turn % 3 == 1:
            for at, data in disk.pread_many([(base + at, count) for at, count in ranges], depth=3):
                assert data == mirror[at - base : at - base + len(data)]
                if generator.random() < 0.1:
                    break  # what is under way is given up
        else:
            at, count = ranges[0]
            try:
                assert disk.pread(count, base + at, timeout=generator.choice([None, PATIENCE, 0.0005])) == mirror[at : at + count]
            except DeadlineExceeded:
                continue
    return bytes(mirror)


@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("structured", [True, False])
def test_every_byte_of_many_threads_is_right(connections, structured, socket_path):
    share, threads = 1 << 20, 6
    memory = MemoryDisk(share * threads)
    with Server(memory) as server:
        uri = server.listen("unix", path=str(socket_path)).address.uri()
        options = {"structured_replies": structured}
        if connections == 1:
            disk = nbdcore.connect(uri, timeout=PATIENCE, **options)
        else:
            disk = nbdcore.create_pool(uri, connections=connections, timeout=PATIENCE, **options)
        with disk:
            mirrors = together(threads, lambda number: shares_of_a_disk(disk, number, share))
            for number, mirror in enumerate(mirrors):
                assert isinstance(mirror, bytes), mirror
                assert disk.pread(share, number * share) == mirror


def test_pool_that_is_closed_under_loops_and_calls_ends_them_all(socket_path):
    with Server(MemoryDisk(1 << 24)) as server:
        uri = server.listen("unix", path=str(socket_path)).address.uri()
        for turn in range(10):
            pool = nbdcore.create_pool(uri, connections=3, timeout=PATIENCE)

            def work(number, pool=pool, turn=turn):
                if number == 0:
                    time.sleep(0.005 * turn)
                    pool.close()
                elif number % 2:
                    for _ in pool.pread_many((0, 300_000 * (number % 3) + 1) for _ in itertools.count()):
                        pass
                else:
                    while True:
                        pool.pread(200_000, 0)

            ended = together(7, work)
            assert ended[0] is None
            assert all(isinstance(error, nbdcore.Error) for error in ended[1:]), ended

"""Deadlines on every call that waits: a command is abandoned and the connection goes on; a handshake ends with its deadline."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest

import nbdcore
from nbdcore import Client, DeadlineExceeded, Phase, UsageError
from nbdcore.protocol.constants import CommandType
from nbdcore.testing.scripted import (
    Connection,
    ScriptedServer,
    answer,
    data,
    drain,
    first,
    goodbye,
    serve,
    unless_gone,
    wait_for,
)
from tests.clients.talking import (
    CALLS,
    DISK,
    DONE,
    HANDSHAKES,
    OPTION_CALLS,
    OPTION_MODE,
    PATIENCE,
    SHORT,
    in_background,
    in_two_parts,
    late,
    odd_ones_first,
    ready_for_options,
    slow_to_receive,
    talk,
)


@pytest.mark.parametrize("name", CALLS)
def test_a_silent_server_costs_the_call_and_not_the_connection(name):
    event = threading.Event()
    with talk(late(event, CALLS[name].chunks), answer(DONE, kind=CommandType.FLUSH)) as (client, _):
        with pytest.raises(DeadlineExceeded, match="no answer from the server in time") as caught:
            CALLS[name].make(client, timeout=SHORT)
        assert isinstance(caught.value, TimeoutError)
        assert client.phase is Phase.CONNECTED
        event.set()
        client.flush(timeout=PATIENCE)


def test_the_message_names_the_command():
    event = threading.Event()
    with talk(late(event)) as (client, _):
        with pytest.raises(DeadlineExceeded, match=r"\(read of 8 bytes at offset 16\)"):
            client.pread(8, 16, timeout=SHORT)
        event.set()


@pytest.mark.parametrize("part", [0, 10, 40, 100_020], ids=["nothing", "half a header", "some data", "most data"])
def test_a_late_reply_does_not_touch_the_buffer_of_an_abandoned_read(part):
    event = threading.Event()
    step = in_two_parts(data(b"x" * 200_000), part, event)

    with talk(step, answer(data(b"y" * 8), kind=CommandType.READ)) as (client, _):
        buffer = bytearray(200_000)
        with pytest.raises(DeadlineExceeded):
            client.pread_into(buffer, 0, timeout=SHORT)
        kept = bytes(buffer)
        buffer.append(0)  # nobody holds it any more
        event.set()
        assert client.pread(8, 0, timeout=PATIENCE) == b"y" * 8
        assert buffer[:-1] == kept


def test_a_write_that_was_half_sent_is_finished_from_a_copy():
    contents = bytearray(b"a" * (8 << 20))
    event, received = threading.Event(), []
    with talk(slow_to_receive(event, received), answer(DONE, kind=CommandType.FLUSH), size=16 << 20) as (client, _):
        with pytest.raises(DeadlineExceeded):
            client.pwrite(contents, 0, timeout=SHORT)
        contents[:] = b"b" * len(contents)
        event.set()
        client.flush(timeout=PATIENCE)
    assert received == [b"a" * (8 << 20)]


def test_a_write_of_which_nothing_was_sent_is_never_sent():
    event = threading.Event()

    def slow(connection: Connection) -> None:
        wait_for(event)(connection)
        connection.send(DONE(connection.receive_request()))

    with talk(slow, answer(DONE, kind=CommandType.FLUSH), size=16 << 20) as (client, connection):
        with in_background(lambda: client.pwrite(bytes(8 << 20), 0, timeout=PATIENCE)) as outcome:
            while not client._engine.has_outgoing:
                time.sleep(0.001)
            with pytest.raises(DeadlineExceeded):
                client.pwrite(b"never", 0, timeout=SHORT)
            event.set()
        assert outcome == [None]
        client.flush(timeout=PATIENCE)
        assert [request.kind for request in connection.requests] == [CommandType.WRITE, CommandType.FLUSH]


def test_a_deadline_that_has_passed_still_takes_what_is_there_but_waits_for_nothing():
    event = threading.Event()
    with talk(late(event, DONE), serve(DONE)) as (client, _):
        with pytest.raises(DeadlineExceeded):
            client.flush(timeout=0)
        assert client.phase is Phase.CONNECTED
        event.set()
        client.flush(timeout=PATIENCE)


def test_a_split_call_has_one_deadline_for_all_of_it():
    event = threading.Event()

    def two_then_nothing(connection: Connection) -> None:
        for _ in range(2):
            connection.send(DONE(connection.receive_request()))
        requests = [connection.receive_request() for _ in range(4)]
        wait_for(event)(connection)
        connection.send(b"".join(DONE(request) for request in requests))

    with talk(two_then_nothing, answer(DONE, kind=CommandType.FLUSH), block_size=(1, 4096, 1 << 16)) as (client, connection):
        with pytest.raises(DeadlineExceeded):
            client.cache(DISK, 0, timeout=0.2)
        event.set()
        client.flush(timeout=PATIENCE)
        assert len(connection.requests) == 7


def test_extents_wait_for_each_request_as_long_as_the_timeout_says():
    event = threading.Event()
    with talk(answer(CALLS["extents"].chunks), late(event)) as (client, connection):
        walk = client.extents(timeout=SHORT)
        with pytest.raises(DeadlineExceeded):
            next(walk)  # the first extent is held back until the second reply shows whether it goes on
        assert len(connection.requests) == 2
        event.set()


def test_an_endless_deadline_is_one():
    with talk(serve(DONE)) as (client, _), in_background(lambda: client.flush(timeout=float("inf"))) as outcome:
        client.flush(timeout=float("inf"))
        client.flush(timeout=10**9)
    assert outcome == [None]


def test_endless_deadlines_of_several_threads():
    event = threading.Event()

    def both(connection: Connection) -> None:
        requests = [connection.receive_request() for _ in range(2)]
        event.set()
        time.sleep(SHORT)
        connection.send(b"".join(DONE(request) for request in requests))

    with talk(both) as (client, _):
        with (
            in_background(lambda: client.flush(timeout=float("inf"))) as one,
            in_background(lambda: client.flush(timeout=float("inf"))) as two,
        ):
            assert event.wait(PATIENCE)
        assert [*one, *two] == [None, None]


# ---------------------------------------------------------------------------------------------- handshake, options, goodbye


@pytest.mark.parametrize("said", [b"", b"NBDMAGIC", b"NBDMAGICIHAVEOPT\0\3"])
def test_a_handshake_that_takes_too_long_kills_the_connection(said):
    with ScriptedServer([said, drain]) as server:
        client = Client()
        with pytest.raises(DeadlineExceeded, match=r"in time \(the handshake\)"):
            client.connect_stream(server.stream(), timeout=SHORT)
        assert client.phase is Phase.DEAD
        with pytest.raises(UsageError, match=r"it ended with: no answer from the server in time \(the handshake\)"):
            client.pread(1, 0)


def test_a_server_that_drips_does_not_stretch_the_deadline():
    def drip(connection: Connection) -> None:
        for byte in HANDSHAKES["newstyle"]:
            connection.send(bytes([byte]))
            time.sleep(0.01)

    with ScriptedServer([unless_gone(drip)]) as server, pytest.raises(DeadlineExceeded):
        Client(server.stream(), timeout=SHORT)


def test_connecting_has_the_deadline_too(socket_path):
    # A backlog that is full makes connecting itself wait.
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first_in_line:
        listener.bind(str(socket_path))
        listener.listen(0)
        first_in_line.connect(str(socket_path))
        client = Client()
        with pytest.raises(DeadlineExceeded):
            client.connect_unix(socket_path, timeout=SHORT)
        assert client.phase is Phase.DEAD
    socket_path.unlink()


@pytest.mark.parametrize("name", OPTION_CALLS)
def test_an_option_that_takes_too_long_kills_the_connection(name):
    make, reply = OPTION_CALLS[name]
    with ScriptedServer([ready_for_options, lambda c: (c.receive_option(), c.send(reply[:-1])), drain]) as server:
        client = Client(server.stream(), timeout=PATIENCE, start_tls=lambda stream: stream, **OPTION_MODE)
        with pytest.raises(DeadlineExceeded, match=rf"in time \({name}\)"):
            make(client, timeout=SHORT)
        assert client.phase is Phase.DEAD


def test_a_server_that_does_not_hang_up_after_the_goodbye_is_left_at_the_deadline():
    event = threading.Event()
    with talk(goodbye, wait_for(event)) as (client, connection):
        with pytest.raises(DeadlineExceeded, match="the server was to hang up"):
            client.disconnect(timeout=SHORT)
        assert client.phase is Phase.CLOSED
        event.set()
        assert connection.requests[-1].kind == CommandType.DISC


def test_list_exports_has_one_deadline_for_connecting_and_asking():
    with ScriptedServer([drain]) as server:
        port = server.listen_tcp()
        with pytest.raises(DeadlineExceeded):
            nbdcore.list_exports(f"nbd://127.0.0.1:{port}", timeout=SHORT)


@pytest.mark.parametrize("timeout", [-1, float("nan"), "5", b"5", [], object()])
def test_a_wrong_timeout_is_a_usage_error_everywhere(timeout):
    client = Client()
    for connect in (
        lambda: client.connect("nbd://127.0.0.1", timeout=timeout),
        lambda: client.connect_tcp("127.0.0.1", timeout=timeout),
        lambda: client.disconnect(timeout=timeout),
        lambda: nbdcore.list_exports("nbd://127.0.0.1", timeout=timeout),
    ):
        with pytest.raises(UsageError, match="timeout"):
            connect()
    assert client.phase is Phase.CREATED
    with talk(goodbye) as (client, _):
        for call in CALLS.values():
            with pytest.raises(UsageError, match="timeout"):
                call.make(client, timeout=timeout)
        with pytest.raises(UsageError, match="timeout"):
            client.pread(DISK, 0, timeout=timeout)
        client.disconnect(timeout=PATIENCE)


def test_one_thread_s_deadline_does_not_disturb_the_others():
    event = threading.Event()
    with talk(odd_ones_first(event), answer(DONE, kind=CommandType.FLUSH)) as (client, _):
        outcomes: dict[int, Any] = {}

        def read(offset: int) -> None:
            try:
                outcomes[offset] = client.pread(1, offset, timeout=PATIENCE if offset % 2 else SHORT)
            except DeadlineExceeded as exc:
                outcomes[offset] = exc

        threads = [threading.Thread(target=read, args=(offset,)) for offset in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads[::2]:
            thread.join(PATIENCE)
        assert sorted(outcomes) == [0, 2, 4, 6]
        event.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert all(isinstance(outcomes[offset], DeadlineExceeded) for offset in (0, 2, 4, 6))
        assert [outcomes[offset] for offset in (1, 3, 5, 7)] == [b"1", b"3", b"5", b"7"]
        client.flush(timeout=PATIENCE)


def test_a_reply_that_stops_in_the_middle_ends_with_the_deadline_and_spoils_what_comes_after():
    """The rest of it may still come: the connection waits for it, and goes on when it is there."""
    event = threading.Event()
    cut = first(30, data(b"12345678"))

    def step(connection: Connection) -> None:
        request = connection.receive_request()
        connection.send(cut(request))
        wait_for(event)(connection)
        connection.send(data(b"12345678")(request)[30:])

    with talk(step, answer(DONE), answer(DONE)) as (client, _):
        with pytest.raises(DeadlineExceeded):
            client.pread(8, 0, timeout=SHORT)
        with pytest.raises(DeadlineExceeded):
            client.flush(timeout=SHORT)
        event.set()
        client.flush(timeout=PATIENCE)

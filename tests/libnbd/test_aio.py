"""Asynchronous commands: completions, retiring, callbacks, and event loops that are somebody else's."""

from __future__ import annotations

import errno
import select
import socket

import pytest

import nbdcore.libnbd as nbd
from nbdcore.protocol.constants import CommandType
from nbdcore.testing.scripted import (
    EVERYTHING,
    Negotiation,
    ScriptedServer,
    answer,
    data,
    error,
    goodbye,
    greeting,
    hang_up,
    hole,
    receive,
    simple,
    status,
)

SIZE = 1 << 20


def until_done(handle) -> None:
    while handle.aio_in_flight():
        handle.poll(10_000)


# ---------------------------------------------------------------------------------------------- retiring


def test_command_without_completion_waits_to_be_retired(connected):
    first, second = connected.aio_pread(bytearray(512), 0), connected.aio_flush()
    assert (first, second) == (1, 2)
    until_done(connected)
    assert connected.aio_peek_command_completed() == 1
    assert connected.aio_command_completed(1) is True
    assert connected.aio_command_completed(1) is False
    assert connected.aio_peek_command_completed() == 2
    assert connected.aio_command_completed(2) is True
    assert connected.aio_command_completed(99) is False
    with pytest.raises(nbd.Error, match="no commands are in flight"):
        connected.aio_peek_command_completed()


@pytest.mark.parametrize(
    ("returns", "retires"), [(1, True), (True, True), (0, False), (None, False), ("text", False), (2, False)]
)
def test_completion_retires_only_by_returning_1(returns, retires, connected):
    cookie = connected.aio_pread(bytearray(512), 0, lambda _: returns)
    until_done(connected)
    assert connected.aio_command_completed(cookie) is not retires


def test_completion_can_make_a_failure_of_a_success(connected):
    def completion(error) -> int:
        assert error.value == 0
        error.value = errno.EBUSY
        return -1

    cookie = connected.aio_flush(completion)
    until_done(connected)
    with pytest.raises(nbd.Error) as caught:
        connected.aio_command_completed(cookie)
    assert caught.value.string == "nbd_aio_command_completed: flush: command failed: Device or resource busy"


def test_completion_that_returns_minus_1_without_an_error_changes_nothing(connected):
    cookie = connected.aio_flush(lambda _: -1)
    until_done(connected)
    assert connected.aio_command_completed(cookie) is True


@pytest.mark.parametrize("exception", [RuntimeError, AssertionError, FileNotFoundError, ConnectionResetError, TimeoutError])
def test_callback_that_raises_is_reported_and_breaks_nothing(exception, connected, capsys):
    def completion(_error) -> int:
        raise exception("in the callback")

    cookie = connected.aio_flush(completion)
    until_done(connected)
    assert connected.aio_command_completed(cookie) is True
    reported = capsys.readouterr().err
    assert "in the callback" in reported
    assert "callbacks.py" not in reported  # the program's own frames are all that helps it
    assert connected.pread(1, 0) == bytearray(1)


def test_interrupt_in_a_callback_reaches_the_caller_once_the_bytes_are_dealt_with(connected):
    def completion(_error) -> int:
        raise KeyboardInterrupt

    cookie = connected.aio_flush(completion)
    with pytest.raises(KeyboardInterrupt):
        until_done(connected)
    assert connected.aio_command_completed(cookie) is True


def test_callback_may_submit_but_not_wait(connected):
    wrong, before = [], connected.stats_chunks_sent()

    def completion(_error) -> int:
        connected.aio_flush(lambda _: 1)
        for call in (lambda: connected.pread(1, 0), lambda: connected.poll(0), connected.aio_notify_read):
            with pytest.raises(nbd.Error) as caught:
                call()
            wrong.append(caught.value.errnum)
        return 1

    connected.aio_flush(completion)
    until_done(connected)
    assert wrong == [errno.EDEADLK] * 3
    assert connected.stats_chunks_sent() == before + 2
    assert connected.pread(1, 0) == bytearray(1)


def test_closing_completes_what_is_under_way_exactly_once(connected):
    told = []
    for _ in range(3):
        connected.aio_pread(bytearray(512), 0, lambda error: told.append(error.value))
    connected.add_close_callback(lambda: told.append("closing"))
    connected.close()
    assert told == ["closing", *[errno.ENOTCONN] * 3]


def test_disconnect_counts_until_the_server_has_hung_up(connected):
    assert connected.aio_disconnect() is None
    assert connected.aio_in_flight() == 1
    for call in (lambda: connected.pread(512, 0), connected.aio_disconnect, connected.aio_flush):
        with pytest.raises(nbd.Error) as caught:
            call()
        assert caught.value.errno == "EINVAL"
    connected.shutdown()
    assert connected.aio_is_closed()
    assert connected.aio_in_flight() == 0
    assert connected.get_size() == SIZE


def test_abandoned_commands_are_never_sent(connected):
    told = []
    commands = [connected.aio_flush(lambda error: told.append(error.value)) for _ in range(4)]
    connected.shutdown(nbd.SHUTDOWN_ABANDON_PENDING)
    assert len(told) == len(commands)
    assert errno.ENOTCONN in told
    assert connected.aio_is_closed()


# ---------------------------------------------------------------------------------------------- loops


def test_chunk_of_code_that_only_knows_libnbd_copies_a_disk(connected, handles, server):
    target = handles()
    target.set_export_name("disk")
    target.connect_tcp("127.0.0.1", server)
    pattern = bytes(range(256)) * 256
    for offset in range(0, SIZE, len(pattern)):
        connected.pwrite(pattern, offset)
    offset, depth, step = 0, 8, 1 << 16
    while offset < SIZE or connected.aio_in_flight() or target.aio_in_flight():
        while offset < SIZE and connected.aio_in_flight() < depth:
            buffer = nbd.Buffer(step)

            def read(error, buffer=buffer, offset=offset) -> int:
                assert not error.value
                target.aio_pwrite(buffer, offset, lambda error: 1 if not error.value else 0)
                return 1

            connected.aio_pread(buffer, offset, read)
            offset += step
        for handle in (connected, target):
            if handle.aio_in_flight():
                handle.poll(-1)
    assert target.pread(SIZE, 0) == connected.pread(SIZE, 0)


def test_strangers_event_loop_drives_connecting_and_commands(handles, server):
    handle = handles()
    handle.aio_connect_tcp("127.0.0.1", server)
    done = []

    def turn() -> None:
        direction = handle.aio_get_direction()
        events = (select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0) | (
            select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0
        )
        poll = select.poll()
        poll.register(handle.aio_get_fd(), events)
        ((_, ready),) = poll.poll(10_000)
        if ready & (select.POLLIN | select.POLLHUP):
            handle.aio_notify_read()
        elif ready & select.POLLOUT:
            handle.aio_notify_write()

    while handle.aio_is_connecting():
        turn()
    assert handle.aio_is_ready()
    payload = bytearray(b"x" * (4 << 18))
    handle.aio_pwrite(payload, 0, lambda _: done.append("written") or 1)
    while handle.aio_in_flight():
        turn()
    back = bytearray(len(payload))
    handle.aio_pread(back, 0, lambda _: done.append("read") or 1)
    while handle.aio_in_flight():
        turn()
    assert done == ["written", "read"]
    assert back == payload


def test_poll_returns_0_when_the_time_is_up(connected):
    assert connected.poll(0) == 0
    assert connected.poll(1) == 0


def test_poll2_wakes_for_another_descriptor_and_reads_nothing_from_it(connected):
    near, far = socket.socketpair()
    with near, far:
        assert connected.poll2(near.fileno(), 0) == 0
        far.send(b"x")
        assert connected.poll2(near.fileno(), -1) == 1
        assert near.recv(1) == b"x"
    assert connected.poll2(-1, 0) == 0


# ---------------------------------------------------------------------------------------------- callbacks within commands


def script(*steps, **offer):
    return [greeting(), Negotiation(**{"size": SIZE, "contexts": {1: "base:allocation"}, "flags": EVERYTHING, **offer}), *steps]


def connect(handles, server):
    """Return a handle that is connected to a scripted server."""
    handle = handles()
    handle.add_meta_context("base:allocation")
    handle.connect_socket(server.socket().detach())
    return handle


def test_pieces_of_a_read_are_reported_as_they_are_sent(handles):
    pieces = answer(data(b"a" * 512, done=False), hole(256, 512, done=False), data(b"b" * 256, 768), kind=CommandType.READ)
    with ScriptedServer(script(pieces)) as server:
        handle, seen = connect(handles, server), []

        def chunk(subbuf, offset, status, error) -> int:
            seen.append((bytes(subbuf), offset, status, error.value, subbuf.readonly))
            return 0

        assert handle.pread_structured(1024, 0, chunk) == b"a" * 512 + bytes(256) + b"b" * 256
        assert seen == [
            (b"a" * 512, 0, nbd.READ_DATA, 0, True),
            (bytes(256), 512, nbd.READ_HOLE, 0, True),
            (b"b" * 256, 768, nbd.READ_DATA, 0, True),
        ]
        handle.close()


def test_error_at_an_offset_is_reported_without_data_and_fails_the_read(handles):
    pieces = answer(data(b"a" * 512, done=False), error(5, offset=600), kind=CommandType.READ)
    with ScriptedServer(script(pieces)) as server:
        handle, seen = connect(handles, server), []
        with pytest.raises(nbd.Error) as caught:
            handle.pread_structured(1024, 0, lambda *report: seen.append((len(report[0]), *report[1:3], report[3].value)))
        assert caught.value.string == "nbd_pread_structured: read: command failed: Input/output error"
        assert seen == [(512, 0, nbd.READ_DATA, 0), (0, 600, nbd.READ_ERROR, errno.EIO)]
        handle.close()


@pytest.mark.parametrize(
    ("value", "result", "number"),
    [(None, -1, errno.EPROTO), (errno.EBUSY, -1, errno.EBUSY), (errno.EBUSY, 0, 0), (None, None, 0)],
)
def test_callback_in_the_middle_fails_its_command_by_returning_minus_1(value, result, number, connected):
    def extent(_context, _offset, _entries, error):
        if value is not None:
            error.value = value
        return result

    if number:
        with pytest.raises(nbd.Error) as caught:
            connected.block_status(SIZE, 0, extent)
        assert caught.value.errnum == number
    else:
        connected.block_status(SIZE, 0, extent)


def test_first_error_of_a_command_wins(handles):
    pieces = answer(data(b"a" * 512, done=False), error(5), kind=CommandType.READ)
    with ScriptedServer(script(pieces)) as server:
        handle = connect(handles, server)

        def chunk(_subbuf, _offset, _status, error) -> int:
            error.value = errno.EBUSY
            return -1

        completed = []
        cookie = handle.aio_pread_structured(bytearray(1024), 0, chunk, lambda error: completed.append(error.value))
        until_done(handle)
        with pytest.raises(nbd.Error) as caught:
            handle.aio_command_completed(cookie)
        assert completed == [caught.value.errnum] == [errno.EBUSY]
        handle.close()


def test_short_read_is_seen_by_the_completion_already(handles):
    with ScriptedServer(script(answer(data(b"a" * 512), kind=CommandType.READ))) as server:
        handle, completed = connect(handles, server), []
        handle.aio_pread(bytearray(1024), 0, lambda error: completed.append(error.value) or 1)
        until_done(handle)
        assert completed == [errno.EPROTO]
        handle.close()


def test_extents_come_flat_or_as_pairs(connected):
    flat, pairs = [], []
    connected.block_status(SIZE, 0, lambda *report: flat.append((*report[:3], report[3].value)))
    connected.block_status_64(SIZE, 0, lambda *report: pairs.append((*report[:3], report[3].value)))
    assert flat == [("base:allocation", 0, [SIZE, 3], 0)]
    assert pairs == [("base:allocation", 0, [(SIZE, 3)], 0)]


def test_block_status_can_be_filtered_where_the_server_can(connected):
    seen = []
    assert connected.can_block_status_payload() is True
    connected.block_status_filter(SIZE, 0, ["base:allocation"], lambda *report: seen.append(report[:3]))
    assert seen == [("base:allocation", 0, [(SIZE, 3)])]


def test_block_status_cannot_be_filtered_without_extended_headers(handles, server):
    handle = handles()
    handle.add_meta_context("base:allocation")
    handle.set_request_extended_headers(False)
    handle.connect_tcp("127.0.0.1", server)
    with pytest.raises(nbd.Error) as caught:
        handle.block_status_filter(SIZE, 0, ["base:allocation"], print)
    assert caught.value.errnum == errno.ENOTSUP


@pytest.mark.parametrize(
    ("extents", "entries", "number"),
    [
        ([(1 << 32, 1)], [(1 << 32) - (64 << 20), 1], 0),
        ([(512, 1 << 33 | 3), (512, 0)], [512, 3], errno.EOVERFLOW),
        ([(512, 1), (512, 1 << 32)], [512, 1], 0),
    ],
)
def test_extents_that_need_64_bits_are_cut_for_a_32_bit_callback(extents, entries, number, handles):
    with ScriptedServer(script(answer(status(1, extents), kind=CommandType.BLOCK_STATUS), size=1 << 40, extended=True)) as server:
        handle, seen = connect(handles, server), []
        assert handle.get_extended_headers_negotiated()
        cookie = handle.aio_block_status(1 << 33, 0, lambda *report: seen.append((report[2], report[3].value)))
        until_done(handle)
        if number:
            with pytest.raises(nbd.Error) as caught:
                handle.aio_command_completed(cookie)
            assert caught.value.errnum == number
        else:
            assert handle.aio_command_completed(cookie)
        assert seen == [(entries, number)]
        handle.close()


@pytest.mark.parametrize("broken_off", [False, True])
def test_server_that_hangs_up_fails_every_command_with_enotconn(broken_off, handles):
    ending = [receive(28), b"\x66\x8e\x33\xef" if broken_off else b"", hang_up]
    with ScriptedServer(script(*ending)) as server:
        handle = connect(handles, server)
        with pytest.raises(nbd.Error) as caught:
            handle.pread(512, 0)
        assert caught.value.string == "nbd_pread: read: command failed: Transport endpoint is not connected"
        assert handle.aio_is_dead() is broken_off
        assert handle.aio_is_closed() is not broken_off
        assert handle.aio_in_flight() == 0
        handle.close()


def test_server_without_structured_replies_answers_a_structured_read_in_one_piece(handles):
    with ScriptedServer(script(answer(simple(b"a" * 512), kind=CommandType.READ), structured=False)) as server:
        handle, seen = connect(handles, server), []
        handle.pread_structured(512, 0, lambda *report: seen.append((bytes(report[0]), *report[1:3])))
        assert seen == [(b"a" * 512, 0, nbd.READ_DATA)]
        handle.close()


@pytest.mark.parametrize("exception", [RuntimeError, FileNotFoundError, ConnectionResetError, TimeoutError])
def test_callback_in_the_middle_that_raises_fails_its_command_alone(exception, connected, capsys):
    def callback(*_arguments):
        raise exception("in the callback")

    calls = {
        "pread_structured": lambda: connected.pread_structured(512, 0, callback),
        "block_status": lambda: connected.block_status(512, 0, callback),
        "block_status_64": lambda: connected.block_status_64(512, 0, callback),
    }
    for name, call in calls.items():
        with pytest.raises(nbd.Error, match=f"nbd_{name}: .*: command failed") as caught:
            call()
        assert caught.value.errnum == errno.EPROTO
        assert "in the callback" in capsys.readouterr().err
    assert connected.pread(1, 0) == bytearray(1)


def test_server_that_shuts_down_answers_what_is_under_way_and_is_told_goodbye(handles):
    def both(connection):
        first, second = connection.receive_request(), connection.receive_request()
        connection.send(error(errno.ESHUTDOWN)(first))
        connection.send(data(b"a" * 512)(second))

    with ScriptedServer(script(both, goodbye)) as server:
        handle, completed = connect(handles, server), []
        for offset in (0, 512):
            handle.aio_pread(bytearray(512), offset, lambda error: completed.append(error.value) or 1)
        while len(completed) < 2:
            handle.poll(10_000)
        assert completed == [errno.ESHUTDOWN, 0]
        for call in (lambda: handle.aio_pread(bytearray(512), 0), lambda: handle.pread(512, 0)):
            with pytest.raises(nbd.Error, match="invalid state"):
                call()
        handle.close()

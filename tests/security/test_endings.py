"""Whatever a server does, each command ends exactly once, with an error that says so, and never with data that did not come."""

from __future__ import annotations

import contextlib
import errno
import threading

import pytest

import nbdcore
import nbdcore.libnbd as nbd
from nbdcore.protocol.constants import Chunk, CommandType, ErrorNumber, Option
from nbdcore.testing.scripted import (
    Connection,
    Request,
    ScriptedServer,
    answer,
    chunk,
    data,
    drain,
    error,
    expect_option,
    greeting,
    hang_up,
    info_replies,
    reset,
    serve,
    simple,
    status,
    wait_for,
)
from tests.clients.talking import CALLS
from tests.security.peers import CONTEXT, DISK, PATIENCE, each_api, number, opened, paused, refused

READ = CommandType.READ


def answered_as(request: Request, cookie: int) -> Request:
    """Return the request as if it had been another, for a reply to that one."""
    return Request(request.kind, request.flags, cookie, request.offset, request.count, extended=request.extended)


# ---------------------------------------------------------------------------------------------- a server that dies


@each_api
@pytest.mark.parametrize("option", [Option.INFO, Option.LIST])
@pytest.mark.parametrize("half", [False, True], ids=["at once", "within its answer"])
def test_server_that_dies_over_an_option_fails_it_and_leaves_a_dead_client(api, option, half):
    said = info_replies(option, DISK)[:30] if half else b""
    with ScriptedServer(paused(expect_option(option), said, hang_up)) as server, contextlib.closing(api(opt_mode=True)) as client:
        client.connect(server.socket())
        refused({Option.INFO: client.info, Option.LIST: client.exports}[option])
        assert client.dead
        refused(client.info)


@pytest.mark.parametrize("said", [b"", b"\x66\x8e\x33\xef"], ids=["between replies", "within a reply"])
@pytest.mark.parametrize("end", [hang_up, reset])
def test_server_that_dies_completes_everything_under_way_exactly_once(said, end):
    def die(connection: Connection) -> None:
        for _ in range(3):
            connection.receive_request()
        connection.send(said)
        end(connection)

    completed: list[tuple[str, int]] = []
    with ScriptedServer(opened(die)) as server:
        handle = nbd.NBD()
        handle.add_meta_context(CONTEXT)
        handle.connect_socket(server.socket().detach())
        note = lambda name: lambda error: completed.append((name, error.value)) or 1  # noqa: E731 (one for each command)
        handle.aio_pread(nbd.Buffer(512), 0, note("read"))
        handle.aio_pwrite(bytes(512), 0, note("write"))
        handle.aio_block_status(512, 0, lambda *_: 0, note("status"))
        with contextlib.suppress(nbd.Error):  # a broken connection is an error of poll, and not of the commands alone
            while handle.aio_in_flight():
                handle.poll(int(PATIENCE * 1000))
        handle.close()
    assert sorted(completed) == [(name, errno.ENOTCONN) for name in ("read", "status", "write")]


@pytest.mark.parametrize("name", CALLS)
def test_server_that_dies_fails_a_command_of_every_kind(name):
    def die(connection: Connection) -> None:
        connection.receive_request()

    with ScriptedServer(opened(die)) as server:
        client = nbdcore.Client(server.stream(), timeout=PATIENCE)
        with contextlib.closing(client), pytest.raises(nbdcore.Disconnected):
            CALLS[name].make(client, timeout=PATIENCE)


def test_first_error_of_a_command_is_its_outcome_and_its_completion_is_run_though_its_callback_failed():
    completed: list[int] = []

    def chunk_seen(_subbuf, _offset, _status, error):
        error.value = errno.EBUSY
        return -1

    with ScriptedServer(opened(answer(data(b"a" * 512, done=False), error(5), kind=READ), drain)) as server:
        handle = nbd.NBD()
        handle.connect_socket(server.socket().detach())
        cookie = handle.aio_pread_structured(nbd.Buffer(1024), 0, chunk_seen, lambda error: completed.append(error.value))
        while handle.aio_in_flight():
            handle.poll(-1)
        with pytest.raises(nbd.Error) as caught:
            handle.aio_command_completed(cookie)
        handle.close()
    assert completed == [caught.value.errnum] == [errno.EBUSY]


@pytest.mark.parametrize("raised", [RuntimeError("mine"), AssertionError("mine"), MemoryError()])
def test_callback_that_raises_anything_loses_no_completion_and_stops_nobody(raised, capsys):
    completed: list[int] = []

    def extent(*_):
        raise raised

    replies = [answer(status(1, [(512, 0)])), answer(data(b"b" * 512), kind=READ), drain]
    with ScriptedServer(opened(*replies)) as server:
        handle = nbd.NBD()
        handle.add_meta_context(CONTEXT)
        handle.connect_socket(server.socket().detach())
        handle.aio_block_status(512, 0, extent, lambda error: completed.append(error.value) or 1)
        while handle.aio_in_flight():
            handle.poll(-1)
        assert handle.pread(512, 0) == b"b" * 512
        handle.close()
    assert completed == [errno.EPROTO]
    assert type(raised).__name__ in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- replies that nobody waits for


@each_api
@pytest.mark.parametrize("kind", [Chunk.OFFSET_DATA, Chunk.ERROR, Chunk.NONE, 77])
def test_chunk_that_nobody_waits_for_is_read_to_its_end_and_not_taken_for_a_header(api, kind):
    forged = data(b"forged!!" * 64)

    def play(connection: Connection) -> None:
        request = connection.receive_request()
        # A good reply to the read, hidden in the payload of a reply to nobody.
        stray = chunk(kind, b"" if kind == Chunk.NONE else bytes(8) + forged(request))(answered_as(request, 1 << 40))
        connection.send(stray + data(b"a" * 512)(request))

    with ScriptedServer(opened(play, drain)) as server, contextlib.closing(api()) as client:
        client.connect(server.socket())
        assert client.read(512) == b"a" * 512


@each_api
def test_simple_reply_that_nobody_waits_for_kills_the_connection_since_data_might_follow(api):
    def play(connection: Connection) -> None:
        request = connection.receive_request()
        connection.send(simple()(answered_as(request, 1 << 40)))

    with ScriptedServer(opened(play, drain, structured=False)) as server, contextlib.closing(api()) as client:
        client.connect(server.socket())
        refused(lambda: client.read(512))
        assert client.dead


@each_api
def test_structured_reply_where_none_was_agreed_on_kills_the_connection(api):
    script = opened(answer(data(b"a" * 512), kind=READ), drain, structured=False)
    with ScriptedServer(script) as server, contextlib.closing(api()) as client:
        client.connect(server.socket())
        refused(lambda: client.read(512))
        assert client.dead


def test_extents_of_a_context_that_was_not_selected_are_ignored_though_the_caller_may_ask_for_anything():
    """The caller gave up the checks of what it may ask: what the server may answer stays checked."""
    with ScriptedServer(opened(answer(status(1, [(512, 0)])), answer(data(b"b" * 512)), drain, contexts={})) as server:
        handle = nbd.NBD()
        handle.connect_socket(server.socket().detach())
        handle.set_strict_mode(0)
        seen: list[object] = []
        with contextlib.suppress(nbd.Error):
            handle.block_status(512, 0, lambda *report: seen.append(report))
        assert seen == []
        assert handle.pread(512, 0) == b"b" * 512
        handle.close()


# ---------------------------------------------------------------------------------------------- memory of a read


@each_api
@pytest.mark.parametrize(
    "replies",
    [
        [data(b"a" * 256, done=False), error(5)],
        [data(b"a" * 256)],
        [data(b"a" * 256, done=False), chunk(Chunk.NONE)],
        [error(ErrorNumber.EIO)],
    ],
    ids=["some, then an error", "some", "some, then the end", "an error"],
)
def test_read_that_failed_returns_no_part_of_it(api, replies):
    with ScriptedServer(opened(answer(*replies, kind=READ), drain)) as server, contextlib.closing(api()) as client:
        client.connect(server.socket())
        assert number(refused(lambda: client.read(512))) in (errno.EIO, errno.EPROTO)


@pytest.mark.parametrize("make", [lambda: bytearray(b"secret!!" * 64), lambda: nbd.Buffer.from_bytearray(b"secret!!" * 64)])
def test_memory_of_a_read_that_failed_holds_nothing_of_what_was_there_before(make):
    buffer = make()
    with ScriptedServer(opened(answer(data(b"a" * 256, done=False), error(5), kind=READ), drain)) as server:
        handle = nbd.NBD()
        handle.connect_socket(server.socket().detach())
        cookie = handle.aio_pread(buffer, 0)
        while handle.aio_in_flight():
            handle.poll(-1)
        with pytest.raises(nbd.Error):
            handle.aio_command_completed(cookie)
        handle.close()
    left = bytes(buffer if isinstance(buffer, bytearray) else buffer.to_bytearray())
    assert left == b"a" * 256 + bytes(256)


# ---------------------------------------------------------------------------------------------- numbers that do not fit


@each_api
@pytest.mark.parametrize("size", [1 << 63, (1 << 64) - 1])
def test_size_beyond_63_bits_is_an_overflow_and_no_number(api, size):
    with ScriptedServer(opened(drain, size=size)) as server, contextlib.closing(api()) as client:
        client.connect(server.socket())
        assert number(refused(lambda: client.size)) == errno.EOVERFLOW


@pytest.mark.parametrize(
    ("extents", "seen", "failure"),
    [
        ([(512, 1 << 32)], [], errno.EOVERFLOW),
        ([(512, 1), (512, 1 << 32)], [512, 1], 0),
        ([(1 << 32, 1)], [(1 << 32) - (64 << 20), 1], 0),
    ],
    ids=["first flags", "later flags", "length"],
)
def test_extents_of_64_bits_are_refused_or_cut_for_a_callback_of_32_bits_and_never_wrapped(extents, seen, failure):
    found: list[int] = []
    with ScriptedServer(opened(answer(status(1, extents)), drain, size=1 << 40, extended=True)) as server:
        handle = nbd.NBD()
        handle.add_meta_context(CONTEXT)
        handle.connect_socket(server.socket().detach())
        outcome = contextlib.nullcontext() if not failure else pytest.raises(nbd.Error)
        with outcome as caught:
            handle.block_status(1 << 33, 0, lambda _context, _offset, entries, _error: found.extend(entries))
        handle.close()
    assert found[: len(seen)] == seen
    assert all(0 <= value < 1 << 32 for value in found)
    assert failure == (caught.value.errnum if caught else 0)


# ---------------------------------------------------------------------------------------------- a server that is silent


@pytest.mark.parametrize("name", CALLS)
def test_silent_server_costs_a_call_its_deadline_and_no_more(name):
    over = threading.Event()
    with ScriptedServer(opened(wait_for(over))) as server:
        client = nbdcore.Client(server.stream(), timeout=PATIENCE)
        with contextlib.closing(client), pytest.raises(nbdcore.DeadlineExceeded):
            CALLS[name].make(client, timeout=0.05)
        over.set()


@pytest.mark.parametrize("said", [b"", greeting()[:-1], greeting()], ids=["nothing", "half a greeting", "a greeting"])
def test_server_silent_in_the_handshake_costs_the_deadline_and_no_more(said):
    over = threading.Event()
    with ScriptedServer([said, wait_for(over)]) as server:
        with pytest.raises(nbdcore.DeadlineExceeded):
            nbdcore.Client(server.stream(), timeout=0.05)
        over.set()


def test_poll_of_a_silent_server_returns_when_its_time_is_up():
    over = threading.Event()
    with ScriptedServer(opened(wait_for(over))) as server:
        handle = nbd.NBD()
        handle.connect_socket(server.socket().detach())
        handle.aio_pread(nbd.Buffer(512), 0)
        while handle.poll(20):  # sending the request is progress
            continue
        assert handle.aio_in_flight() == 1
        handle.close()
        over.set()


# ---------------------------------------------------------------------------------------------- walks that do not advance


@pytest.mark.parametrize(
    "reply", [status(1, [(0, 0)]), chunk(Chunk.NONE), status(9, [(DISK, 0)])], ids=["empty", "none", "others"]
)
def test_extents_that_do_not_advance_end_the_walk_with_an_error(reply):
    with ScriptedServer(opened(serve(reply))) as server:
        client = nbdcore.Client(server.stream(), timeout=PATIENCE)
        with contextlib.closing(client), pytest.raises(nbdcore.Error) as caught:
            list(client.extents(CONTEXT, timeout=PATIENCE))
        assert not isinstance(caught.value, nbdcore.DeadlineExceeded)

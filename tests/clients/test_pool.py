"""Several connections as one: how many there are, where requests go, what is lost with one, flush, closing, wrong calls."""

from __future__ import annotations

import contextlib
import errno
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

import nbdcore
from nbdcore import (
    Client,
    DeadlineExceeded,
    Disconnected,
    NegotiationError,
    Phase,
    Pool,
    ProtocolViolation,
    TransportError,
    UsageError,
)
from nbdcore.clients.connect import establish as establishing
from nbdcore.protocol.constants import CommandFlag, CommandType, OptionReply, TransmissionFlag
from nbdcore.protocol.state import LEGAL
from nbdcore.server import BlockSizes, ExportSettings, MemoryDisk, Server
from nbdcore.streams.memory import memory_pair
from nbdcore.streams.sockets import connected_pair
from nbdcore.testing.scripted import (
    EVERYTHING,
    ClientGone,
    Connection,
    Negotiation,
    Request,
    ScriptedServer,
    Step,
    answer,
    data,
    drain,
    error,
    expect_end,
    goodbye,
    greeting,
    hang_up,
    option_reply,
    reset,
    serve,
    status,
    unless_gone,
    wait_for,
)
from tests.clients.talking import CALLS, DISK, DONE, PATIENCE, SHORT, expected, good, in_background, script, together

READ, WRITE, FLUSH = CommandType.READ, CommandType.WRITE, CommandType.FLUSH


@contextlib.contextmanager
def pooled(*scripts: Iterable[Step], connections: int | None = None, **options: Any) -> Iterator[tuple[Pool, ScriptedServer]]:
    """A pool of as many connections as there are scripts, unless told otherwise. Leaving does not say goodbye."""
    with ScriptedServer(*scripts, patience=PATIENCE) as server:
        timing = {"timeout": options.pop("timeout", PATIENCE)}
        port = server.listen_tcp()
        pool = Pool(connections=connections or len(scripts), **options).connect_tcp("127.0.0.1", port, **timing)
        with contextlib.closing(pool):
            yield pool, server


def kinds(connection: Connection) -> list[int]:
    """Which requests a server got on one connection, without the goodbye."""
    return [request.kind for request in connection.requests if request.kind != CommandType.DISC]


# ---------------------------------------------------------------------------------------------- how many there are


def test_further_connection_that_disagrees_and_hangs_up_at_once_costs_only_itself():
    other_size = [greeting(), Negotiation(size=2 * DISK)]  # and the end
    with pooled(script(serve(good)), other_size, script(serve(good))) as (pool, _):
        assert pool.connections == 2
        assert pool.pread(8, 5, timeout=PATIENCE) == expected(5, 8)


def test_as_many_as_asked_for_are_opened_and_each_takes_leave():
    with pooled(*[script(goodbye)] * 5) as (pool, server):
        assert isinstance(pool, Pool)
        assert pool.connections == len(server.connections) == 5
        assert pool.phase is Phase.CONNECTED
        assert pool.size == DISK
        assert "connected, 5 to " in repr(pool)
        pool.disconnect(timeout=PATIENCE)
        assert (pool.connections, pool.phase) == (0, Phase.CLOSED)
        assert pool.size == DISK  # what was known stays known


def test_leaving_a_with_block_takes_leave_on_each():
    with pooled(*[script(goodbye)] * 3) as (pool, server), pool:
        assert len(server.connections) == 3


def test_an_export_that_is_not_multi_conn_gets_one_connection():
    alone = int(EVERYTHING & ~TransmissionFlag.CAN_MULTI_CONN)
    with pooled(script(serve(good), flags=alone), connections=4) as (pool, server):
        assert (pool.connections, len(server.connections)) == (1, 1)
        assert not pool.can_multi_conn
        assert pool.pread(8, 3, timeout=PATIENCE) == expected(3, 8)


def test_a_read_only_export_that_is_not_multi_conn_gets_one_too():
    alone = int(TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY)
    with pooled(script(serve(good), flags=alone), connections=4) as (pool, server):
        assert (pool.connections, len(server.connections)) == (1, 1)


REFUSALS = {
    "hangs up at once": [hang_up],
    "breaks off": [reset],
    "hangs up after the greeting": [greeting(), hang_up],
    "talks nonsense": [b"x" * 18, unless_gone(drain)],
    "refuses the export": [
        greeting(),
        lambda c: c.receive(4),
        lambda c: [c.send(option_reply(c.receive_option()[0], OptionReply.ERR_UNSUP)) for _ in range(2)],
        lambda c: c.send(option_reply(c.receive_option()[0], OptionReply.ERR_SHUTDOWN, b"full")),
        drain,
    ],
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_a_server_that_refuses_some_leaves_fewer(refusal):
    with pooled(script(serve(good)), refusal, script(serve(good)), refusal) as (pool, _):
        assert pool.connections == 2
        assert dict(pool.pread_many([(n, 8) for n in range(99)], timeout=PATIENCE)) == {n: expected(n, 8) for n in range(99)}
        pool.disconnect(timeout=PATIENCE)


def test_a_server_that_accepts_and_never_greets_delays_by_no_more_than_the_grace(monkeypatch):
    monkeypatch.setattr(establishing, "GRACE", SHORT)
    with pooled(script(serve(good)), [expect_end], [expect_end]) as (pool, _):
        assert pool.connections == 1
        assert pool.pread(8, 3, timeout=PATIENCE) == expected(3, 8)


def test_a_server_that_stops_in_the_middle_of_the_handshake_delays_by_no_more_than_the_timeout(monkeypatch):
    monkeypatch.setattr(establishing, "GRACE", 100 * PATIENCE)
    stuck = [greeting(), lambda c: c.receive(4), drain]
    with pooled(script(serve(good)), stuck, stuck, timeout=1.0) as (pool, _):
        assert pool.connections == 1
        assert pool.pread(8, 3, timeout=PATIENCE) == expected(3, 8)


def test_those_that_are_open_at_the_end_of_the_grace_are_used(monkeypatch):
    monkeypatch.setattr(establishing, "GRACE", 0.5)
    with pooled(script(serve(good)), [expect_end], script(serve(good)), [expect_end]) as (pool, _):
        assert pool.connections == 2


DIFFERENT: dict[str, dict[str, Any]] = {
    "size": {"size": DISK - 512},
    "flags": {"flags": int(EVERYTHING | TransmissionFlag.READ_ONLY)},
    "no multi-conn": {"flags": int(EVERYTHING & ~TransmissionFlag.CAN_MULTI_CONN)},
    "block sizes": {"block_size": (512, 4096, 1 << 20)},
    "structured replies": {"structured": False},
    "extended headers": {"extended": True},
    "ids of contexts": {"contexts": {2: "base:allocation"}},
    "no contexts": {"contexts": {}},
    "more contexts": {"contexts": {1: "base:allocation", 2: "qemu:allocation-depth"}},
}


@pytest.mark.parametrize("difference", DIFFERENT.values(), ids=DIFFERENT)
def test_a_connection_to_something_else_is_not_used_and_told_so(difference):
    contexts = ["base:allocation", "qemu:allocation-depth"]
    with pooled(script(serve(good)), script(goodbye, **difference), contexts=contexts) as (pool, server):
        assert pool.connections == 1
        for n in range(5):
            assert pool.pread(8, n, timeout=PATIENCE) == expected(n, 8)
        assert kinds(server.connections[1]) == []


def test_the_first_connections_error_is_the_pools():
    with ScriptedServer([greeting(), REFUSALS["refuses the export"][1], *REFUSALS["refuses the export"][2:]]) as server:
        pool = Pool(connections=3)
        with pytest.raises(NegotiationError, match="full"):
            pool.connect_tcp("127.0.0.1", server.listen_tcp(), timeout=PATIENCE)
        assert (pool.phase, pool.connections) == (Phase.DEAD, 0)


def test_nobody_listens():
    with pytest.raises(TransportError):
        nbdcore.create_pool("nbd+unix:///?socket=/nonexistent", connections=3)


def test_waiting_for_a_server_waits_for_the_first_connection(socket_path):
    def connect() -> Pool:
        return Pool(connections=3).connect_unix(socket_path, wait=PATIENCE)

    with Server(MemoryDisk(DISK)) as server:
        with in_background(connect) as outcome:
            time.sleep(SHORT)
            server.listen("unix", path=str(socket_path))
        with outcome[0] as pool:
            assert pool.connections == 3


# ---------------------------------------------------------------------------------------------- where requests go


def test_a_request_goes_where_the_fewest_are_under_way():
    release = threading.Event()
    held = [answer(lambda r: release.wait(PATIENCE) and good(r)), serve(good)]
    with pooled(script(*held), script(serve(good))) as (pool, server), in_background(lambda: pool.pread(1, 7)):
        while not kinds(server.connections[0]):
            time.sleep(0.001)
        for n in range(5):
            assert pool.pread(8, n, timeout=PATIENCE) == expected(n, 8)
        assert [len(kinds(connection)) for connection in server.connections] == [1, 5]
        release.set()


def test_many_requests_are_spread_evenly():
    gate = threading.Barrier(4)
    steps = [lambda c: [c.receive_request() for _ in range(16)], lambda _: gate.wait(PATIENCE)]
    steps += [lambda c: [c.send(good(request)) for request in c.requests], unless_gone(drain)]
    with pooled(*[script(*steps)] * 4) as (pool, _):
        found = dict(pool.pread_many([(n, 8) for n in range(64)], depth=64, timeout=PATIENCE))
        assert found == {n: expected(n, 8) for n in range(64)}


def test_the_pieces_of_a_large_request_are_spread():
    sizes = {"block_size": (1, 4096, 4096)}
    with pooled(script(serve(good), **sizes), script(serve(good), **sizes)) as (pool, server):
        pool.pwrite(bytes(64 << 10), 0, timeout=PATIENCE)
        pool.disconnect(timeout=PATIENCE)
        written = [
            request.offset for connection in server.connections for request in connection.requests if request.kind == WRITE
        ]
        assert sorted(written) == [*range(0, 64 << 10, 4096)]
        assert all(kinds(connection).count(WRITE) >= 2 for connection in server.connections)


@pytest.mark.parametrize("name", CALLS)
def test_each_call_works(name):
    with pooled(*[script(serve(CALLS[name].chunks))] * 2) as (pool, _):
        CALLS[name].make(pool, timeout=PATIENCE)


def test_extents_are_never_mislabelled():
    contexts = {7: "base:allocation", 9: "qemu:allocation-depth"}

    def reply(request: Request) -> bytes:
        return status(7, [(DISK, 1)], done=False)(request) + status(9, [(DISK, 2)])(request)

    names = [*contexts.values()]
    swapped = {7: "qemu:allocation-depth", 9: "base:allocation"}
    same = script(serve(reply), contexts=contexts)
    with pooled(same, script(goodbye, contexts=swapped), same, contexts=names) as (pool, _):
        assert pool.connections == 2
        assert pool.contexts == tuple(names)
        found = together(4, lambda _: pool.block_status(DISK, 0, timeout=PATIENCE))
        assert all({name: part[0].flags for name, part in one.items()} == {names[0]: 1, names[1]: 2} for one in found)


# ---------------------------------------------------------------------------------------------- flush


def test_a_flush_is_sent_once_and_after_all_that_it_covers():
    log: list[tuple[int, str]] = []

    def logging(number: int) -> Any:
        def reply(request: Request) -> bytes:
            log.append((number, CommandType(request.kind).name))
            return good(request)

        return reply

    with pooled(*[script(serve(logging(n))) for n in range(4)]) as (pool, _):
        assert len([*pool.pwrite_many([(n, b"x") for n in range(64)], timeout=PATIENCE)]) == 64
        pool.flush(timeout=PATIENCE)
        assert Counter(kind for _, kind in log) == {"WRITE": 64, "FLUSH": 1}
        assert log[-1][1] == "FLUSH"
        assert {number for number, kind in log if kind == "WRITE"} == {0, 1, 2, 3}


def test_a_flush_after_the_connection_of_a_write_was_lost_goes_to_another():
    gone = threading.Event()
    first = script(answer(DONE, kind=WRITE), hang_up, lambda _: gone.set())
    with pooled(first, script(answer(DONE, kind=FLUSH), goodbye)) as (pool, _):
        pool.pwrite(b"x", 0, timeout=PATIENCE)
        assert gone.wait(PATIENCE)
        with pytest.raises(Disconnected):
            pool.pread(1, 0, timeout=PATIENCE)
        pool.flush(timeout=PATIENCE)
        pool.disconnect(timeout=PATIENCE)


def test_fua_is_sent_with_each_write():
    with pooled(*[script(serve(good))] * 2) as (pool, server):
        assert len([*pool.pwrite_many([(n, b"x") for n in range(16)], fua=True, timeout=PATIENCE)]) == 16
        requests = [request for connection in server.connections for request in connection.requests]
        assert {(request.kind, request.flags) for request in requests} == {(WRITE, CommandFlag.FUA)}


# ---------------------------------------------------------------------------------------------- loss


def test_a_lost_connection_fails_its_own_requests_only():
    release = threading.Event()
    lives = script(answer(lambda r: release.wait(PATIENCE) and good(r)), serve(good))
    dies = script(lambda c: c.receive_request(), wait_for(release), hang_up)
    with pooled(lives, dies) as (pool, _):
        first, second = iter(pool.pread_many([(5, 8), (6, 8)], depth=2, timeout=PATIENCE)), []
        with in_background(lambda: second.extend(first)) as outcome:
            time.sleep(SHORT)
            release.set()
        assert second == [(5, expected(5, 8))]
        assert isinstance(outcome[0], Disconnected)
        assert (pool.phase, pool.connections, pool.size) == (Phase.CONNECTED, 1, DISK)
        for n in range(20):
            assert pool.pread(8, n, timeout=PATIENCE) == expected(n, 8)


def test_a_violation_on_one_connection_fails_its_own_requests_only():
    with pooled(script(answer(b"x" * 64), unless_gone(drain)), script(serve(good))) as (pool, _):
        with pytest.raises(ProtocolViolation):
            pool.pread(8, 0, timeout=PATIENCE)
        assert pool.connections == 1
        assert pool.phase is Phase.CONNECTED
        assert pool.pread(8, 3, timeout=PATIENCE) == expected(3, 8)


def test_each_caller_on_a_lost_connection_gets_an_error_of_their_own():
    lost = script(lambda c: [c.receive_request() for _ in range(4)], hang_up)
    with pooled(lost, lost) as (pool, _):
        errors = together(8, lambda n: pool.pread(8, n, timeout=PATIENCE))
        assert {type(exc) for exc in errors} == {Disconnected}
        assert len({id(exc) for exc in errors}) == 8


def test_when_the_last_is_lost_the_pool_is():
    with pooled(*[script(lambda c: c.receive_request(), hang_up)] * 3) as (pool, _):
        for left in (2, 1, 0):
            with pytest.raises(Disconnected, match="the server closed the connection"):
                pool.pread(8, 0, timeout=PATIENCE)
            assert pool.connections == left
        assert pool.phase is Phase.CLOSED
        for call in CALLS.values():
            with pytest.raises(Disconnected, match="it ended with: the server closed the connection"):
                call.make(pool, timeout=PATIENCE)
        with pytest.raises(Disconnected, match="it ended with"):
            pool.pread_many([(0, 8)])
        pool.disconnect(timeout=PATIENCE)


def test_all_lost_at_once_ends_every_caller_and_every_loop():
    everybody = threading.Barrier(3)
    with pooled(*[script(lambda c: c.receive_request(), lambda _: everybody.wait(PATIENCE), reset)] * 3) as (pool, _):
        errors = together(24, lambda n: pool.pread(8, n, timeout=PATIENCE) if n % 2 else [*pool.pread_many([(n, 8)] * 9)])
        assert {type(exc) for exc in errors} == {Disconnected}
        assert pool.connections == 0


def test_a_loop_that_lost_a_connection_yields_the_rest_then_raises():
    flaky = script(lambda c: [c.send(good(c.receive_request())) for _ in range(20)], hang_up)
    with pooled(script(serve(good)), flaky, script(serve(good))) as (pool, _):
        found: list[int] = []
        with pytest.raises(Disconnected):
            found.extend(offset for offset, _ in pool.pread_many([(n, 8) for n in range(5000)], timeout=PATIENCE))
        assert len(found) == len(set(found)) >= 20
        assert [*pool.pread_many([(5, 8)], timeout=PATIENCE)] == [(5, expected(5, 8))]
        assert pool.connections == 2


def end_the_next_choice(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next call choose the first connection, which ends before it gets the command."""
    shared = pool._shared
    choose = shared._choose

    def choose_one_that_ends(_: object) -> object:
        monkeypatch.setattr(shared, "_choose", choose)
        first = shared._connections[0]
        first.close(Disconnected(errno.ECONNRESET, "it ended just now"))
        return first

    monkeypatch.setattr(shared, "_choose", choose_one_that_ends)


@pytest.mark.parametrize("count", [8, 20_000, 200_000])
def test_a_command_whose_connection_ends_before_it_has_it_arrives_whole_on_another(monkeypatch, count):
    with pooled(script(unless_gone(drain)), script(serve(good))) as (pool, server):
        contents = random.Random(count).randbytes(count)
        end_the_next_choice(pool, monkeypatch)
        pool.pwrite(contents, 7, timeout=PATIENCE)
        (written,) = server.connections[1].requests
        assert (written.offset, bytes(written.payload)) == (7, contents)


def test_a_read_whose_connection_ends_before_it_has_it_is_made_on_another(monkeypatch):
    with pooled(script(unless_gone(drain)), script(serve(good))) as (pool, _):
        buffer = bytearray(200_000)
        end_the_next_choice(pool, monkeypatch)
        assert pool.pread_into(buffer, 5, timeout=PATIENCE) == len(buffer)
        assert buffer == expected(5, len(buffer))


def test_idle_connections_that_are_lost_are_noticed_by_whoever_waits():
    gone = threading.Event()
    with pooled(script(serve(good)), script(hang_up, lambda _: gone.set())) as (pool, _):
        assert gone.wait(PATIENCE)
        for n in range(100):
            assert pool.pread(8, n, timeout=PATIENCE) == expected(n, 8)
            if pool.connections == 1:
                return
        pytest.fail("the loss was never noticed")


class Flaky:
    """A disk behind a scripted server; one connection is broken off after so many requests."""

    def __init__(self, size: int) -> None:
        self.contents = bytearray(size)

    def steps(self, breaks_after: int | None = None) -> list[Step]:
        return script(lambda c: self._serve(c, breaks_after), size=len(self.contents))

    def _serve(self, connection: Connection, breaks_after: int | None) -> None:
        with contextlib.suppress(ClientGone):
            while (request := connection.receive_request()).kind != CommandType.DISC:
                if len(connection.requests) == breaks_after:
                    connection.reset()
                    return
                connection.send(self._answer(request))

    def _answer(self, request: Request) -> bytes:
        end = request.offset + request.count
        if request.kind == READ:
            return data(bytes(self.contents[request.offset : end]))(request)
        self.contents[request.offset : end] = request.payload
        return DONE(request)


def test_contents_of_many_threads_are_right_while_connections_are_lost():
    area = 64 << 10
    disk = Flaky(8 * area)
    with pooled(disk.steps(), disk.steps(40), disk.steps(200), disk.steps(7)) as (pool, _):

        def again(call: Any, *arguments: Any) -> Any:
            while True:
                try:
                    return call(*arguments, timeout=PATIENCE)
                except Disconnected:
                    assert pool.connections

        def work(number: int) -> str:
            generator = random.Random(number)
            base, mirror = number * area, bytearray(area)
            for _ in range(60):
                count = generator.choice([1, 512, 4096, 20_000])
                at = generator.randrange(area - count + 1)
                if generator.random() < 0.5:
                    mirror[at : at + count] = contents = generator.randbytes(count)
                    again(pool.pwrite, contents, base + at)
                else:
                    assert again(pool.pread, count, base + at) == mirror[at : at + count]
            return "as written"

        assert together(8, work) == ["as written"] * 8
        assert pool.connections < 4


# ---------------------------------------------------------------------------------------------- deadlines and loops


def test_a_deadline_gives_up_one_command_and_its_late_answer():
    late = threading.Event()
    slow = script(answer(lambda r: late.wait(PATIENCE) and good(r)), serve(good))
    with pooled(slow, script(serve(good))) as (pool, _):
        buffer = bytearray(b"untouched")
        with pytest.raises(DeadlineExceeded):
            pool.pread_into(buffer, 3, timeout=SHORT)
        late.set()
        for n in range(50):
            assert pool.pread(8, n, timeout=PATIENCE) == expected(n, 8)
        assert buffer == b"untouched"
        assert pool.connections == 2


def test_leaving_a_loop_early_leaves_every_connection_usable():
    with pooled(*[script(serve(good))] * 3) as (pool, _):
        for _ in range(20):
            buffers = [(n, bytearray(100)) for n in range(200)]
            for _ in pool.pread_into_many(buffers, depth=100, timeout=PATIENCE):
                break
            left = [bytes(buffer) for _, buffer in buffers]
            assert pool.pread(8, 3, timeout=PATIENCE) == expected(3, 8)
            assert [bytes(buffer) for _, buffer in buffers] == left
        assert pool.connections == 3
        pool.disconnect(timeout=PATIENCE)  # what the servers still send is taken in, as the last of it


def test_late_answers_on_a_connection_that_nobody_uses_are_taken_in():
    with pooled(*[script(serve(good))] * 3) as (pool, _):
        for _ in pool.pread_into_many([(n, bytearray(100)) for n in range(200)], depth=100, timeout=PATIENCE):
            break
        until = time.monotonic() + PATIENCE
        while any(connection.engine.pending for connection in pool._shared._connections):
            assert time.monotonic() < until, "a connection is taken for busy for ever"
            assert pool.pread(8, 3, timeout=PATIENCE) == expected(3, 8)
        pool.disconnect(timeout=PATIENCE)


def test_a_loop_with_an_error_of_the_server_yields_the_rest_then_raises():
    def reply(request: Request) -> bytes:
        return (error(errno.EIO, "no luck") if request.offset == 17 else good)(request)

    with pooled(*[script(serve(reply))] * 3) as (pool, _):
        found = []
        with pytest.raises(nbdcore.CommandError, match="no luck"):
            found.extend(offset for offset, _ in pool.pread_many([(n, 8) for n in range(40)], depth=40, timeout=PATIENCE))
        assert sorted(found) == [n for n in range(40) if n != 17]
        assert pool.connections == 3


# ---------------------------------------------------------------------------------------------- closing


def test_closing_from_another_thread_ends_every_call():
    silent = script(unless_gone(lambda c: [c.receive_request() for _ in range(99)]))
    with pooled(silent, silent, silent) as (pool, server):
        with contextlib.ExitStack() as stack:
            outcomes = [stack.enter_context(in_background(lambda n=n: pool.pread(8, n))) for n in range(9)]
            outcomes.append(stack.enter_context(in_background(lambda: [*pool.pread_many([(n, 8) for n in range(9)])])))
            while sum(len(connection.requests) for connection in server.connections) < 9:
                time.sleep(0.001)
            pool.close()
        assert {type(outcome[0]) for outcome in outcomes} <= {Disconnected, UsageError}
        assert (pool.phase, pool.connections) == (Phase.CLOSED, 0)
        with pytest.raises(UsageError, match="closed by this program"):
            pool.pread(1, 0)
        pool.close()


def test_a_pool_that_lost_one_connection_and_was_closed_is_closed_not_dead():
    with pooled(script(answer(b"x" * 64), unless_gone(drain)), script(goodbye)) as (pool, _):
        with pytest.raises(ProtocolViolation):
            pool.pread(8, 0, timeout=PATIENCE)
        pool.disconnect(timeout=PATIENCE)
        assert (pool.phase, pool.size) == (Phase.CLOSED, DISK)
        with pytest.raises(UsageError, match=r"^pread: the connection is closed"):
            pool.pread(1, 0)


def test_closing_while_further_connections_are_opened_ends_the_connect():
    with ScriptedServer(script(drain), [expect_end], [expect_end], patience=PATIENCE) as server:
        pool = Pool(connections=3)
        port = server.listen_tcp()
        with in_background(lambda: pool.connect_tcp("127.0.0.1", port)) as outcome:
            while len(server.connections) < 3:
                time.sleep(0.001)
            pool.close()
        assert isinstance(outcome[0], Disconnected)
        assert "closed by this program while connecting" in str(outcome[0])
        assert (pool.phase, pool.connections) == (Phase.CLOSED, 0)


def test_nothing_is_asked_before_all_connections_are_open():
    with ScriptedServer(script(serve(good)), [expect_end], [expect_end], patience=PATIENCE) as server:
        pool = Pool(connections=3)
        port = server.listen_tcp()
        with in_background(lambda: pool.connect_tcp("127.0.0.1", port)) as outcome:
            while len(server.connections) < 3:
                time.sleep(0.001)
            assert pool.phase is Phase.CONNECTING
            for call in CALLS.values():
                with pytest.raises(UsageError, match="the connection is connecting, and must be connected"):
                    call.make(pool, timeout=PATIENCE)
            pool.close()
        assert isinstance(outcome[0], Disconnected)


def test_a_pool_that_nobody_knows_any_more_is_closed():
    with pooled(*[script(expect_end)] * 3) as (pool, _):
        del pool


# ---------------------------------------------------------------------------------------------- the shape of a pool


def test_a_pool_has_what_a_client_has_but_opt_mode_and_listing():
    public = {name for name in dir(Client) if not name.startswith("_")}
    missing = public - {name for name in dir(Pool) if not name.startswith("_")}
    assert missing == {"list_exports"} | {name for name in LEGAL if name.startswith("opt_")}


@pytest.mark.parametrize("name", list(CALLS))
def test_a_new_pool_is_not_connected(name):
    pool = Pool()
    assert (pool.phase, pool.connections, repr(pool)) == (Phase.CREATED, 0, "<nbdcore.Pool newly created>")
    with pytest.raises(UsageError, match=f"^{name}: the connection is newly created, and must be connected"):
        CALLS[name].make(pool)
    pool.close()


def test_connecting_is_legal_once():
    with pooled(script(goodbye), script(goodbye)) as (pool, _):
        with pytest.raises(UsageError, match=r"^connect: the connection is connected"):
            pool.connect("nbd://127.0.0.1:1")
        pool.disconnect(timeout=PATIENCE)


@pytest.mark.parametrize("number", [0, -1, 129, True, 1.5, "4", None])
def test_a_wrong_number_of_connections_is_a_usage_error(number):
    with pytest.raises(UsageError, match="connections"):
        Pool(connections=number)


def test_opt_mode_is_for_one_connection():
    with pytest.raises(UsageError, match="opt mode"):
        nbdcore.create_pool("nbd://127.0.0.1:1", connections=2, opt_mode=True)


def connect_stream(pool: Pool) -> None:
    """Offer a stream, which stays the caller's."""
    near, far = memory_pair()
    with contextlib.closing(near), contextlib.closing(far):
        pool.connect_stream(near)


ONE_ONLY = {
    "connect_command": lambda c: c.connect_command(["true"]),
    "connect_socket_activation": lambda c: c.connect_socket_activation(["true"]),
    "connect_transport": lambda c: c.connect_transport("command", argv=["true"]),
    "connect_socket": lambda c: c.connect_socket(3),
    "connect_stream": connect_stream,
}


@pytest.mark.parametrize("name", ONE_ONLY)
def test_what_leads_to_no_second_connection_is_a_usage_error(name):
    pool = Pool(connections=2)
    with pytest.raises(UsageError, match=f"^{name}: .* and a pool of 2 was asked for"):
        ONE_ONLY[name](pool)
    assert pool.phase is Phase.CREATED
    pool.close()


@pytest.mark.parametrize("name", ["connect", "connect_tcp", "connect_command", "connect_socket"])
def test_the_functions_for_clients_say_how_a_pool_is_made(name):
    with pytest.raises(UsageError, match="unknown option connections; a pool of connections is made by create_pool"):
        getattr(nbdcore, name)("nbd://localhost", connections=2)


def test_a_socket_that_was_refused_is_still_the_callers():
    near, far = connected_pair()
    with near, far, contextlib.closing(Pool(connections=2)) as pool:
        for refused in (near, near.fileno()):
            with pytest.raises(UsageError):
                pool.connect_socket(refused)
        near.send(b"x")
        assert far.recv(1) == b"x"


@pytest.mark.parametrize("over", ["stream", "socket"])
def test_a_pool_of_one_goes_over_anything(over):
    with ScriptedServer(script(serve(good))) as server, Pool(connections=1) as pool:
        if over == "stream":
            pool.connect_stream(server.stream(), timeout=PATIENCE)
        else:
            pool.connect_socket(server.socket(), timeout=PATIENCE)
        assert pool.connections == 1
        assert pool.pread(8, 3, timeout=PATIENCE) == expected(3, 8)


def test_a_pool_is_made_by_its_own_function(socket_path):
    with Server(MemoryDisk(DISK)) as server:
        uri = server.listen("unix", path=str(socket_path)).address.uri()
        with nbdcore.connect(uri, timeout=PATIENCE) as client, nbdcore.create_pool(uri, connections=2, timeout=PATIENCE) as pool:
            assert type(client) is Client
            assert (type(pool), pool.connections) == (Pool, 2)
        with nbdcore.create_pool(uri, timeout=PATIENCE) as pool:
            assert pool.connections == 4


def test_the_embedded_server_keeps_what_many_threads_write(socket_path):
    area = 1 << 20
    settings = ExportSettings(MemoryDisk(8 * area), block_sizes=BlockSizes(minimum=1, preferred=4096, maximum=1 << 17))
    with Server(settings) as server:
        server.listen("unix", path=str(socket_path))
        with Pool(connections=4).connect_unix(socket_path, timeout=PATIENCE) as pool:
            contents = random.Random(1).randbytes(8 * area)

            def work(number: int) -> bool:
                base = number * area
                pool.pwrite(contents[base : base + area // 2], base, timeout=PATIENCE)
                rest = [(at, contents[at : at + 5000]) for at in range(base + area // 2, base + area - 5000, 5000)]
                rest.append((base + area - 5000, contents[base + area - 5000 : base + area]))
                assert len([*pool.pwrite_many(rest, timeout=PATIENCE)]) == len(rest)
                return pool.pread(area, base, timeout=PATIENCE) == contents[base : base + area]

            assert together(8, work) == [True] * 8
            assert pool.connections == 4
            pool.flush(timeout=PATIENCE)

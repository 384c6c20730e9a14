"""Several threads on one client: contents, closing, errors, full send buffers, and the descriptor that nobody frees too early."""

from __future__ import annotations

import contextlib
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from nbdcore import Client, CommandError, Disconnected, Error, Phase, TransportError, UsageError
from nbdcore.protocol.constants import CommandType
from nbdcore.protocol.handshake.agreement import Settings, TLSPolicy
from nbdcore.server import MemoryDisk, Server
from nbdcore.streams.base import Want
from nbdcore.streams.memory import memory_pair
from nbdcore.streams.sockets import SocketStream, connected_pair
from nbdcore.streams.waiting import NEVER, wait
from nbdcore.testing.choppy import ChoppyStream
from nbdcore.testing.scripted import (
    Connection,
    Negotiation,
    ScriptedServer,
    answer,
    data,
    drain,
    error,
    first,
    goodbye,
    greeting,
    serve,
    unless_gone,
    wait_for,
)
from tests.clients.talking import CALLS, DONE, PATIENCE, SHORT, in_background, script, talk, together

THREADS = 16
AREA = 256 << 10  # what each thread writes and reads, alone


@pytest.fixture(params=["whole", "choppy"])
def disk(request: pytest.FixtureRequest) -> Iterator[Client]:
    """A client of the embedded server, over a stream that is as good as any or as awkward as may be."""
    with Server(MemoryDisk(THREADS * AREA)) as server:
        near, far = memory_pair()
        server.serve_stream(far)
        stream = near if request.param == "whole" else ChoppyStream(near, most=50_000, quiet=0.05)
        with Client(stream, timeout=PATIENCE) as client:
            yield client


def test_nobody_is_remembered_once_loops_and_single_reads_have_ended(disk):
    def work(number: int) -> int:
        base = number * AREA
        if number % 2:
            return sum(len(disk.pread(512, base + 512 * step)) for step in range(100))
        ranges = [(base + 512 * step, 512) for step in range(100)]
        return sum(len(data) for _, data in disk.pread_many(ranges, depth=4))

    for _ in range(3):
        assert together(THREADS, work) == [51200] * THREADS
    waiters = disk._shared._mover.waiters
    assert [len(waiters.parked), len(waiters.waiting_for_any), len(waiters.woken), len(waiters.inbox)] == [0, 0, 0, 0]


def test_mixed_reads_and_writes_of_many_threads_keep_their_contents(disk):
    def work(number: int) -> str:
        generator = random.Random(number)
        base, mirror = number * AREA, bytearray(AREA)
        for _ in range(60):
            count = generator.choice([1, 512, 4096, 40_000, 200_000])
            at = generator.randrange(AREA - count + 1)
            if generator.random() < 0.5:
                mirror[at : at + count] = contents = generator.randbytes(count)
                disk.pwrite(contents, base + at, timeout=PATIENCE)
            else:
                assert disk.pread(count, base + at, timeout=PATIENCE) == mirror[at : at + count]
        return "as written"

    assert together(THREADS, work) == ["as written"] * THREADS


def test_large_writes_and_reads_at_once_fill_every_buffer_and_do_not_deadlock():
    contents = os.urandom(8 << 20)
    with Server(MemoryDisk(64 << 20)) as server:
        near, far = memory_pair(capacity=1 << 14)
        server.serve_stream(far)
        with Client(near, timeout=PATIENCE) as disk:

            def work(number: int) -> bool:
                for _ in range(2):
                    if number % 2:
                        disk.pwrite(contents, number * len(contents), timeout=3 * PATIENCE)
                    else:
                        disk.pread(len(contents), number * len(contents), timeout=3 * PATIENCE)
                return True

            assert together(8, work) == [True] * 8
            assert disk.pread(len(contents), len(contents), timeout=PATIENCE) == contents


def test_an_error_of_one_thread_is_its_own():
    def reply(request: Any) -> bytes:
        return (error(5, "no luck") if request.offset % 2 else data(b"x"))(request)

    with talk(serve(reply)) as (client, _):

        def work(number: int) -> int:
            failures = 0
            for _ in range(50):
                try:
                    assert client.pread(1, number, timeout=PATIENCE) == b"x"
                except CommandError:
                    failures += 1
            return failures

        assert together(8, work) == [0, 50] * 4
        assert client.phase is Phase.CONNECTED


# ---------------------------------------------------------------------------------------------- the end


def test_closing_wakes_every_thread_that_waits_with_one_clear_error():
    received = threading.Event()

    def silent(connection: Connection) -> None:
        for _ in range(THREADS):
            connection.receive_request()
        received.set()
        connection.expect_end()

    with talk(silent) as (client, _):

        def work(number: int) -> Any:
            if number == THREADS:
                assert received.wait(PATIENCE)
                return client.close()
            return client.pread(8, number)  # without a deadline: only the closing can end it

        outcomes = together(THREADS + 1, work)
        assert client.phase is Phase.CLOSED
    assert outcomes.pop() is None
    assert {type(outcome) for outcome in outcomes} == {Disconnected}
    assert {str(outcome) for outcome in outcomes} == {"the connection was closed by this program (ENOTCONN)"}
    assert len({id(outcome) for outcome in outcomes}) == THREADS, "each has an error of its own to add its traceback to"


#: What a thread may be told that the end has overtaken.
_ENDS = "closed by this program|the server closed the connection|took leave|is being closed|broke while (sending|receiving)"


def read_until_it_ends(client: Client, number: int) -> Error:
    while True:
        try:
            client.pread(8, number)
        except Error as exc:
            return exc


@pytest.mark.parametrize("way", ["close", "disconnect", "server"] * 10)
def test_threads_that_never_pause_all_learn_of_the_end(way):
    """A call that was legal when it began, and is overtaken by the end before its command is queued, must not wait for ever."""
    go_on = threading.Event()

    def serve_some(connection: Connection) -> None:
        while way != "server" or len(connection.requests) < 200:
            request = connection.receive_request()
            if request.kind == CommandType.DISC:
                return
            connection.send(data(b"12345678")(request))
            if len(connection.requests) == 100:
                go_on.set()

    with ScriptedServer(script(unless_gone(serve_some)), patience=PATIENCE) as server:
        client = Client(server.stream(), timeout=PATIENCE)
        end = {"close": client.close, "disconnect": client.disconnect, "server": lambda: None}[way]

        def work(number: int) -> Error:
            if number == 0:
                assert go_on.wait(PATIENCE)
                end()
            return read_until_it_ends(client, number)

        for outcome in together(6, work):
            assert isinstance(outcome, Disconnected | UsageError), outcome
            assert re.search(_ENDS, str(outcome))
        client.close()


def test_a_server_that_dies_under_many_threads_ends_them_all():
    def dies(connection: Connection) -> None:
        requests = [connection.receive_request() for _ in range(THREADS)]
        connection.send(first(30, data(b"12345678"))(requests[0]))

    with talk(dies) as (client, _):
        outcomes = together(THREADS, lambda number: client.pread(8, number))
        assert client.phase is Phase.DEAD
    assert {str(outcome) for outcome in outcomes} == {"the server closed the connection in the middle of a reply (ENOTCONN)"}


def test_two_threads_that_take_leave_at_once_both_return():
    with talk(goodbye) as (client, connection):
        assert together(2, lambda _: client.disconnect(timeout=PATIENCE)) == [None, None]
        assert client.phase is Phase.CLOSED
        assert [request.kind for request in connection.requests] == [CommandType.DISC]


def test_closing_while_another_thread_is_in_the_handshake_ends_that():
    greeted = threading.Event()
    with ScriptedServer([greeting(), lambda c: c.receive(4), lambda _: greeted.set(), drain]) as server:
        client = Client()
        with in_background(lambda: client.connect_stream(server.stream())) as outcome:
            assert greeted.wait(PATIENCE)
            client.close()
        assert isinstance(outcome[0], Disconnected)
        assert "closed by this program" in str(outcome[0])
        assert client.phase is Phase.CLOSED


def test_closing_while_another_thread_opens_the_transport_ends_that(socket_path):
    import socket

    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first_in_line:
        listener.bind(str(socket_path))
        listener.listen(0)
        first_in_line.connect(str(socket_path))  # the backlog is full: the next one waits
        client = Client()
        with in_background(lambda: client.connect_unix(socket_path)) as outcome:
            while client.phase is Phase.CREATED:
                time.sleep(0.001)
            client.close()
            assert client.phase is Phase.CLOSED
        assert isinstance(outcome[0], Disconnected)
        with pytest.raises(UsageError, match="connect_unix: the connection is closed"):
            client.connect_unix(socket_path)
    socket_path.unlink()


def test_closing_in_opt_mode_while_another_thread_asks_ends_that():
    for _ in range(30):
        with ScriptedServer([greeting(), unless_gone(Negotiation(exports={"a": ""})), drain]) as server:
            client = Client(server.stream(), opt_mode=True, timeout=PATIENCE)

            def ask(client: Client = client) -> Error:
                while True:
                    try:
                        client.opt_list()
                    except Error as exc:
                        return exc

            with in_background(ask) as outcome:
                client.close()
            assert isinstance(outcome[0], Disconnected | UsageError)
            assert client.phase is Phase.CLOSED


class Watched(SocketStream):
    """Notes which thread frees the descriptor."""

    freed_by: str | None = None

    def close(self) -> None:
        if self.freed_by is None:
            self.freed_by = threading.current_thread().name
        super().close()


def test_a_descriptor_is_not_freed_while_another_thread_waits_on_it():
    """Its number could be another file's by the time that the waiting thread gets to poll it."""
    silent = threading.Event()
    with ScriptedServer(script(wait_for(silent))) as server:
        stream = Watched(server.socket())
        client = Client(stream, timeout=PATIENCE)
        outcome: list[BaseException] = []

        def read() -> None:
            try:
                client.pread(8, 0)
            except Error as exc:
                outcome.append(exc)

        thread = threading.Thread(target=read, name="the one that waits")
        thread.start()
        while not client._shared._session.waited_for:
            time.sleep(0.001)
        client.close()
        thread.join(PATIENCE)
        assert stream.freed_by == "the one that waits"
        assert stream.fileno() == -1
        assert isinstance(outcome[0], Disconnected)
        silent.set()


def test_a_stream_that_cannot_hang_up_is_closed():
    class Plain(Watched):
        def hang_up(self) -> None:
            self.close()

        def close(self) -> None:
            self.freed_by = self.freed_by or threading.current_thread().name
            SocketStream.hang_up(self)
            self._sock.close()

    silent = threading.Event()
    with ScriptedServer(script(wait_for(silent))) as server:
        client = Client(Plain(server.socket()), timeout=PATIENCE)
        with in_background(lambda: client.pread(8, 0)) as outcome:
            while not client._shared._session.waited_for:
                time.sleep(0.001)
            client.close()
        assert isinstance(outcome[0], Disconnected)
        silent.set()


def test_the_polling_is_handed_over_when_the_one_that_polls_is_done():
    """The first thread polls, the second sleeps; the first is answered, and the second must go on by itself."""
    event = threading.Event()

    def one_then_the_other(connection: Connection) -> None:
        one = connection.receive_request()
        two = connection.receive_request()
        connection.send(data(b"1")(one))
        wait_for(event)(connection)
        connection.send(data(b"2")(two))

    with talk(one_then_the_other) as (client, connection):
        with in_background(lambda: client.pread(1, 1)) as one:
            while not connection.requests:
                time.sleep(0.001)
            with in_background(lambda: client.pread(1, 2)) as two:
                while not one:
                    time.sleep(0.001)
                event.set()
        assert (one, two) == ([b"1"], [b"2"])


def test_the_polling_is_handed_over_at_a_deadline():
    event = threading.Event()

    def second_only(connection: Connection) -> None:
        connection.receive_request()
        two = connection.receive_request()
        wait_for(event)(connection)
        connection.send(data(b"2")(two))

    with talk(second_only) as (client, connection):
        with in_background(lambda: client.pread(1, 1, timeout=0.2)) as one:
            while not connection.requests:
                time.sleep(0.001)
            with in_background(lambda: client.pread(1, 2)) as two:
                while not one:
                    time.sleep(0.001)
                event.set()
        assert isinstance(one[0], TimeoutError)
        assert two == [b"2"]


def test_answer_that_woke_a_caller_is_not_taken_by_another_that_sends():
    """The system may take its time to run a thread that it has woken; where nothing is left by then, it waits on."""
    may_run, given_up = threading.Event(), threading.Event()
    may_run.set()

    class RunLate(SocketStream):
        def wait(self, seconds: float | None = None) -> bool:
            wait(self.fileno(), Want.READ, NEVER, "")
            may_run.wait(PATIENCE)
            return super().wait(seconds)

    def answer_in_the_middle_of_a_request(connection: Connection) -> None:
        one = connection.receive_request()
        connection.receive(1 << 16)
        connection.send(data(b"1")(one))
        connection.receive(1 << 20)
        wait_for(given_up)(connection)

    with ScriptedServer(script(answer_in_the_middle_of_a_request, drain, size=1 << 30)) as server:
        client = Client(RunLate(server.socket()), timeout=PATIENCE)
        may_run.clear()
        with contextlib.closing(client), in_background(lambda: client.pread(1, 1)) as outcome:
            while not client._shared._session.waited_for:
                time.sleep(0.001)
            with pytest.raises(TimeoutError):
                client.pwrite(bytes(16 << 20), 0, timeout=10 * SHORT)
            may_run.set()
            given_up.set()
        assert outcome == [b"1"]


def test_caller_whose_command_an_interrupted_decoding_lost_is_told_of_the_end():
    """Ctrl-C in another thread may come when a reply has been taken for a command's, and before that is known to be done."""
    with talk(drain) as (client, _):
        shared, engine = client._shared, client._shared.engine
        with in_background(lambda: client.pread(1, 1)) as first, in_background(lambda: client.pread(1, 2)) as second:
            while len(engine.in_flight) < 2 or not shared._mover.waiters.parked:
                time.sleep(0.001)
            with shared._lock:
                engine.in_flight.clear()
            shared.close(Disconnected(0, "interrupted"))
        assert [str(outcome[0]) for outcome in (first, second)] == ["interrupted", "interrupted"]


def test_caller_that_sends_takes_the_receiving_over_from_one_that_left():
    """A server that is sending a long answer, which its caller has given up, reads on only when it is rid of that."""
    left = threading.Event()

    def answer_late(connection: Connection) -> None:
        one = connection.receive_request()
        wait_for(left)(connection)
        connection.send(data(bytes(one.count))(one))
        connection.send(DONE(connection.receive_request()))

    with talk(answer_late, size=1 << 30) as (client, connection):
        with in_background(lambda: client.pread(16 << 20, 0, timeout=10 * SHORT)) as one:
            while not connection.requests:
                time.sleep(0.001)
            with in_background(lambda: client.pwrite(bytes(16 << 20), 0)) as two:
                while not one:
                    time.sleep(0.001)
                left.set()
        assert isinstance(one[0], TimeoutError)
        assert two == [None]


def test_each_call_of_many_threads_ends_when_a_stream_breaks_its_contract():
    """An exception that no stream should raise ends the connection for all, and shows in the thread that met it."""

    class Broken(SocketStream):
        broken = False

        def recv_into(self, room: memoryview) -> int | None:
            if self.broken:
                raise ZeroDivisionError("a bug in the stream")
            return super().recv_into(room)

    with ScriptedServer(script(lambda c: [c.receive_request() for _ in range(4)], lambda c: c.send(b"x"), drain)) as server:
        stream = Broken(server.socket())
        client = Client(stream, timeout=PATIENCE)
        stream.broken = True
        outcomes = together(4, lambda number: client.pread(1, number))
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Disconnected"] * 3 + ["ZeroDivisionError"]
        assert client.phase is Phase.DEAD
        assert stream.fileno() == -1


def test_every_kind_of_call_at_once():
    def reply(request: Any) -> bytes:
        return next(call for call in CALLS.values() if call.kind == request.kind).chunks(request)

    with talk(serve(reply)) as (client, _):
        names = list(CALLS) * 2

        def work(number: int) -> bool:
            for _ in range(30):
                CALLS[names[number]].make(client, timeout=PATIENCE)
            return True

        assert together(len(names), work) == [True] * len(names)


def test_a_transport_that_raises_a_plain_oserror_is_a_transport_error():
    from nbdcore.plugins.spec import Address, Connecting, Transport

    class Nowhere:
        def uri(self, export: str = "") -> str:
            return f"nbd+nowhere:///{export}"

        def __str__(self) -> str:
            return "nowhere"

    class NowhereTransport(Transport):
        name = "nowhere"
        schemes = ("nbd+nowhere",)

        def address(self, **parts: Any) -> Address:
            assert parts == {}
            return Nowhere()

        def parse(self, uri: Any) -> Address:  # noqa: ARG002
            return Nowhere()

        def connect(self, address: Any, *, timeout: float | None = None) -> Connecting:  # noqa: ARG002
            near, far = connected_pair()
            with near, far:
                yield near.fileno(), 2
                raise OSError(113, "no way there")

    from nbdcore.clients.blocking.drive import drive
    from nbdcore.clients.connect.establish import establish
    from nbdcore.clients.connect.target import Endpoint, Target

    target = Target(Endpoint(NowhereTransport(), Nowhere()), TLSPolicy.DISABLE, None)
    with pytest.raises(TransportError, match="cannot connect to nowhere: no way there") as caught:
        drive(establish(target, Settings(), timeout=PATIENCE, wait=None), lambda: None)
    assert caught.value.errno == 113
    assert type(caught.value.__cause__) is OSError


def test_answers_go_to_the_thread_that_asked():
    def backwards(connection: Connection) -> None:
        requests = [connection.receive_request() for _ in range(8)]
        connection.send(b"".join(data(b"%d" % request.offset)(request) for request in reversed(requests)))

    with talk(backwards) as (client, _):
        assert together(8, lambda number: client.pread(1, number, timeout=PATIENCE)) == [b"%d" % n for n in range(8)]


def test_a_reply_for_one_thread_in_the_middle_of_another_s_write_is_taken():
    """The server answers a read before it takes the rest of a write that fills the send buffer."""

    def read_first(connection: Connection) -> None:
        read = connection.receive_request()
        time.sleep(0.05)
        connection.send(data(b"r")(read))
        answer(DONE, kind=CommandType.WRITE)(connection)

    with talk(read_first, size=16 << 20) as (client, connection):
        with in_background(lambda: client.pread(1, 0)) as read:
            while not connection.requests:
                time.sleep(0.001)
            client.pwrite(bytes(8 << 20), 0, timeout=PATIENCE)
        assert read == [b"r"]

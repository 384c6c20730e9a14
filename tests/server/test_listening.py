# ruff: noqa: ARG002  # back ends made for one test look at some of their arguments only

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import socket
import sys
import threading
import time

import pytest

from nbdcore.errors import TransportError, TransportUnavailable, UsageError
from nbdcore.plugins.registry import registry
from nbdcore.protocol import wire
from nbdcore.protocol.constants import CommandType, ErrorNumber, Option, OptionReply
from nbdcore.server import ExportSettings, MemoryDisk, Server
from nbdcore.server.accepting import start_accepting
from nbdcore.server.clients import Clients
from nbdcore.server.shutdown import Shutdown
from nbdcore.streams.base import Listener
from nbdcore.streams.sockets import SocketStream, connected_pair
from nbdcore.streams.waiting import Deadline
from tests import leaks
from tests.server.conftest import connect, server_threads
from tests.server.raw import PATIENCE, RawClient

MEBIBYTE = 1 << 20


class Gate(MemoryDisk):
    """A disk whose reads wait until the gate is opened."""

    def __init__(self, size=MEBIBYTE):
        super().__init__(size)
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()
        self.reads = 0
        self.closed = 0

    def pread(self, count, offset):
        self.reads += 1
        self.entered.release()
        assert self.opened.wait(PATIENCE)
        return super().pread(count, offset)

    def close(self):
        self.closed += 1


def until(condition) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


@contextlib.contextmanager
def stopping(server: Server, timeout: float):
    """Stop a server in another thread, which has begun when the body runs and has returned after it."""
    thread = threading.Thread(target=server.stop, args=(timeout,))
    thread.start()
    until(lambda: server._shutdown.requested)
    yield
    thread.join(PATIENCE)
    assert not thread.is_alive()


def in_transmission(server: Server) -> RawClient:
    client = connect(server)
    client.greet()
    client.agree()
    client.go()
    return client


# ---------------------------------------------------------------------------------------------- listening


def by_tcp(server: Server) -> socket.socket:
    """Listen on a port, and return a connection to it."""
    where = server.listen("tcp", host="127.0.0.1", port=0).address
    return socket.create_connection((where.host, where.port), PATIENCE)


def by_unix(server: Server, path: str) -> socket.socket:
    assert server.listen("unix", path=path).address.uri("disk") == f"nbd+unix:///disk?socket={path}"
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock


def test_several_transports_serve_the_same_exports(short_folder):
    with Server({"disk": MemoryDisk(MEBIBYTE)}) as server:
        other = by_unix(server, str(short_folder / "s")) if hasattr(socket, "AF_UNIX") else by_tcp(server)
        one, two = RawClient(by_tcp(server)), RawClient(other)
        for client in (one, two):
            client.greet()
            client.go("disk")
        one.write(0, b"seen by all")
        assert two.read(0, 11).contents() == b"seen by all"
        one.close()
        two.close()
    assert list(short_folder.iterdir()) == []
    assert server_threads() == []


def test_clients_that_come_before_the_start_are_served_then():
    server = Server(MemoryDisk(MEBIBYTE))
    client = RawClient(by_tcp(server))
    assert server_threads() == []
    server.start()
    server.start()
    client.greet()
    client.go()
    client.close()
    server.stop()


def test_a_uri_says_where_to_listen():
    with Server(MemoryDisk(MEBIBYTE)) as server:
        where = server.listen_uri("nbd://127.0.0.1:0/whatever").address
        client = RawClient(socket.create_connection((where.host, where.port), PATIENCE))
        client.greet()
        client.go()
        client.close()
        with pytest.raises(UsageError, match="TLS"):
            server.listen_uri("nbds://127.0.0.1")


def test_a_uri_and_what_it_cannot_say():
    with Server(MemoryDisk(MEBIBYTE)) as server:
        assert server.listen_uri("nbd://127.0.0.1:0").address.keepalive is None
        assert server.listen_uri("nbd://127.0.0.1:0", keepalive=False).address.keepalive is False
        with pytest.raises(UsageError, match="has no part called colour"):
            server.listen_uri("nbd://127.0.0.1:0", colour="red")


def test_listening_on_what_is_not_there_is_an_error():
    with Server(MemoryDisk(1)) as server:
        with pytest.raises(TransportUnavailable):
            server.listen("carrier pigeon")
        with pytest.raises(UsageError):
            server.listen("tcp", path="/nowhere")


class Exhausted(Listener):
    """A listener that at first cannot accept, as if there were no descriptors left."""

    def __init__(self):
        self.near, far = connected_pair()
        self.ready, self.signal = connected_pair()
        self.signal.send(b"!")
        self.streams = [SocketStream(far)]
        self.failures = 2

    @property
    def address(self):
        return "nowhere"

    def accept(self):
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, "too many open files")
        if not self.streams:
            return None
        self.ready.recv(1)
        return self.streams.pop()

    def fileno(self):
        return self.ready.fileno()

    def close(self):
        self.ready.close()
        self.signal.close()


def test_a_failed_accept_is_logged_once_and_tried_again(caplog):
    listener = Exhausted()
    with Server(MemoryDisk(MEBIBYTE)) as server:
        server._listeners.append(listener)
        server._start_accepting(listener)
        client = RawClient(listener.near)
        client.greet()
        client.go()
        client.close()
    assert [record.getMessage() for record in caplog.records] == [
        "accepting on nowhere failed, and is tried again: [Errno 24] too many open files"
    ]


@contextlib.contextmanager
def accepting(listener: Listener, welcome):
    """Accept clients without a server, until the body ends."""
    shutdown = Shutdown()
    with contextlib.closing(shutdown):
        thread = start_accepting(listener, shutdown, Clients(threading.RLock(), 1), welcome)
        try:
            yield
        finally:
            shutdown.request(Deadline.after(PATIENCE))
            thread.join(PATIENCE)
    assert not thread.is_alive()


def test_a_fault_in_welcoming_a_client_costs_that_client_and_not_the_listener(caplog):
    welcomed = []

    def welcome(stream):
        welcomed.append(stream)
        if len(welcomed) == 1:
            raise AssertionError("a fault")

    tcp = registry.get("tcp")
    listener = tcp.listen(tcp.listening_address(host="127.0.0.1", port=0))
    with contextlib.closing(listener), accepting(listener, welcome):
        for number in (1, 2):
            with socket.create_connection((listener.address.host, listener.address.port), PATIENCE) as client:
                if number == 1:
                    assert client.recv(1) == b""
                until(lambda: len(welcomed) == number)  # noqa: B023 (called at once)
        welcomed[1].close()
    assert "disconnected by a fault of the server" in caplog.text


class Faulty(Exhausted):
    """Its first accept fails with no OSError."""

    def accept(self):
        try:
            return super().accept()
        except OSError as problem:
            raise RuntimeError("a fault of the transport") from problem


def test_a_fault_of_a_transport_in_accepting_is_tried_again(caplog):
    listener = Faulty()
    with Server(MemoryDisk(MEBIBYTE)) as server:
        server._listeners.append(listener)
        server._start_accepting(listener)
        client = RawClient(listener.near)
        client.greet()
        client.close()
    assert "accepting on nowhere failed, and is tried again: a fault of the transport" in caplog.text


def test_a_client_too_many_is_disconnected_and_room_is_made_again(caplog):
    with Server(MemoryDisk(MEBIBYTE), max_clients=2) as server:
        first, second = RawClient(by_tcp(server)), RawClient(by_tcp(server))
        for client in (first, second):
            client.greet()
            client.go()
        third = RawClient(by_tcp(server))
        assert third.hung_up()
        assert "127.0.0.1" in caplog.text
        assert "every place is taken" in caplog.text
        first.close()
        until(lambda: len(server._clients) == 1)
        fourth = RawClient(by_tcp(server))
        fourth.greet()
        fourth.go()
        for client in (second, third, fourth):
            client.close()


def chosen(server: Server) -> RawClient:
    """Return a client that came through a listener, and has chosen its export."""
    client = RawClient(by_tcp(server))
    client.greet()
    client.go()
    return client


def silent(server: Server) -> RawClient:
    """Return a client that came through a listener, and listens."""
    client = RawClient(by_tcp(server))
    client.unpack(wire.GREETING)
    client.unpack(wire.HANDSHAKE_FLAGS)
    return client


def test_silent_clients_keep_nobody_out(caplog):
    with Server(MemoryDisk(MEBIBYTE), max_clients=4) as server:
        clients = [chosen(server)]
        keepers = [silent(server) for _ in range(3)]
        for keeper in keepers:
            clients.append(chosen(server))
            assert keeper.hung_up()
        assert [client.read(0, 1).error for client in clients] == [0] * 4
        clients.append(RawClient(by_tcp(server)))
        assert clients[-1].hung_up()
        assert [client.read(0, 1).error for client in clients[:4]] == [0] * 4
        for client in clients + keepers:
            client.close()
    assert caplog.text.count("it had said nothing, and all 4 places are taken") == 3


def test_clients_that_have_spoken_give_way_after_those_that_have_not():
    with Server(MemoryDisk(MEBIBYTE), max_clients=2) as server:
        spoken = RawClient(by_tcp(server))
        spoken.greet()
        spoken.option(Option.LIST)
        keeper = silent(server)
        third = chosen(server)
        assert keeper.hung_up()
        spoken.option(Option.LIST)
        fourth = chosen(server)
        assert spoken.hung_up()
        for client in (spoken, keeper, third, fourth):
            client.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of descriptors that holds for this process")
def test_without_descriptors_the_silent_give_way_and_the_listener_lives(caplog):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Server(MemoryDisk(MEBIBYTE)) as server, contextlib.ExitStack() as stack:
        where = server.listen("tcp", host="127.0.0.1", port=0).address
        ours = [stack.enter_context(socket.socket()) for _ in range(12)]
        used = leaks.open_descriptors()
        free = [number for number in range(3, 4096) if number not in used]
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[4], hard))
        try:
            for sock in ours:
                sock.connect((where.host, where.port))
            last = RawClient(ours[-1])
            last.greet()
            last.go()
            assert last.read(0, 1).error == 0
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "the system has nothing left for another" in caplog.text


def test_arguments_that_cannot_be_are_refused():
    for wrong in ({"max_clients": 0}, {"handshake_timeout": -1}):
        with pytest.raises(UsageError):
            Server(MemoryDisk(1), **wrong)


# ---------------------------------------------------------------------------------------------- slow clients


@pytest.mark.parametrize(
    "said", [b"", b"\0\0", wire.CLIENT_FLAGS.pack(3), wire.CLIENT_FLAGS.pack(3) + b"IHAVEOPT\0\0\0\7\0\0\0\x0a..."]
)
def test_a_client_that_stalls_in_the_handshake_is_cut_off(serve, client_of, said):
    client = client_of(serve(MemoryDisk(1), handshake_timeout=0.2))
    client.unpack(wire.GREETING)
    client.unpack(wire.HANDSHAKE_FLAGS)
    client.send(said)
    assert client.hung_up()


def test_a_client_that_always_has_another_option_is_cut_off(serve, client_of):
    client = client_of(serve(MemoryDisk(1), handshake_timeout=0.2))
    client.greet()
    with contextlib.suppress(ConnectionError, AssertionError):
        while True:
            client.option(Option.LIST)
    assert client.hung_up()


def test_a_client_that_does_not_read_its_option_replies_is_cut_off(serve, client_of):
    server = serve({f"{number:04}" * 1000: MemoryDisk(1) for number in range(300)}, handshake_timeout=0.2)
    client = client_of(server)
    client.greet()
    client.send(wire.pack_option(Option.LIST) * 4)
    until(lambda: not server._clients)


def test_a_client_in_transmission_may_be_silent(serve, client_of):
    client = client_of(serve(MemoryDisk(MEBIBYTE), handshake_timeout=0.1))
    client.greet()
    client.go()
    time.sleep(0.3)
    assert client.read(0, 10).contents() == bytes(10)


def test_a_client_that_never_reads_makes_the_server_wait_and_not_grow(serve, client_of):
    disk = Gate(64 * MEBIBYTE)
    disk.opened.set()
    client = client_of(serve(disk))
    client.greet()
    client.go()
    client.send(b"".join(client.pack(CommandType.READ, 0, MEBIBYTE) for _ in range(1000)))
    until(lambda: disk.reads)
    time.sleep(0.3)
    assert disk.reads < 20
    assert [len(client.reply(MEBIBYTE).contents()) for _ in range(100)] == [MEBIBYTE] * 100
    assert disk.reads < 120


def test_a_client_inside_the_back_end_does_not_hold_up_another(serve, client_of):
    disk = Gate()
    server = serve(disk)
    first, second = client_of(server), client_of(server)
    for client in (first, second):
        client.greet()
        client.go()
    first.send(first.pack(CommandType.READ, 0, 10))
    assert disk.entered.acquire(timeout=PATIENCE)
    assert second.write(0, b"hello").error == 0
    disk.opened.set()
    assert first.reply(10).contents() == b"hello" + bytes(5)


# ---------------------------------------------------------------------------------------------- stopping


def test_stopping_answers_the_request_begun_and_refuses_the_next():
    disk = Gate()
    server = Server(disk)
    client = in_transmission(server)
    client.send(b"".join(client.pack(CommandType.READ, 0, 10) for _ in range(3)))
    assert disk.entered.acquire(timeout=PATIENCE)
    with stopping(server, PATIENCE):
        disk.opened.set()
        assert client.reply(10).contents() == bytes(10)
        refused = [client.reply(), client.reply()]
        assert [reply.error for reply in refused] == [ErrorNumber.ESHUTDOWN] * 2
        assert client.hung_up()
    assert disk.closed == 1
    client.close()


@pytest.mark.parametrize("timeout", [1000, None])
def test_stopping_disconnects_idle_clients_at_once(timeout):
    server = Server(MemoryDisk(MEBIBYTE))
    clients = [in_transmission(server), connect(server), connect(server)]
    clients[1].greet()
    server.stop(timeout=timeout)
    clients[2].unpack(wire.GREETING)
    clients[2].unpack(wire.HANDSHAKE_FLAGS)
    for client in clients:
        assert client.hung_up()
        client.close()
    assert server_threads() == []


def test_an_option_that_is_unknown_or_not_allowed_is_refused_for_the_stop_alone():
    server = Server(MemoryDisk(MEBIBYTE))
    client = connect(server)
    client.greet()
    client.send(wire.pack_option(Option.LIST) + wire.pack_option(99)[:10])
    client.option_replies(Option.LIST)  # what came with it has been received, too
    with stopping(server, PATIENCE):
        client.send(wire.pack_option(99)[10:])
        ((kind, _),) = client.option_replies(99)
        assert kind == OptionReply.ERR_SHUTDOWN
    client.close()


def test_an_option_under_way_is_refused_when_stopping():
    server = Server(MemoryDisk(MEBIBYTE))
    client = connect(server)
    client.greet()
    request = wire.pack_option(Option.GO, wire.pack_info_request("", []))
    client.send(wire.pack_option(Option.LIST) + request[:20])
    client.option_replies(Option.LIST)  # what came with it has been received, too
    with stopping(server, PATIENCE):
        client.send(request[20:])
        ((kind, _),) = client.option_replies(Option.GO)
        assert kind == OptionReply.ERR_SHUTDOWN
        assert client.hung_up()
    client.close()


@pytest.mark.parametrize("what", ["half a request", "replies unread"])
def test_a_client_that_does_not_finish_is_cut_off_at_the_deadline(what):
    server = Server(MemoryDisk(64 * MEBIBYTE))
    client = in_transmission(server)
    if what == "half a request":
        client.send(client.pack(CommandType.WRITE, 0, 1000, 0, b"x" * 10))
    else:
        client.send(b"".join(client.pack(CommandType.CACHE, 0, 1) + client.pack(CommandType.READ, 0, 60000) for _ in range(200)))
    time.sleep(0.1)
    server.stop(timeout=0.2)
    assert server_threads() == []
    client.close()


def test_a_long_zeroing_is_interrupted_between_its_pieces():
    started = threading.Event()

    class Slow(MemoryDisk):
        zero = None

        def pwrite(self, data, offset):
            started.set()
            time.sleep(0.01)

    server = Server(Slow(1 << 40))
    client = in_transmission(server)
    client.send(client.pack(CommandType.WRITE_ZEROES, 0, 2**32 - 1))
    assert started.wait(PATIENCE)
    with stopping(server, PATIENCE):
        assert client.reply().error == ErrorNumber.ESHUTDOWN
    client.close()


def test_a_back_end_that_does_not_return_is_left_behind_until_it_does(caplog):
    disk = Gate()
    server = Server(disk)
    client = in_transmission(server)
    client.send(client.pack(CommandType.READ, 0, 10))
    assert disk.entered.acquire(timeout=PATIENCE)
    server.stop(timeout=0.1)
    assert "1 clients are still inside a back end" in caplog.text
    assert disk.closed == 0
    disk.opened.set()
    until(lambda: disk.closed)
    until(lambda: not server_threads())
    assert server._shutdown.fileno() == -1
    client.close()


def test_many_clients_in_a_back_end_that_does_not_return_hold_the_stop_up_no_longer_than_one(caplog):
    disk = Gate()
    server = Server(disk)
    clients = [in_transmission(server) for _ in range(40)]
    for client in clients:
        client.send(client.pack(CommandType.READ, 0, 10))
        assert disk.entered.acquire(timeout=PATIENCE)
    try:
        with stopping(server, 0.1):  # half a second for each of them would be too long for it
            pass
        assert "40 clients are still inside a back end" in caplog.text
    finally:
        disk.opened.set()
        until(lambda: not server_threads())
        for client in clients:
            client.close()


def test_a_back_end_may_stop_its_own_server():
    class Last(MemoryDisk):
        def flush(self):
            server.stop()

    server = Server(Last(MEBIBYTE))
    client = in_transmission(server)
    assert client.ask(CommandType.FLUSH).error == 0
    assert client.hung_up()
    until(lambda: not server_threads())
    client.close()


def test_a_stopped_server_stays_stopped():
    disk = Gate()
    server = Server(disk)
    server.stop()
    server.stop()
    assert disk.closed == 1
    for call in (server.start, lambda: server.listen("tcp", host="127.0.0.1", port=0)):
        with pytest.raises(UsageError):
            call()
    near, far = connected_pair()
    with near, pytest.raises(UsageError):
        server.serve_stream(SocketStream(far))
    assert far.fileno() == -1


def test_a_back_end_that_cannot_be_closed_is_logged(caplog):
    disk = MemoryDisk(1)
    disk.close = lambda: 1 / 0
    Server({"broken": disk}).stop()
    assert "broken" in caplog.text


def test_a_back_end_under_several_names_is_closed_once():
    closed = []
    shared, other = MemoryDisk(1), MemoryDisk(1)
    shared.close = lambda: closed.append("shared")
    other.close = lambda: closed.append("other")
    Server({"a": shared, "b": other, "c": ExportSettings(shared, read_only=True)}).stop()
    assert sorted(closed) == ["other", "shared"]


def test_serve_forever_returns_when_another_thread_stops_the_server():
    server = Server(MemoryDisk(1))
    timer = threading.Timer(0.1, server.stop)
    timer.start()
    server.serve_forever()
    timer.join(PATIENCE)
    assert server_threads() == []


def test_a_thread_that_cannot_be_started_costs_the_client_only(monkeypatch, caplog):
    server = Server(MemoryDisk(MEBIBYTE))

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse_threads)
        unlucky = connect(server)
    assert unlucky.hung_up()
    assert "can't start new thread" in caplog.text
    client = in_transmission(server)
    assert client.read(0, 1).error == 0
    unlucky.close()
    client.close()
    server.stop()


def refuse_threads(thread):
    raise RuntimeError("can't start new thread")


def test_a_server_that_gets_no_thread_to_accept_in_says_so_and_listens_nowhere(monkeypatch):
    server = Server(MemoryDisk(MEBIBYTE))
    listeners = [server.listen("tcp", host="127.0.0.1", port=0) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse_threads)
        with pytest.raises(TransportError, match="can't start new thread"):
            server.start()
    assert [listener.fileno() for listener in listeners] == [-1, -1]
    server.stop()


def test_a_running_server_that_gets_no_thread_for_one_listener_more_goes_on(monkeypatch):
    with Server(MemoryDisk(MEBIBYTE)) as server:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse_threads)
            with pytest.raises(TransportError, match="can't start new thread"):
                server.listen("tcp", host="127.0.0.1", port=0)
        client = in_transmission(server)
        assert client.read(0, 1).error == 0
        client.close()


def test_a_fault_of_the_server_itself_costs_one_client(monkeypatch, caplog):
    with Server(MemoryDisk(MEBIBYTE)) as server:
        with monkeypatch.context() as patch:
            patch.setattr("nbdcore.server.listening.transmit", lambda *_: 1 / 0)
            unlucky = in_transmission(server)
            assert unlucky.hung_up()
        client = in_transmission(server)
        assert client.read(0, 1).error == 0
        unlucky.close()
        client.close()
    assert "ZeroDivisionError" in caplog.text


def test_clients_that_come_and_go_leave_nothing(serve):
    server = serve(MemoryDisk(MEBIBYTE))
    gc.collect()
    before = len(leaks.open_descriptors())
    for number in range(60):
        client = connect(server)
        client.greet()
        if number % 3:
            client.go()
        if number % 2:
            client.send(client.pack(CommandType.READ, 0, 1000)[: number % 28])
        client.close()
    until(lambda: not server._clients)
    assert len(leaks.open_descriptors()) == before


def test_ordinary_clients_come_and_go_at_info_and_leave_no_other_line_in_the_log(serve, client_of, caplog):
    caplog.set_level(logging.INFO)
    server = serve(MemoryDisk(MEBIBYTE))
    client = client_of(server)
    client.greet()
    client.go()
    client.send(client.pack(CommandType.DISC))
    assert client.hung_up()
    until(lambda: not server._clients)
    come, gone = (record.getMessage() for record in caplog.records if record.levelno == logging.INFO)
    assert (come.partition(" has ")[2], gone.partition(" has ")[2]) == ("chosen its export, without TLS", "left")
    assert len(caplog.records) == 2

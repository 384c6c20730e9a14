"""Socket streams and listeners: what they refuse, how they fail, what their errors say."""

from __future__ import annotations

import contextlib
import errno
import math
import signal
import socket
import struct
import subprocess
import sys
import threading

import pytest

from nbdcore.errors import Disconnected, TransportError, UsageError
from nbdcore.streams import sockets
from nbdcore.streams.base import Want
from nbdcore.streams.memory import memory_pair
from nbdcore.streams.sockets import SocketListener, SocketStream, connected_pair, transport_errors
from nbdcore.streams.waiting import NEVER, Deadline, wait
from nbdcore.testing.streams import check_stream
from tests import leaks

SOON = 30.0


@pytest.fixture
def tcp():
    """A stream and the plain socket of its peer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    stream = SocketStream(near)
    yield stream, far
    stream.close()
    far.close()


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# --- what a stream is made of ---


def test_datagram_socket_is_refused_and_left_alone():
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", 10809))
        with pytest.raises(UsageError) as caught:
            SocketStream(sock)
        assert caught.value.errno == errno.EPROTOTYPE
        assert sock.gettimeout() is None
        assert sock.fileno() >= 0


def test_unconnected_socket_is_refused():
    with socket.socket() as sock:
        with pytest.raises(UsageError) as caught:
            SocketStream(sock)
        assert caught.value.errno == errno.ENOTCONN


def test_listening_socket_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as sock, pytest.raises(UsageError):
        SocketStream(sock)


def test_closed_socket_is_refused():
    sock = socket.socket()
    sock.close()
    with pytest.raises(UsageError) as caught:
        SocketStream(sock, peer="somebody")
    assert caught.value.errno == errno.EBADF


def test_stream_is_named_after_its_peer(tcp):
    stream, far = tcp
    host, port = far.getsockname()
    assert str(stream) == f"{host} port {port}"


# --- how it breaks ---


def test_reset_by_peer_is_a_disconnect_with_errno_cause_and_name(tcp):
    stream, far = tcp
    reset(far)
    wait(stream.fileno(), Want.READ, Deadline.after(SOON), "late")
    with pytest.raises(Disconnected) as caught:
        stream.recv_into(memoryview(bytearray(10)))
    assert caught.value.errno == errno.ECONNRESET
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    assert str(stream) in str(caught.value)
    assert "ECONNRESET" in str(caught.value)


def test_reset_that_a_wait_met_is_still_told_by_the_next_receive(tcp):
    stream, far = tcp
    reset(far)
    wait(stream.fileno(), Want.READ, Deadline.after(SOON), "late")
    stream.wait()
    with pytest.raises(Disconnected) as caught:
        stream.recv_into(memoryview(bytearray(10)))
    assert caught.value.errno == errno.ECONNRESET


waits = pytest.mark.skipif(not sockets._DONT_WAIT, reason="there, streams have no way of their own to wait")


@waits
@pytest.mark.parametrize("seconds", [None, SOON])
def test_duplicate_in_the_other_mode_makes_a_wait_give_up(tcp, seconds):
    stream, _ = tcp
    with stream._sock.dup() as duplicate:
        duplicate.setblocking(False)
        assert stream.wait(seconds) is False


@pytest.mark.parametrize("refused", [b"?", None], ids=["by the system", "by Python, as for vsock"])
def test_socket_whose_receives_take_no_limit_makes_a_wait_with_a_deadline_give_up(tcp, monkeypatch, refused):
    stream, _ = tcp
    monkeypatch.setattr(sockets, "_FOR_SHORT", refused)
    for _ in range(2):
        assert stream.wait(SOON) is False
        assert stream.recv_into(memoryview(bytearray(1))) is None


@pytest.mark.skipif(not hasattr(socket, "AF_VSOCK"), reason="there are no vsock sockets")
def test_vsock_socket_makes_a_wait_with_a_deadline_give_up(tcp, monkeypatch):
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as vsock, monkeypatch.context() as patch:
        patch.setattr(tcp[0], "_sock", vsock)
        assert tcp[0].wait(SOON) is False


def test_socket_that_cannot_be_peeked_at_makes_every_wait_give_up(tcp, monkeypatch):
    stream, far = tcp
    with monkeypatch.context() as patch:
        patch.setattr(socket, "MSG_PEEK", socket.MSG_OOB)  # which TCP refuses where nothing is urgent
        assert stream.wait() is False
    assert stream.wait() is False
    far.send(b"x")
    wait(stream.fileno(), Want.READ, Deadline.after(SOON), "late")
    assert stream.recv_into(memoryview(bytearray(1))) == 1


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 0.02, 3600.0])
def test_wait_with_a_deadline_says_that_nothing_has_come_and_leaves_the_rest_to_poll(tcp, seconds):
    stream, _ = tcp
    assert stream.wait(seconds) is False
    assert stream.recv_into(memoryview(bytearray(1))) is None


@waits
@pytest.mark.parametrize("seconds", [math.inf, 1e300, 3600.0])
def test_wait_with_a_deadline_says_when_something_is_there(tcp, seconds):
    stream, far = tcp
    far.send(b"x")
    wait(stream.fileno(), Want.READ, Deadline.after(SOON), "late")
    assert stream.wait(seconds)
    assert stream.recv_into(memoryview(bytearray(1))) == 1


@waits
def test_wait_for_ever_after_one_with_a_deadline_ends_when_something_comes(tcp):
    stream, far = tcp
    assert not stream.wait(SOON)
    timer = threading.Timer(0.02, far.send, (b"x",))
    timer.start()
    assert stream.wait()
    timer.join()
    assert stream.recv_into(memoryview(bytearray(1))) == 1


@pytest.fixture
def alarm():
    """Calls a function in the main thread again and again, until the test has ended."""

    def ring(handler, *, every):
        signal.signal(signal.SIGALRM, lambda *_: handler())
        signal.setitimer(signal.ITIMER_REAL, every, every)

    before = signal.getsignal(signal.SIGALRM)
    yield ring
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_error_that_a_signal_handler_raises_ends_a_wait_and_is_none_of_the_socket(tcp, alarm):
    stream, far = tcp

    def late():
        raise TimeoutError("the program's own")

    def wait_for_ever(stream):
        while not stream.wait():
            wait(stream.fileno(), Want.READ, NEVER, "")

    alarm(late, every=0.02)
    with pytest.raises(TimeoutError, match="the program's own"):
        wait_for_ever(stream)
    signal.setitimer(signal.ITIMER_REAL, 0)
    far.send(b"x")
    wait(stream.fileno(), Want.READ, Deadline.after(SOON), "late")
    assert stream.recv_into(memoryview(bytearray(1))) == 1


def test_signals_without_end_do_not_put_a_deadline_off(tcp, alarm):
    stream, far = tcp
    rings = iter(range(100))
    alarm(lambda: next(rings, None) is None and far.send(b"late"), every=0.02)
    assert stream.wait(SOON) is False
    assert next(rings, None) is not None


def test_platform_without_the_flag_has_sockets_that_never_wait(monkeypatch):
    monkeypatch.setattr(sockets, "_DONT_WAIT", 0)
    monkeypatch.setattr(sockets, "_SEND_FLAGS", 0)
    check_stream(memory_pair)
    near, far = memory_pair()
    with contextlib.closing(near), contextlib.closing(far):
        assert near.wait() is False


def test_sending_to_a_peer_that_reset_is_a_disconnect(tcp):
    stream, far = tcp
    reset(far)
    wait(stream.fileno(), Want.READ, Deadline.after(SOON), "late")
    with pytest.raises(Disconnected) as caught:
        stream.send([memoryview(b"x")])
    assert caught.value.errno in {errno.ECONNRESET, errno.EPIPE}


def test_half_closing_after_a_reset_is_a_disconnect(tcp):
    stream, far = tcp
    reset(far)
    wait(stream.fileno(), Want.READ, Deadline.after(SOON), "late")
    with pytest.raises(Disconnected):
        stream.finish_sending()


@pytest.mark.parametrize(
    "call",
    [
        lambda stream: stream.recv_into(memoryview(bytearray(1))),
        lambda stream: stream.send([memoryview(b"x")]),
        lambda stream: stream.finish_sending(),
    ],
    ids=["recv_into", "send", "finish_sending"],
)
def test_call_after_close_says_who_closed(tcp, call):
    stream, _ = tcp
    stream.close()
    with pytest.raises(Disconnected, match="was closed by this program") as caught:
        call(stream)
    assert caught.value.errno == errno.ENOTCONN


def test_end_seen_while_another_thread_closes_is_no_end_of_the_peer(tcp):
    stream, _ = tcp
    # The moment between the two steps of close(), in which the socket answers 0.
    stream._closed = True
    stream._sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(Disconnected, match="was closed by this program"):
        stream.recv_into(memoryview(bytearray(1)))


def test_broken_pipe_does_not_kill_a_program_with_default_sigpipe():
    program = """
import signal
from nbdcore.errors import Disconnected
from nbdcore.streams.memory import memory_pair
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
near, far = memory_pair()
near.send([memoryview(b"unread")])
far.close()
try:
    near.send([memoryview(b"x")])
    near.send([memoryview(b"x")])
except Disconnected as exc:
    print(exc.errno)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SOON, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(errno.EPIPE), "")


def test_signal_that_interrupts_a_call_means_not_now(monkeypatch):
    near, far = memory_pair()

    class Interrupted:
        def recv_into(self, *_):
            raise InterruptedError

        def sendmsg(self, *_):
            raise InterruptedError

    real = near._sock
    monkeypatch.setattr(near, "_sock", Interrupted())
    assert near.recv_into(memoryview(bytearray(1))) is None
    assert near.send([memoryview(b"x")]) is None
    monkeypatch.setattr(near, "_sock", real)
    near.close()
    far.close()


def test_contract_holds_on_a_platform_without_sendmsg(monkeypatch):
    monkeypatch.setattr(sockets, "_HAS_SENDMSG", False)
    check_stream(memory_pair)


# --- pairs ---


def test_pair_is_connected_where_there_are_no_unix_sockets(monkeypatch):
    monkeypatch.delattr(socket, "AF_UNIX", raising=False)
    near, far = connected_pair()
    with near, far:
        near.send(b"x")
        assert far.recv(10) == b"x"
        assert near.getpeername() == far.getsockname()


def test_capacity_bounds_what_a_memory_pair_keeps():
    def taken(capacity):
        near, far = memory_pair(capacity=capacity)
        total = 0
        while (count := near.send([memoryview(bytes(1024))])) is not None:
            total += count
        near.close()
        far.close()
        return total

    assert 0 < taken(8192) < taken(65536)


# --- listeners ---


class Somewhere:
    """An address that needs nothing but its name."""

    def uri(self, export=""):
        return f"nbd+somewhere:///{export}"

    def __str__(self):
        return "somewhere"


@pytest.fixture
def listener():
    listener = SocketListener(socket.create_server(("127.0.0.1", 0)), Somewhere())
    yield listener
    listener.close()


def connect_to(listener: SocketListener) -> socket.socket:
    return socket.create_connection(listener._sock.getsockname())


def accept(listener: SocketListener):
    wait(listener.fileno(), Want.READ, Deadline.after(SOON), "late")
    return listener.accept()


def test_accepted_stream_names_listener_and_client(listener):
    with connect_to(listener) as client:
        stream = accept(listener)
        assert str(stream) == f"a client of somewhere (127.0.0.1 port {client.getsockname()[1]})"
        stream.close()


class Accepting:
    """Stands for the kernel: a listening socket whose accept fails in one of the ways of accept(2)."""

    def __init__(self, error):
        self.error = error

    def setblocking(self, _):
        return None

    def accept(self):
        raise self.error

    def close(self):
        return None


@pytest.mark.parametrize(
    "number", [errno.EAGAIN, errno.EINTR, errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN, errno.EHOSTUNREACH]
)
def test_connection_that_failed_before_it_was_taken_is_nobody(number):
    listener = SocketListener(Accepting(OSError(number, "so")), Somewhere())
    assert listener.accept() is None


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_lack_of_resources_is_told_to_who_accepts(number):
    listener = SocketListener(Accepting(OSError(number, "none left")), Somewhere())
    with pytest.raises(TransportError, match="cannot accept clients on somewhere: none left") as caught:
        listener.accept()
    assert caught.value.errno == number
    assert isinstance(caught.value.__cause__, OSError)


def test_what_a_signal_handler_raises_while_a_client_is_set_up_comes_out_as_it_is(listener, monkeypatch):
    class Alarm(TimeoutError):
        pass

    def handler(_number, _frame):
        raise Alarm

    monkeypatch.setattr(listener, "stream", lambda _sock, _name: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, handler)
    try:
        with leaks.none_left_open(), connect_to(listener), pytest.raises(Alarm):
            accept(listener)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("error", "raised"), [(OSError(errno.EINVAL, "gone"), None), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_client_that_cannot_be_set_up_is_closed(listener, monkeypatch, error, raised):
    def fail(sock, name):
        raise error

    monkeypatch.setattr(listener, "stream", fail)
    with connect_to(listener) as client:
        if raised:
            with pytest.raises(raised):
                accept(listener)
        else:
            assert accept(listener) is None
        client.settimeout(SOON)
        assert client.recv(1) == b""


def test_closed_listener_accepts_nobody(listener):
    listener.close()
    listener.close()
    assert listener.fileno() == -1
    with pytest.raises(TransportError):
        listener.accept()


# --- errors ---


def test_system_error_becomes_a_transport_error_with_its_errno():
    cause = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    with pytest.raises(TransportError, match="cannot reach it: Connection refused") as caught, transport_errors("reach it"):
        raise cause
    assert caught.value.errno == errno.ECONNREFUSED
    assert caught.value.__cause__ is cause


def test_hint_takes_the_place_of_the_systems_words():
    hints = {errno.EIO: "nobody home"}
    with pytest.raises(TransportError, match="cannot reach it: nobody home"), transport_errors("reach it", hints):
        raise OSError(errno.EIO, "I/O error")


def test_look_up_error_has_no_errno_of_another_kind():
    with pytest.raises(TransportError, match="no such name") as caught, transport_errors("reach it"):
        raise socket.gaierror(2, "no such name")
    assert caught.value.errno == 0


def test_error_of_ours_passes_unchanged():
    error = UsageError(errno.EINVAL, "wrong")
    with pytest.raises(UsageError) as caught, transport_errors("reach it"):
        raise error
    assert caught.value is error

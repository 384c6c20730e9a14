"""The scripted server itself: it plays its steps, and says what went wrong in them."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest

from nbdcore.protocol.constants import CommandType, Option
from nbdcore.streams.sockets import SocketStream
from nbdcore.testing.scripted import (
    ScriptedServer,
    ScriptFailed,
    answer,
    expect,
    expect_end,
    expect_option,
    goodbye,
    half_close,
    hang_up,
    receive,
    reset,
    serve,
    simple,
    wait_for,
)


def read_all(sock: socket.socket) -> bytes:
    received = b""
    while piece := sock.recv(4096):
        received += piece
    return received


def test_steps_are_played_in_order():
    seen = []
    script = [b"hello", expect(b"abc"), lambda c: seen.append(c.receive(2)), half_close, expect_end]
    with ScriptedServer(script) as server, server.socket() as sock:
        sock.sendall(b"abcde")
        assert read_all(sock) == b"hello"
    assert seen == [b"de"]


def test_each_connection_gets_a_script_of_its_own_on_tcp_and_unix(socket_path):
    with ScriptedServer([b"one"], [b"two"], [expect_end]) as server:
        port = server.listen_tcp()
        server.listen_unix(socket_path)
        with socket.create_connection(("127.0.0.1", port)) as sock:
            assert read_all(sock) == b"one"
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(socket_path))
            assert read_all(sock) == b"two"
        stream = server.stream()
        assert isinstance(stream, SocketStream)
        stream.close()
    socket_path.unlink()


def test_wait_for_goes_on_when_the_event_is_set():
    event = threading.Event()
    with ScriptedServer([wait_for(event), b"now"]) as server, server.socket() as sock:
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1)
        event.set()
        sock.setblocking(True)
        assert read_all(sock) == b"now"


def test_reset_breaks_a_tcp_connection_off():
    with ScriptedServer([receive(1), reset]) as server, socket.create_connection(("127.0.0.1", server.listen_tcp())) as sock:
        sock.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (expect(b"abc"), "expected"),
        (receive(4), "after 3 of 4"),
        (expect_end, "its end was expected"),
        (expect_option(Option.GO), "after 3 of 16"),
        (goodbye, "after 3 of 4"),
        (serve(simple()), "after 3 of 4"),
        (lambda _: 1 // 0, "ZeroDivisionError"),
        (wait_for(threading.Event(), patience=0.01), "did not happen"),
    ],
)
def test_what_goes_wrong_is_raised_at_the_end(step, said):
    with pytest.raises(ScriptFailed, match=f"step 2 of 3.*{said}"):  # noqa: PT012, SIM117 (it is raised by the context's end)
        with ScriptedServer([b"x", step, b"y"]) as server, server.socket() as sock:
            with contextlib.suppress(OSError):  # a server that fails hangs up when it will
                sock.sendall(b"xyz")
                sock.shutdown(socket.SHUT_WR)
                read_all(sock)


def test_a_client_that_says_nothing_fails_the_script_in_time():
    with pytest.raises(ScriptFailed, match=r"within 0\.01 s"):  # noqa: SIM117
        with ScriptedServer([receive(1)], patience=0.01) as server, server.socket() as sock:
            assert read_all(sock) == b""


def test_a_script_that_nobody_plays_is_a_failure():
    with pytest.raises(ScriptFailed, match="2 of 2 scripts: nobody connected"), ScriptedServer([], []) as server:
        server.listen_tcp()


def test_one_connection_too_many_is_refused():
    with ScriptedServer([]) as server, server.socket(), pytest.raises(ScriptFailed, match="one more"):
        server.socket()


def test_a_failure_of_the_test_itself_comes_first_and_at_once():
    with pytest.raises(KeyError) as caught:  # noqa: PT012, SIM117
        with ScriptedServer([receive(1)], patience=1000) as server:
            sock = server.socket()
            raise KeyError("the test's own")
    sock.close()
    assert "step 1 of 1" in caught.value.__notes__[0]


def test_a_wrong_request_fails_the_script():
    with pytest.raises(ScriptFailed, match="count=5"):  # noqa: PT012, SIM117
        with ScriptedServer([answer(simple(), kind=CommandType.READ, count=5)]) as server, server.socket() as sock:
            sock.sendall(bytes.fromhex("25609513 0000 0000 0000000000000001 0000000000000000 00000004"))
            assert read_all(sock) == b""


def test_the_end_of_a_script_hangs_up():
    with ScriptedServer([b"x", hang_up]) as server, server.socket() as sock:
        assert read_all(sock) == b"x"

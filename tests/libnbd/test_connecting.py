"""URIs and their allow-lists, commands, socket activation, and what `get_uri` says."""

from __future__ import annotations

import errno
import sys

import pytest

import nbdcore.libnbd as nbd

#: A server on standard input and output, and one that takes over a socket: the embedded one, as a program.
TALKER = """
import socket, sys
from nbdcore.server import MemoryDisk, Server
from nbdcore.streams.sockets import SocketStream
sys.stderr.write("on standard error")
sys.exit(int(sys.argv[1]))
"""


def refusal(call) -> nbd.Error:
    with pytest.raises(nbd.Error) as caught:
        call()
    return caught.value


def test_uri_leads_to_server_and_export(handles, server):
    handle = handles()
    handle.connect_uri(f"NBD://127.0.0.1:{server}/disk?unknown=ignored")
    assert handle.get_export_name() == "disk"
    assert handle.get_uri() == f"nbd://127.0.0.1:{server}/disk"
    assert nbd.NBD.is_uri(handle, "nbds+vsock://2") is True
    assert handle.is_uri("http://host") is False


@pytest.mark.parametrize(
    ("uri", "number"),
    [
        ("foo", errno.EINVAL),
        ("nbd+foo://host", errno.EINVAL),
        ("nbd://host?socket=/x", errno.EINVAL),
        ("nbd+unix:///", errno.EINVAL),
        ("nbd://host/a%00b", errno.EINVAL),
        ("nbd://host/a b", errno.EINVAL),
        ("nbd://-oProxyCommand=x/", errno.EINVAL),
        ("nbd://host?tls-hostnam=typo", errno.EINVAL),
        ("nbds://host?tls-verify-peer=maybe", errno.EINVAL),
        ("nbds://host?tls-verify-peer=false", errno.EPERM),
        ("nbds://host?tls-certificates=/etc", errno.EPERM),
        ("nbds://host?tls-psk-file=/etc/passwd", errno.EPERM),
        ("nbds://host?tls-priority=NORMAL", errno.EPERM),
    ],
)
def test_uri_that_is_wrong_or_wants_too_much_is_refused_and_changes_nothing(uri, number, handles):
    handle = handles()
    handle.set_export_name("mine")
    assert refusal(lambda: handle.connect_uri(uri)).errnum == number
    assert refusal(lambda: handle.aio_connect_uri(uri)).errnum == number
    assert handle.aio_is_created()
    assert (handle.get_tls(), handle.get_export_name()) == (nbd.TLS_DISABLE, "mine")


def test_uri_may_use_only_what_the_lists_allow(handles):
    handle = handles()
    handle.set_uri_allow_transports(nbd.ALLOW_TRANSPORT_UNIX)
    assert refusal(lambda: handle.connect_uri("nbd://127.0.0.1")).errno == "EPERM"
    handle.set_uri_allow_tls(nbd.TLS_DISABLE)
    assert refusal(lambda: handle.connect_uri("nbds+unix:///?socket=/nonexistent")).errno == "EPERM"
    handle.set_uri_allow_tls(nbd.TLS_REQUIRE)
    assert refusal(lambda: handle.connect_uri("nbd+unix:///?socket=/nonexistent")).errno == "EPERM"
    handle.set_uri_allow_tls(nbd.TLS_ALLOW)
    assert refusal(lambda: handle.connect_uri("nbd+unix:///?socket=/nonexistent")).errno == "ENOENT"


def test_plain_uri_never_lowers_what_the_program_asked_for(handles, server):
    handle = handles()
    handle.set_tls(nbd.TLS_REQUIRE)
    assert refusal(lambda: handle.connect_uri(f"nbd://127.0.0.1:{server}")).errno == "ENOTSUP"
    assert handle.aio_is_dead()


def test_host_of_a_failed_attempt_is_forgotten(handles, server):
    handle = handles()
    refusal(lambda: handle.connect_tcp("127.0.0.2", "1"))
    assert handle.get_tls_hostname() == ""
    handle.connect_tcp("127.0.0.1", server)
    assert handle.get_tls_hostname() == "127.0.0.1"


def test_command_that_fails_says_why_with_its_last_words(handles, capsys):
    handle = handles()
    error = refusal(lambda: handle.connect_command([sys.executable, "-c", TALKER, "3"]))
    assert error.errnum == 0
    assert "ended with status 3: on standard error" in error.string
    assert handle.aio_is_dead()
    pid = handle.get_subprocess_pid()
    assert pid > 0
    handle.kill_subprocess(0)
    assert refusal(handle.get_uri).errno == "EINVAL"


def test_command_that_is_not_there_kills_the_handle(handles):
    handle = handles()
    assert refusal(lambda: handle.connect_command(["/nonexistent"])).errno == "ENOENT"
    assert handle.aio_is_dead()


def test_handle_without_a_process_has_none_to_kill(handles):
    handle = handles()
    assert refusal(lambda: handle.kill_subprocess(0)).errno == "ESRCH"
    assert refusal(handle.get_subprocess_pid).errno == "ESRCH"


def test_keepalive_reaches_the_socket(handles, server):
    import socket

    handle = handles()
    handle.set_keepalive(True)
    handle.set_tcp_option(socket.TCP_KEEPIDLE, 77)
    handle.connect_tcp("127.0.0.1", server)
    with socket.socket(fileno=socket.dup(handle.aio_get_fd())) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 77
    assert (handle.get_keepalive(), handle.get_tcp_option(socket.TCP_KEEPIDLE)) == (True, 77)


def test_keepalive_is_the_sockets_own_once_connected_and_the_wish_before(handles, server):
    import socket

    handle = handles()
    assert handle.get_keepalive() is False
    assert refusal(lambda: handle.get_tcp_option(socket.TCP_KEEPCNT)).errno == "EINVAL"
    handle.set_tcp_option(socket.TCP_KEEPIDLE, 77)
    assert handle.get_tcp_option(socket.TCP_KEEPIDLE) == 77
    handle.connect_tcp("127.0.0.1", server)
    with socket.socket(fileno=socket.dup(handle.aio_get_fd())) as sock:
        assert handle.get_tcp_option(socket.TCP_KEEPCNT) == sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    assert handle.get_keepalive() is True
    handle.shutdown()
    assert handle.get_keepalive() is False
    assert handle.get_tcp_option(socket.TCP_KEEPIDLE) == 77


@pytest.mark.interop("nbdkit")
@pytest.mark.parametrize("connect", ["connect_command", "connect_systemd_socket_activation"])
def test_program_is_a_server_until_the_handle_is_closed(connect, handles):
    handle = handles()
    options = ["-s"] if connect == "connect_command" else []
    getattr(handle, connect)(["nbdkit", "--exit-with-parent", "--foreground", *options, "pattern", "1M"])
    assert handle.pread(16, 0) == bytes.fromhex("00000000000000000000000000000008")
    assert handle.get_subprocess_pid() > 0
    handle.close()


def test_connection_whose_socket_options_cannot_be_set_is_closed(handles):
    import socket

    handle = handles()
    handle.set_tcp_option(socket.TCP_KEEPCNT, 100_000)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        with pytest.raises(nbd.Error) as refused:
            handle.connect_tcp("127.0.0.1", str(server.getsockname()[1]))
        far, _ = server.accept()
        with far:
            far.settimeout(10)
            assert far.recv(1) == b""
        assert refused.value.errnum == errno.EINVAL

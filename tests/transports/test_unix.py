"""The unix transport: paths and abstract names, and whose socket file is whose."""

from __future__ import annotations

import errno
import os
import socket
import sys
from pathlib import Path

import pytest

import nbdcore_unix
from nbdcore.errors import TransportError, UsageError
from nbdcore.streams.base import Want
from nbdcore.streams.connecting import connect_socket
from nbdcore.streams.sockets import SocketStream
from nbdcore.streams.waiting import Deadline, drive, wait
from nbdcore.testing.streams import check_stream
from nbdcore.testing.transports import check_address, check_transport
from nbdcore.uri import parse_uri
from nbdcore_unix import UnixAddress

SOON = 30.0
(UNIX,) = nbdcore_unix.nbdcore_transports()
LINUX = sys.platform == "linux"
#: A name that no other run of these tests uses at the same time.
ABSTRACT = f"nbdcore-test-{os.getpid()}"


def connect(address):
    return drive(UNIX.connect(address), Deadline.after(SOON), "late")


def accept(listener):
    wait(listener.fileno(), Want.READ, Deadline.after(SOON), "late")
    return listener.accept()


@pytest.fixture
def address(socket_path):
    return UNIX.address(path=socket_path)


def leave_stale(path: Path) -> None:
    """Leave the file of a server that is gone, as one that was killed does."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


# --- contracts ---


def test_transport_keeps_its_contract_with_a_file(address):
    check_transport(UNIX, address)


def test_streams_keep_their_contract(address):
    listener = UNIX.listen(address)

    def make_pair():
        return connect(address), accept(listener)

    check_stream(make_pair)
    listener.close()


def test_streams_over_a_socketpair_keep_the_contract():
    def make_pair():
        near, far = socket.socketpair()
        return SocketStream(near), SocketStream(far)

    check_stream(make_pair)


def test_stream_of_a_socketpair_has_a_name_too():
    near, far = (SocketStream(sock) for sock in socket.socketpair())
    assert str(near) == "an unnamed unix socket"
    near.close()
    far.close()


# --- addresses ---


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("nbd+unix:///?socket=/run/nbd.sock", "/run/nbd.sock"),
        ("nbd+unix:///export?socket=nbd.sock", "nbd.sock"),
        ("nbds+unix:///?tls-hostname=h&socket=a%20b", "a b"),
        ("nbd+unix:///?socket=first&socket=last", "last"),
        ("nbd+unix://ignored:9/?socket=x", "x"),
        ("nbd+unix:///?socket=%FF%C3%BC", "\udcffü"),
    ],
)
def test_uri_names_a_path(text, path):
    assert UNIX.parse(parse_uri(text)) == UnixAddress(path)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("nbd+unix:///export", errno.EINVAL),
        ("nbd+unix:///?socket", errno.EINVAL),
        ("nbd+unix:///?socket=", errno.EINVAL),
        ("nbd+unix:///?socket=%00", errno.EINVAL),
        ("nbd+unix:///?socket=/" + "x" * 107, errno.ENAMETOOLONG),
    ],
)
def test_uri_without_a_usable_socket_is_refused(text, number):
    with pytest.raises(UsageError) as caught:
        UNIX.parse(parse_uri(text))
    assert caught.value.errno == number


@pytest.mark.parametrize("given", ["/run/x", b"/run/x", Path("/run/x")])
def test_path_may_be_text_bytes_or_a_path(given):
    assert UNIX.address(path=given) == UnixAddress("/run/x")


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"path": "/x", "abstract": "x"},
        {"path": ""},
        {"abstract": ""},
        {"path": "a\0b"},
        {"path": None},
        {"path": 3},
        {"port": 3},
        {"path": "/x", "port": 3},
    ],
)
def test_wrong_part_is_refused(parts):
    with pytest.raises(UsageError) as caught:
        UNIX.address(**parts)
    assert caught.value.errno == errno.EINVAL


def test_path_of_the_longest_length_works_and_one_more_byte_names_the_limit(short_folder):
    room = nbdcore_unix._SUN_PATH - 1 - len(os.fsencode(short_folder)) - 1
    path = short_folder / ("x" * room)
    check_transport(UNIX, UNIX.address(path=path))
    with pytest.raises(UsageError, match=f"{nbdcore_unix._SUN_PATH - 1} is the limit") as caught:
        UNIX.address(path=f"{path}y")
    assert caught.value.errno == errno.ENAMETOOLONG


def test_length_counts_bytes_not_characters():
    with pytest.raises(UsageError) as caught:
        UNIX.address(path="/" + "ü" * 54)
    assert caught.value.errno == errno.ENAMETOOLONG


def test_path_that_is_no_utf8_works(short_folder):
    address = UNIX.address(path=os.fsencode(short_folder) + b"/\xff\xfe")
    check_address(UNIX, address)
    assert str(address).isprintable()


def test_message_shows_control_characters_escaped():
    assert str(UNIX.address(path="/run/a\nb")) == "unix socket /run/a\\x0ab"


# --- the abstract namespace ---

if LINUX:

    def test_transport_keeps_its_contract_with_an_abstract_name():
        check_transport(UNIX, UNIX.address(abstract=ABSTRACT))

    def test_abstract_name_is_a_path_with_a_leading_nul():
        address = UNIX.address(abstract="name")
        assert address == UNIX.address(path="\0name") == UNIX.address(abstract=b"name")
        assert address == UNIX.parse(parse_uri("nbd+unix:///?socket=%00name"))
        assert address.abstract
        assert str(address) == "unix socket @name"

    def test_abstract_name_reaches_a_server_made_without_nbdcore():
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"\0{ABSTRACT}")
            server.listen()
            connect(UNIX.address(abstract=ABSTRACT)).close()

    def test_abstract_name_may_be_padded_with_nuls():
        name = ABSTRACT.encode().ljust(nbdcore_unix._SUN_PATH - 1, b"\0")
        address = UNIX.address(abstract=name)
        listener = UNIX.listen(address)
        connect(address).close()
        listener.close()
        with pytest.raises(UsageError) as caught:
            UNIX.address(abstract=name + b"\0")
        assert caught.value.errno == errno.ENAMETOOLONG

    def test_abstract_name_in_use_is_a_transport_error():
        address = UNIX.address(abstract=ABSTRACT)
        listener = UNIX.listen(address)
        with pytest.raises(TransportError) as caught:
            UNIX.listen(address)
        assert caught.value.errno == errno.EADDRINUSE
        listener.close()


def test_abstract_name_is_refused_elsewhere_than_on_linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UsageError, match="only Linux") as caught:
        UNIX.address(abstract="name")
    assert caught.value.errno == errno.ENOTSUP


# --- connecting ---


def test_missing_socket_asks_for_the_server(address):
    with pytest.raises(TransportError, match="is the server running") as caught:
        connect(address)
    assert caught.value.errno == errno.ENOENT
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_stale_socket_says_that_no_server_listens(address, socket_path):
    leave_stale(socket_path)
    with pytest.raises(TransportError, match="no server listens") as caught:
        connect(address)
    assert caught.value.errno == errno.ECONNREFUSED


def test_full_backlog_is_waited_for(socket_path):
    name = str(socket_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen(0)
        waiting = socket.socket(socket.AF_UNIX)
        waiting.connect(name)
        connecting = UNIX.connect(UNIX.address(path=name))
        _, want = next(connecting)
        assert want == Want.READ
        first, _ = server.accept()
        stream = drive(connecting, Deadline.after(SOON), "late")
        second, _ = server.accept()
        for each in (stream, waiting, first, second):
            each.close()


def test_connect_given_up_before_a_full_backlog_closes_the_socket(socket_path):
    name = str(socket_path)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as waiting:
        server.bind(name)
        server.listen(0)
        waiting.connect(name)
        sock = socket.socket(socket.AF_UNIX)
        with pytest.raises(TimeoutError, match="late"):
            drive(connect_socket(sock, name, "the server"), Deadline.after(0.05), "late")
        assert sock.fileno() == -1


# --- whose file it is ---


def test_file_exists_while_it_is_listened_on_and_no_longer(address, socket_path):
    listener = UNIX.listen(address)
    assert socket_path.is_socket()
    listener.close()
    assert not socket_path.exists()


def test_stale_file_is_replaced(address, socket_path):
    leave_stale(socket_path)
    listener = UNIX.listen(address)
    connect(address).close()
    listener.close()
    assert not socket_path.exists()


@pytest.mark.parametrize("backlog", ["with room", "full"])
def test_live_server_keeps_its_file(address, socket_path, backlog):
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as waiting:
        server.bind(str(socket_path))
        server.listen(0 if backlog == "full" else 10)
        waiting.connect(str(socket_path))
        with pytest.raises(TransportError, match="another server does") as caught:
            UNIX.listen(address)
        assert caught.value.errno == errno.EADDRINUSE
        assert socket_path.is_socket()


def test_file_that_is_no_socket_is_kept(address, socket_path):
    socket_path.write_text("precious")
    with pytest.raises(TransportError, match="no socket is there") as caught:
        UNIX.listen(address)
    assert caught.value.errno == errno.EADDRINUSE
    assert socket_path.read_text() == "precious"


def test_link_to_a_stale_socket_is_kept(address, socket_path, short_folder):
    leave_stale(short_folder / "other")
    socket_path.symlink_to("other")
    with pytest.raises(TransportError):
        UNIX.listen(address)
    assert socket_path.is_symlink()


def test_file_that_another_server_has_put_in_place_is_left_alone(address, socket_path):
    first = UNIX.listen(address)
    socket_path.unlink()
    second = UNIX.listen(address)
    first.close()
    connect(address).close()
    second.close()
    assert not socket_path.exists()


def test_file_that_is_gone_already_harms_nothing(address, socket_path):
    listener = UNIX.listen(address)
    socket_path.unlink()
    listener.close()
    listener.close()


def test_relative_path_is_removed_where_it_was_made(short_folder, monkeypatch):
    monkeypatch.chdir(short_folder)
    listener = UNIX.listen(UNIX.address(path="socket"))
    monkeypatch.chdir("/")
    listener.close()
    assert not (short_folder / "socket").exists()


def test_folder_that_does_not_exist_is_a_transport_error(short_folder):
    with pytest.raises(TransportError, match=r"there is no folder .*; make it") as caught:
        UNIX.listen(UNIX.address(path=short_folder / "none" / "socket"))
    assert caught.value.errno == errno.ENOENT

"""The vsock transport, as far as a machine without a vsock device goes; tests/vm has the rest.

Nothing here connects to CID 2: that may be the real host of the machine that runs the tests.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct

import pytest

import nbdcore_vsock
from nbdcore.errors import TransportError, UsageError
from nbdcore.streams.base import Want
from nbdcore.streams.waiting import Deadline, drive
from nbdcore.testing.transports import check_address
from nbdcore.uri import parse_uri
from nbdcore_vsock import VMADDR_CID_ANY, VMADDR_CID_LOCAL, VMADDR_PORT_ANY, VsockAddress

SOON = 30.0
(VSOCK,) = nbdcore_vsock.nbdcore_transports()
LARGEST = 2**32 - 1


def connect_here(timeout=SOON):
    """Connect to this machine itself, where nobody listens."""
    address = VSOCK.address(cid=VMADDR_CID_LOCAL, port=LARGEST - 1)
    return drive(VSOCK.connect(address, timeout=timeout), Deadline.after(SOON), "late")


# --- addresses ---


@pytest.mark.parametrize(
    ("text", "cid", "port"),
    [
        ("nbd+vsock://", 2, 10809),
        ("nbd+vsock:///export", 2, 10809),
        ("nbd+vsock://2", 2, 10809),
        ("nbd+vsock://3:1024/export", 3, 1024),
        ("nbd+vsock://:7", 2, 7),
        ("nbds+vsock://1:10809", 1, 10809),
        ("nbd+vsock://4294967295:4294967295/", LARGEST, LARGEST),
        ("nbd+vsock://3:1073741824/", 3, 1 << 30),
        ("nbd+vsock://003:00080", 3, 80),
        ("nbd+vsock://0:0", 0, 0),
    ],
)
def test_uri_names_an_address(text, cid, port):
    assert VSOCK.parse(parse_uri(text)) == VsockAddress(cid, port)


@pytest.mark.parametrize(
    "text",
    [
        "nbd+vsock://4294967296",
        "nbd+vsock://" + "9" * 5000,
        "nbd+vsock://3:4294967296",
        "nbd+vsock://host",
        "nbd+vsock://local:1",
        "nbd+vsock://0x3",
        "nbd+vsock://3.0",
        "nbd+vsock://+3",
        "nbd+vsock://%D9%A3",  # an Arabic-Indic digit three
        "nbd+vsock://[::1]",
    ],
)
def test_uri_that_fits_no_address_is_refused(text):
    with pytest.raises(UsageError) as caught:
        VSOCK.parse(parse_uri(text))
    assert caught.value.errno == errno.EINVAL


def test_parts_have_defaults():
    assert VSOCK.address() == VsockAddress(2, 10809)
    assert VSOCK.listening_address() == VsockAddress(VMADDR_CID_ANY, 10809)
    assert VSOCK.listening_address(cid=1, port=7) == VsockAddress(1, 7)


@pytest.mark.parametrize(
    "parts",
    [
        {"cid": -1},
        {"cid": 2**32},
        {"cid": "3"},
        {"cid": None},
        {"cid": 3.0},
        {"port": -1},
        {"port": 2**32},
        {"port": None},
        {"host": "x"},
        {"cid": 3, "path": "/x"},
    ],
)
def test_wrong_part_is_refused(parts):
    with pytest.raises(UsageError) as caught:
        VSOCK.address(**parts)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("address", [VsockAddress(), VsockAddress(LARGEST, LARGEST), VsockAddress(0, 0)])
def test_addresses_keep_their_contract(address):
    check_address(VSOCK, address)


@pytest.mark.parametrize("address", [VsockAddress(VMADDR_CID_ANY, 10809), VsockAddress(VMADDR_CID_LOCAL, VMADDR_PORT_ANY)])
def test_wildcard_cannot_be_connected_to(address):
    with pytest.raises(UsageError, match="not connected to"):
        next(VSOCK.connect(address))


# --- errors ---


def test_kernel_that_gives_up_is_explained_and_its_errno_kept():
    # With a vsock_loopback the port is refused (ECONNRESET); without one the peer does not answer; without any vsock transport
    # there is no way (ENODEV), without the module no socket (EAFNOSUPPORT).
    with pytest.raises(TransportError, match="cannot connect to vsock CID 1, port 4294967294: ") as caught:
        connect_here(timeout=0)
    assert caught.value.errno in nbdcore_vsock._CONNECT_HINTS
    assert caught.value.message.endswith(nbdcore_vsock._CONNECT_HINTS[caught.value.errno])
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == caught.value.errno


class Kernel(socket.socket):
    """Stands for the kernel: a socket that answers a connect with the error under test. No connection is made."""

    answer = 0

    def __init__(self, _, kind, protocol=0, fileno=None):
        super().__init__(socket.AF_INET, kind, protocol, fileno)

    def connect_ex(self, _):
        return self.answer


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ECONNRESET, "nothing listens on that port"),
        (errno.ENODEV, "no vsock device"),
        (errno.ETIMEDOUT, "that machine is not up"),
        (errno.ENETUNREACH, "unreachable"),
    ],
)
def test_each_answer_of_the_kernel_has_its_words(monkeypatch, number, words):
    monkeypatch.setattr(socket, "socket", Kernel)
    monkeypatch.setattr(Kernel, "answer", number)
    with pytest.raises(TransportError, match=words) as caught:
        connect_here()
    assert caught.value.errno == number


def test_kernel_without_vsock_is_explained(monkeypatch):
    def refuse(*_):
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", refuse)
    for call in (connect_here, lambda: VSOCK.listen(VSOCK.listening_address())):
        with pytest.raises(TransportError, match="module vsock is not loaded") as caught:
            call()
        assert caught.value.errno == errno.EAFNOSUPPORT


def test_connect_given_up_closes_the_socket(monkeypatch):
    made = []

    class Remembered(socket.socket):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            made.append(self)

    monkeypatch.setattr(socket, "socket", Remembered)
    connecting = VSOCK.connect(VSOCK.address(cid=VMADDR_CID_LOCAL, port=LARGEST - 1))
    # A kernel without any vsock transport refuses at once.
    with contextlib.suppress(TransportError):
        assert next(connecting) == (made[0].fileno(), Want.WRITE)
    connecting.close()
    assert {sock.fileno() for sock in made} <= {-1}


# --- listening ---


def test_privileged_port_needs_privileges(monkeypatch):
    class Unprivileged(Kernel):
        def bind(self, _):
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "socket", Unprivileged)
    with pytest.raises(TransportError, match="ports below 1024 need privileges") as caught:
        VSOCK.listen(VSOCK.listening_address(port=80))
    assert caught.value.errno == errno.EACCES


def has_vsock() -> bool:
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError:
        return False
    return True


def limit_of(sock: socket.socket) -> float:
    other = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=sock.fileno())
    seconds, microseconds = struct.unpack("@ll", other.getsockopt(socket.AF_VSOCK, 6, struct.calcsize("@ll")))
    other.detach()
    return seconds + microseconds / 1e6


if has_vsock():

    @pytest.mark.parametrize(
        ("timeout", "limit"),
        [(None, 10.0), (0, 1.0), (0.25, 1.25), (30, 31.0), (1e9, 86400.0), (float("inf"), 86400.0)],
    )
    def test_timeout_of_the_caller_reaches_the_kernel(monkeypatch, timeout, limit):
        limits = []

        class Watched(socket.socket):
            def connect_ex(self, _):
                limits.append(limit_of(self))
                return errno.ENODEV

        monkeypatch.setattr(socket, "socket", Watched)
        with pytest.raises(TransportError):
            connect_here(timeout)
        # The kernel rounds up to its own clock's tick.
        assert limits == [pytest.approx(limit, abs=0.02)]

    @pytest.mark.parametrize("port", [0, VMADDR_PORT_ANY])
    def test_kernel_chooses_a_port(port):
        listener = VSOCK.listen(VSOCK.listening_address(port=port))
        assert listener.address.cid == VMADDR_CID_ANY
        assert 1024 <= listener.address.port < VMADDR_PORT_ANY
        assert str(listener.address) == f"vsock CID any, port {listener.address.port}"
        assert listener.accept() is None
        listener.close()

    def test_port_in_use_is_a_transport_error():
        listener = VSOCK.listen(VSOCK.listening_address(port=0))
        with pytest.raises(TransportError, match="another server listens on that port") as caught:
            VSOCK.listen(listener.address)
        assert caught.value.errno == errno.EADDRINUSE
        listener.close()

    def test_cid_of_another_machine_cannot_be_listened_on():
        with pytest.raises(TransportError, match="not this machine's own") as caught:
            VSOCK.listen(VSOCK.address(cid=LARGEST - 1))
        assert caught.value.errno == errno.EADDRNOTAVAIL

"""Wrong arguments, as a new user or a bug passes them: a UsageError that says what is wrong, and nothing is sent."""

from __future__ import annotations

import array
import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import pytest

import nbdcore
from nbdcore import TLS, Client, Phase, TLSPolicy, UsageError
from nbdcore.protocol.constants import CommandType
from nbdcore.streams.sockets import connected_pair
from nbdcore.testing.scripted import EVERYTHING, Request, answer, data, goodbye, serve
from tests.clients.talking import DISK, DONE, PATIENCE, talk


class Index:
    """An integer of another library."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


WRONG_NUMBERS = [None, 1.0, "1", b"1", [1], (), True, False, object(), 1j, float("nan")]
BY_RANGE: dict[str, Callable[[Client, Any, Any], Any]] = {
    "pread": lambda c, count, offset: c.pread(count, offset),
    "trim": lambda c, count, offset: c.trim(count, offset),
    "zero": lambda c, count, offset: c.zero(count, offset),
    "cache": lambda c, count, offset: c.cache(count, offset),
    "block_status": lambda c, count, offset: c.block_status(count, offset),
}
BY_OFFSET: dict[str, Callable[[Client, Any], Any]] = {
    "pread_into": lambda c, offset: c.pread_into(bytearray(8), offset),
    "pwrite": lambda c, offset: c.pwrite(b"12345678", offset),
}


@pytest.mark.parametrize("wrong", WRONG_NUMBERS, ids=lambda value: type(value).__name__)
def test_what_is_no_integer_is_refused_as_count_and_as_offset(wrong):
    with talk(goodbye) as (client, _):
        for name, make in BY_RANGE.items():
            with pytest.raises(UsageError, match=f"^{name}: count is an integer"):
                make(client, wrong, 0)
            with pytest.raises(UsageError, match=f"^{name}: offset is an integer"):
                make(client, 8, wrong)
        for name, make in BY_OFFSET.items():
            with pytest.raises(UsageError, match=f"^{name}: offset is an integer"):
                make(client, wrong)
        client.disconnect(timeout=PATIENCE)


@pytest.mark.parametrize(
    ("count", "offset", "said"),
    [
        (-1, 0, "from 0 on"),
        (8, -1, "from 0 on"),
        (DISK + 1, 0, "past the end"),
        (8, DISK - 7, "past the end"),
        (8, DISK, "past the end"),
        (1, 1 << 64, "from 0 on"),
        (1 << 64, 0, "past the end"),
        (1 << 200, 1 << 200, "from 0 on"),
        (-(1 << 200), 0, "from 0 on"),
    ],
)
def test_a_wrong_range_is_refused(count, offset, said):
    with talk(goodbye) as (client, _):
        for name, make in BY_RANGE.items():
            if name == "block_status" and count > DISK:
                continue  # cut down to one request, as its documentation says: the next case of the table has it
            with pytest.raises(UsageError, match=said):
                make(client, count, offset)
        client.disconnect(timeout=PATIENCE)


def test_integers_of_other_libraries_are_integers():
    with talk(answer(data(b"12345678"), kind=CommandType.READ, count=8, offset=16), answer(DONE, offset=3), goodbye) as (
        client,
        _,
    ):
        assert client.pread(Index(8), Index(16), timeout=PATIENCE) == b"12345678"
        client.pwrite(b"x", Index(3), timeout=PATIENCE)
        client.disconnect(timeout=PATIENCE)


# ---------------------------------------------------------------------------------------------- buffers


@pytest.mark.parametrize(
    ("buffer", "said"),
    [
        (None, "a bytes-like object is needed, not NoneType"),
        ("text", "a bytes-like object is needed, not str; encode it first"),
        (8, "a bytes-like object is needed, not int"),
        ([1, 2], "a bytes-like object is needed, not list"),
        (memoryview(bytearray(16))[::2], "the buffer must be contiguous"),
        (memoryview(bytearray(16))[::-1], "the buffer must be contiguous"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_buffer_cannot_be_written(buffer, said):
    with talk(goodbye) as (client, _):
        with pytest.raises(UsageError, match=said):
            client.pwrite(buffer, 0)
        client.disconnect(timeout=PATIENCE)


@pytest.mark.parametrize(
    ("buffer", "said"),
    [
        (None, "a bytes-like object is needed, not NoneType"),
        (8, "a bytes-like object is needed, not int"),
        ("text", "not str"),
        (bytes(8), "the buffer must be writable, and this bytes is not"),
        (memoryview(bytes(8)), "the buffer must be writable"),
        (memoryview(bytearray(16))[::2], "the buffer must be contiguous"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_buffer_cannot_be_read_into(buffer, said):
    with talk(goodbye) as (client, _):
        with pytest.raises(UsageError, match=said):
            client.pread_into(buffer, 0)
        client.disconnect(timeout=PATIENCE)


@pytest.mark.parametrize(
    "make",
    [
        lambda: bytearray(16),
        lambda: memoryview(bytearray(32))[8:24],
        lambda: array.array("i", [0] * 4),
        lambda: array.array("d", [0] * 2),
        lambda: ctypes.create_string_buffer(16),
        ctypes.c_ubyte * 16,
        ctypes.c_uint32.__ctype_be__ * 4,
        lambda: mmap.mmap(-1, 16),
        lambda: memoryview(bytearray(16)).cast("B", (4, 4)),
    ],
    ids=["bytearray", "slice", "ints", "doubles", "ctypes chars", "ctypes bytes", "ctypes big-endian", "mmap", "two dimensions"],
)
def test_any_contiguous_memory_can_be_read_into_and_written(make):
    disk = bytearray(b"0123456789abcdef")

    def reply(request: Request) -> bytes:
        if request.kind == CommandType.WRITE:
            disk[:] = request.payload
            return DONE(request)
        return data(bytes(disk))(request)

    with talk(serve(reply)) as (client, _):
        buffer = make()
        assert client.pread_into(buffer, 0, timeout=PATIENCE) == 16
        assert bytes(memoryview(buffer).tobytes()) == b"0123456789abcdef"
        disk[:] = bytes(16)
        client.pwrite(buffer, 0, timeout=PATIENCE)
        assert disk == b"0123456789abcdef"
        client.close()


def test_memory_is_let_go_of_when_the_call_has_ended():
    with talk(serve(lambda r: (DONE if r.kind else data(bytes(8)))(r))) as (client, _):
        buffer = bytearray(8)
        client.pread_into(buffer, 0, timeout=PATIENCE)
        buffer.append(0)
        client.pwrite(buffer, 0, timeout=PATIENCE)
        buffer.append(0)
        with pytest.raises(UsageError):
            client.pwrite(buffer, DISK)
        buffer.append(0)


# ---------------------------------------------------------------------------------------------- options and addresses


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"export": None}, "an export's name is a string, not NoneType"),
        ({"export": b"disk"}, "an export's name is a string, not bytes"),
        ({"export": 5}, "an export's name is a string, not int"),
        ({"export": "a\0b"}, "NUL"),
        ({"export": "x" * 5000}, "4096"),
        ({"contexts": "base:allocation"}, "contexts are a list of strings, not str"),
        ({"contexts": None}, "contexts are a list of strings, not NoneType"),
        ({"contexts": [b"base:allocation"]}, "each of the contexts is a string, not bytes"),
        ({"contexts": 5}, "contexts are a list of strings, not int"),
        ({"contexts": ["a\0b"]}, "NUL"),
        ({"exports": "disk"}, "unknown option exports"),
        ({"handshake_flags": 0}, "unknown option handshake_flags"),
        ({"start_tls": "yes"}, "start_tls is a function"),
        ({"tls": "require"}, "tls says how to do TLS: a TLS value, True, False or None, not 'require'"),
        ({"tls": TLSPolicy.REQUIRE}, "tls says how to do TLS"),
        ({"tls_policy": True}, r"tls_policy is one of TLSPolicy\.DISABLE"),
        ({"tls_policy": "require"}, r"tls_policy is one of TLSPolicy\.DISABLE"),
        ({"tls": TLS(), "start_tls": id}, "tls and start_tls both say how to encrypt"),
        ({"tls": False, "start_tls": id}, "tls=False forbids TLS"),
        ({"tls": False, "tls_policy": TLSPolicy.ALLOW}, "tls=False forbids TLS"),
        ({"allow_transports": "tcp"}, "allow_transports are a list of strings, not str"),
    ],
)
def test_a_wrong_option_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        Client(**options)


@pytest.mark.parametrize("uri", [None, 5, b"nbd://host", "", "host", "http://host", "nbd://host:99999", "nbd+nonsense://host"])
def test_a_wrong_uri_is_refused(uri):
    for call in (lambda: nbdcore.connect(uri, timeout=1), lambda: nbdcore.list_exports(uri, timeout=1)):
        with pytest.raises((UsageError, nbdcore.TransportUnavailable)):
            call()


@pytest.mark.parametrize(
    "make",
    [
        lambda c: c.connect_tcp(5),
        lambda c: c.connect_tcp("localhost", "10809"),
        lambda c: c.connect_tcp("localhost", 70000),
        lambda c: c.connect_tcp("localhost", 10.5),
        lambda c: c.connect_tcp(None),
        lambda c: c.connect_unix(None),
        lambda c: c.connect_unix(5),
        lambda c: c.connect_unix(""),
        lambda c: c.connect_vsock("two"),
        lambda c: c.connect_vsock(-1),
        lambda c: c.connect_vsock(2, 1 << 40),
        lambda c: c.connect_transport("tcp", nonsense=1),
        lambda c: c.connect_transport("carrier-pigeon"),
        lambda c: c.connect_transport(None),
    ],
)
def test_a_wrong_address_is_refused_and_leaves_the_client_newly_created(make):
    client = Client()
    with pytest.raises((UsageError, nbdcore.TransportUnavailable)):
        make(client)
    assert client.phase is Phase.CREATED
    client.close()


def test_a_socket_is_no_stream_and_the_message_says_what_makes_one():
    near, far = connected_pair()
    with near, far, pytest.raises(UsageError, match=r"a Stream is needed, not socket: connect_socket takes one"):
        Client(near)
    with pytest.raises(UsageError, match="a Stream is needed, not str"):
        Client("nbd://localhost")


# ---------------------------------------------------------------------------------------------- what the export cannot do


@pytest.mark.parametrize(
    ("flag", "make"),
    [
        (1 << 2, lambda c: c.flush()),
        (1 << 3, lambda c: c.pwrite(b"x", 0, fua=True)),
        (1 << 5, lambda c: c.trim(8, 0)),
        (1 << 6, lambda c: c.zero(8, 0)),
        (1 << 7, lambda c: c.pread(8, 0, df=True)),
        (1 << 10, lambda c: c.cache(8, 0)),
        (1 << 11, lambda c: c.zero(8, 0, fast_zero=True)),
    ],
    ids=["flush", "fua", "trim", "zero", "df", "cache", "fast zero"],
)
def test_what_the_export_does_not_offer_is_not_sent(flag, make):
    with talk(goodbye, flags=int(EVERYTHING) & ~flag) as (client, _):
        with pytest.raises(UsageError, match="the server does not offer"):
            make(client)
        client.disconnect(timeout=PATIENCE)

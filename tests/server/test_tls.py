"""TLS, as a client of raw bytes sees it: Python's own `ssl` over what it says, right or wrong."""

from __future__ import annotations

import contextlib
import errno
import logging
import random
import select
import socket
import ssl
import time
import tracemalloc

import pytest

from nbdcore.errors import UsageError
from nbdcore.protocol import wire
from nbdcore.protocol.constants import CommandType, ErrorNumber, Info, Option, OptionReply, TransmissionFlag
from nbdcore.server import ExportSettings, MemoryDisk, Server, ServerTLS
from nbdcore.streams.sockets import SocketStream, connected_pair
from nbdcore.streams.tls.credentials import supports_tls_psk
from nbdcore.testing.choppy import ChoppyStream
from tests.certificates import PSK_KEY, PSK_LINE, PSK_USER, CertificateAuthority
from tests.server.conftest import connect, server_threads
from tests.server.raw import PATIENCE, RawClient

ACK = (OptionReply.ACK, b"")
MEBIBYTE = 1 << 20
VERSIONS = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}


@pytest.fixture(params=VERSIONS)
def versioned(request, context):
    """A client's context for one version only."""
    context.minimum_version = context.maximum_version = VERSIONS[request.param]
    return context


@pytest.fixture
def forced(serve, tls):
    """A server that does nothing without TLS."""
    return serve({"disk": MemoryDisk(MEBIBYTE)}, tls=tls, handshake_timeout=PATIENCE)


@pytest.fixture
def selective(serve, tls):
    """A server that needs TLS for one export of two."""
    exports = {"open": MemoryDisk(MEBIBYTE), "secret": ExportSettings(MemoryDisk(2 * MEBIBYTE), require_tls=True)}
    return serve(exports, tls=tls, require_tls=False)


def greeted(server: Server) -> RawClient:
    client = connect(server)
    client.greet()
    return client


def refused(replies: list[tuple[int, bytes]]) -> int:
    """Return the error that is the only reply, which must have a text."""
    ((kind, text),) = replies
    assert text.decode()
    return kind


def is_served(server: Server, context: ssl.SSLContext) -> None:
    """An honest client has what it wants."""
    with contextlib.closing(greeted(server)) as client:
        client.start_tls(context)
        client.agree()
        client.go()
        assert client.write(100, b"hello").error == 0
        assert client.read(99, 7).contents() == b"\0hello\0"


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def go(name: str) -> bytes:
    return wire.pack_info_request(name, [])


# ---------------------------------------------------------------------------------------------- TLS, required


def test_client_with_tls_is_served_and_told_goodbye(forced, versioned, client_of, caplog):
    client = client_of(forced)
    client.greet()
    client.start_tls(versioned)
    assert VERSIONS[client.sock.version()] is versioned.maximum_version
    client.agree(extended=True, name="disk")
    client.go("disk")
    assert client.write(100, b"hello").error == 0
    assert client.read(99, 7).contents() == b"\0hello\0"
    assert client.ask(CommandType.BLOCK_STATUS, 0, MEBIBYTE).error == 0
    client.send(client.pack(CommandType.DISC))
    assert client.hung_up()  # which an end without goodbye is not
    client.sock.unwrap()
    assert warnings(caplog) == []


def test_client_that_does_not_answer_the_goodbye_is_left(forced, context, client_of):
    client = client_of(forced)
    client.greet()
    client.start_tls(context)
    client.go()
    client.send(client.pack(CommandType.DISC))
    assert client.hung_up()
    assert wait_for(lambda: not forced._clients)


def test_bytes_behind_the_clients_goodbye_do_not_cost_it_the_servers(forced, context, client_of):
    # A connection that is closed while there are bytes to be received is reset.
    client = client_of(forced)
    client.greet()
    client.start_tls(context)
    client.go()
    client.send(client.pack(CommandType.DISC) + bytes(MEBIBYTE))
    assert client.hung_up()
    client.sock = client.sock.unwrap()
    assert client.sock.recv(1) == b""


def wait_for(condition) -> bool:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)
    return True


@pytest.mark.parametrize("option", [0, *(int(option) for option in Option if option not in (1, 2, 5)), 12, 99, 0xFFFFFFFF])
@pytest.mark.parametrize("size", [0, 70000])
def test_every_other_option_needs_tls(forced, context, client_of, option, size):
    client = client_of(forced)
    client.greet()
    assert refused(client.option(option, bytes(size))) == OptionReply.ERR_TLS_REQD
    client.start_tls(context)
    client.go("disk")


def test_option_of_an_export_that_is_there_needs_tls_like_any_other(forced, client_of):
    client = client_of(forced)
    client.greet()
    for name in ("", "disk", "missing"):
        for option in (Option.INFO, Option.GO):
            ((kind, text),) = client.option(option, go(name))
            assert (kind, b"disk" in text) == (OptionReply.ERR_TLS_REQD, False)


def test_option_that_needs_tls_and_is_far_too_big_ends_the_connection(forced, client_of):
    client = client_of(forced)
    client.greet()
    client.send(wire.OPTION_REQUEST.pack(0x49484156454F5054, Option.GO, 0xFFFFFFFF))
    assert client.hung_up()


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
@pytest.mark.parametrize("name", [b"", b"disk", b"missing"])
def test_export_name_without_tls_ends_the_connection(forced, client_of, flags, name):
    client = client_of(forced)
    client.greet(flags)
    client.send(wire.pack_option(Option.EXPORT_NAME, name))
    assert client.hung_up()


def test_client_of_the_old_kind_cannot_start_tls(forced, client_of):
    client = client_of(forced)
    client.greet(2)
    client.send(wire.pack_option(Option.STARTTLS))
    assert client.hung_up()


def test_client_may_leave_without_tls(forced, client_of):
    client = client_of(forced)
    client.greet()
    assert client.option(Option.ABORT) == [ACK]
    assert client.hung_up()


def test_client_may_leave_within_tls_and_is_told_goodbye(forced, client_of, context):
    client = client_of(forced)
    client.greet()
    client.start_tls(context)
    assert client.option(Option.ABORT) == [ACK]
    assert client.hung_up()


def test_export_name_within_tls_enters_transmission(forced, client_of, context):
    client = client_of(forced)
    client.greet()
    client.start_tls(context)
    client.send(wire.pack_option(Option.EXPORT_NAME, b"disk"))
    assert client.unpack(wire.EXPORT_NAME_REPLY)[0] == MEBIBYTE
    assert client.read(0, 10).contents() == bytes(10)


def test_nothing_needs_tls_any_more_once_it_is_started(forced, client_of, context):
    client = client_of(forced)
    client.greet()
    client.start_tls(context)
    assert client.option(Option.LIST) == [(OptionReply.SERVER, wire.pack_counted_string("disk")), ACK]
    assert refused(client.option(Option.INFO, go("missing"))) == OptionReply.ERR_UNKNOWN
    assert refused(client.option(99)) == OptionReply.ERR_UNSUP


def test_starting_tls_twice_is_invalid(forced, client_of, context):
    client = client_of(forced)
    client.greet()
    client.start_tls(context)
    assert refused(client.option(Option.STARTTLS)) == OptionReply.ERR_INVALID
    client.go()


def test_request_for_tls_with_data_is_invalid_and_another_may_follow(forced, client_of, context):
    client = client_of(forced)
    client.greet()
    assert refused(client.option(Option.STARTTLS, b"?")) == OptionReply.ERR_INVALID
    assert refused(client.option(Option.LIST)) == OptionReply.ERR_TLS_REQD
    client.start_tls(context)
    client.go()


# ---------------------------------------------------------------------------------------------- TLS, for those who want it


def test_client_may_do_without_where_tls_is_not_required(serve, tls, client_of, context):
    server = serve(MemoryDisk(MEBIBYTE), tls=tls, require_tls=False)
    is_served(server, context)
    client = client_of(server)
    client.greet()
    assert refused(client.option(Option.GO, go("missing"))) == OptionReply.ERR_UNKNOWN
    client.agree()
    client.go()
    assert client.read(100, 5).contents() == b"hello"


def test_list_without_tls_leaves_out_what_requires_it(selective, client_of, context):
    client = client_of(selective)
    client.greet()
    shown = [(OptionReply.SERVER, wire.pack_counted_string(name)) for name in ("open", "secret")]
    assert client.option(Option.LIST) == [shown[0], ACK]
    client.start_tls(context)
    assert client.option(Option.LIST) == [*shown, ACK]


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_export_that_requires_tls_and_one_that_is_not_there_look_alike(selective, client_of, option):
    client = client_of(selective)
    client.greet()
    told = [client.option(option, go(name)) for name in ("secret", "missin")]
    assert refused(told[0]) == OptionReply.ERR_TLS_REQD
    assert told[0][0][1].replace(b"secret", b"missin") == told[1][0][1]
    assert [told[0][0][0]] == [told[1][0][0]]
    assert refused(client.option(option, go(""))) == OptionReply.ERR_TLS_REQD
    client.go("open")
    assert client.size == MEBIBYTE


@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_contexts_of_an_export_that_requires_tls_are_unknown(selective, client_of, option):
    client = client_of(selective)
    client.greet()
    client.agree(allocation=False)
    told = [client.option(option, wire.pack_meta_context_request(name, [])) for name in ("secret", "missin")]
    assert refused(told[0]) == refused(told[1]) == OptionReply.ERR_UNKNOWN
    assert told[0][0][1].replace(b"secret", b"missin") == told[1][0][1]


@pytest.mark.parametrize("name", [b"secret", b"", b"missing"])
def test_export_name_of_an_export_that_requires_tls_ends_the_connection(selective, client_of, name):
    client = client_of(selective)
    client.greet()
    client.send(wire.pack_option(Option.EXPORT_NAME, name))
    assert client.hung_up()


def test_export_that_requires_tls_is_there_for_clients_with_tls(selective, client_of, context):
    for name, size in (("secret", 2 * MEBIBYTE), ("open", MEBIBYTE)):
        client = client_of(selective)
        client.greet()
        client.start_tls(context)
        assert refused(client.option(Option.GO, go("missing"))) == OptionReply.ERR_UNKNOWN
        client.go(name)
        assert client.size == size


def test_only_export_is_not_found_without_its_name_where_it_requires_tls(serve, tls, client_of, context):
    server = serve({"disk": ExportSettings(MemoryDisk(MEBIBYTE), require_tls=True)}, tls=tls, require_tls=False)
    client = client_of(server)
    client.greet()
    assert client.option(Option.LIST) == [ACK]
    assert refused(client.option(Option.GO, go(""))) == OptionReply.ERR_TLS_REQD
    client.start_tls(context)
    client.go("")
    assert client.size == MEBIBYTE


# ---------------------------------------------------------------------------------------------- what was said in the clear


def test_nothing_agreed_on_in_the_clear_survives(serve, tls, client_of, context):
    client = client_of(serve(MemoryDisk(MEBIBYTE), tls=tls, require_tls=False))
    client.greet()
    client.agree(extended=True)
    client.start_tls(context)
    client.structured = client.extended = False
    assert refused(client.option(Option.SET_META_CONTEXT, b"")) == OptionReply.ERR_INVALID  # structured replies come first
    client.go()
    assert not client.flags & TransmissionFlag.SEND_DF
    assert client.read(0, 10).contents() == bytes(10)
    assert client.ask(CommandType.BLOCK_STATUS, 0, 10).error == ErrorNumber.EINVAL


def test_contexts_selected_in_the_clear_are_not_within_tls(serve, tls, client_of, context):
    client = client_of(serve(MemoryDisk(MEBIBYTE), tls=tls, require_tls=False))
    client.greet()
    client.agree()
    client.start_tls(context)
    client.agree(allocation=False)
    client.go()
    assert client.ask(CommandType.BLOCK_STATUS, 0, 10).error == ErrorNumber.EINVAL


@pytest.mark.parametrize("injected", [b"\0", wire.pack_option(Option.STRUCTURED_REPLY), b"\x16\x03\x01\x00\x05", bytes(70000)])
@pytest.mark.parametrize("required", [True, False])
def test_bytes_behind_the_request_for_tls_end_the_connection(serve, tls, context, client_of, caplog, injected, required):
    server = serve(MemoryDisk(MEBIBYTE), tls=tls, require_tls=required)
    client = client_of(server)
    client.greet()
    client.send(wire.pack_option(Option.STARTTLS) + injected)
    assert client.hung_up()
    [line] = warnings(caplog)
    assert line.endswith("was disconnected: there were bytes in the clear behind the request for TLS")
    is_served(server, context)


def test_hello_of_a_client_that_did_not_wait_for_the_answer_is_not_taken_over(forced, context, client_of):
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    client = client_of(forced)
    client.greet()
    client.send(wire.pack_option(Option.STARTTLS) + outgoing.read())
    assert client.hung_up()


@pytest.mark.parametrize(
    "said",
    [
        wire.pack_option(Option.STRUCTURED_REPLY),
        wire.pack_option(Option.GO, wire.pack_info_request("", [Info.EXPORT])),
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(1000),
        b"\x16\x03\x01\xff\xff" + bytes(70000),
    ],
)
def test_bytes_that_are_no_tls_after_the_answer_cost_that_client_only(forced, context, client_of, caplog, said):
    client = client_of(forced)
    client.greet()
    assert client.option(Option.STARTTLS) == [ACK]
    with contextlib.suppress(ConnectionError):
        client.send(said)
    told = b""
    with contextlib.suppress(ConnectionError):
        while piece := client.sock.recv(1000):
            told += piece
    assert len(told) <= 7  # an alert of TLS's, at most
    assert wait_for(lambda: warnings(caplog))
    [line] = warnings(caplog)
    assert "the TLS handshake with" in line
    assert "what the client sends is no TLS" in line
    is_served(forced, context)


def test_answer_in_the_clear_never_leaves_within_tls(serve, tls, context, client_of):
    # Hundreds of options that arrive in one piece with the request: their answers have all left before TLS begins.
    client = client_of(serve(MemoryDisk(MEBIBYTE), tls=tls, require_tls=False))
    client.greet()
    client.send(wire.pack_option(Option.LIST) * 500 + wire.pack_option(Option.STARTTLS))
    for _ in range(500):
        assert client.option_replies(Option.LIST)[-1] == ACK
    assert client.option_replies(Option.STARTTLS) == [ACK]
    client.wrap(context)
    client.go()


# ---------------------------------------------------------------------------------------------- handshakes that fail


def hello(context: ssl.SSLContext) -> bytes:
    """Return a client's first message."""
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_client_that_stalls_in_the_handshake_of_tls_is_cut_off(serve, tls, versioned, client_of, caplog, part):
    server = serve(MemoryDisk(MEBIBYTE), tls=tls, handshake_timeout=0.3)
    client = client_of(server)
    client.greet()
    assert client.option(Option.STARTTLS) == [ACK]
    said = hello(versioned)
    client.send(said[: int(len(said) * part)])
    with contextlib.suppress(ConnectionError):
        while client.sock.recv(1000):
            pass
    assert wait_for(lambda: warnings(caplog))
    [line] = warnings(caplog)
    assert line.endswith("the client took too long")


def test_client_that_says_its_hello_byte_by_byte_is_cut_off(serve, tls, context, client_of):
    client = client_of(serve(MemoryDisk(MEBIBYTE), tls=tls, handshake_timeout=0.2))
    client.greet()
    assert client.option(Option.STARTTLS) == [ACK]
    said = hello(context)
    assert len(said) * 0.01 > 1
    with pytest.raises(ConnectionError):
        say_slowly(client, said)


def say_slowly(client: RawClient, said: bytes) -> None:
    for byte in said:
        client.send(bytes([byte]))
        time.sleep(0.01)


def test_client_that_stalls_within_tls_is_cut_off(serve, tls, context, client_of):
    client = client_of(serve(MemoryDisk(MEBIBYTE), tls=tls, handshake_timeout=0.5))
    client.greet()
    client.start_tls(context)
    assert client.hung_up()


def test_client_that_does_not_read_its_option_replies_is_cut_off_within_tls(serve, tls, context, client_of):
    exports = {f"{number:04}" * 1000: MemoryDisk(1) for number in range(300)}
    server = serve(exports, tls=tls, handshake_timeout=0.5)
    client = client_of(server)
    client.greet()
    client.start_tls(context)
    with contextlib.suppress(OSError):
        client.send(wire.pack_option(Option.LIST) * 100)
    wait_for(lambda: not server._clients)


def test_client_that_hangs_up_in_the_handshake_is_one_line(forced, context, client_of, caplog):
    client = client_of(forced)
    client.greet()
    assert client.option(Option.STARTTLS) == [ACK]
    client.send(hello(context)[:100])
    client.close()
    assert wait_for(lambda: warnings(caplog))
    [line] = warnings(caplog)
    assert "hung up during the TLS handshake" in line
    assert "client certificate" not in line  # which only a server could demand
    is_served(forced, context)


def test_client_that_does_not_trust_the_server_is_one_line(forced, context, tmp_path, caplog):
    stranger = CertificateAuthority("strangers").write(tmp_path)
    client = greeted(forced)
    with contextlib.closing(client), pytest.raises(ssl.SSLCertVerificationError):
        client.start_tls(ssl.create_default_context(cafile=stranger / "ca-cert.pem"))
    assert wait_for(lambda: warnings(caplog))
    [line] = warnings(caplog)
    assert "the client does not trust the CA that issued the certificate of this side" in line
    is_served(forced, context)


def test_client_of_an_old_tls_is_refused(forced, context, caplog):
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with pytest.deprecated_call():
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    client = greeted(forced)
    with contextlib.closing(client), pytest.raises(ssl.SSLError):
        client.start_tls(context)
    assert wait_for(lambda: warnings(caplog))


# ---------------------------------------------------------------------------------------------- clients' certificates


def ask_within_tls(client: RawClient, context: ssl.SSLContext) -> None:
    client.start_tls(context)
    client.option(Option.LIST)


@pytest.fixture
def verifying(serve, pki):
    return serve(MemoryDisk(MEBIBYTE), tls=ServerTLS(certificates=pki, verify_clients=True))


def test_client_with_a_certificate_is_served(verifying, pki, versioned):
    versioned.load_cert_chain(pki / "client-cert.pem", pki / "client-key.pem")
    is_served(verifying, versioned)


@pytest.mark.parametrize("shown", ["none", "another CA's", "expired", "a server's"])
def test_client_without_a_good_certificate_gets_nothing(verifying, ca, tmp_path, versioned, caplog, shown):
    issuer = CertificateAuthority("strangers") if shown == "another CA's" else ca
    purpose, days = "server" if shown == "a server's" else "client", (-2, -1) if shown == "expired" else (-1, 2)
    if shown != "none":
        issuer.write(tmp_path, client=issuer.issue(purpose, days=days))
        versioned.load_cert_chain(tmp_path / "client-cert.pem", tmp_path / "client-key.pem")
    client = greeted(verifying)
    # With TLS 1.3 the client's part of the handshake ends before the server has looked at its certificate.
    with contextlib.closing(client), pytest.raises((OSError, AssertionError)):
        ask_within_tls(client, versioned)
    assert wait_for(lambda: warnings(caplog))
    [line] = warnings(caplog)
    assert "the TLS handshake with" in line


# ---------------------------------------------------------------------------------------------- much, little, and the end


def test_much_goes_both_ways_at_once(serve, tls, versioned, client_of):
    """Requests are sent while the replies to earlier ones come back, so that both directions are full at times."""
    piece, count = 2 * MEBIBYTE, 16
    disk = MemoryDisk(piece * count)
    client = client_of(serve(disk, tls=tls))
    client.greet()
    client.start_tls(versioned)
    client.go()
    data = random.Random(3).randbytes(piece * count)
    asked = b"".join(
        client.pack(CommandType.WRITE, at, piece, payload=data[at : at + piece]) + client.pack(CommandType.READ, at, piece)
        for at in range(0, len(data), piece)
    )
    answers = memoryview(exchanged(client.sock, asked, count * (2 * wire.SIMPLE_REPLY.size + piece)))
    for at in range(0, len(data), piece):
        for payload in (b"", data[at : at + piece]):
            _, error, _ = wire.SIMPLE_REPLY.unpack_from(answers)
            end = wire.SIMPLE_REPLY.size + len(payload)
            assert (error, answers[wire.SIMPLE_REPLY.size : end] == payload) == (0, True)
            answers = answers[end:]
    assert disk.pread(len(data), 0) == data


def exchanged(sock: ssl.SSLSocket, said: bytes, expected: int) -> bytes:
    """Send everything, and meanwhile receive that many bytes."""
    sock.settimeout(0)
    rest, received = memoryview(said), bytearray()
    while rest or len(received) < expected:
        moved = False
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            received += sock.recv(1 << 18)
            moved = True
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if rest:
                rest = rest[sock.send(rest) :]
                moved = True
        if not moved:
            assert any(select.select([sock], [sock] if rest else [], [], PATIENCE))
    return bytes(received)


def test_client_that_reads_late_loses_nothing(forced, context, client_of):
    client = client_of(forced)
    client.greet()
    client.start_tls(context)
    client.go()
    for _ in range(16):
        client.send(client.pack(CommandType.READ, 0, MEBIBYTE))
    client.send(client.pack(CommandType.DISC))
    time.sleep(0.1)
    for _ in range(16):
        assert client.reply(MEBIBYTE).contents() == bytes(MEBIBYTE)
    assert client.hung_up()


@pytest.mark.parametrize("most", [1, 3, 1000])
def test_stream_that_is_as_awkward_as_it_may_be(serve, tls, versioned, most):
    server = serve(MemoryDisk(MEBIBYTE), tls=tls, handshake_timeout=PATIENCE)
    near, far = connected_pair()
    server.serve_stream(ChoppyStream(SocketStream(far), most=most, seed=most))
    with contextlib.closing(RawClient(near)) as client:
        client.greet()
        client.start_tls(versioned)
        client.agree()
        client.go()
        data = random.Random(4).randbytes(20 * most)
        assert client.write(7, data).error == 0
        assert client.read(7, len(data)).contents() == data
        client.send(client.pack(CommandType.DISC))
        assert client.hung_up()


def test_refusal_leaves_before_the_connection_ends_however_slowly(serve, tls, context):
    server = serve(MemoryDisk(MEBIBYTE), tls=tls, handshake_timeout=PATIENCE)
    near, far = connected_pair()
    server.serve_stream(ChoppyStream(SocketStream(far), most=2))
    with contextlib.closing(RawClient(near)) as client:
        client.greet()
        client.start_tls(context)
        client.agree()
        client.go()
        assert client.ask(CommandType.WRITE, 0, 1 << 31).error == ErrorNumber.EINVAL


class ReadingAhead(SocketStream):
    """Takes in all that there is, and hands out a little of it every other time: its descriptor is quiet, as TLS's may be."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.ahead = bytearray()
        self.asked = 0

    def recv_into(self, room):
        piece = memoryview(bytearray(MEBIBYTE))
        while count := super().recv_into(piece):
            self.ahead += piece[:count]
        self.asked += 1
        if not self.ahead:
            return count
        if self.asked % 2:
            return None
        given = self.ahead[: min(len(room), 5)]
        del self.ahead[: len(given)]
        room[: len(given)] = given
        return len(given)

    def buffered(self):
        return bool(self.ahead)


def test_stream_that_has_more_than_its_descriptor_shows(serve, tls, context):
    for encrypted in (False, True):
        server = serve(MemoryDisk(MEBIBYTE), tls=tls, require_tls=encrypted)
        near, far = connected_pair()
        server.serve_stream(ReadingAhead(far))
        with contextlib.closing(RawClient(near)) as client:
            client.greet()
            if encrypted:
                client.start_tls(context)
            client.agree()
            client.go()
            assert client.write(0, b"x" * 3000).error == 0
            assert client.read(0, 3000).contents() == b"x" * 3000


def test_memory_per_client_is_bounded_within_tls(serve, tls, context, client_of):
    server = serve(MemoryDisk(1 << 40), tls=tls)
    tracemalloc.start()
    try:
        for number in range(10):
            client = client_of(server)
            client.greet()
            client.start_tls(context)
            if number % 2:
                client.send(wire.OPTION_REQUEST.pack(0x49484156454F5054, number, 0xFFFFFFFF) + bytes(1000))
            else:
                client.agree(extended=True)
                client.go()
                client.send(client.pack(CommandType.READ, 0, 32 * MEBIBYTE) * 10)
        time.sleep(0.2)
        assert tracemalloc.get_traced_memory()[1] < 30 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01"])
def test_stopping_does_not_wait_for_a_handshake_of_tls(tls, said):
    server = Server(MemoryDisk(MEBIBYTE), tls=tls)
    client = greeted(server)
    assert client.option(Option.STARTTLS) == [ACK]
    client.send(said)
    with contextlib.closing(client):
        # A test run that waits for this deadline is over before it has come.
        server.stop(timeout=10 * PATIENCE)
        assert client.hung_up()
    assert server_threads() == []


def test_stopping_tells_idle_clients_goodbye(tls, context):
    server = Server(MemoryDisk(MEBIBYTE), tls=tls)
    client = greeted(server)
    client.start_tls(context)
    client.go()
    with contextlib.closing(client):
        server.stop(timeout=10 * PATIENCE)
        assert client.hung_up()


def test_clients_that_come_and_go_leave_nothing(serve, tls, context, client_of):
    server = serve(MemoryDisk(MEBIBYTE), tls=tls)
    for number in range(20):
        client = greeted(server)
        client.option(Option.STARTTLS)
        if number % 4:
            client.wrap(context)
        if number % 2:
            client.go()
            client.send(client.pack(CommandType.READ, 0, 1000)[: number % 28])
        client.close()
    wait_for(lambda: not server._clients)
    is_served(server, context)


# ---------------------------------------------------------------------------------------------- what a program says


def test_require_tls_without_tls_is_refused():
    for exports, options in (
        (MemoryDisk(1), {"require_tls": True}),
        (ExportSettings(MemoryDisk(1), require_tls=True), {}),
        ({"a": MemoryDisk(1), "b": ExportSettings(MemoryDisk(1), require_tls=True)}, {"require_tls": False}),
    ):
        with pytest.raises(UsageError, match="ServerTLS") as caught:
            Server(exports, **options)
        assert caught.value.errno == errno.EINVAL


def test_credentials_are_read_when_the_server_is_made(tmp_path):
    with pytest.raises(UsageError, match=r"server-cert\.pem"):
        Server(MemoryDisk(1), tls=ServerTLS(certificates=tmp_path))


def test_server_without_tls_refuses_it(serve, client_of):
    client = client_of(serve(MemoryDisk(1), require_tls=False))
    client.greet()
    assert refused(client.option(Option.STARTTLS)) == OptionReply.ERR_POLICY
    client.go()


def test_uri_for_clients_demands_tls_where_there_is_tls(tls, short_folder):
    path = short_folder / "s"
    for options, scheme in (({}, "nbd"), ({"tls": tls}, "nbds"), ({"tls": tls, "require_tls": False}, "nbds")):
        with Server({"my disk": MemoryDisk(1)}, **options) as server:
            tcp = server.listen("tcp", host="127.0.0.1", port=0)
            assert server.uri(tcp, "my disk") == f"{scheme}://127.0.0.1:{tcp.address.port}/my%20disk"
            if hasattr(socket, "AF_UNIX"):
                assert server.uri(server.listen("unix", path=path)) == f"{scheme}+unix:///?socket={path}"


def test_uri_to_listen_at_may_demand_tls_of_a_server_that_requires_it(tls):
    with Server(MemoryDisk(1), tls=tls) as server:
        for scheme in ("nbds", "nbd"):
            assert server.uri(server.listen_uri(f"{scheme}://127.0.0.1:0")).startswith("nbds://127.0.0.1:")
    for options in ({}, {"tls": tls, "require_tls": False}):
        with Server(MemoryDisk(1), **options) as server, pytest.raises(UsageError, match="demands TLS"):
            server.listen_uri("nbds://127.0.0.1:0")


def test_address_of_a_scheme_without_a_twin_for_tls_stays_as_it_is(tls):
    class Pigeon:
        def uri(self, export=""):
            return f"pigeon://loft/{export}"

    class Loft:
        address = Pigeon()

    with Server(MemoryDisk(1), tls=tls) as server:
        assert server.uri(Loft(), "disk") == "pigeon://loft/disk"


# ---------------------------------------------------------------------------------------------- pre-shared keys


def psk_context(user: str, key: bytes, version: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.set_ciphers("PSK")
    context.minimum_version = context.maximum_version = version
    context.set_psk_client_callback(lambda _hint: (user, key))
    return context


class TestPreSharedKeys:
    # From Python 3.13 on.
    __test__ = supports_tls_psk()

    @pytest.fixture
    def server(self, serve, tmp_path):
        (tmp_path / "keys.psk").write_text(PSK_LINE)
        return serve(MemoryDisk(MEBIBYTE), tls=ServerTLS(psk_file=tmp_path / "keys.psk"))

    @pytest.mark.parametrize("version", VERSIONS.values(), ids=VERSIONS)
    def test_client_with_the_key_is_served(self, server, version):
        is_served(server, psk_context(PSK_USER, PSK_KEY, version))

    @pytest.mark.parametrize("version", VERSIONS.values(), ids=VERSIONS)
    @pytest.mark.parametrize(("user", "key"), [(PSK_USER, b"wrong"), ("mallory", PSK_KEY), ("", b"")])
    def test_client_without_the_key_gets_nothing(self, server, version, user, key, caplog):
        client = greeted(server)
        with contextlib.closing(client), pytest.raises((OSError, AssertionError)):
            ask_within_tls(client, psk_context(user, key, version))
        assert wait_for(lambda: warnings(caplog))
        assert len(warnings(caplog)) == 1

    def test_client_with_certificates_only_gets_nothing(self, server, context, caplog):
        client = greeted(server)
        with contextlib.closing(client), pytest.raises(OSError, match=r"SSL|reset|closed"):
            client.start_tls(context)
        assert wait_for(lambda: warnings(caplog))


class TestWithoutPreSharedKeys:
    # Before Python 3.13.
    __test__ = not supports_tls_psk()

    def test_they_are_refused(self, tmp_path):
        (tmp_path / "keys.psk").write_text(PSK_LINE)
        with pytest.raises(UsageError, match=r"Python 3\.13") as caught:
            Server(MemoryDisk(1), tls=ServerTLS(psk_file=tmp_path / "keys.psk"))
        assert caught.value.errno == errno.ENOTSUP

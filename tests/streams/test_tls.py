"""TLS keeps the Stream contract over any stream, and takes nothing for data, or for its end, that the peer did not encrypt."""

from __future__ import annotations

import contextlib
import errno
import random
import signal
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdcore.errors import Disconnected, TLSError
from nbdcore.streams.base import Want
from nbdcore.streams.memory import memory_pair
from nbdcore.streams.tls import stream as tls_stream
from nbdcore.streams.tls.credentials import TLS, ServerTLS
from nbdcore.streams.tls.starting import client_starter, server_starter
from nbdcore.streams.tls.stream import TLSStream
from nbdcore.streams.waiting import Deadline, wait_any
from nbdcore.testing import streams
from nbdcore.testing.choppy import ChoppyStream
from nbdcore.testing.moving import transfer
from tests.certificates import CertificateAuthority
from tests.streams.tls_pairs import (
    PAIRS,
    PATIENCE,
    Pair,
    connected,
    connected_pair,
    finish,
    receive,
    receive_exactly,
    send,
    shake,
    shake_both,
    started,
    tcp_pair,
)

NAME = "db.example"
VERSIONS = {"TLSv1.2": "NORMAL:-VERS-TLS1.3", "TLSv1.3": "NORMAL:-VERS-TLS1.2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ca = CertificateAuthority()
    return ca.write(tmp_path_factory.mktemp("pki"), server=ca.issue("server", NAME))


@pytest.fixture(scope="module", params=VERSIONS)
def starters(request, folder):
    """The client's and the server's, for each version of TLS."""
    client = client_starter(TLS(certificates=folder, priority=VERSIONS[request.param]), NAME)
    return client, server_starter(ServerTLS(certificates=folder))


@pytest.fixture(scope="module")
def modern(folder):
    return client_starter(TLS(certificates=folder), NAME), server_starter(ServerTLS(certificates=folder))


@contextlib.contextmanager
def memory_pair_closed() -> Iterator[Pair]:
    pair = memory_pair()
    try:
        yield pair
    finally:
        for end in pair:
            end.close()


# --- the contract ---


def choppy_pair() -> Pair:
    near, far = memory_pair()
    return ChoppyStream(near, most=4099, seed=1), ChoppyStream(far, most=4099, seed=2)


def small_memory_pair() -> Pair:
    return memory_pair(capacity=4096)


@pytest.mark.parametrize("clause", streams.CLAUSES, ids=lambda clause: clause.__name__)
@pytest.mark.parametrize("make_pair", [tcp_pair, memory_pair, small_memory_pair, choppy_pair], ids=lambda pair: pair.__name__)
@pytest.mark.parametrize("side", ["client", "server"])
def test_stream_keeps_the_clause(starters, make_pair, side, clause):
    ends = connected_pair(*starters, make_pair)
    try:
        clause(*(ends if side == "client" else reversed(ends)))
    finally:
        for end in ends:
            end.close()


def test_tls_over_tls_keeps_the_contract(modern):
    def make_pair() -> Pair:
        return connected_pair(*modern, lambda: connected_pair(*modern))

    streams.check_stream(make_pair)


# --- the handshake ---


@pytest.mark.parametrize("make_pair", PAIRS, ids=lambda pair: pair.__name__)
def test_handshake_agrees_on_the_version_asked_for(starters, make_pair):
    with started(*starters, make_pair) as (near, far):
        assert (near.version, near.cipher, far.version) == (None, None, None)
        shake(near, far)
        assert near.version == far.version in VERSIONS
        assert near.cipher == far.cipher is not None


def test_handshake_byte_by_byte(starters):
    def make_pair() -> Pair:
        near, far = memory_pair()
        return ChoppyStream(near, most=1, seed=1), ChoppyStream(far, most=1, seed=2)

    with connected(*starters, make_pair) as (near, far):
        send(near, b"there")
        assert receive_exactly(far, 5) == b"there"


def test_handshake_goes_on_inside_send_and_receive(starters):
    with started(*starters) as (near, far):
        room = memoryview(bytearray(100))
        assert near.wants() == Want.READ | Want.WRITE
        assert far.wants() == Want.READ
        sent = received = None
        while not received:
            sent = sent or near.send([memoryview(b"first words")])
            received = far.recv_into(room)
        assert sent == received == 11
        assert room[:11] == b"first words"
        assert near.wants() == far.wants() == Want.NOTHING


def test_handshake_moves_nothing_in_the_clear(modern):
    with memory_pair_closed() as (near, spy):
        client = modern[0](near)
        assert client.send([memoryview(b"a secret")]) is None
        assert client.recv_into(memoryview(bytearray(10))) is None
        hello = receive(spy)
        assert hello[:2] == b"\x16\x03"  # a handshake record
        assert b"secret" not in hello


def test_peer_that_hangs_up_during_the_handshake_is_a_tls_error(modern):
    with memory_pair_closed() as (near, far):
        client = modern[0](near)
        assert not client.handshake()
        far.finish_sending()
        with pytest.raises(TLSError, match="hung up during the TLS handshake"):
            client.handshake()


@pytest.mark.parametrize(
    "injected",
    [
        b"\x00\x03\xe8\x89\x04\x55\x65\xa9" + bytes(16),
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        bytes(1 << 10),
        b"\x17\x03\x03\x00\x04data",
    ],
    ids=["an NBD option reply", "HTTP", "zeroes", "early application data"],
)
@pytest.mark.parametrize("side", ["client", "server"])
def test_plain_text_injected_before_the_handshake_is_a_tls_error(modern, side, injected):
    with memory_pair_closed() as (near, far):
        victim = modern[0 if side == "client" else 1](near)
        send(far, injected)
        with pytest.raises(TLSError, match="is no TLS") as caught:
            shake(victim, victim)
        assert isinstance(caught.value.__cause__, ssl.SSLError)


def test_plain_text_injected_after_the_handshake_is_a_tls_error(starters):
    plain = memory_pair()
    with connected(*starters, lambda: plain) as (near, _):
        send(plain[1], b"\x67\x44\x66\x98" + bytes(12))  # a simple reply
        with pytest.raises(TLSError):
            receive(near)


@pytest.mark.parametrize("at", range(8))
def test_ciphertext_changed_on_the_way_is_a_tls_error(starters, at):
    plain = memory_pair()
    with connected(*starters, lambda: plain) as (near, far):
        send(far, b"pay alice 10 coins")
        record = bytearray(receive(plain[0]))
        record[random.Random(at).randrange(5, len(record))] ^= 1 << at
        send(plain[1], bytes(record))
        with pytest.raises(TLSError):
            receive(near)


def test_failed_handshake_tells_the_peer_why(folder):
    with started(
        client_starter(TLS(certificates=folder), "other.example"), server_starter(ServerTLS(certificates=folder))
    ) as ends:
        client_error, server_error = shake_both(*ends)
        assert "not for the name 'other.example'" in str(client_error)
        assert "does not accept the certificate" in str(server_error)


def test_handshake_after_close_is_disconnected(modern):
    with started(*modern) as (near, _):
        near.close()
        with pytest.raises(Disconnected):
            near.handshake()


# --- the end ---


def test_end_without_goodbye_is_no_end_of_data(starters):
    plain = memory_pair()
    with connected(*starters, lambda: plain) as (near, far):
        send(far, b"half of the tr")
        plain[1].close()
        assert receive_exactly(near, 14) == b"half of the tr"
        with pytest.raises(Disconnected, match="without TLS's goodbye") as caught:
            receive(near)
        assert caught.value.errno == errno.ECONNRESET


def test_end_inside_a_record_is_no_end_of_data(starters):
    plain = memory_pair()
    with connected(*starters, lambda: plain) as (near, far):
        send(far, b"nothing but ")
        assert receive(near) == b"nothing but "
        send(far, b"the truth")
        record = receive(plain[0])
        send(plain[1], record[:-1])
        plain[1].close()
        with pytest.raises(Disconnected, match="without TLS's goodbye"):
            receive(near)


@pytest.mark.parametrize("heard", [True, False], ids=["goodbye received", "reset"])
def test_end_without_goodbye_is_the_end_once_this_side_has_finished(starters, heard):
    plain = memory_pair()
    with connected(*starters, lambda: plain) as (near, far):
        finish(near)
        if heard:
            assert receive(far) == b""
        send(far, b"last words")
        plain[1].close()
        assert receive_exactly(near, 10) == b"last words"
        assert receive(near) == b""


def test_reset_before_this_side_has_finished_is_no_end_of_data(starters):
    plain = memory_pair()
    with connected(*starters, lambda: plain) as (near, far):
        send(far, b"words")
        assert receive(near) == b"words"
        send(near, b"never received")
        plain[1].close()
        with pytest.raises(Disconnected) as caught:
            receive(near)
        assert isinstance(caught.value.__cause__, ConnectionResetError)


def test_goodbye_counts_as_the_end_while_the_stream_below_is_open(starters):
    plain = memory_pair()
    with connected(*starters, lambda: plain) as (near, far):
        send(far, b"bye")
        far._say_goodbye()
        far.send([])
        room = memoryview(bytearray(100))
        assert near.recv_into(room) == 3
        assert near.buffered()  # the descriptor is quiet, and there is the end to tell
        assert near.recv_into(room) == 0


@pytest.mark.parametrize("received", [1, 10, 16384, 16385, 100_000])
def test_finishing_loses_nothing_that_was_received_in_part(starters, received):
    data = random.Random(received).randbytes(100_001)
    with connected(*starters) as (near, far):
        send(far, data)
        first = receive_exactly(near, received)
        finish(near)
        assert first + receive_exactly(near, len(data) - received) == data
        send(far, b"still there")
        assert receive_exactly(near, 11) == b"still there"
        finish(far)
        assert receive(near) == b""


def test_sending_after_finishing_is_refused(starters):
    with connected(*starters) as (near, _):
        finish(near)
        with pytest.raises(Disconnected):
            near.send([memoryview(b"more")])


def test_close_says_goodbye(starters):
    with connected(*starters) as (near, far):
        near.close()
        assert receive(far) == b""


def test_no_goodbye_is_said_on_a_connection_that_was_cut_off(starters):
    plain = memory_pair()
    with connected(*starters, lambda: plain) as (near, far):
        send(far, b"words")
        assert receive(near) == b"words"
        plain[1].finish_sending()
        with pytest.raises(Disconnected):
            receive(near)
        near.close()
        assert receive(plain[1]) == b""


def test_nothing_can_be_sent_after_a_failure(starters):
    plain = memory_pair()
    with connected(*starters, lambda: plain) as (near, _):
        send(plain[1], bytes(100))
        for call in (lambda: receive(near), lambda: near.send([memoryview(b"x")]), near.finish_sending, lambda: receive(near)):
            with pytest.raises(OSError, match=str(near)):
                call()


def test_hanging_up_says_goodbye_and_keeps_the_descriptor(starters):
    with connected(*starters) as (near, far):
        descriptor = near.fileno()
        near.hang_up()
        assert near.fileno() == descriptor
        assert not near.buffered()
        assert receive(far) == b""
        with pytest.raises(Disconnected, match="closed by this program"):
            near.recv_into(memoryview(bytearray(1)))
        near.close()
        assert near.fileno() == -1


def test_finishing_before_the_handshake_finishes_it_first(starters):
    with started(*starters) as (near, far):
        assert not near.finish_sending()
        while not near.finish_sending():
            far.handshake()
        assert receive(far) == b""


def test_finishing_with_a_peer_that_is_no_tls_fails(starters):
    with memory_pair_closed() as (near, far):
        client = starters[0](near)
        send(far, bytes(100))
        with pytest.raises(TLSError, match="is no TLS"):
            client.finish_sending()


def test_peer_of_a_failed_stream_gets_an_alert_and_no_goodbye(starters):
    plain = memory_pair()
    with connected(*starters, lambda: plain) as (near, far):
        send(plain[1], bytes(100))
        with pytest.raises(TLSError):
            receive(near)
        near.close()
        with pytest.raises(TLSError):
            receive(far)


def test_close_from_another_thread_while_bytes_move(modern):
    with connected(*modern) as (near, far):
        closer = threading.Timer(0.05, near.close)
        closer.start()
        with pytest.raises(OSError, match="closed by this program"):
            _move_until_failure(near, far)
        closer.join()
        assert near.fileno() == -1


def _move_until_failure(near, far):
    data, room = memoryview(bytes(1 << 20)), memoryview(bytearray(1 << 20))
    deadline = Deadline.after(PATIENCE)
    while not deadline.expired:
        with contextlib.suppress(ConnectionError):  # the other end's, once this one is closed
            far.send([data])
        near.recv_into(room)


def test_server_that_hangs_up_right_after_the_handshake_has_refused(starters):
    plain = memory_pair()
    with connected(*starters, lambda: plain) as (near, _):
        plain[1].close()
        with pytest.raises(TLSError, match="right after the TLS handshake"):
            receive(near)


def test_client_that_hangs_up_right_after_the_handshake_is_gone(starters):
    plain = memory_pair()
    with connected(*starters, lambda: plain) as (_, far):
        plain[0].close()
        with pytest.raises(Disconnected, match="without TLS's goodbye"):
            receive(far)


# --- bytes ---


def test_much_both_ways_at_once_over_choppy_streams(starters):
    there, back = random.Random(1).randbytes(300_000), random.Random(2).randbytes(200_000)
    with connected(*starters, choppy_pair) as (near, far):
        assert transfer(near, far, there, back) == (there, back)


def test_small_parts_share_a_record(modern):
    plain = memory_pair()
    with connected(*modern, lambda: plain) as (near, _):
        assert near.send([memoryview(b"x" * 28)] * 100) == 2800
        record = receive(plain[1])
        assert 5 + int.from_bytes(record[3:5], "big") == len(record) > 2800


class SmallRecords:
    """An SSLObject whose peer asked for records of 512 bytes."""

    def __init__(self, tls):
        self._tls = tls

    def write(self, data):
        return self._tls.write(data[:512])

    def __getattr__(self, name):
        return getattr(self._tls, name)


def test_peer_that_asked_for_small_records_gets_every_byte(modern):
    data = random.Random(4).randbytes(100_000)
    with connected(*modern) as (near, far):
        near._tls = SmallRecords(near._tls)
        small = [memoryview(data)[at : at + 28] for at in range(0, 2800, 28)]
        assert near.send([*small, memoryview(data)[2800:]]) == len(data)
        assert receive_exactly(far, len(data)) == data


def test_room_is_filled_from_many_records_at_once(modern):
    with connected(*modern) as (near, far):
        data = random.Random(3).randbytes(60_000)
        send(far, data)
        room = memoryview(bytearray(60_000))
        assert near.recv_into(room) == 60_000
        assert room == data


class Hoard:
    """A stream below which much has arrived already, and perhaps an error behind it."""

    def __init__(self, stream, arrived, error=None):
        self._stream = stream
        self._arrived = memoryview(arrived)
        self._error = error

    def recv_into(self, room):
        count = min(len(room), len(self._arrived))
        room[:count] = self._arrived[:count]
        self._arrived = self._arrived[count:]
        if not count and self._error is not None:
            raise self._error
        return count or self._stream.recv_into(room)

    def __str__(self):
        return str(self._stream)

    def __getattr__(self, name):
        return getattr(self._stream, name)


def encrypted(end, other_below, data):
    """Return the ciphertext of `data` from one end of a connection, received below the other."""
    received, rest = b"", memoryview(data)
    deadline = Deadline.after(PATIENCE)
    while rest or end.wants() & Want.WRITE:
        assert not deadline.expired
        rest = rest[end.send([rest] if rest else []) or 0 :]
        received += receive(other_below, 1 << 20)
    return received


def test_room_is_filled_from_what_several_receives_bring(modern):
    plain = memory_pair()
    with connected(*modern, lambda: plain) as (near, far):
        data = random.Random(5).randbytes(3 * tls_stream._PIECE)
        near._stream = Hoard(near._stream, encrypted(far, plain[0], data))
        room = memoryview(bytearray(len(data)))
        assert near.recv_into(room) == len(data)
        assert room == data


def test_one_call_decrypts_no_more_than_its_share(modern):
    plain = memory_pair()
    with connected(*modern, lambda: plain) as (near, far):
        data = random.Random(5).randbytes(1 << 20)
        near._stream = Hoard(near._stream, encrypted(far, plain[0], data))
        room = memoryview(bytearray(len(data)))
        assert near.recv_into(room) == tls_stream._MOST_AT_ONCE
        assert receive_exactly(near, len(data) - tls_stream._MOST_AT_ONCE) == data[tls_stream._MOST_AT_ONCE :]


@pytest.mark.parametrize("broken", ["changed on the way", "reset"])
def test_what_came_before_the_connection_broke_is_received_first(starters, broken):
    plain = memory_pair()
    data = random.Random(6).randbytes(2 * tls_stream._PIECE - 32768)
    room = memoryview(bytearray(len(data) + 1))
    with connected(*starters, lambda: plain) as (near, far):
        arrived = encrypted(far, plain[0], data)
        if broken == "reset":
            near._stream = Hoard(near._stream, arrived, Disconnected(errno.ECONNRESET, f"{near} broke"))
        else:
            near._stream = Hoard(near._stream, arrived + bytes(100))
        assert near.recv_into(room) == len(data)
        assert room[:-1] == data
        assert near.buffered()  # the descriptor may be quiet, and there is the error to tell
        for call in (lambda: near.recv_into(room), lambda: near.send([memoryview(b"x")]), near.finish_sending):
            with pytest.raises(TLSError if broken == "changed on the way" else Disconnected, match=str(near)):
                call()


def test_data_before_a_broken_record_that_came_along_are_received_first(starters):
    plain = memory_pair()
    with connected(*starters, lambda: plain) as (near, far):
        near._stream = Hoard(near._stream, encrypted(far, plain[0], b"words") + bytes(100))
        room = memoryview(bytearray(10))
        assert near.recv_into(room) == 5
        assert near.buffered()
        with pytest.raises(TLSError) as caught:
            near.recv_into(room)
        assert isinstance(caught.value.__cause__, ssl.SSLError)


def test_rest_of_a_record_is_buffered(modern):
    with connected(*modern) as (near, far):
        send(far, b"abcdef")
        assert not near.buffered()
        assert receive(near, 2) == b"ab"
        assert near.buffered()
        assert receive(near, 4) == b"cdef"
        assert not near.buffered()


def test_next_record_is_buffered(modern):
    with connected(*modern) as (near, far):
        send(far, b"ab")
        send(far, b"cd")
        assert receive(near, 2) == b"ab"
        assert near.buffered()
        assert receive(near, 2) == b"cd"
        assert not near.buffered()


def test_unsent_ciphertext_is_bounded_and_wanted(modern):
    with connected(*modern) as (near, far):
        data = memoryview(bytes(1 << 20))
        sent = 0
        while (count := near.send([data])) is not None:
            assert 0 < count <= 2 * tls_stream._BATCH
            sent += count
        assert near.wants() == Want.WRITE
        assert sum(map(len, near._unsent)) <= 2 * tls_stream._BATCH
        assert near.send([]) is None
        deadline = Deadline.after(PATIENCE)
        while near.wants():
            receive(far, 1 << 16)
            near.send([])
            assert not deadline.expired
        assert near.send([]) == 0


def test_receiving_sends_what_is_unsent(modern):
    with connected(*modern) as (near, far):
        data, room = memoryview(bytes(1 << 20)), memoryview(bytearray(1 << 20))
        while near.send([data]) is not None:
            continue
        deadline = Deadline.after(PATIENCE)
        while near.wants():
            assert near.recv_into(room) is None
            far.recv_into(room)
            assert not deadline.expired


def test_the_name_in_messages_is_that_of_the_stream_below(modern):
    with started(*modern) as (near, _):
        assert str(near) == str(near._stream)


def test_context_that_offers_nothing_is_a_tls_error():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2
    with memory_pair_closed() as (near, _), pytest.raises(TLSError, match="no TLS version"):
        TLSStream(near, context)


def test_end_underneath_stays_the_end(starters):
    with connected(*starters) as (near, far):
        finish(far)
        assert receive(near) == b""
        assert receive(near) == b""
        deadline = Deadline.after(PATIENCE)
        send(near, b"answer")
        wait_any([(far.fileno(), Want.READ)], deadline)
        assert receive_exactly(far, 6) == b"answer"


# --- signal handlers ---


class Alarm(ConnectionResetError):
    """What a signal handler raises: an error like those of streams."""


class Alarming(ChoppyStream):
    """Has a signal arrive in the middle of a call, once `armed` names it."""

    armed: str | None = None

    def _alarm(self, call: str) -> None:
        if call == self.armed:
            self.armed = None
            signal.raise_signal(signal.SIGINT)

    def send(self, parts):
        self._alarm("send")
        return super().send(parts)

    def recv_into(self, room):
        self._alarm("recv_into")
        return super().recv_into(room)


@pytest.fixture
def alarming():
    def handler(_number, _frame):
        raise Alarm

    before = signal.signal(signal.SIGINT, handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("alarming")
def test_signal_handler_while_a_refusal_is_sent_comes_out_as_it_is(folder, modern):
    with memory_pair_closed() as (near, far):
        below = Alarming(near, most=1 << 20, quiet=0)
        client, server = client_starter(TLS(certificates=folder), "other.example")(below), modern[1](far)
        for end in (client, server):
            assert not end.handshake()
        below.armed = "send"  # of the alert: the certificate is for another name
        with pytest.raises(Alarm):
            client.handshake()


@pytest.mark.usefixtures("alarming")
def test_signal_handler_while_the_last_words_of_a_peer_are_read_comes_out_as_it_is(modern):
    made = []

    def make_pair():
        near, far = memory_pair()
        made.append(Alarming(near, most=1 << 20, quiet=0))
        return made[0], far

    with connected(*modern, make_pair) as (near, _):
        below = made[0]

        def broken(_parts):
            below.armed = "recv_into"
            raise Disconnected(errno.EPIPE, "gone")

        below.send = broken
        with pytest.raises(Alarm):
            near.send([memoryview(b"x")])


def test_what_the_peer_answered_before_it_hung_up_is_received_though_sending_fails_first(starters):
    """A client sends its next request before it has looked at the answer to the one before."""
    with connected(*starters, tcp_pair) as (near, far):
        send(far, b"the answer")
        far.close()
        with pytest.raises(Disconnected):
            keep_sending(near)
        room = memoryview(bytearray(64))
        assert near.recv_into(room) == len(b"the answer")
        assert bytes(room[:10]) == b"the answer"


def keep_sending(stream):
    """Send until the system knows that nobody receives."""
    deadline = Deadline.after(PATIENCE)
    while not deadline.expired:
        stream.send([memoryview(b"the next request")])

"""The greeting: three styles of handshake, and servers that speak none of them."""

from __future__ import annotations

import errno

import pytest

from nbdcore.errors import Disconnected, ProtocolViolation
from nbdcore.protocol.constants import HandshakeFlag, Option, TransmissionFlag
from nbdcore.protocol.state import Phase
from tests.protocol.harness import SIZE, ack, everywhere, export, export_name_reply, greeting, newborn, oldstyle

PLAIN = {"structured_replies": False, "contexts": ()}


def test_oldstyle_server_is_connected_at_once_and_nothing_is_said():
    client = everywhere(lambda: (newborn(), oldstyle(SIZE, 0b100111)))

    assert client.engine.phase is Phase.CONNECTED
    assert client.engine.agreement.protocol == "oldstyle"
    assert client.engine.agreement.export.size == SIZE
    assert client.engine.limits.flags == TransmissionFlag(0b100111)
    assert client.exchange.result is True
    assert bytes(client.said) == b""


def test_oldstyle_server_ignores_opt_mode():
    assert newborn(opt_mode=True).hear(oldstyle()).engine.phase is Phase.CONNECTED


@pytest.mark.parametrize("flags", [1 << 16 | 1, 1 << 31 | 1])
def test_oldstyle_server_with_handshake_flags_is_fatal(flags):
    client = everywhere(lambda: (newborn(), oldstyle(flags=flags)))

    assert client.engine.phase is Phase.DEAD
    assert isinstance(client.exchange.error, ProtocolViolation)


def test_newstyle_server_without_fixed_is_asked_for_nothing_but_the_export():
    client = everywhere(lambda: (newborn(export="disk", **PLAIN), greeting(0) + export_name_reply(zeroes=True)))

    assert client.engine.phase is Phase.CONNECTED
    assert client.engine.agreement.protocol == "newstyle"
    assert client.engine.agreement.export.name == "disk"
    assert bytes(client.said) == bytes.fromhex(
        "00000000"  # client flags
        "49484156454f5054 00000001 00000004 6469736b"  # EXPORT_NAME "disk"
    )


def test_newstyle_server_without_fixed_gets_no_option_though_all_are_wanted():
    client = everywhere(lambda: (newborn(), greeting(2) + export_name_reply()))

    assert client.engine.phase is Phase.CONNECTED
    assert bytes(client.said) == bytes.fromhex("00000002 49484156454f5054 00000001 00000000")


@pytest.mark.parametrize(("offered", "wished", "agreed"), [(3, 3, 3), (1, 3, 1), (3, 1, 1), (0xFFFF, 3, 3), (2, 1, 0)])
def test_client_flags_are_those_that_both_sides_have(offered, wished, agreed):
    client = newborn(handshake_flags=HandshakeFlag(wished), **PLAIN).hear(greeting(offered))

    assert bytes(client.said[:4]) == agreed.to_bytes(4, "big")
    assert client.engine.agreement.handshake_flags == agreed
    assert client.engine.agreement.protocol == ("newstyle-fixed" if agreed & 1 else "newstyle")


def test_reserved_zeroes_follow_the_export_name_unless_both_sides_agreed_to_leave_them_out():
    padded = newborn(**PLAIN).hear(greeting(0) + export_name_reply())
    assert padded.engine.phase is Phase.CONNECTING
    padded.hear(bytes(123))
    assert padded.engine.phase is Phase.CONNECTING
    padded.hear(bytes(1))
    assert padded.engine.phase is Phase.CONNECTED

    assert newborn(**PLAIN).hear(greeting(2) + export_name_reply()).engine.phase is Phase.CONNECTED


@pytest.mark.parametrize(
    "script",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"\x00" * 16,
        b"NBDMAGIC" + b"\xff" * 8,
        b"NBDMAGIH" + greeting()[8:],
        b"NBDMAGIC" + (0x3E889045565A9).to_bytes(8, "big"),
    ],
    ids=["http", "zeroes", "unknown style", "nearly", "option reply"],
)
def test_peer_that_is_no_nbd_server_is_fatal_and_is_sent_nothing(script):
    client = everywhere(lambda: (newborn(), script))

    assert client.engine.phase is Phase.DEAD
    assert isinstance(client.exchange.error, ProtocolViolation)
    assert client.exchange.error.errno == 0
    assert bytes(client.said) == b""
    assert client.taken == 16


@pytest.mark.parametrize(
    "length", range(len(greeting() + ack(Option.EXTENDED_HEADERS) + ack(Option.SET_META_CONTEXT) + export()))
)
def test_server_that_hangs_up_during_the_handshake_leaves_a_dead_connection(length):
    script = greeting() + ack(Option.EXTENDED_HEADERS, Option.SET_META_CONTEXT) + export()
    client = newborn().hear(script[:length])

    client.engine.received_eof()

    assert client.engine.phase is Phase.DEAD
    assert isinstance(client.exchange.error, Disconnected)
    assert client.exchange.error.errno == errno.ENOTCONN
    assert client.completed_once(client.exchange)


@pytest.mark.parametrize(
    ("script", "hint"),
    [(b"", "before its greeting"), (b"NBD", "within its greeting"), (greeting(0), "has no export 'disk'")],
)
def test_hang_up_is_explained_by_when_it_came(script, hint):
    client = newborn(export="disk").hear(script)

    client.engine.received_eof()

    assert hint in str(client.exchange.error)


@pytest.mark.parametrize(
    "script",
    [
        oldstyle(flags=0),
        greeting(2) + export_name_reply(flags=0),
        greeting() + ack(Option.EXTENDED_HEADERS, Option.SET_META_CONTEXT) + export(flags=0) + ack(Option.GO),
    ],
    ids=["oldstyle", "newstyle", "fixed"],
)
def test_export_without_any_transmission_flag_is_fatal(script):
    client = everywhere(lambda: (newborn(), script))

    assert client.engine.phase is Phase.DEAD
    assert client.exchange.error.errno == errno.EINVAL


@pytest.mark.parametrize("size", [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_any_size_of_64_bits_is_accepted(size):
    client = newborn().hear(oldstyle(size))

    assert client.engine.limits.size == size

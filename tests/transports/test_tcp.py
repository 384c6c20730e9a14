"""The TCP transport: addresses, several addresses of one name, options of its sockets."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import sys
import threading
from functools import partial
from types import SimpleNamespace

import pytest

import nbdcore
import nbdcore_tcp
from nbdcore.errors import DeadlineExceeded, TransportError, UsageError
from nbdcore.server import MemoryDisk, Server
from nbdcore.streams.base import Want
from nbdcore.streams.waiting import Deadline, drive, wait
from nbdcore.testing import ContractBroken
from nbdcore.testing.streams import check_stream
from nbdcore.testing.transports import check_transport
from nbdcore.uri import parse_uri
from nbdcore_tcp import TCPAddress
from tests import leaks

SOON = 30.0
(TCP,) = nbdcore_tcp.nbdcore_transports()


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


LOOPBACKS = ["127.0.0.1", "localhost", *(["::1"] if has_ipv6() else [])]


def connect(address, timeout=SOON):
    return drive(TCP.connect(address), Deadline.after(timeout), "late")


def accept(listener):
    wait(listener.fileno(), Want.READ, Deadline.after(SOON), "late")
    return listener.accept()


# --- contracts ---


@pytest.mark.parametrize("host", LOOPBACKS)
def test_transport_keeps_its_contract(host):
    check_transport(TCP, TCP.address(host=host, port=0))


def test_streams_keep_their_contract():
    listener = TCP.listen(TCP.address(port=0))

    def make_pair():
        return connect(listener.address), accept(listener)

    check_stream(make_pair)
    listener.close()


def test_transport_check_finds_a_refusal_without_cause_out():
    class Careless(nbdcore_tcp.TCPTransport):
        def connect(self, address, *, timeout=None):
            try:
                return (yield from super().connect(address, timeout=timeout))
            except TransportError as exc:
                raise TransportError(exc.errno, exc.message) from None

    with pytest.raises(ContractBroken, match="as its cause"):
        check_transport(Careless(), TCP.address(port=0))


def test_transport_check_finds_a_leak_out(monkeypatch):
    monkeypatch.setattr("nbdcore.testing.transports.PATIENCE", 0.5)
    kept = []

    class Leaking(nbdcore_tcp.TCPTransport):
        def connect(self, address, *, timeout=None):
            kept.append(socket.socket())
            return (yield from super().connect(address, timeout=timeout))

    with pytest.raises(ContractBroken, match="leaves no descriptor open"):
        check_transport(Leaking(), TCP.address(port=0))
    for sock in kept:
        sock.close()


# --- addresses ---


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("nbd://", TCPAddress("localhost", 10809)),
        ("nbd:///export", TCPAddress("localhost", 10809)),
        ("nbd://:1234", TCPAddress("localhost", 1234)),
        ("nbd://example.com", TCPAddress("example.com", 10809)),
        ("nbd://user@example.com:65535/x", TCPAddress("example.com", 65535)),
        ("nbds://example.com/", TCPAddress("example.com", 10809)),
        ("nbd://[::1]:99/", TCPAddress("::1", 99)),
        ("nbd://[fe80::1%25eth0]/", TCPAddress("fe80::1%eth0", 10809)),
        ("nbd://b%C3%BCcher.example", TCPAddress("bücher.example", 10809)),
        ("nbd://host:0", TCPAddress("host", 0)),
    ],
)
def test_uri_names_an_address(text, address):
    assert TCP.parse(parse_uri(text)) == address


@pytest.mark.parametrize("text", ["nbd://host:65536", "nbd://host:4294967295", "nbd://" + "ü" * 70])
def test_uri_that_fits_no_address_is_refused(text):
    quoted = "".join(char if char.isascii() else "".join(f"%{octet:02X}" for octet in char.encode()) for char in text)
    with pytest.raises(UsageError) as caught:
        TCP.parse(parse_uri(quoted))
    assert caught.value.errno == errno.EINVAL


def test_parts_have_defaults():
    assert TCP.address() == TCPAddress("localhost", 10809, keepalive=None)
    assert TCP.listening_address(port=1) == TCP.address(port=1)


@pytest.mark.parametrize(
    "parts",
    [
        {"port": -1},
        {"port": 65536},
        {"port": "10809"},
        {"port": None},
        {"host": ""},
        {"host": None},
        {"host": b"localhost"},
        {"host": "-oProxyCommand=x"},
        {"host": "a b"},
        {"host": "a\0b"},
        {"host": "a\nb"},
        {"host": "[::1]"},
        {"host": "ü" * 70},
        {"path": "/run/x.sock"},
        {"host": "x", "cid": 3},
    ],
)
def test_wrong_part_is_refused(parts):
    with pytest.raises(UsageError) as caught:
        TCP.address(**parts)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("host", ["localhost", "::1", "192.0.2.1", "bücher.example"])
def test_address_leads_to_a_uri_and_back(host):
    address = TCP.address(host=host, port=1234)
    assert TCP.parse(parse_uri(address.uri("an export"))) == address


def test_port_0_cannot_be_connected_to():
    with pytest.raises(UsageError, match="not connected to"):
        connect(TCP.address(port=0))


# --- several addresses of one name ---


@pytest.fixture
def resolver(monkeypatch):
    """Lets "several.test" have the addresses in `resolver.addresses`."""
    resolver = SimpleNamespace(addresses=[])
    real = socket.getaddrinfo

    def look_up(host, port, *arguments, **options):
        if host != b"several.test":
            return real(host, port, *arguments, **options)
        if options.get("flags", 0) & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "no number")
        return [found for address in resolver.addresses for found in real(address, port, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return resolver


# All of 127.0.0.0/8 is loopback on Linux; elsewhere only the first address is.
def test_first_address_that_answers_is_taken(resolver):
    listener = TCP.listen(TCP.address(host="127.0.0.3", port=0))
    resolver.addresses = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    client = connect(TCP.address(host="several.test", port=listener.address.port))
    server = accept(listener)
    assert str(client) == f"TCP several.test port {listener.address.port}"
    for each in (client, server, listener):
        each.close()


def test_name_with_ipv6_and_ipv4_addresses_reaches_a_server_on_either(resolver):
    resolver.addresses = ["::1", "127.0.0.1"]
    for host in LOOPBACKS:
        listener = TCP.listen(TCP.address(host=host, port=0))
        client = connect(TCP.address(host="several.test", port=listener.address.port))
        server = accept(listener)
        for each in (client, server, listener):
            each.close()


def test_error_of_the_first_address_counts_and_all_are_listed(resolver, monkeypatch):
    listener = TCP.listen(TCP.address(port=0))
    port = listener.address.port
    listener.close()
    # The second one fails in a way of its own: there is no route from the loopback device to a broadcast address.
    resolver.addresses = ["127.0.0.1", "255.255.255.255"]
    with pytest.raises(TransportError) as caught:
        connect(TCP.address(host="several.test", port=port))
    assert caught.value.errno == errno.ECONNREFUSED
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert f"TCP several.test port {port} at 127.0.0.1: nothing listens there" in caught.value.message
    assert f"TCP several.test port {port} at 255.255.255.255: " in caught.value.message


@contextlib.contextmanager
def silent_at(host, port):
    """A server whose backlog is full: the kernel drops what else comes, as a firewall does."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind((host, port))
        server.listen(0)
        for _ in range(4):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex((host, port))
        yield


@pytest.mark.skipif(sys.platform != "linux", reason="a full backlog is silent on Linux")
def test_address_after_a_silent_one_is_taken_and_nothing_is_left_open(resolver):
    listener = TCP.listen(TCP.address(port=0))
    resolver.addresses = ["127.0.0.2", "127.0.0.4", "127.0.0.1"]
    with leaks.none_left_open(), silent_at("127.0.0.2", listener.address.port), silent_at("127.0.0.4", listener.address.port):
        client = connect(TCP.address(host="several.test", port=listener.address.port))
        server = accept(listener)
        for each in (client, server):
            each.close()
    listener.close()


@contextlib.contextmanager
def nobody_answers(resolver, *silent):
    """Give a port at which no address of several.test answers, and these are silent; nothing may be left open at the end."""
    listener = TCP.listen(TCP.address(host="127.0.0.9", port=0))  # so that nobody else gets the port
    port = listener.address.port
    resolver.addresses = ["127.0.0.2", "127.0.0.4"]
    with leaks.none_left_open(), contextlib.ExitStack() as stack:
        for host in silent:
            stack.enter_context(silent_at(host, port))
        yield port
    listener.close()


@pytest.mark.skipif(sys.platform != "linux", reason="a full backlog is silent on Linux")
def test_connecting_that_is_given_up_while_several_addresses_are_tried_leaves_nothing_open(resolver):
    with nobody_answers(resolver, "127.0.0.2", "127.0.0.4") as port, pytest.raises(DeadlineExceeded):
        drive(TCP.connect(TCP.address(host="several.test", port=port)), Deadline.after(0.6), "too long")


def connected_in_a_loop(uri, **options):
    async def main():
        async with await nbdcore.aio.connect(uri, **options) as disk:
            return disk.size

    return asyncio.run(main())


def connected(connect, uri, **options):
    with connect(uri, **options) as disk:
        return disk.size


@pytest.mark.skipif(sys.platform != "linux", reason="a full backlog is silent on Linux")
@pytest.mark.parametrize(
    "size_of",
    [partial(connected, nbdcore.connect), partial(connected, nbdcore.create_pool), connected_in_a_loop],
    ids=["client", "pool", "aio"],
)
def test_a_server_behind_a_silent_address_is_waited_for(size_of, resolver):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    resolver.addresses = ["127.0.0.2", "127.0.0.1"]
    with Server(MemoryDisk(512)) as server, silent_at("127.0.0.2", port):
        coming = threading.Timer(0.6, server.listen, ("tcp",), {"host": "127.0.0.1", "port": port})
        coming.start()
        try:
            assert size_of(f"nbd://several.test:{port}", wait=SOON) == 512
        finally:
            coming.join()


@pytest.mark.skipif(sys.platform != "linux", reason="a full backlog is silent on Linux")
def test_waiting_for_a_silent_address_ends_in_time_and_nothing_is_left_open(resolver):
    too_late = pytest.raises(DeadlineExceeded, match=r"no server at .* within 1.5 s")
    with nobody_answers(resolver, "127.0.0.2") as port, too_late:
        nbdcore.connect(f"nbd://several.test:{port}", wait=1.5)


@pytest.mark.parametrize(
    ("families", "order"),
    [
        ("444", "444"),
        ("6644", "6464"),
        ("4466", "4646"),
        ("66644", "64646"),
        ("6444", "6444"),
        ("64", "64"),
    ],
)
def test_addresses_of_both_families_are_tried_by_turns(families, order):
    of = {"4": socket.AF_INET, "6": socket.AF_INET6}
    found = [(of[family], 0, 0, "", (str(number), 0)) for number, family in enumerate(families)]
    turns = nbdcore_tcp._by_turns(found)
    assert [one[0] for one in turns] == [of[family] for family in order]
    for family in of.values():  # within a family the resolver's order stays
        assert [one for one in turns if one[0] == family] == [one for one in found if one[0] == family]


def test_name_that_does_not_exist_is_a_transport_error(monkeypatch):
    def look_up(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(TransportError, match="TCP nowhere port 10809: Name or service not known") as caught:
        connect(TCP.address(host="nowhere"))
    assert caught.value.errno == 0
    assert isinstance(caught.value.__cause__, socket.gaierror)


def test_deadline_covers_a_name_server_that_does_not_answer(monkeypatch, eventually):
    answer = threading.Event()

    def look_up(*_, flags=0, **__):
        if not flags & socket.AI_NUMERICHOST:
            assert answer.wait(SOON)
        raise socket.gaierror(socket.EAI_NONAME, "no number")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(DeadlineExceeded):
        connect(TCP.address(host="slow.test"), timeout=0.05)
    answer.set()
    eventually(lambda: threading.active_count() == 1, "the thread of the look-up ended")


# --- options ---


@pytest.mark.parametrize(("keepalive", "asks", "answers"), [(None, False, True), (False, False, False), (True, True, True)])
def test_options_are_set_on_both_ends(keepalive, asks, answers):
    listener = TCP.listen(TCP.address(port=0, keepalive=keepalive))
    client, server = connect(listener.address), accept(listener)
    for stream, probed in ((client, asks), (server, answers)):
        sock = stream._sock
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) is probed
        assert not sock.get_inheritable()
    for each in (client, server, listener):
        each.close()


def test_a_client_whose_machine_died_is_given_up_in_minutes_not_hours():
    listener = TCP.listen(TCP.address(port=0))
    client, server = connect(listener.address), accept(listener)
    idle, interval, count = (
        server._sock.getsockopt(socket.IPPROTO_TCP, option)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    )
    assert idle + interval * count < 600
    for each in (client, server, listener):
        each.close()


# --- listening ---


def test_listener_reports_the_port_that_the_kernel_chose():
    listener = TCP.listen(TCP.address(host="127.0.0.1", port=0))
    assert listener.address == TCPAddress("127.0.0.1", listener._sock.getsockname()[1])
    listener.close()


def test_address_of_another_machine_is_told():
    with pytest.raises(TransportError, match="that address is not this machine's own") as caught:
        TCP.listen(TCP.address(host="192.0.2.1", port=0))
    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_port_in_use_is_a_transport_error_that_names_it():
    listener = TCP.listen(TCP.address(port=0))
    with pytest.raises(TransportError, match=f"TCP localhost port {listener.address.port}: another server") as caught:
        TCP.listen(listener.address)
    assert caught.value.errno == errno.EADDRINUSE
    listener.close()


def test_server_starts_again_while_its_old_connections_time_out():
    listener = TCP.listen(TCP.address(port=0))
    address = listener.address
    client, server = connect(address), accept(listener)
    # Who closes first keeps the port busy for a minute (TIME_WAIT).
    server.close()
    client.close()
    listener.close()
    TCP.listen(address).close()


def test_foreign_address_cannot_be_listened_on():
    with pytest.raises(TransportError) as caught:
        TCP.listen(TCP.address(host="192.0.2.1", port=0))  # RFC 5737: nobody's
    assert caught.value.errno == errno.EADDRNOTAVAIL

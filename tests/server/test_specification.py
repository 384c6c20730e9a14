"""What the specification demands of a server and no other test shows: by raw sockets, section by section."""

from __future__ import annotations

import pytest

from nbdcore.protocol import wire
from nbdcore.protocol.constants import CommandFlag, CommandType, ErrorNumber, Info, Option, OptionReply, TransmissionFlag
from nbdcore.server import BlockSizes, ExportSettings, MemoryDisk

ACK = (OptionReply.ACK, b"")
MEBIBYTE = 1 << 20

# ---------------------------------------------------------------------------------------------- handshake


@pytest.fixture
def one(serve, client_of):
    client = client_of(serve(MemoryDisk(MEBIBYTE)))
    client.greet()
    return client


@pytest.mark.parametrize("option", [Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS])
def test_option_that_was_granted_may_be_asked_for_again(one, option):
    assert one.option(option) == [ACK]
    assert one.option(option) == [ACK]


def test_client_that_says_abort_and_does_not_wait_costs_nothing(serve, client_of, caplog):
    server = serve(MemoryDisk(MEBIBYTE))
    leaver = client_of(server)
    leaver.greet()
    leaver.send(wire.pack_option(Option.ABORT))
    leaver.close()

    client = client_of(server)
    client.greet()
    client.go()

    assert client.read(0, 10).contents() == bytes(10)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("zeroes", [True, False])
def test_nothing_follows_the_acknowledgement_of_go(serve, client_of, zeroes):
    client = client_of(serve(MemoryDisk(MEBIBYTE)))
    client.greet(1 if zeroes else 3)
    client.go()

    assert client.read(0, 10).contents() == bytes(10)


def test_information_asked_for_twice_or_unknown_is_no_reason_to_refuse(one):
    replies = one.option(Option.INFO, wire.pack_info_request("", [Info.NAME, Info.NAME, 77, 0xFFFF]))

    assert replies[-1] == ACK
    assert [wire.UINT16.unpack_from(data)[0] for _, data in replies[:-1]].count(Info.EXPORT) == 1


def test_block_sizes_that_were_asked_for_are_told(serve, client_of):
    client = client_of(serve(ExportSettings(MemoryDisk(MEBIBYTE), block_sizes=BlockSizes(512, 4096, MEBIBYTE))))
    client.greet()
    replies = client.option(Option.GO, wire.pack_info_request("", [Info.BLOCK_SIZE]))

    assert (OptionReply.INFO, wire.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, 512, 4096, MEBIBYTE)) in replies


# ---------------------------------------------------------------------------------------------- transmission


def test_flag_for_contexts_in_a_request_needs_extended_headers_and_df_needs_chunks(ready):
    simple, structured = ready(MemoryDisk(MEBIBYTE), structured=False).flags, ready(MemoryDisk(MEBIBYTE)).flags

    assert not simple & (TransmissionFlag.SEND_DF | TransmissionFlag.BLOCK_STATUS_PAYLOAD)
    assert structured & (TransmissionFlag.SEND_DF | TransmissionFlag.BLOCK_STATUS_PAYLOAD) == TransmissionFlag.SEND_DF


@pytest.mark.parametrize("allocation", [True, False])
def test_filters_are_offered_where_a_context_was_selected(one, allocation):
    one.agree(extended=True, allocation=allocation)
    one.go()

    assert bool(one.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD) is allocation


def test_what_was_flushed_on_one_connection_is_seen_on_every_other(serve, client_of):
    server = serve(MemoryDisk(MEBIBYTE))
    first, second = client_of(server), client_of(server)
    for client in (first, second):
        client.greet()
        client.go()

    assert first.flags & TransmissionFlag.CAN_MULTI_CONN
    assert first.write(5, b"hello").error == 0
    assert first.ask(CommandType.FLUSH).error == 0
    assert second.read(5, 5).contents() == b"hello"
    assert second.write(7, b"L", CommandFlag.FUA).error == 0
    assert first.read(5, 5).contents() == b"heLlo"


def test_payload_of_32_mebibytes_is_taken_and_one_that_is_refused_is_no_attack(ready_any):
    client = ready_any(MemoryDisk(64 * MEBIBYTE))
    data = bytes(32 * MEBIBYTE)

    assert client.write(0, data).error == 0
    assert client.write(32 * MEBIBYTE + 1, data).error == ErrorNumber.ENOSPC
    assert client.read(0, 10).contents() == bytes(10)


def test_cache_changes_nothing_but_speed(ready_any):
    client = ready_any(MemoryDisk(MEBIBYTE))
    client.write(10, b"data")

    assert client.ask(CommandType.CACHE, 0, 100).error == 0
    assert client.read(9, 6).contents() == b"\0data\0"


@pytest.mark.parametrize("offset", [0, 512, 1 << 19])
def test_one_extent_when_one_is_asked_for_and_no_longer_than_the_request(ready, offset):
    disk = MemoryDisk(MEBIBYTE)
    disk.pwrite(b"x" * 70000, 1 << 19)
    reply = ready(disk).ask(CommandType.BLOCK_STATUS, offset, MEBIBYTE // 2, CommandFlag.REQ_ONE)

    ((length, _),) = reply.extents[1]
    assert 0 < length <= MEBIBYTE // 2

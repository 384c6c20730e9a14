"""Requests larger than one request may be: the exact pieces that the server sees, and what becomes of errors in them."""

from __future__ import annotations

import os
from typing import Any

import pytest

from nbdcore import Client, CommandError, Phase, UsageError
from nbdcore.protocol.constants import CommandFlag, CommandType
from nbdcore.testing.scripted import EVERYTHING, Reply, Request, answer, data, error, serve, simple
from tests.clients.talking import DISK, DONE, PATIENCE, talk

KIB = 1 << 10
LIMIT = 64 * KIB
#: What the server of most of these tests says: multiples of 512, no more than 64 KiB at a time.
SMALL = {"block_size": (512, 4096, LIMIT)}


def disk_reply(disk: bytes | bytearray) -> Reply:
    """Serve reads and writes from memory; acknowledge the rest."""

    def reply(request: Request) -> bytes:
        if request.kind == CommandType.READ:
            return data(bytes(disk[request.offset : request.offset + request.count]))(request)
        if request.kind == CommandType.WRITE:
            disk[request.offset : request.offset + request.count] = request.payload
        return DONE(request)

    return reply


def pieces(requests: list[Request]) -> list[tuple[int, int, int]]:
    return [(request.offset, request.count, request.flags) for request in requests if request.kind != CommandType.DISC]


def test_a_read_is_split_and_put_together():
    disk = os.urandom(DISK)
    with talk(serve(disk_reply(disk)), **SMALL) as (client, connection):
        assert client.pread(3 * LIMIT + 512, 1024, timeout=PATIENCE) == disk[1024 : 1024 + 3 * LIMIT + 512]
        assert pieces(connection.requests) == [(1024 + n * LIMIT, LIMIT, 0) for n in range(3)] + [(1024 + 3 * LIMIT, 512, 0)]


def test_reading_into_a_buffer_is_split_in_place():
    disk = os.urandom(DISK)
    with talk(serve(disk_reply(disk)), **SMALL) as (client, connection):
        buffer = bytearray(DISK)
        assert client.pread_into(buffer, 0, timeout=PATIENCE) == DISK
        assert buffer == disk
        assert len(connection.requests) == 16


def test_a_write_is_split_with_its_flag_on_every_piece():
    disk, contents = bytearray(DISK), os.urandom(2 * LIMIT + 1024)
    with talk(serve(disk_reply(disk)), **SMALL) as (client, connection):
        client.pwrite(contents, 512, fua=True, timeout=PATIENCE)
        assert disk[512 : 512 + len(contents)] == contents
        flags = int(CommandFlag.FUA)
        assert pieces(connection.requests) == [
            (512, LIMIT, flags),
            (512 + LIMIT, LIMIT, flags),
            (512 + 2 * LIMIT, 1024, flags),
        ]


def test_exactly_the_maximum_is_one_request():
    with talk(serve(disk_reply(bytearray(DISK))), **SMALL) as (client, connection):
        client.pread(LIMIT, 0, timeout=PATIENCE)
        client.pwrite(bytes(LIMIT), 0, timeout=PATIENCE)
        assert len(connection.requests) == 2


def test_a_maximum_that_is_no_multiple_of_the_minimum_gives_aligned_pieces():
    # 0xffffffff is "no limit", so that our own cap of 64 MiB counts.
    with talk(serve(simple()), size=256 << 20, structured=False, block_size=(512, 4096, 0xFFFFFFFF)) as (client, connection):
        client.cache(100 << 20, 0, timeout=PATIENCE)
        assert pieces(connection.requests) == [(0, 64 << 20, 0), (64 << 20, 36 << 20, 0)]


def test_without_a_maximum_pieces_are_32_mib():
    with talk(serve(simple()), size=256 << 20, structured=False) as (client, connection):
        client.cache(70 << 20, 0, timeout=PATIENCE)
        assert pieces(connection.requests) == [(0, 32 << 20, 0), (32 << 20, 32 << 20, 0), (64 << 20, 6 << 20, 0)]


@pytest.mark.parametrize(
    ("make", "flags"),
    [
        (lambda c: c.zero(LIMIT + 512, 512, timeout=PATIENCE), 0),
        (
            lambda c: c.zero(LIMIT + 512, 512, fua=True, no_hole=True, timeout=PATIENCE),
            int(CommandFlag.FUA | CommandFlag.NO_HOLE),
        ),
        (lambda c: c.cache(LIMIT + 512, 512, timeout=PATIENCE), 0),
    ],
    ids=["zero", "zero with flags", "cache"],
)
def test_zero_and_cache_obey_the_maximum_where_lengths_have_32_bits(make, flags):
    with talk(serve(DONE), **SMALL) as (client, connection):
        make(client)
        assert pieces(connection.requests) == [(512, LIMIT, flags), (512 + LIMIT, 512, flags)]


@pytest.mark.parametrize(
    "make",
    [
        lambda c: c.trim(5 << 30, 512, timeout=PATIENCE),
        lambda c: c.zero(5 << 30, 512, fast_zero=True, timeout=PATIENCE),
    ],
    ids=["trim", "fast zero"],
)
def test_requests_without_data_fill_32_bits_with_whole_sectors(make):
    most = (1 << 32) - 512
    with talk(serve(DONE), size=8 << 30, **SMALL) as (client, connection):
        make(client)
        assert [(offset, count) for offset, count, _ in pieces(connection.requests)] == [
            (512, most),
            (512 + most, (5 << 30) - most),
        ]


@pytest.mark.parametrize("name", ["trim", "zero", "cache"])
def test_extended_headers_need_no_pieces(name):
    with talk(serve(DONE), size=1 << 40, extended=True, **SMALL) as (client, connection):
        getattr(client, name)(1 << 40, 0, timeout=PATIENCE)
        assert pieces(connection.requests) == [(0, 1 << 40, 0)]


def test_block_status_cuts_a_count_down_to_one_request():
    from nbdcore.testing.scripted import status

    with talk(serve(status(1, [(4096, 0)])), size=8 << 30, **SMALL) as (client, connection):
        client.block_status(8 << 30, 0, timeout=PATIENCE)
        assert pieces(connection.requests) == [(0, (1 << 32) - 512, 0)]


def test_no_more_than_four_pieces_are_under_way_at_a_time():
    waiting: list[int] = []

    def in_bursts(connection: Any) -> None:
        requests = [connection.receive_request() for _ in range(4)]
        with pytest.raises(AssertionError, match=r"sent only 0 of 4 bytes"):
            type(connection)(connection._sock, 0.05).receive_request()
        waiting.append(len(requests))
        for request in requests:
            connection.send(DONE(request))

    with talk(in_bursts, serve(DONE), **SMALL) as (client, connection):
        client.cache(6 * LIMIT, 0, timeout=PATIENCE)
        assert len(connection.requests) == 6
    assert waiting == [4]


# ---------------------------------------------------------------------------------------------- errors


def failing_at(*numbers: int, errors: tuple[int, ...]) -> Reply:
    """Fail the requests that come as these numbers, counted from 1, with these errors."""
    seen: list[Request] = []

    def reply(request: Request) -> bytes:
        seen.append(request)
        if len(seen) in numbers:
            return error(errors[numbers.index(len(seen))], f"piece {len(seen)}")(request)
        if request.kind == CommandType.READ:
            return data(bytes(request.count))(request)
        return DONE(request)

    return reply


@pytest.mark.parametrize(
    "make",
    [
        lambda c: c.pread(DISK, 0, timeout=PATIENCE),
        lambda c: c.pwrite(bytes(DISK), 0, timeout=PATIENCE),
        lambda c: c.zero(DISK, 0, timeout=PATIENCE),
        lambda c: c.cache(DISK, 0, timeout=PATIENCE),
    ],
    ids=["pread", "pwrite", "zero", "cache"],
)
def test_the_first_error_is_raised_when_the_rest_has_settled_and_the_connection_lives(make):
    with talk(serve(failing_at(2, 4, errors=(5, 28))), **SMALL) as (client, connection):
        with pytest.raises(CommandError, match="piece 2") as caught:
            make(client)
        assert caught.value.errno == 5
        assert "at offset 65536" in str(caught.value)
        # Those that were under way were waited for: nothing of this call can come later. No more were begun.
        assert 4 <= len(connection.requests) <= 6
        assert client._engine.pending == 0
        assert client.phase is Phase.CONNECTED
        client.flush(timeout=PATIENCE)


def test_an_error_in_the_first_piece_stops_the_rest():
    with talk(serve(failing_at(1, errors=(5,))), **SMALL) as (client, connection):
        with pytest.raises(CommandError):
            client.cache(DISK, 0, timeout=PATIENCE)
        assert len(connection.requests) == 4


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda c: c.pread(2 * DISK, 0), "read of 2097152 bytes at offset 0 reaches past the end"),
        (lambda c: c.pread(DISK, 512), "read of 1048576 bytes at offset 512 reaches past the end"),
        (lambda c: c.pread(1 << 70, 0), "reaches past the end"),
        (lambda c: c.pread_into(bytearray(DISK), 512), "read of 1048576 bytes at offset 512"),
        (lambda c: c.pwrite(bytes(DISK), 512), "write of 1048576 bytes at offset 512"),
        (lambda c: c.trim(1 << 70, 0), "trim of"),
        (lambda c: c.zero(DISK, 512), "write zeroes of 1048576 bytes"),
        (lambda c: c.cache(DISK + 512, 0), "cache of 1049088 bytes"),
        (lambda c: c.pread(LIMIT + 511, 0), "multiples of 512"),
        (lambda c: c.zero(2 * LIMIT, 100), "multiples of 512"),
        (lambda c: c.zero(2 * LIMIT, -512), "offset and count must be numbers from 0 on"),
    ],
)
def test_a_split_request_is_checked_as_a_whole_before_anything_is_sent(make, said):
    with talk(answer(DONE, kind=CommandType.FLUSH), **SMALL) as (client, _):
        with pytest.raises(UsageError, match=said):
            make(client)
        client.flush(timeout=PATIENCE)  # the first that the server hears


def test_a_read_that_must_not_be_fragmented_is_not_split():
    with talk(serve(disk_reply(bytes(DISK))), **SMALL) as (client, connection):
        assert client.pread(DISK, 0, df=True, timeout=PATIENCE) == bytes(DISK)
        buffer = bytearray(2 * LIMIT)
        client.pread_into(buffer, 0, df=True, timeout=PATIENCE)
        assert pieces(connection.requests) == [(0, DISK, int(CommandFlag.DF)), (0, 2 * LIMIT, int(CommandFlag.DF))]


@pytest.mark.parametrize("number", [75, 22], ids=["NBD_EOVERFLOW", "NBD_EINVAL"])
def test_a_read_that_is_too_large_for_one_piece_says_what_to_do(number):
    with talk(answer(error(number)), answer(error(number)), serve(disk_reply(bytes(DISK))), **SMALL) as (client, _):
        with pytest.raises(CommandError, match=r"; the server may be unable to answer .* read less at once, or without df"):
            client.pread(DISK, 0, df=True, timeout=PATIENCE)
        with pytest.raises(CommandError) as told:
            client.pread(512, 0, timeout=PATIENCE)
        assert "df" not in str(told.value)
        assert client.pread(DISK, 0, timeout=PATIENCE) == bytes(DISK)


def test_a_read_only_export_is_read_in_pieces_and_not_written():
    flags = (EVERYTHING & ~0) | 2
    with talk(serve(disk_reply(bytes(DISK))), flags=flags, **SMALL) as (client, _):
        assert client.read_only
        assert client.pread(2 * LIMIT, 0, timeout=PATIENCE) == bytes(2 * LIMIT)
        with pytest.raises(UsageError, match="read-only"):
            client.pwrite(bytes(2 * LIMIT), 0)


def test_nothing_is_sent_when_the_client_is_told_nonsense_about_a_big_read():
    client = Client()
    with pytest.raises(UsageError, match="newly created"):
        client.pread(1 << 40, 0)
    client.close()

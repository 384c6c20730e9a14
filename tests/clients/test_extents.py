"""Block status and extents: one question and the whole walk, over replies that are shorter, longer, or out of step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from nbdcore import CombinedExtent, CommandError, Extent, Phase, UsageError
from nbdcore.protocol.constants import CommandFlag, CommandType
from nbdcore.testing.scripted import EVERYTHING, Reply, Request, answer, error, goodbye, serve, status
from tests.clients.talking import DONE, PATIENCE, talk

KIB = 1 << 10
SIZE = 64 * KIB
BITMAP = "qemu:dirty-bitmap:b"
TWO = {"contexts": {1: "base:allocation", 7: BITMAP}, "options": {"contexts": ("base:allocation", BITMAP)}}
Map = Sequence[tuple[int, int]]


def replies(*each: Reply) -> Reply:
    return lambda request: b"".join(reply(request) for reply in each)


def kib(*extents: tuple[int, int]) -> list[tuple[int, int]]:
    """Return (length, flags) pairs with the lengths given in KiB."""
    return [(length * KIB, flags) for length, flags in extents]


def plain(extents: Iterable[Any]) -> list[tuple[int, int, Any]]:
    return [(extent.offset // KIB, extent.length // KIB, extent.flags) for extent in extents]


def of_map(whole: Map, *, context: int = 1, at_most: int = 10**9, past_request: bool = False) -> Reply:
    """Describe a request from a map of the whole export, in so many extents at most."""

    def reply(request: Request) -> bytes:
        end, at, found = request.offset + request.count, 0, []
        for length, flags in whole:
            begin, after = max(at, request.offset), at + length if past_request else min(at + length, end)
            if begin < after and begin < end:
                found.append((after - begin, flags))
            at += length
        return status(context, found[:at_most])(request)

    return reply


# ---------------------------------------------------------------------------------------------- one question


def test_block_status_returns_what_the_server_said():
    with talk(answer(status(1, kib((4, 0), (8, 3))), offset=16 * KIB, count=32 * KIB), size=SIZE) as (client, _):
        found = client.block_status(32 * KIB, 16 * KIB, timeout=PATIENCE)
        assert found == {"base:allocation": [Extent(16 * KIB, 4 * KIB, 0), Extent(20 * KIB, 8 * KIB, 3)]}
        hole = found["base:allocation"][1]
        assert (hole.hole, hole.zero, hole.end) == (True, True, 28 * KIB)


def test_block_status_may_describe_more_than_was_asked():
    with talk(answer(status(1, kib((48, 0)))), size=SIZE) as (client, _):
        assert client.block_status(KIB, 16 * KIB, timeout=PATIENCE) == {"base:allocation": [Extent(16 * KIB, 48 * KIB, 0)]}


@pytest.mark.parametrize("extended", [False, True])
def test_block_status_of_several_contexts_in_any_order(extended):
    both = replies(status(7, kib((2, 1)), done=False), status(1, kib((8, 0))))
    with talk(answer(both), size=SIZE, extended=extended, **TWO) as (client, _):
        found = client.block_status(8 * KIB, 0, timeout=PATIENCE)
        assert found == {"base:allocation": [Extent(0, 8 * KIB, 0)], BITMAP: [Extent(0, 2 * KIB, 1)]}


def test_one_extent_a_context_is_asked_for_with_a_flag():
    with talk(answer(status(1, kib((4, 0))), flags=int(CommandFlag.REQ_ONE)), size=SIZE) as (client, _):
        client.block_status(8 * KIB, 0, req_one=True, timeout=PATIENCE)


def test_an_error_of_block_status_leaves_the_connection_alive():
    failing = replies(status(1, kib((4, 0)), done=False), error(5, "bad map"))
    with talk(answer(failing), answer(status(1, kib((4, 0)))), size=SIZE) as (client, _):
        with pytest.raises(CommandError, match="bad map"):
            client.block_status(8 * KIB, 0, timeout=PATIENCE)
        assert client.block_status(8 * KIB, 0, timeout=PATIENCE)


# ---------------------------------------------------------------------------------------------- some of the contexts


def test_a_filter_is_sent_to_a_server_that_knows_it():
    with talk(answer(status(7, kib((4, 1)))), size=SIZE, extended=True, **TWO) as (client, connection):
        assert client.can_block_status_payload
        assert client.block_status(8 * KIB, 0, contexts=[BITMAP], timeout=PATIENCE) == {BITMAP: [Extent(0, 4 * KIB, 1)]}
        (request,) = connection.requests
        assert request.flags == CommandFlag.PAYLOAD_LEN
        assert request.payload == (8 * KIB).to_bytes(8, "big") + (7).to_bytes(4, "big")


@pytest.mark.parametrize("offer", [{"extended": False}, {"extended": True, "flags": EVERYTHING & ~(1 << 12)}])
def test_a_filter_works_here_where_the_server_does_not_know_it(offer):
    both = replies(status(1, kib((8, 0)), done=False), status(7, kib((4, 1))))
    with talk(answer(both, payload=b""), size=SIZE, **offer, **TWO) as (client, _):
        assert not client.can_block_status_payload
        assert client.block_status(8 * KIB, 0, contexts=[BITMAP], timeout=PATIENCE) == {BITMAP: [Extent(0, 4 * KIB, 1)]}


def test_a_filter_keeps_the_order_that_it_names():
    both = replies(status(1, kib((8, 0)), done=False), status(7, kib((4, 1))))
    with talk(answer(both), size=SIZE, **TWO) as (client, _):
        found = client.block_status(8 * KIB, 0, contexts=iter([BITMAP, "base:allocation", BITMAP]), timeout=PATIENCE)
        assert list(found) == [BITMAP, "base:allocation"]


@pytest.mark.parametrize(
    ("contexts", "said"),
    [
        (["qemu:other"], r"qemu:other is not selected \(selected: base:allocation\)"),
        ([], "no metadata context is named"),
        ("base:allocation", "are a list of strings, not str"),
        (b"base:allocation", "are a list of strings, not bytes"),
        ([1], "is a string, not int"),
        (7, "are a list of strings, not int"),
    ],
)
def test_a_filter_of_what_is_not_selected_is_a_usage_error(contexts, said):
    with talk(goodbye, size=SIZE) as (client, _):
        with pytest.raises(UsageError, match=said):
            client.block_status(KIB, 0, contexts=contexts)
        client.disconnect(timeout=PATIENCE)


def test_without_structured_replies_there_is_no_block_status():
    with talk(goodbye, size=SIZE, structured=False) as (client, _):
        assert client.contexts == ()
        for call in (lambda: client.block_status(KIB, 0), client.extents):
            with pytest.raises(UsageError) as caught:
                call()
            assert caught.value.errno == 95
        client.disconnect(timeout=PATIENCE)


# ---------------------------------------------------------------------------------------------- the walk

WHOLE: Map = kib((8, 0), (8, 3), (16, 3), (16, 0), (16, 2))


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("past_request", [False, True])
@pytest.mark.parametrize("at_most", [1, 2, 3, 100])
def test_a_walk_is_the_same_however_the_server_cuts_it(at_most, past_request, extended):
    server = serve(of_map(WHOLE, at_most=at_most, past_request=past_request))
    with talk(server, size=SIZE, extended=extended) as (client, connection):
        merged = [(0, 8, 0), (8, 24, 3), (32, 16, 0), (48, 16, 2)]
        assert plain(client.extents(timeout=PATIENCE)) == merged
        assert next(request.offset for request in connection.requests) == 0
        assert len(connection.requests) == {1: 5, 2: 3, 3: 2, 100: 1}[at_most]
        # A part of it is clipped at both ends.
        assert plain(client.extents(offset=10 * KIB, count=30 * KIB, timeout=PATIENCE)) == [(10, 22, 3), (32, 8, 0)]
        assert plain(client.extents(offset=60 * KIB, timeout=PATIENCE)) == [(60, 4, 2)]
        assert plain(client.extents(count=KIB, timeout=PATIENCE)) == [(0, 1, 0)]


def test_a_walk_asks_for_the_rest_each_time():
    with talk(serve(of_map(WHOLE, at_most=2)), size=SIZE) as (client, connection):
        list(client.extents(offset=4 * KIB, timeout=PATIENCE))
        assert [(r.offset // KIB, r.count // KIB) for r in connection.requests if r.kind == CommandType.BLOCK_STATUS] == [
            (4, 60),
            (16, 48),
            (48, 16),
        ]


@pytest.mark.parametrize(("first_cut", "second_cut"), [(1, 1), (1, 2), (2, 1), (100, 1), (1, 100), (100, 100)])
def test_several_contexts_go_in_lock_step(first_cut, second_cut):
    """Whichever covers less says how far the walk gets; extents end where either of them changes."""
    other: Map = kib((4, 1), (20, 0), (40, 1))
    both = replies(
        lambda r: of_map(WHOLE, at_most=first_cut)(r)[:0] + not_done(of_map(WHOLE, at_most=first_cut), r),
        of_map(other, context=7, at_most=second_cut),
    )
    with talk(serve(both), size=SIZE, **TWO) as (client, _):
        combined = client.extents("base:allocation", BITMAP, timeout=PATIENCE)
        expected = [(0, 4, (0, 1)), (4, 4, (0, 0)), (8, 16, (3, 0)), (24, 8, (3, 1)), (32, 16, (0, 1)), (48, 16, (2, 1))]
        assert plain(combined) == expected
        swapped = client.extents(BITMAP, "base:allocation", offset=4 * KIB, count=24 * KIB, timeout=PATIENCE)
        assert plain(swapped) == [(4, 4, (0, 0)), (8, 16, (0, 3)), (24, 4, (1, 3))]


def not_done(reply: Reply, request: Request) -> bytes:
    """Return a chunk without the flag that says it is the last."""
    encoded = bytearray(reply(request))
    encoded[5] &= ~1
    return bytes(encoded)


def test_combined_extents_are_values():
    extent = CombinedExtent(4, 8, (0, 1))
    assert extent == CombinedExtent(4, 8, (0, 1))
    assert extent.end == 12


def test_the_extents_of_one_context_may_come_in_several_chunks():
    pieces = replies(status(1, kib((8, 0)), done=False), status(1, kib((8, 0), (48, 1))))
    with talk(answer(pieces), size=SIZE) as (client, _):
        assert plain(client.extents(timeout=PATIENCE)) == [(0, 16, 0), (16, 48, 1)]


@pytest.mark.parametrize("reply", [DONE, status(9, kib((64, 0))), status(1, [(0, 0)])], ids=["nothing", "a stranger", "no bytes"])
def test_a_server_that_describes_nothing_is_an_error_and_no_endless_loop(reply):
    with talk(answer(reply), answer(DONE, kind=CommandType.FLUSH), size=SIZE) as (client, _):
        with pytest.raises(CommandError) as caught:
            list(client.extents(timeout=PATIENCE))
        assert caught.value.errno == 71
        assert client.phase is Phase.CONNECTED
        client.flush(timeout=PATIENCE)


def test_a_server_that_forgets_one_of_two_contexts_is_an_error():
    with talk(answer(status(1, kib((64, 0)))), size=SIZE, **TWO) as (client, _):
        with pytest.raises(CommandError, match="described nothing in context 'qemu:dirty-bitmap:b'"):
            list(client.extents("base:allocation", BITMAP, timeout=PATIENCE))
        client.close()


def test_an_error_in_the_middle_of_a_walk_comes_after_what_was_settled():
    with talk(answer(of_map(WHOLE, at_most=3)), answer(error(5)), size=SIZE) as (client, _):
        walk = client.extents(timeout=PATIENCE)
        assert plain([next(walk)]) == [(0, 8, 0)]
        with pytest.raises(CommandError):
            next(walk)
        assert client.phase is Phase.CONNECTED


def test_a_server_that_crawls_gets_there():
    with talk(serve(lambda request: status(1, [(512, request.offset // 512 % 2)])(request)), size=SIZE) as (client, connection):
        assert len(list(client.extents(timeout=PATIENCE))) == SIZE // 512
        assert len(connection.requests) == SIZE // 512


def test_the_walk_of_an_empty_range_asks_nothing():
    with talk(goodbye, size=SIZE) as (client, _):
        assert list(client.extents(count=0)) == []
        assert list(client.extents(offset=SIZE)) == []
        client.disconnect(timeout=PATIENCE)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"offset": -1}, "no part of the export"),
        ({"offset": SIZE + 1}, "no part of the export"),
        ({"count": -1}, "no part of the export"),
        ({"count": SIZE + 1}, "no part of the export"),
        ({"offset": 1, "count": SIZE}, "no part of the export"),
        ({"offset": 1.0}, "offset is an integer, not float"),
        ({"count": "1"}, "count is an integer, not str"),
        ({"count": True}, "count is an integer, and True was given"),
        ({"timeout": "1"}, "timeout"),
    ],
)
def test_a_wrong_range_shows_at_once_and_not_at_the_first_step(arguments, said):
    with talk(goodbye, size=SIZE) as (client, _):
        with pytest.raises(UsageError, match=said):
            client.extents(**arguments)
        client.disconnect(timeout=PATIENCE)


def test_a_context_that_is_not_selected_shows_at_once():
    with talk(goodbye, size=SIZE) as (client, _):
        with pytest.raises(UsageError, match="metadata context qemu:x is not selected"):
            client.extents("qemu:x")
        with pytest.raises(UsageError, match="is a string, not NoneType"):
            client.extents(None)
        client.disconnect(timeout=PATIENCE)


def test_a_walk_over_more_than_32_bits_asks_in_whole_sectors():
    size = 10 << 30
    with talk(serve(lambda r: status(1, [(r.count, 0)])(r)), size=size) as (client, connection):
        assert list(client.extents(timeout=PATIENCE)) == [Extent(0, size, 0)]
        assert {request.count % 512 for request in connection.requests} == {0}
        assert len(connection.requests) == 3


def test_a_walk_whose_connection_ends_says_so():
    with talk(answer(of_map(WHOLE, at_most=2)), size=SIZE) as (client, _):
        walk = client.extents(timeout=PATIENCE)
        next(walk)
        client.close()
        with pytest.raises(UsageError, match="extents: the connection is closed"):
            next(walk)


# ---------------------------------------------------------------------------------------------- block sizes


def asked_about(requests: list[tuple[int, int]], reply: Reply) -> Reply:
    """Keep what each request asks about."""

    def answered(request: Request) -> bytes:
        requests.append((request.offset, request.count))
        return reply(request)

    return answered


def exact(extents: Iterable[Any]) -> list[tuple[int, int, int]]:
    return [(extent.offset, extent.length, extent.flags) for extent in extents]


BLOCKS = {"block_size": (4 * KIB, 4 * KIB, 32 * KIB)}


def test_server_that_describes_half_a_block_is_asked_about_the_whole_block_again():
    asked: list[tuple[int, int]] = []
    whole = [(512, 0), (8 * KIB, 3), (64 * KIB - 512 - 8 * KIB, 0)]
    ask = [answer(asked_about(asked, of_map(whole, at_most=2)))] * 2
    with talk(*ask, size=SIZE, **BLOCKS) as (client, _):
        assert exact(client.extents(timeout=PATIENCE)) == [(0, 512, 0), (512, 8 * KIB, 3), (512 + 8 * KIB, 55 * KIB + 512, 0)]
    assert asked == [(0, 64 * KIB), (8 * KIB, 56 * KIB)]


def test_server_that_never_describes_a_whole_block_is_an_error_of_the_server():
    ask = [answer(of_map([(512, 0), (63 * KIB + 512, 3)], at_most=1))] * 2
    with talk(*ask, size=SIZE, **BLOCKS) as (client, _):
        with pytest.raises(CommandError, match="less than a block"):
            list(client.extents(timeout=PATIENCE))
        assert client.phase is Phase.CONNECTED


def test_export_that_ends_within_a_block_is_described_to_its_end():
    size = 10 * KIB + 3
    with talk(answer(status(1, [(size, 3)]), offset=0, count=size), size=size, **BLOCKS) as (client, _):
        assert exact(client.extents(timeout=PATIENCE)) == [(0, size, 3)]


def test_range_within_blocks_is_asked_about_in_whole_ones_and_cut():
    with talk(answer(status(1, kib((8, 3))), offset=4 * KIB, count=8 * KIB), size=SIZE, **BLOCKS) as (client, _):
        assert exact(client.extents(offset=5 * KIB, count=4 * KIB, timeout=PATIENCE)) == [(5 * KIB, 4 * KIB, 3)]

"""Records of TLS: bytes are cut into them in order, and their end is found in what was received, however it is cut."""

from __future__ import annotations

import random

import pytest

from nbdcore.streams.tls.records import end_of_records, pieces


def record(size: int, kind: int = 23) -> bytes:
    return bytes([kind, 3, 3]) + size.to_bytes(2, "big") + bytes(size)


def end_of(received: bytes) -> int:
    # What lies behind the end in a buffer that is used again looks like records too.
    return end_of_records(memoryview(received + record(10)), len(received))


def test_small_parts_share_a_record():
    assert list(pieces([memoryview(b"x" * 28)] * 100)) == [b"x" * 2800]


@pytest.mark.parametrize("sizes", [[28, 65536], [0], [], [5000, 1, 2, 5000], [4096] * 9, [16384, 16385, 0, 7]])
def test_pieces_are_records_in_order(sizes):
    parts = [memoryview(random.Random(place).randbytes(size)) for place, size in enumerate(sizes)]
    cut = list(pieces(parts))
    assert b"".join(cut) == b"".join(parts)
    assert all(0 < len(piece) <= 16384 for piece in cut)


def test_part_of_a_record_is_left_wherever_it_is_cut():
    first, second = record(3, 22), record(7)
    for cut in range(len(second)):
        assert end_of(first + second[:cut]) == len(first)
    for cut in range(len(first)):
        assert end_of(first[:cut]) == 0


@pytest.mark.parametrize("kind", range(20, 25))
def test_records_of_every_type_and_of_the_greatest_length_are_whole(kind):
    received = record(16384 + 2048, kind) + record(0, kind)
    assert end_of(received) == len(received)


@pytest.mark.parametrize(
    "nonsense",
    [
        bytes([19, 3, 3, 0, 9]),
        bytes([25, 3, 3, 0, 9]),
        bytes([23, 2, 0, 0, 9]),
        bytes([23, 3, 3]) + (16384 + 2049).to_bytes(2, "big"),
    ],
    ids=["type too low", "type too high", "version", "length"],
)
def test_what_is_no_record_is_given_on_at_once(nonsense):
    received = record(5) + nonsense
    assert end_of(received) == len(received)

"""The choppy stream cuts everything up, loses nothing, and does the same each time for the same seed."""

from __future__ import annotations

from nbdcore.streams.memory import memory_pair
from nbdcore.testing.choppy import ChoppyStream


def received_pieces(seed: int) -> list[bytes | None]:
    near, far = memory_pair()
    choppy = ChoppyStream(near, most=3, seed=seed)
    far.send([memoryview(bytes(range(100)))])
    room = bytearray(100)
    pieces: list[bytes | None] = []
    while sum(len(piece or b"") for piece in pieces) < 100:
        count = choppy.recv_into(memoryview(room))
        pieces.append(None if count is None else bytes(room[:count]))
    choppy.close()
    far.close()
    return pieces


def test_receives_everything_in_small_pieces_and_pauses() -> None:
    pieces = received_pieces(seed=1)
    assert b"".join(piece for piece in pieces if piece is not None) == bytes(range(100))
    assert {len(piece) for piece in pieces if piece is not None} == {1, 2, 3}
    assert None in pieces


def test_same_seed_gives_same_pieces() -> None:
    assert received_pieces(seed=7) == received_pieces(seed=7) != received_pieces(seed=8)


def test_send_cuts_inside_a_part_and_reaches_over_parts() -> None:
    near, far = memory_pair()
    choppy = ChoppyStream(near, most=3, seed=3)
    parts = [memoryview(b"ab"), memoryview(b"cdefgh")]
    counts = {choppy.send(parts) for _ in range(60)}
    assert counts == {None, 1, 2, 3}
    room = bytearray(1000)
    count = far.recv_into(memoryview(room))
    assert set(bytes(room[:count]).split(b"a")) == {b"", b"b", b"bc"}
    choppy.close()
    far.close()

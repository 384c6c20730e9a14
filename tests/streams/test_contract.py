"""Every stream of nbdcore keeps the Stream contract, and the contract's checks notice a stream that does not."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from nbdcore.streams.base import Stream, Want
from nbdcore.streams.memory import memory_pair
from nbdcore.streams.sockets import SocketStream
from nbdcore.testing import ContractBroken, moving, streams
from nbdcore.testing.choppy import ChoppyStream

Pair = tuple[Stream, Stream]


def tcp_pair() -> Pair:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    return SocketStream(near), SocketStream(far)


def small_memory_pair() -> Pair:
    return memory_pair(capacity=4096)


def choppy_pair() -> Pair:
    near, far = memory_pair()
    return ChoppyStream(near, most=4099, seed=1), ChoppyStream(far, most=4099, seed=2)


PAIRS = [tcp_pair, memory_pair, small_memory_pair, choppy_pair]


@pytest.mark.parametrize("clause", streams.CLAUSES, ids=lambda clause: clause.__name__)
@pytest.mark.parametrize("make_pair", PAIRS, ids=lambda make_pair: make_pair.__name__)
def test_stream_keeps_the_clause(make_pair: Callable[[], Pair], clause) -> None:
    near, far = make_pair()
    try:
        clause(near, far)
    finally:
        near.close()
        far.close()


def test_check_stream_closes_every_pair_it_was_given() -> None:
    pairs = []

    def make_pair() -> Pair:
        pairs.append(memory_pair())
        return pairs[-1]

    streams.check_stream(make_pair)
    assert len(pairs) == len(streams.CLAUSES)
    assert {stream.fileno() for pair in pairs for stream in pair} == {-1}


# --- a contract that nothing can break is none: one wrong stream for each kind of fault ---


class Wrapper(ChoppyStream):
    """Passes all on, but for what a test overrides."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream, most=1 << 30, quiet=0)


class AnswersZeroForNotYet(Wrapper):
    def recv_into(self, room):
        return super().recv_into(room) or 0


class SwapsBytes(Wrapper):
    def recv_into(self, room):
        count = super().recv_into(room)
        room[: count or 0] = bytes(room[: count or 0])[::-1]
        return count


class KeepsViews(Wrapper):
    """Sends what it was given one call later."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        self.kept: list[memoryview] = []

    def send(self, parts):
        self.flush()
        # Views of the caller's own memory, not copies of it.
        self.kept = [part[:] for part in parts]
        return sum(map(len, parts))

    def recv_into(self, room):
        self.flush()
        return super().recv_into(room)

    def flush(self):
        super().send([memoryview(b"".join(self.kept))])
        self.kept = []

    def wants(self):
        return Want.WRITE if self.kept else Want.NOTHING


class TakesEverything(Wrapper):
    def send(self, parts):
        return super().send(parts) or sum(map(len, parts))


class LosesTheEnd(Wrapper):
    def recv_into(self, room):
        return super().recv_into(room) or None


class KeepsItsNumber(Wrapper):
    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        self.number = stream.fileno()

    def fileno(self):
        return self.number


class ForgetsToClose(Wrapper):
    def close(self):
        return None


class HalfClosesBothWays(Wrapper):
    def finish_sending(self):
        super().close()
        return True


@pytest.mark.parametrize(
    ("wrong", "clause"),
    [
        (AnswersZeroForNotYet, "answers none when nothing has come"),
        (SwapsBytes, "keeps order and room"),
        (KeepsViews, "keeps no view after send"),
        (TakesEverything, "bounds what is not received"),
        (LosesTheEnd, "delivers all before the end"),
        (HalfClosesBothWays, "tells the peer that it is finished"),
        (KeepsItsNumber, "closes once and for all"),
        (ForgetsToClose, "closes once and for all"),
    ],
)
def test_broken_stream_is_found_out(wrong: type[Wrapper], clause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Stream] = []

    def make_pair() -> Pair:
        near, far = memory_pair()
        made.append(near)
        return wrong(near), far

    names = [each.__name__.strip("_").replace("_", " ") for each in streams.CLAUSES]
    broken = names.index(clause)
    monkeypatch.setattr(streams, "CLAUSES", streams.CLAUSES[:broken])
    streams.check_stream(make_pair)  # those before it are kept
    monkeypatch.undo()
    # What a broken stream does not do need not be waited for as long as what a good one does.
    for module in (streams, moving):
        monkeypatch.setattr(module, "PATIENCE", 0.3)
    monkeypatch.setattr(streams, "CLAUSES", streams.CLAUSES[broken : broken + 1])
    with pytest.raises(ContractBroken, match=clause):
        streams.check_stream(make_pair)
    for stream in made:
        stream.close()

"""Pairs of TLS streams inside one process, and what drives both ends of one at once. Every wait has a deadline."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

from nbdcore.streams.base import Stream, Want
from nbdcore.streams.memory import memory_pair
from nbdcore.streams.sockets import SocketStream
from nbdcore.streams.tls.stream import TLSStream
from nbdcore.streams.waiting import Deadline, wait_any

Pair = tuple[Stream, Stream]
MakePair = Callable[[], Pair]
Starter = Callable[[Stream], TLSStream]

#: Seconds that anything here may take on a busy machine.
PATIENCE = 30.0


def tcp_pair() -> Pair:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    return SocketStream(near), SocketStream(far)


PAIRS: tuple[MakePair, ...] = (memory_pair, tcp_pair)


@contextlib.contextmanager
def started(client: Starter, server: Starter, make_pair: MakePair = memory_pair) -> Iterator[tuple[TLSStream, TLSStream]]:
    """Yield the two ends of a connection on which TLS is started and the handshake not yet; both are closed afterwards."""
    near, far = make_pair()
    try:
        yield client(near), server(far)
    finally:
        near.close()
        far.close()


@contextlib.contextmanager
def connected(client: Starter, server: Starter, make_pair: MakePair = memory_pair) -> Iterator[tuple[TLSStream, TLSStream]]:
    """Yield the two ends of a connection whose handshake is finished."""
    with started(client, server, make_pair) as (near, far):
        shake(near, far)
        yield near, far


def connected_pair(client: Starter, server: Starter, make_pair: MakePair = memory_pair) -> Pair:
    """Return what `connected` yields, for a caller who closes it."""
    near, far = make_pair()
    ends = client(near), server(far)
    shake(*ends)
    return ends


def shake(near: TLSStream, far: TLSStream) -> None:
    """Finish the handshake at both ends; an end that fails closes, as its owner would, and its error is raised at the end."""
    errors = shake_both(near, far)
    if errors:
        raise errors[0]


def shake_both(*ends: TLSStream) -> list[OSError]:
    """Go on until each end has finished or failed. Returns the errors, in the order in which they came."""
    deadline = Deadline.after(PATIENCE)
    errors: list[OSError] = []
    unfinished = list(ends)
    while unfinished:
        assert not deadline.expired, "the handshake ends"
        unfinished = [end for end in unfinished if not _has_finished(end, errors)]
        if len(unfinished) == len(ends):
            wait_any([(end.fileno(), end.wants()) for end in unfinished], deadline)
    return errors


def _has_finished(end: TLSStream, errors: list[OSError]) -> bool:
    try:
        return end.handshake() and not (end.wants() & Want.WRITE and end.send([]) is None)
    except OSError as exc:
        errors.append(exc)
        end.close()
        return True


def receive(stream: Stream, count: int = 1 << 16) -> bytes:
    """Receive something; b"" is the end."""
    deadline = Deadline.after(PATIENCE)
    room = bytearray(count)
    while (got := stream.recv_into(memoryview(room))) is None:
        assert not deadline.expired, "something arrives"
        wait_any([(stream.fileno(), Want.READ | stream.wants())], deadline)
    return bytes(room[:got])


def receive_exactly(stream: Stream, count: int) -> bytes:
    received = b""
    while len(received) < count:
        piece = receive(stream, count - len(received))
        assert piece, f"{count} bytes arrive before the end, not {received!r}"
        received += piece
    return received


def send(stream: Stream, data: bytes) -> None:
    """Send all of it; for amounts that fit the buffers on the way."""
    deadline = Deadline.after(PATIENCE)
    rest = memoryview(data)
    while rest or stream.wants() & Want.WRITE:
        assert not deadline.expired, "bytes are taken"
        count = stream.send([rest] if rest else [])
        if count is None:
            wait_any([(stream.fileno(), Want.WRITE | stream.wants())], deadline)
        rest = rest[count or 0 :]


def finish(stream: Stream) -> None:
    deadline = Deadline.after(PATIENCE)
    while not stream.finish_sending():
        assert not deadline.expired, "finish_sending() comes to its end"
        wait_any([(stream.fileno(), Want.WRITE | stream.wants())], deadline)

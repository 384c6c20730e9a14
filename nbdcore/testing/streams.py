"""The Stream contract, clause by clause: `check_stream(make_pair)`.

`make_pair` makes two streams connected to each other, anew for each clause; the one under test is the first, the second may be
of any kind that keeps the contract. A stream that needs both ends to be at work (a handshake) finishes that before it is handed
over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from nbdcore.errors import Error
from nbdcore.streams.base import Stream, Want
from nbdcore.streams.waiting import Deadline, wait, wait_any
from nbdcore.testing import ContractBroken, require

__all__ = ["CLAUSES", "check_stream"]

MakePair = Callable[[], tuple[Stream, Stream]]

#: Seconds that a single clause may take on a busy machine.
PATIENCE = 30.0
#: A stream that takes this many bytes which nobody receives has no bound.
_MOST_KEPT = 64 << 20
#: More parts than one system call takes (IOV_MAX is 1024).
_MANY_PARTS = 3000


def check_stream(make_pair: MakePair) -> None:
    """Check every clause of the Stream contract, each on a pair of its own. Raises ContractBroken with the first one broken."""
    for clause in CLAUSES:
        near, far = make_pair()
        try:
            clause(near, far)
        except (ContractBroken, OSError) as exc:
            raise ContractBroken(f"{clause.__name__.removeprefix('_').replace('_', ' ')}: {exc}") from exc
        finally:
            near.close()
            far.close()


# --- clauses ---


def _has_one_pollable_descriptor(near: Stream, far: Stream) -> None:
    before = near.fileno()
    require(before >= 0, "fileno() of an open stream is a descriptor")
    require(not near.buffered(), "buffered() is False when nothing has come")
    wait(before, Want.WRITE, Deadline.after(PATIENCE), "an idle stream's descriptor was never writable")
    _transfer(near, far, b"there", b"and back")
    require(near.fileno() == before, "fileno() stays the same for the life of the stream")
    require(isinstance(near.wants(), Want), "wants() is a Want")
    require(not near.send([]), "send() without parts takes nothing")


def _answers_none_when_nothing_has_come(near: Stream, far: Stream) -> None:
    room = bytearray(b"untouched")
    require(near.recv_into(memoryview(room)) is None, "recv_into() answers None when nothing has come")
    require(room == b"untouched", "recv_into() leaves the room alone when nothing has come")
    _transfer(near, far, b"", b"x")
    require(near.recv_into(memoryview(room)) is None, "recv_into() answers None when everything was received")


def _keeps_order_and_room(near: Stream, far: Stream) -> None:
    _send(far, b"0123456789")
    received = b""
    while len(received) < 10:
        room = bytearray(b"....")
        count = _receive(near, memoryview(room)[1:3])
        require(1 <= count <= 2, f"recv_into() returns 1 to len(room) bytes, not {count}")
        require(room[:1] == b"." and room[1 + count :] == b"." * (3 - count), "recv_into() writes into its room only")
        received += room[1 : 1 + count]
    require(received == b"0123456789", f"bytes arrive as they were sent, not as {received!r}")


def _sends_any_number_of_parts(near: Stream, far: Stream) -> None:
    data = _pattern(_MANY_PARTS * 7)
    parts = [memoryview(data)[at : at + 7] for at in range(0, len(data), 7)]
    parts.insert(1, memoryview(b""))
    require(_transfer(near, far, parts, b"") == (data, b""), "many small parts arrive in order")


def _keeps_no_view_after_send(near: Stream, far: Stream) -> None:
    data = bytearray(b"before")
    with memoryview(data) as view:
        sent = _send_some(near, [view])
    data[:] = b"after!"
    room = bytearray(sent)
    got = 0
    while got < sent:
        got += _receive(far, memoryview(room)[got:], near)
    require(room == b"before"[:sent], "bytes may be changed as soon as send() has returned")


def _bounds_what_is_not_received(near: Stream, far: Stream) -> None:
    piece = memoryview(_pattern(1 << 16))
    sent = 0
    while (count := near.send([piece[sent % len(piece) :]])) is not None:
        require(0 < count <= len(piece), f"send() returns 1 to the number of bytes offered, or None, not {count}")
        sent += count
        require(sent <= _MOST_KEPT, "send() answers None some time when nobody receives")
    room = bytearray(1 << 16)
    got = 0
    while got < sent:
        count = _receive(far, memoryview(room), near)
        expected = b"".join((piece[got % len(piece) :], piece))[:count]
        require(room[:count] == expected, f"bytes arrive as they were sent, at {got} of {sent}")
        got += count
    require(_send_some(near, [memoryview(b"more")]), "send() goes on once there is room again")


def _moves_much_both_ways_at_once(near: Stream, far: Stream) -> None:
    there, back = _pattern(3 << 20), _pattern((4 << 20) + 1)
    require(_transfer(near, far, there, back) == (there, back), "megabytes both ways at once arrive unchanged")


def _delivers_all_before_the_end(near: Stream, far: Stream) -> None:
    _send(far, b"last words")
    _finish(far)
    require(_receive_all(near) == b"last words", "what was sent before finish_sending() arrives, then 0")
    require(_receive(near, memoryview(bytearray(4))) == 0, "recv_into() answers 0 again after the end")
    require(_transfer(near, far, b"still talking", b"") == (b"still talking", b""), "the other way stays open after a half-close")


def _tells_the_peer_that_it_is_finished(near: Stream, far: Stream) -> None:
    _send(near, b"bye")
    _finish(near)
    require(_receive_all(far) == b"bye", "finish_sending() lets the peer receive all, then 0")
    require(_transfer(near, far, b"", b"answer") == (b"", b"answer"), "receiving goes on after finish_sending()")


def _closes_once_and_for_all(near: Stream, far: Stream) -> None:
    near.close()
    near.close()
    require(near.fileno() == -1, "fileno() is -1 once closed")
    _must_fail(lambda: near.recv_into(memoryview(bytearray(1))), "recv_into() after close() raises an OSError")
    _must_fail(lambda: near.send([memoryview(b"x")]), "send() after close() raises an OSError")
    _must_fail(near.finish_sending, "finish_sending() after close() raises an OSError")
    require(not _receive_all(far), "the peer of a closed stream sees the end")


def _waits_and_takes_nothing(near: Stream, far: Stream) -> None:
    _send(far, b"x")
    waiting = _Waiting(near)
    waiting.ends("wait() ends when something has come")
    if not waiting.answer:
        return  # it has no way of its own
    room = bytearray(2)
    require(near.recv_into(memoryview(room)) == 1 and room[:1] == b"x", "wait() leaves what has come to recv_into()")
    waiting = _Waiting(near)
    _send(far, b"y")
    waiting.ends("wait() ends when something comes")
    require(near.recv_into(memoryview(room)) == 1, "wait() ends only when recv_into() has something to say")
    require(not near.wait(0.01), "wait() ends when its time has passed, and says that nothing has come")
    waiting = _Waiting(near)
    near.hang_up()
    waiting.ends("hang_up() in another thread ends wait()")


def _closes_from_another_thread(near: Stream, far: Stream) -> None:
    del far
    fd = near.fileno()
    closer = threading.Timer(0.05, near.close)
    closer.start()
    try:
        wait(fd, Want.READ, Deadline.after(PATIENCE), "close() in another thread did not wake who waits on the descriptor")
    except Error as exc:
        require(not isinstance(exc, TimeoutError), str(exc))
    finally:
        closer.join()
    _must_fail(lambda: near.recv_into(memoryview(bytearray(1))), "recv_into() raises an OSError after close() in another thread")


def _survives_a_peer_that_leaves(near: Stream, far: Stream) -> None:
    _send(near, b"never received")
    far.close()
    data = memoryview(_pattern(1 << 16))
    deadline = Deadline.after(PATIENCE)
    try:
        while True:
            require(not deadline.expired, "send() to a peer that is gone raises an OSError some time")
            if near.send([data]) is None:
                wait(near.fileno(), Want.WRITE, deadline, "the descriptor of a stream whose peer is gone is never writable")
    except TimeoutError as exc:
        raise ContractBroken(str(exc)) from exc
    except OSError:
        near.close()
    require(near.fileno() == -1, "close() works after an error")


#: In the order in which they are checked; each takes the two ends of a new pair.
CLAUSES: tuple[Callable[[Stream, Stream], None], ...] = (
    _has_one_pollable_descriptor,
    _answers_none_when_nothing_has_come,
    _keeps_order_and_room,
    _sends_any_number_of_parts,
    _keeps_no_view_after_send,
    _bounds_what_is_not_received,
    _moves_much_both_ways_at_once,
    _delivers_all_before_the_end,
    _tells_the_peer_that_it_is_finished,
    _closes_once_and_for_all,
    _waits_and_takes_nothing,
    _closes_from_another_thread,
    _survives_a_peer_that_leaves,
)


# --- moving bytes; every wait has a deadline ---


def _pattern(count: int) -> bytes:
    """Return bytes that repeat only every 251, so that a shift by any power of two shows."""
    return (bytes(range(251)) * (count // 251 + 1))[:count]


def _must_fail(call: Callable[[], object], clause: str) -> None:
    try:
        call()
    except OSError:
        return
    raise ContractBroken(clause)


def _pause(stream: Stream, want: Want, deadline: Deadline, message: str) -> None:
    if not (want & Want.READ and stream.buffered()):
        try:
            wait(stream.fileno(), want | stream.wants(), deadline, message)
        except TimeoutError as exc:
            raise ContractBroken(message) from exc


def _send_some(stream: Stream, parts: list[memoryview]) -> int:
    deadline = Deadline.after(PATIENCE)
    while (count := stream.send(parts)) is None:
        _pause(stream, Want.WRITE, deadline, "the descriptor becomes writable when there is room")
        require(not deadline.expired, "send() takes bytes once the descriptor is writable")
    return count


def _send(stream: Stream, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[_send_some(stream, [rest]) :]


def _receive(stream: Stream, room: memoryview, sender: Stream | None = None) -> int:
    """Receive something; 0 is the end. `sender` is given a chance to get rid of what it still owes."""
    deadline = Deadline.after(PATIENCE)
    while (count := stream.recv_into(room)) is None:
        if sender is not None and sender.wants() & Want.WRITE:
            sender.send([])
        _pause(stream, Want.READ, deadline, "the descriptor becomes readable when bytes have come")
        require(not deadline.expired, "recv_into() returns bytes once the descriptor is readable")
    return count


def _receive_all(stream: Stream) -> bytes:
    received = bytearray()
    room = bytearray(1 << 16)
    while count := _receive(stream, memoryview(room)):
        received += room[:count]
    return bytes(received)


def _finish(stream: Stream) -> None:
    deadline = Deadline.after(PATIENCE)
    while not stream.finish_sending():
        _pause(stream, Want.WRITE, deadline, "finish_sending() returns True some time")


class _Waiting(threading.Thread):
    """A thread in `stream.wait()`."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(daemon=True)
        self.answer: object = None
        self._stream = stream
        self.start()

    def run(self) -> None:
        self.answer = self._stream.wait()

    def ends(self, clause: str) -> None:
        self.join(PATIENCE)
        require(not self.is_alive(), clause)
        require(isinstance(self.answer, bool), "wait() returns a bool, and raises nothing")


class _Way:
    """Bytes on their way from one stream to the other."""

    def __init__(self, source: Stream, target: Stream, parts: list[memoryview]) -> None:
        self.source, self.target = source, target
        self.parts = parts
        self.total = sum(map(len, parts))
        self.received = bytearray()
        self._room = memoryview(bytearray(1 << 16))

    def arrived(self) -> bool:
        return len(self.received) >= self.total

    def step(self) -> bool:
        """Send and receive what can be; tell whether anything moved."""
        moved = False
        if (self.parts or self.source.wants() & Want.WRITE) and (sent := self.source.send(self.parts)) is not None:
            moved = bool(sent)
            while self.parts and sent >= len(self.parts[0]):
                sent -= len(self.parts.pop(0))
            if sent:
                self.parts[0] = self.parts[0][sent:]
        if not self.arrived():
            count = self.target.recv_into(self._room)
            require(count != 0, "recv_into() answers 0 only when the peer has finished")
            self.received += self._room[: count or 0]
            moved = moved or bool(count)
        return moved

    def waiting(self) -> list[tuple[int, Want]]:
        sending = Want.WRITE if self.parts else Want.NOTHING
        receiving = Want.NOTHING if self.arrived() else Want.READ
        return [
            (self.source.fileno(), sending | self.source.wants()),
            (self.target.fileno(), receiving | self.target.wants()),
        ]


def _transfer(near: Stream, far: Stream, there: bytes | list[memoryview], back: bytes) -> tuple[bytes, bytes]:
    """Send `there` from near to far and `back` the other way, at the same time, and return what arrived."""
    deadline = Deadline.after(PATIENCE)
    parts = [memoryview(there)] if isinstance(there, bytes) else list(there)
    ways = (_Way(near, far, [part for part in parts if there]), _Way(far, near, [memoryview(back)] if back else []))
    while not all(way.arrived() for way in ways):
        require(not deadline.expired, "bytes arrive")
        # Both take a turn, whether or not the first one moves.
        moved = [way.step() for way in ways]
        if not any(moved) and not any(way.target.buffered() for way in ways):
            wait_any([pair for way in ways for pair in way.waiting()], deadline)
    return bytes(ways[0].received), bytes(ways[1].received)

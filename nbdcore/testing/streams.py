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
from nbdcore.streams.waiting import Deadline, wait
from nbdcore.testing import ContractBroken, require
from nbdcore.testing.moving import PATIENCE, Waiting, finish, receive, receive_all, send, send_some, transfer

__all__ = ["CLAUSES", "check_stream"]

MakePair = Callable[[], tuple[Stream, Stream]]

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
    transfer(near, far, b"there", b"and back")
    require(near.fileno() == before, "fileno() stays the same for the life of the stream")
    require(isinstance(near.wants(), Want), "wants() is a Want")
    require(not near.send([]), "send() without parts takes nothing")


def _answers_none_when_nothing_has_come(near: Stream, far: Stream) -> None:
    room = bytearray(b"untouched")
    require(near.recv_into(memoryview(room)) is None, "recv_into() answers None when nothing has come")
    require(room == b"untouched", "recv_into() leaves the room alone when nothing has come")
    transfer(near, far, b"", b"x")
    require(near.recv_into(memoryview(room)) is None, "recv_into() answers None when everything was received")


def _keeps_order_and_room(near: Stream, far: Stream) -> None:
    send(far, b"0123456789")
    received = b""
    while len(received) < 10:
        room = bytearray(b"....")
        count = receive(near, memoryview(room)[1:3])
        require(1 <= count <= 2, f"recv_into() returns 1 to len(room) bytes, not {count}")
        require(room[:1] == b"." and room[1 + count :] == b"." * (3 - count), "recv_into() writes into its room only")
        received += room[1 : 1 + count]
    require(received == b"0123456789", f"bytes arrive as they were sent, not as {received!r}")


def _sends_any_number_of_parts(near: Stream, far: Stream) -> None:
    data = _pattern(_MANY_PARTS * 7)
    parts = [memoryview(data)[at : at + 7] for at in range(0, len(data), 7)]
    parts.insert(1, memoryview(b""))
    require(transfer(near, far, parts, b"") == (data, b""), "many small parts arrive in order")


def _keeps_no_view_after_send(near: Stream, far: Stream) -> None:
    data = bytearray(b"before")
    with memoryview(data) as view:
        sent = send_some(near, [view])
    data[:] = b"after!"
    room = bytearray(sent)
    got = 0
    while got < sent:
        got += receive(far, memoryview(room)[got:], near)
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
        count = receive(far, memoryview(room), near)
        expected = b"".join((piece[got % len(piece) :], piece))[:count]
        require(room[:count] == expected, f"bytes arrive as they were sent, at {got} of {sent}")
        got += count
    require(send_some(near, [memoryview(b"more")]), "send() goes on once there is room again")


def _moves_much_both_ways_at_once(near: Stream, far: Stream) -> None:
    there, back = _pattern(3 << 20), _pattern((4 << 20) + 1)
    require(transfer(near, far, there, back) == (there, back), "megabytes both ways at once arrive unchanged")


def _delivers_all_before_the_end(near: Stream, far: Stream) -> None:
    send(far, b"last words")
    finish(far)
    require(receive_all(near) == b"last words", "what was sent before finish_sending() arrives, then 0")
    require(receive(near, memoryview(bytearray(4))) == 0, "recv_into() answers 0 again after the end")
    require(transfer(near, far, b"still talking", b"") == (b"still talking", b""), "the other way stays open after a half-close")


def _tells_the_peer_that_it_is_finished(near: Stream, far: Stream) -> None:
    send(near, b"bye")
    finish(near)
    require(receive_all(far) == b"bye", "finish_sending() lets the peer receive all, then 0")
    require(transfer(near, far, b"", b"answer") == (b"", b"answer"), "receiving goes on after finish_sending()")


def _closes_once_and_for_all(near: Stream, far: Stream) -> None:
    near.close()
    near.close()
    require(near.fileno() == -1, "fileno() is -1 once closed")
    _must_fail(lambda: near.recv_into(memoryview(bytearray(1))), "recv_into() after close() raises an OSError")
    _must_fail(lambda: near.send([memoryview(b"x")]), "send() after close() raises an OSError")
    _must_fail(near.finish_sending, "finish_sending() after close() raises an OSError")
    require(not receive_all(far), "the peer of a closed stream sees the end")


def _waits_and_takes_nothing(near: Stream, far: Stream) -> None:
    send(far, b"x")
    waiting = Waiting(near)
    waiting.ends("wait() ends when something has come")
    if not waiting.answer:
        return  # it has no way of its own
    room = bytearray(2)
    require(near.recv_into(memoryview(room)) == 1 and room[:1] == b"x", "wait() leaves what has come to recv_into()")
    waiting = Waiting(near)
    send(far, b"y")
    waiting.ends("wait() ends when something comes")
    require(near.recv_into(memoryview(room)) == 1, "wait() ends only when recv_into() has something to say")
    require(not near.wait(0.01), "wait() ends when its time has passed, and says that nothing has come")
    waiting = Waiting(near)
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
    send(near, b"never received")
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


# --- what clauses are made of ---


def _pattern(count: int) -> bytes:
    """Return bytes that repeat only every 251, so that a shift by any power of two shows."""
    return (bytes(range(251)) * (count // 251 + 1))[:count]


def _must_fail(call: Callable[[], object], clause: str) -> None:
    try:
        call()
    except OSError:
        return
    raise ContractBroken(clause)

"""The Stream contract: an open, ordered, two-way byte pipe that never waits; and Listener, a server's source of them.

A session owns one stream and moves bytes between it and the engine; whoever waits (a thread in poll, an asyncio loop, any other
loop) waits on `fileno()` for what the session and `wants()` ask for. So a stream knows nothing of NBD, of time or of threads: two
methods that move bytes, and a few that say how things stand. Anything can be a stream that has a pollable descriptor: a socket,
a child process behind a socketpair, TLS over another stream.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar, runtime_checkable

__all__ = ["WANTS", "Address", "AnyOf", "Listener", "Opening", "Stream", "Waiting", "Want", "from_signal_handler"]


class Want(enum.IntFlag):
    """What to wait for on a descriptor before calling again."""

    NOTHING = 0
    READ = 1
    WRITE = 2


#: Every Want by its number: operations on flags cost more than the system calls that they are for.
WANTS = (Want.NOTHING, Want.READ, Want.WRITE, Want.READ | Want.WRITE)


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Several descriptors to wait for at once, or a time: what a generator that opens a connection may yield.

    Whoever drives it sends those that are ready into the generator, as a set of numbers: none when the time has passed.

    Attributes:
        waiting: each descriptor, and what to wait for on it; without any, time is all that is waited for.
        seconds: after which to go on though nothing is ready; None: never.
    """

    waiting: tuple[tuple[int, Want], ...]
    seconds: float | None = None

    @classmethod
    def of(cls, wanted: Waiting) -> AnyOf:
        """Return the same for whatever such a generator yields: a single descriptor may stand alone."""
        return wanted if isinstance(wanted, AnyOf) else cls((wanted,))


#: Something to wait for before going on: a descriptor and what it must become, or any of several.
Waiting: TypeAlias = tuple[int, Want] | AnyOf

Result = TypeVar("Result")
#: What opens a connection: yields what to wait for, is sent the descriptors that are ready, and returns what it opened. Closing
#: it early frees what it had opened.
Opening: TypeAlias = Generator[Waiting, Collection[int] | None, Result]


class Stream(ABC):
    """An open, ordered, two-way byte pipe. No method waits, except `wait`, `fill` and `send_all`, which a stream need not have.

    Calls come from one thread at a time, except `hang_up` and `close`, which may come from any. A method that fails raises an
    `OSError` (an `nbdcore.Error` is one too); after that only `close` may be called. What a signal handler raises meanwhile is no
    error of the stream's, and passes unchanged (`from_signal_handler`). None means "not now": wait on `fileno()`,
    then call again. `str(stream)` is how messages name the other end.
    """

    @abstractmethod
    def recv_into(self, room: memoryview) -> int | None:
        """Receive at most `len(room)` bytes (at least one is asked for) into `room`.

        Returns the number of bytes received; 0 when the peer has finished sending; None when nothing has arrived yet.
        """

    @abstractmethod
    def send(self, parts: Sequence[memoryview]) -> int | None:
        """Send bytes from the front of `parts`, in order.

        Returns how many bytes were taken, which may be fewer than offered; None when there is no room now. The views may be
        released as soon as the call returns: a stream that keeps bytes for later copies them. Without parts it sends only what
        the stream still owes itself (see `wants`), and returns 0 or None.
        """

    @abstractmethod
    def fileno(self) -> int:
        """Return the one descriptor to poll, the same for the life of the stream; -1 once closed."""

    def buffered(self) -> bool:
        """Return whether `recv_into` would return bytes now though the descriptor may be quiet (TLS)."""
        return False

    def wait(self, seconds: float | None = None) -> bool:  # noqa: ARG002 (for those that can)
        """Wait until `recv_into` is worth calling, in a faster way than to poll `fileno()`, if the stream has one.

        Returns whether it is. False where the stream has no such way, then at once, and where nothing has come in so many seconds
        or fewer: who has time left polls. None in `seconds` is for ever. Other threads may send
        meanwhile, and `hang_up` and `close` end it. An error is for the next `recv_into` to report.
        """
        return False

    def fill(
        self,
        room: memoryview,  # noqa: ARG002 (for those that can)
        taken: list[int],  # noqa: ARG002
        seconds: float | None = None,  # noqa: ARG002
        *,
        whole: bool = False,  # noqa: ARG002
    ) -> bool:
        """Receive into `room` and wait for it, in one step, if the stream has a way: for a byte, or, if `whole`, till it is full.

        How many bytes were received is appended to `taken`, before a signal handler can raise anything: no byte is lost. Where
        the stream has ended or failed, nothing is appended, or 0, and the next `recv_into` says what happened. It may return
        early. Returns False, as `wait` does, where the stream has no such way, and where nothing has come in so many seconds or
        fewer. Other threads may send meanwhile, and `hang_up` and `close` end it.
        """
        return False

    def send_all(
        self,
        parts: Sequence[memoryview],  # noqa: ARG002 (for those that can)
        sent: list[int],  # noqa: ARG002
        seconds: float | None = None,  # noqa: ARG002
    ) -> bool:
        """Send `parts` and wait until all of it is sent, in one step, if the stream has a way.

        How many bytes were sent is appended to `sent`, before a signal handler can raise anything. It may return early, having
        sent less. Where the stream has failed nothing is appended: the next `send` says what happened. Returns False where the
        stream has no such way, and where nothing could be sent for a moment, or for so many seconds. Other threads may receive
        meanwhile, and `hang_up` and `close` end it.
        """
        return False

    def wants(self) -> Want:
        """Return what the stream itself waits for (unsent ciphertext, a handshake), beyond what its user waits for.

        When it is ready, call `recv_into` (READ) or `send` (WRITE), with no parts where there is nothing to send.
        """
        return Want.NOTHING

    @abstractmethod
    def finish_sending(self) -> bool:
        """Tell the peer that nothing more will be sent (half-close). Returns False when it must be called again."""

    def hang_up(self) -> None:
        """End the connection in both directions, but keep the descriptor until `close`. Idempotent; never raises.

        A thread that waits on the descriptor wakes up. Once it is closed its number may be given to another file at once, and a
        thread that was just about to wait would wait for that: whoever knows of such a thread hangs up first. A stream without
        this method is closed.
        """
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Free the descriptor, whatever happens. Idempotent; never raises; may lose bytes that the stream itself still holds.

        A thread that waits on the descriptor wakes up, and its next call raises Disconnected.
        """


def from_signal_handler(exc: BaseException) -> bool:
    """Tell whether a signal handler raised this, in the middle of whatever this thread was doing.

    Many handlers raise a TimeoutError, which is an OSError like those of a stream. It is the caller's own, and must come out as
    it is. A handler is known by its second argument: the frame that it interrupted, which is the one below its own.
    """
    entry = exc.__traceback__
    while entry is not None and entry.tb_next is not None:
        interrupted, inner = entry.tb_frame, entry.tb_next.tb_frame
        for value in inner.f_locals.values():
            if value is interrupted or (isinstance(value, tuple) and any(one is interrupted for one in value)):
                return True
        entry = entry.tb_next
    return False


@runtime_checkable
class Address(Protocol):
    """Where a server is, in the terms of one transport: a frozen, picklable dataclass that holds no socket.

    `str(address)` is how messages name it, such as "vsock CID 2, port 10809".
    """

    def uri(self, export: str = "") -> str:
        """Return the NBD URI that leads here, with the export name percent-encoded."""


class Listener(ABC):
    """An open, listening endpoint. No method waits. Calls come from one thread at a time."""

    @property
    @abstractmethod
    def address(self) -> Address:
        """The address in effect: where port 0 was asked for, the port that the kernel chose."""

    @abstractmethod
    def accept(self) -> Stream | None:
        """Return the next client's stream, or None when nobody is waiting any more.

        Raises OSError when accepting failed: with EMFILE, ENFILE, ENOBUFS or ENOMEM it may be tried again later, though the
        descriptor stays readable all the while.
        """

    @abstractmethod
    def fileno(self) -> int:
        """Return the descriptor to poll for READ; -1 once closed."""

    @abstractmethod
    def close(self) -> None:
        """Stop listening and remove what `listen` created (a unix socket's file). Idempotent; never raises."""

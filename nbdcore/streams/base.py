"""The Stream contract: an open, ordered, two-way byte pipe that never waits.

A session owns one stream and moves bytes between it and the engine; whoever waits (a thread in poll, an asyncio loop, any other
loop) waits on `fileno()` for what the session and `wants()` ask for. So a stream knows nothing of NBD, of time or of threads: two
methods that move bytes, and a few that say how things stand. Anything can be a stream that has a pollable descriptor: a socket,
a child process behind a socketpair, TLS over another stream.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence

__all__ = ["Stream", "Want"]


class Want(enum.IntFlag):
    """What to wait for on a descriptor before calling again."""

    NOTHING = 0
    READ = 1
    WRITE = 2


class Stream(ABC):
    """An open, ordered, two-way byte pipe. No method waits.

    Calls come from one thread at a time, except `close`, which may come from any. A method that fails raises an `OSError` (an
    `nbdcore.Error` is one too); after that only `close` may be called. None means "not now": wait on `fileno()`, then call again.
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
        released as soon as the call returns: a stream that keeps bytes for later copies them.
        """

    @abstractmethod
    def fileno(self) -> int:
        """Return the one descriptor to poll, the same for the life of the stream; -1 once closed."""

    def buffered(self) -> bool:
        """Return whether `recv_into` would return bytes now though the descriptor may be quiet (TLS)."""
        return False

    def wants(self) -> Want:
        """Return what the stream itself still owes (unsent ciphertext, a handshake), beyond what its user waits for."""
        return Want.NOTHING

    @abstractmethod
    def finish_sending(self) -> bool:
        """Tell the peer that nothing more will be sent (half-close). Returns False when it must be called again."""

    @abstractmethod
    def close(self) -> None:
        """Free the descriptor, whatever happens. Idempotent; never raises; loses bytes not yet sent."""

"""A stream that is as awkward as the contract allows: a few bytes at a time, and "not now" every so often.

Wrapped around a well-behaved stream it shows whether its user copes with messages cut at any byte, with partial sends and with
readiness that turns out to be stale. The same seed gives the same cuts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from nbdcore.streams.base import Stream, Want

__all__ = ["ChoppyStream"]


class ChoppyStream(Stream):
    """Passes everything on to another stream, in small and uneven pieces.

    Args:
        stream: what carries the bytes; closed with this one.
        most: the largest piece, in bytes; pieces are of 1 to `most`.
        quiet: how often, of all calls, to answer None though something could be done: 0 never, and less than 1.
        seed: of the random sizes.
    """

    def __init__(self, stream: Stream, *, most: int = 3, quiet: float = 0.25, seed: int = 0) -> None:
        self._stream = stream
        self._most = most
        self._quiet = quiet
        self._random = random.Random(seed)  # noqa: S311 (sizes, not secrets)

    def __str__(self) -> str:
        return str(self._stream)

    def recv_into(self, room: memoryview) -> int | None:
        """Receive at most a few bytes."""
        return None if self._is_quiet() else self._stream.recv_into(room[: self._piece()])

    def send(self, parts: Sequence[memoryview]) -> int | None:
        """Send at most a few bytes, which may end inside a part or reach over several."""
        if self._is_quiet():
            return None
        left, front = self._piece(), []
        for part in parts:
            front.append(part[:left])
            left -= len(front[-1])
            if not left:
                break
        return self._stream.send(front)

    def fileno(self) -> int:
        """Return the descriptor of the stream inside."""
        return self._stream.fileno()

    def buffered(self) -> bool:
        """Return what the stream inside says."""
        return self._stream.buffered()

    def wants(self) -> Want:
        """Return what the stream inside says."""
        return self._stream.wants()

    def finish_sending(self) -> bool:
        """Half-close the stream inside."""
        return self._stream.finish_sending()

    def hang_up(self) -> None:
        """Hang the stream inside up."""
        self._stream.hang_up()

    def close(self) -> None:
        """Close the stream inside."""
        self._stream.close()

    def _is_quiet(self) -> bool:
        # A closed stream has something to say at once: that it is closed.
        return self.fileno() >= 0 and self._random.random() < self._quiet

    def _piece(self) -> int:
        return self._random.randint(1, self._most)

"""The server's wish to stop, as every thread of it sees it: a flag to look at, a descriptor to wait for, a deadline to keep."""

from __future__ import annotations

import contextlib
import socket

from nbdcore.streams.sockets import connected_pair
from nbdcore.streams.waiting import NEVER, Deadline

__all__ = ["Shutdown", "moment_after"]


class Shutdown:
    """Asked for once, for good.

    Attributes:
        requested: whether to stop; a plain attribute, since it is looked at for every request.
        deadline: when the last client must be gone; meaningful once requested.
    """

    def __init__(self) -> None:
        self.requested: bool = False
        self.deadline: Deadline = NEVER
        # Half-closing one end makes the other readable for good, for as many threads as wait for it.
        self._reader, self._writer = connected_pair()

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when stopping is requested, and stays so."""
        return self._reader.fileno()

    def request(self, deadline: Deadline) -> None:
        """Ask every thread to stop by `deadline`. Idempotent; the first deadline stands."""
        if not self.requested:
            self.deadline = deadline
            self.requested = True
            with contextlib.suppress(OSError):  # closed already
                self._writer.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Free the descriptors, once nobody waits for them any more. Idempotent."""
        self._reader.close()
        self._writer.close()


def moment_after(deadline: Deadline, seconds: float) -> Deadline:
    """Return one deadline for all who end at `deadline`, or now where that is past, and need so many seconds more."""
    left = deadline.remaining()
    return NEVER if left is None else Deadline.after(left + seconds)

"""A bell: how a thread that waits for descriptors is woken by another one."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence

from nbdcore.streams.sockets import connected_pair

__all__ = ["Bell"]


class Bell:
    """A descriptor that is readable while the bell rings. It exists once it has been asked for.

    Attributes:
        rung: whether it was rung and not silenced since.
    """

    def __init__(self) -> None:
        self.rung: bool = False
        self._ends: Sequence[socket.socket] = ()

    def fileno(self) -> int:
        """Return the descriptor to wait for; -1 where the system has none left."""
        if not self._ends:
            try:
                ends = connected_pair()
            except OSError:
                return -1
            for end in ends:
                end.setblocking(False)
            self._ends = ends
        return self._ends[0].fileno()

    def release(self) -> None:
        """Ring it."""
        # In this order: whoever makes the descriptor looks at `rung` after that.
        self.rung = True
        if self._ends:
            with contextlib.suppress(OSError):  # it has been rung so often that there is no room, or is closed
                self._ends[1].send(b"\0")
            # It may have been silenced in between: a bell that is readable and not `rung` would be silenced by nobody.
            self.rung = True

    def silence(self) -> None:
        """Forget that it was rung; what it was rung for is looked at after this."""
        self.rung = False
        if self._ends:
            with contextlib.suppress(BlockingIOError):
                self._ends[0].recv(4096)

    def close(self) -> None:
        """Free the descriptors."""
        for end in self._ends:
            end.close()
        self._ends = ()

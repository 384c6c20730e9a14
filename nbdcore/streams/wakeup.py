"""A flag that a waiting thread can be woken with: raised by any thread, seen by whoever waits on its descriptor.

`waiting` waits for descriptors only. A thread that must also notice what another thread does (new work, a request to stop) waits
for this one among the others. Raising it several times before it is lowered counts once.
"""

from __future__ import annotations

import contextlib
import threading

from nbdcore.streams.sockets import connected_pair

__all__ = ["Wakeup"]


class Wakeup:
    """A flag with a descriptor to poll for READ. Safe to use from several threads, and `set` from a signal handler too.

    Raises OSError where no more descriptors can be opened.
    """

    def __init__(self) -> None:
        self._reader, self._writer = connected_pair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        # Re-entrant, since a signal handler may interrupt a thread that holds it.
        self._lock = threading.RLock()
        self._is_set = False

    def fileno(self) -> int:
        """Return the descriptor to poll for READ; -1 once closed."""
        return self._reader.fileno()

    def set(self) -> None:
        """Raise the flag: whoever waits wakes up. After `close` it does nothing."""
        with self._lock:
            if not self._is_set and self._writer.fileno() >= 0:
                self._is_set = True
                self._writer.send(b"\0")

    def clear(self) -> None:
        """Lower the flag. Look at what it stands for afterwards, never before: what comes in between raises it again."""
        with self._lock:
            self._is_set = False
            # A byte still on its way wakes somebody once for nothing.
            with contextlib.suppress(BlockingIOError):
                while self._reader.fileno() >= 0 and self._reader.recv(16):
                    continue

    def close(self) -> None:
        """Free both descriptors. Idempotent."""
        with self._lock:
            self._writer.close()
            self._reader.close()

"""A connected pair of streams inside one process: what tests, demonstrations and in-process servers talk over.

The memory is the kernel's: the pair is a socketpair. A stream must offer one descriptor that is readable exactly when bytes are
there and writable exactly when there is room; only the kernel keeps such a descriptor true, whichever thread moves the bytes, and
one buffer of our own plus wake-up descriptors would only imitate it. So nothing here is special to memory but the absence of an
address.
"""

from __future__ import annotations

import socket

from nbdcore.streams.sockets import SocketStream, connected_pair

__all__ = ["memory_pair"]


def memory_pair(*, capacity: int | None = None) -> tuple[SocketStream, SocketStream]:
    """Return two streams connected to each other.

    `capacity` is about how many bytes either may send before the other receives, from which on `send` returns None; the kernel
    counts its own overhead too and has a minimum of a few KiB. Left out, it is the platform's usual one. Raises OSError where no
    more descriptors can be opened.
    """
    pair = connected_pair()
    if capacity is not None:
        for sock in pair:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, capacity)
    near, far = pair
    return SocketStream(near, peer="the far end of a memory pair"), SocketStream(far, peer="the near end of a memory pair")

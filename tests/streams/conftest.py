"""Which tests this platform can have, and a connected socket as a stream."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from nbdcore.streams.sockets import SocketStream, connected_pair

PATIENCE = 10.0
collect_ignore = [] if hasattr(socket, "AF_UNIX") else ["test_process.py"]  # programs are talked to through unix sockets


@pytest.fixture
def ends() -> Iterator[tuple[SocketStream, socket.socket]]:
    """A stream over a socket, and the plain socket at its other end, which waits for so long at most."""
    near, far = connected_pair()
    far.settimeout(PATIENCE)
    stream = SocketStream(near)
    yield stream, far
    stream.close()
    far.close()

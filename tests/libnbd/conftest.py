"""A server for the drop-in's tests, embedded, and handles in every state; what a test opens it closes."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

import pytest

import nbdcore.libnbd as nbd
from nbdcore.libnbd.handle import NBD
from nbdcore.server import MemoryDisk, Server
from tests import leaks

DISK = 1 << 20


@pytest.fixture
def server() -> Iterator[str]:
    """The port of a server with a writable disk of 1 MiB, called "" and "disk"."""
    with Server({"": MemoryDisk(DISK), "disk": MemoryDisk(DISK)}) as running:
        yield str(running.listen("tcp", host="127.0.0.1", port=0).address.port)


@pytest.fixture
def handles() -> Iterator[Callable[[], NBD]]:
    """Make handles that the test's end closes."""
    made: list[NBD] = []

    def make() -> NBD:
        made.append(nbd.NBD())
        return made[-1]

    yield make
    for handle in made:
        with contextlib.suppress(nbd.ClosedHandle):
            handle.close()


@pytest.fixture
def connected(handles: Callable[[], NBD], server: str) -> NBD:
    """A handle that is connected, with base:allocation selected."""
    handle = handles()
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.connect_tcp("127.0.0.1", server)
    return handle


@pytest.fixture
def negotiating(handles: Callable[[], NBD], server: str) -> NBD:
    """A handle in opt mode."""
    handle = handles()
    handle.set_opt_mode(True)
    handle.connect_tcp("127.0.0.1", server)
    return handle


@pytest.fixture
def in_state(handles: Callable[[], NBD], server: str) -> Iterator[Callable[[str], NBD]]:
    """Make a handle in a state, by the letter that the manual's table has for it."""
    with contextlib.ExitStack() as ends:

        def make(letter: str) -> NBD:
            handle = handles()
            if letter in "od":
                near, far = socket.socketpair()
                ends.enter_context(far)
                handle.aio_connect_socket(near.detach())
                if letter == "d":
                    far.sendall(bytes(64))
                    with pytest.raises(nbd.Error):
                        handle.poll(10_000)
            elif letter != "c":
                handle.set_opt_mode(letter == "n")
                handle.connect_tcp("127.0.0.1", server)
                if letter == "s":
                    handle.shutdown()
            return handle

        yield make


@pytest.fixture(autouse=True)
def _nothing_left_open(server: str) -> Iterator[None]:
    with leaks.none_left_open():
        yield

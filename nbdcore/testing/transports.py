"""The Transport contract: `check_transport(transport, address)`, and `check_address` for what cannot listen.

The checks open real endpoints and look at the process's descriptors, so nothing else should open any meanwhile. A platform that
does not list descriptors (Windows) is not asked for leaks; everything else is checked there too.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from nbdcore.errors import DeadlineExceeded, TransportError, UsageError
from nbdcore.plugins.spec import Address, Listener, Transport
from nbdcore.streams.base import Stream, Want
from nbdcore.streams.waiting import Deadline, drive, wait
from nbdcore.testing import ContractBroken, require
from nbdcore.uri import parse_uri

__all__ = ["check_address", "check_transport"]

Raised = TypeVar("Raised", bound=Exception)

#: Seconds that one step may take on a busy machine.
PATIENCE = 30.0
#: What an export name may be made of (doc/uri.md): any Unicode character but NUL.
_EXPORT = "/an export, 100%/ünïcode?#&=+"


def check_transport(transport: Transport, address: Address, *, reach: Callable[[Address], Address] | None = None) -> None:
    """Check a transport that can listen: its addresses, streams, errors, and that nothing stays open.

    Args:
        transport: what is checked.
        address: where this machine can listen, such as port 0 of localhost. Nothing may be there yet.
        reach: turns the listener's address in effect into one to connect to, where they differ (a wildcard).

    Raises ContractBroken with the clause that was broken, UsageError where the transport cannot listen.
    """
    with _nothing_left_open("listen, connect, close"):
        listener = transport.listen(address)
        try:
            target = reach(listener.address) if reach else listener.address
            check_address(transport, target)
            _check_listener(listener)
            _check_connection(transport, target, listener)
            _check_giving_up(transport, target, listener)
        finally:
            listener.close()
        _check_closed(listener)
        _check_refusal(transport, target)


def check_address(transport: Transport, address: Address) -> None:
    """Check a transport's names and an address of it that has a URI."""
    require(transport.name and transport.schemes, "a transport has a name and URI schemes")
    for scheme in transport.schemes:
        plain = scheme.islower() and scheme.partition("+")[0] != "nbds"
        require(plain, f"schemes are in lower case and without the s of TLS, not {scheme}")
    require(str(address) and str(address) != repr(address), "str(address) is what a message calls it")
    copy = pickle.loads(pickle.dumps(address))  # noqa: S301 (made here)
    require(copy == address and hash(copy) == hash(address), "an address is a value: pickling keeps it, equal ones have one hash")
    uri = parse_uri(address.uri(_EXPORT))
    require(uri.transport_scheme in transport.schemes, f"address.uri() has a scheme of its transport, not {uri.scheme}")
    require(uri.export == _EXPORT, f"address.uri() keeps the export name, not {uri.export!r}")
    uri.check_parameters(transport.parameters)
    require(transport.parse(uri) == address, f"address.uri() leads back to the address, not to {transport.parse(uri)}")
    _must_raise(UsageError, lambda: transport.address(no_such_part=1), "address() refuses a part that it does not know")


# --- with a server ---


def _check_listener(listener: Listener) -> None:
    require(isinstance(listener.address, Address), "listener.address is an Address")
    require(listener.fileno() >= 0, "fileno() of a listener is a descriptor")
    require(listener.accept() is None, "accept() answers None when nobody has connected")


def _check_connection(transport: Transport, target: Address, listener: Listener) -> None:
    client = _connect(transport, target)
    try:
        server = _accept(listener)
        try:
            require(str(client) and str(server), "str(stream) is what a message calls the other end")
            # The server speaks first in NBD: a transport that reads ahead would swallow its greeting.
            _check_bytes(server, client, b"greeting")
            _check_bytes(client, server, b"answer")
        finally:
            server.close()
        require(_receive(client) == b"", "a client sees the end when the server closes")
    finally:
        client.close()


def _check_giving_up(transport: Transport, target: Address, listener: Listener) -> None:
    with _nothing_left_open("a connect that is closed before its first step"):
        transport.connect(target).close()
    with _nothing_left_open("a connect that is closed where it first waits"):
        opening = transport.connect(target)
        try:
            next(opening)
        except StopIteration as end:
            end.value.close()
        finally:
            opening.close()
        _drop_waiting(listener)
    with _nothing_left_open("a connect whose deadline has passed"):
        # One that needs no waiting may well succeed.
        with suppress(DeadlineExceeded):
            drive(transport.connect(target, timeout=0), Deadline.after(0), "no time at all").close()
        _drop_waiting(listener)


def _check_closed(listener: Listener) -> None:
    listener.close()
    require(listener.fileno() == -1, "fileno() of a listener is -1 once closed")
    _must_raise(OSError, listener.accept, "accept() raises an OSError once closed")


def _check_refusal(transport: Transport, target: Address) -> None:
    with _nothing_left_open("a connect that is refused"):
        exc = _must_raise(TransportError, lambda: _connect(transport, target), "connecting to nobody raises a TransportError")
        require(exc.errno, "the TransportError has the operating system's errno")
        require(isinstance(exc.__cause__, OSError), "the TransportError has the operating system's error as its cause")
        require(str(target) in str(exc), "the TransportError names the address")


# --- steps; every wait has a deadline ---


def _connect(transport: Transport, target: Address) -> Stream:
    return drive(transport.connect(target, timeout=PATIENCE), Deadline.after(PATIENCE), f"no connection to {target}")


def _accept(listener: Listener) -> Stream:
    deadline = Deadline.after(PATIENCE)
    while (stream := listener.accept()) is None:
        wait(listener.fileno(), Want.READ, deadline, "a listener's descriptor becomes readable when a client connects")
    return stream


def _drop_waiting(listener: Listener) -> None:
    """Take and close the connections that were given up."""
    while (stream := listener.accept()) is not None:
        stream.close()


def _check_bytes(source: Stream, target: Stream, data: bytes) -> None:
    require(source.send([memoryview(data)]) == len(data), "a new connection takes a few bytes at once")
    received = b""
    while len(received) < len(data):
        piece = _receive(target)
        require(piece, f"all bytes arrive: {data!r}, not {received!r}")
        received += piece
    require(received == data, f"bytes arrive as they were sent: {data!r}, not {received!r}")


def _receive(stream: Stream) -> bytes:
    deadline = Deadline.after(PATIENCE)
    room = bytearray(64)
    while (count := stream.recv_into(memoryview(room))) is None:
        wait(stream.fileno(), Want.READ, deadline, "the descriptor becomes readable when bytes have come")
    return bytes(room[:count])


def _must_raise(kind: type[Raised], call: Callable[[], object], clause: str) -> Raised:
    try:
        call()
    except kind as exc:
        return exc
    raise ContractBroken(clause)


@contextmanager
def _nothing_left_open(what: str) -> Iterator[None]:
    before = _descriptors()
    yield
    deadline = Deadline.after(PATIENCE)
    # A look-up that was given up ends in its own time, in a thread of its own.
    while (left := _descriptors() - before) and not deadline.expired:
        time.sleep(0.01)
    require(not left, f"{what} leaves no descriptor open, not {sorted(left)}")


def _descriptors() -> set[str]:
    """Return the open descriptors, each with what it leads to, where the platform lists them."""
    for folder in (Path("/proc/self/fd"), Path("/dev/fd")):
        if folder.is_dir():
            return {entry.name for entry in folder.iterdir() if _is_open(int(entry.name))}
    return set()


def _is_open(fd: int) -> bool:
    """Tell whether it still is: the listing has a descriptor of its own."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True

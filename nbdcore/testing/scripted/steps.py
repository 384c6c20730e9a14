"""Steps: what a scripted server does next. Each is called with the Connection."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from nbdcore.protocol.constants import CommandType
from nbdcore.testing.scripted.connection import ClientGone, Connection, Reply, ScriptFailed, Step

__all__ = [
    "answer",
    "drain",
    "expect",
    "expect_end",
    "expect_option",
    "goodbye",
    "half_close",
    "hang_up",
    "receive",
    "reset",
    "serve",
    "unless_gone",
    "wait_for",
]


def receive(count: int) -> Step:
    """Receive this many bytes, whatever they are."""
    return lambda connection: connection.receive(count)


def expect(data: bytes) -> Step:
    """Receive exactly these bytes."""
    return lambda connection: connection.expect(data)


def expect_end(connection: Connection) -> None:
    """Receive the client's end, and not a byte before it."""
    connection.expect_end()


def drain(connection: Connection) -> None:
    """Receive whatever comes until the client's end."""
    connection.drain()


def unless_gone(step: Callable[[Connection], object]) -> Step:
    """Play a step that the client may break off by hanging up."""

    def play(connection: Connection) -> None:
        with contextlib.suppress(ClientGone):
            step(connection)

    return play


def expect_option(option: int, data: bytes | None = None) -> Step:
    """Receive this option request, with these data unless they do not matter."""

    def step(connection: Connection) -> None:
        received = connection.receive_option()
        if received[0] != option or data not in (None, received[1]):
            raise ScriptFailed(f"the client sent option {received}, and {(option, data)} was expected")

    return step


def wait_for(event: threading.Event, *, patience: float = 10.0) -> Step:
    """Do nothing until the test sets the event."""

    def step(_: Connection) -> None:
        if not event.wait(patience):
            raise ScriptFailed(f"the event that the script waits for did not happen within {patience} s")

    return step


def hang_up(connection: Connection) -> None:
    """Hang up here."""
    connection.close()


def half_close(connection: Connection) -> None:
    """Say that nothing more will be sent, and go on listening."""
    connection.half_close()


def reset(connection: Connection) -> None:
    """Break the connection off (see Connection.reset)."""
    connection.reset()


def goodbye(connection: Connection) -> None:
    """Receive NBD_CMD_DISC, then the client's end."""
    request = connection.receive_request()
    if request.kind != CommandType.DISC:
        raise ScriptFailed(f"the client sent {request}, and its goodbye was expected")
    connection.expect_end()


def answer(*replies: Reply | bytes, **expected: int | bytes) -> Step:
    """Receive a request and answer it. `expected` are attributes of Request that it must have: `kind=`, `count=`, and so on."""

    def step(connection: Connection) -> None:
        request = connection.receive_request()
        for name, value in expected.items():
            if getattr(request, name) != value:
                raise ScriptFailed(f"the client sent {request}, and {name}={value!r} was expected")
        for reply in replies:
            connection.send(reply if isinstance(reply, bytes) else reply(request))

    return step


def serve(reply: Reply) -> Step:
    """Answer each request until the goodbye; a client that hangs up without one ends it too, whether it was answered or not."""

    def step(connection: Connection) -> None:
        while True:
            try:
                request = connection.receive_request()
            except ClientGone as end:
                if end.received:
                    raise
                return
            if request.kind == CommandType.DISC:
                return
            answer = reply(request)
            try:
                connection.send(answer)
            except ClientGone:
                return

    return step

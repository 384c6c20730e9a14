"""The further connections of a pool: opened all at once, in the caller's own thread, within a time; only those that fit are kept.

A server may refuse one, take it and never greet, or show another export than it did on the first: none of that is an error here,
there are only fewer. What a connection must have in common with the first is decided here, since a request that is built for one
is sent on any: the size, the flags and the block sizes; the kind of headers and replies; and the metadata contexts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from nbdcore.clients.connect.target import Way, check_wanted, look_up
from nbdcore.clients.polled import PolledClient
from nbdcore.clients.session.session import Session
from nbdcore.errors import Error
from nbdcore.protocol.constants import TransmissionFlag
from nbdcore.protocol.engine import Engine
from nbdcore.protocol.state import Phase
from nbdcore.streams.waiting import Deadline, wait_any


def how_many_more(first: Engine, asked_for: int) -> int:
    """Return how many connections to open after the first: none unless the server says that they see each other's writes."""
    return asked_for - 1 if first.limits.flags & TransmissionFlag.CAN_MULTI_CONN else 0


def open_further(way: Way, first: Engine, count: int, deadline: Deadline, wanted: Callable[[], bool]) -> list[Session]:
    """Open up to `count` connections more, by the same way and with the same settings; return those that agree with the first.

    Stops at the deadline, with those that are open by then. Raises Disconnected, with none left open, when the pool is not
    `wanted` any more.
    """
    clients = [PolledClient(first.settings, start_tls=way.start_tls) for _ in range(count)]
    try:
        for client in clients:
            client.connect_steps(way.route.transport.connect(way.route.address, timeout=deadline.remaining()))
        _shake_hands(clients, deadline, wanted)
        opened = [client for client in clients if client.phase is Phase.CONNECTED]
        for client in opened:
            if not agree(client.engine, first):
                client.disconnect()
        return [client.release() for client in opened if agree(client.engine, first)]
    finally:
        for client in clients:
            client.close()


def _shake_hands(clients: Sequence[PolledClient], deadline: Deadline, wanted: Callable[[], bool]) -> None:
    """Let all clients advance until none is connecting any more, or the deadline."""
    while connecting := [client for client in clients if client.phase is Phase.CONNECTING]:
        check_wanted(wanted)
        waiting = [(client.fileno(), client.direction()) for client in connecting]
        ready = {descriptor for descriptor, _ in wait_any(waiting, look_up(deadline))}
        for client, (descriptor, _) in zip(connecting, waiting, strict=True):
            if descriptor in ready:
                _advance(client)
        if deadline.expired:  # also where servers always have a little more to say
            return


def _advance(client: PolledClient) -> None:
    with contextlib.suppress(Error):  # it ended, which its phase tells: there is one connection less
        client.advance()


def agree(engine: Engine, first: Engine) -> bool:
    """Whether a request built for the first connection means the same on this one."""
    ours, theirs = engine.agreement, first.agreement
    return engine.limits == first.limits and ours.contexts == theirs.contexts and ours.tls == theirs.tls

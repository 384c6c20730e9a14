"""Getting from a target to open sessions: attempts, pauses, deadlines, and a pool's further connections. One generator for all.

It asks its driver to wait (see `steps`), and never waits itself. Whatever it has opened is closed when it fails or is closed.

An attempt that failed is made again, with a new engine, only where the caller waits for a server and the failure may pass by
itself. The further connections of a pool are opened all at once, within a time, and only those that fit are kept: a server may
refuse one, take it and never greet, or show another export than it did on the first. None of that is an error here; there are
only fewer.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Collection
from functools import partial

from nbdcore.clients import log
from nbdcore.clients.connect.steps import AnyOf, Steps, WaitingSteps
from nbdcore.clients.connect.target import Endpoint, OpenStream, Target
from nbdcore.clients.requests.arguments import deadline_after
from nbdcore.clients.session.session import Session
from nbdcore.errors import DeadlineExceeded, Disconnected, Error, TransportError, printable
from nbdcore.protocol.constants import TransmissionFlag
from nbdcore.protocol.engine import Engine
from nbdcore.protocol.handshake.agreement import Settings
from nbdcore.protocol.transmission.commands import disconnect
from nbdcore.streams.base import Stream
from nbdcore.streams.connecting import Branch, any_of, relay
from nbdcore.streams.sockets import transport_errors
from nbdcore.streams.waiting import NEVER, Deadline, sooner

#: Seconds between attempts while a server is waited for: short first, since it may be about to listen; the longest costs a
#: machine nothing, and a person does not notice it.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5
#: Seconds that the first attempt to open a stream may take while a server is waited for, twice as many for each that took longer.
#: One of several addresses may be silent for minutes, as behind a firewall; a server that comes up at another one is found by the
#: next attempt only. A handshake may take any time, once there is somebody.
_FIRST_OPENING = 1.0
#: Seconds that the further connections of a pool may take beyond what the first one took. They are opened at the same time, so
#: more than that is a server that accepted a connection and will not greet, as qemu-nbd does with those beyond `--shared`.
GRACE = 2.0
_LATE = "no answer from the server in time (the handshake)"


def establish(
    target: Target, settings: Settings, *, timeout: float | None, wait: float | None, connections: int = 1
) -> Steps[list[Session]]:
    """Open up to so many sessions, at least one; in opt mode one, which is left negotiating.

    `timeout` is for an attempt in all, `wait` for all attempts. Raises the last attempt's error, or, when a server was waited for
    in vain, DeadlineExceeded with that error as its cause.
    """
    begin = time.monotonic()
    if wait:
        first, deadline, begin = yield from _wait_for_server(target, settings, timeout, wait)
    else:
        deadline = deadline_after(timeout)
        first = yield from open_session(Engine(settings), target, deadline)
    more = connections - 1 if first.engine.limits.flags & TransmissionFlag.CAN_MULTI_CONN else 0
    if more <= 0:
        return [first]
    patience = Deadline.after(time.monotonic() - begin + GRACE)
    try:
        further = yield from _open_further(first.engine, target, settings, more, sooner(deadline, patience))
    except BaseException as exc:
        first.fail(given_up(str(target.endpoint), exc))
        raise
    return [first, *further]


def _wait_for_server(
    target: Target, settings: Settings, timeout: float | None, wait: float
) -> Steps[tuple[Session, Deadline, float]]:
    """Make attempts until one succeeds. Returns its session, the deadline that it had, and when it began."""
    until = deadline_after(wait)
    last: Error | None = None
    pause, longest = _FIRST_PAUSE, _FIRST_OPENING
    while True:
        begin, deadline, engine = time.monotonic(), sooner(deadline_after(timeout), until), Engine(settings)
        opening = Deadline.after(longest) if target.endpoint.may_be_silent else NEVER
        try:
            return (yield from open_session(engine, target, deadline, sooner(opening, deadline))), deadline, begin
        except Error as exc:
            if opening.at is not None and opening.expired:
                longest *= 2
            if not target.endpoint.is_retryable(exc, heard=engine.traffic.bytes_received > 0):
                raise
            # An attempt that was cut off because the time is up says less than the one before it.
            last = last if last is not None and until.expired and isinstance(exc, DeadlineExceeded) else exc
        if until.expired:
            raise _never_up(target, wait, last) from last
        log.debug("no server at %s yet (%s): the next attempt is in %g s", target.endpoint, last, pause)
        remaining = until.remaining()
        yield AnyOf((), pause if remaining is None else min(pause, remaining))
        pause = min(pause * 2, _LONGEST_PAUSE)


def _never_up(target: Target, wait: float, last: Error) -> DeadlineExceeded:
    said = f": {printable(last.server_text)}" if last.server_text else ""
    return DeadlineExceeded(errno.ETIMEDOUT, f"no server at {target.endpoint} within {wait:g} s ({last.message}{said})")


# ---------------------------------------------------------------------------------------------- one connection


def open_session(engine: Engine, target: Target, deadline: Deadline, opening: Deadline | None = None) -> WaitingSteps[Session]:
    """Open a stream, until the deadline `opening` if there is one, and shake hands. Whatever goes wrong ends the engine too."""
    try:
        stream = yield from _open_stream(target.endpoint, opening or deadline)
        session = Session(engine, stream, start_tls=target.start_tls)
    except BaseException as exc:
        engine.fail(given_up(str(target.endpoint), exc))
        raise
    try:
        yield from _shake_hands(session, target, deadline)
    except BaseException as exc:
        session.fail(given_up(str(target.endpoint), exc))
        raise
    return session


def _open_stream(endpoint: Endpoint | OpenStream, deadline: Deadline) -> WaitingSteps[Stream]:
    log.debug("connecting to %s", endpoint)
    wait = partial(_until, deadline=deadline, message=f"connecting to {endpoint} took too long")
    with transport_errors(f"connect to {endpoint}"):
        return (yield from relay(endpoint.open(deadline.remaining()), wait))


def _shake_hands(session: Session, target: Target, deadline: Deadline) -> WaitingSteps[None]:
    log.debug("%s is there: its handshake begins", target.endpoint)
    exchange = session.engine.handshake()
    session.advance()
    while not exchange.done:
        # Where there are bytes already, the driver is heard in between.
        need = AnyOf((), 0) if session.buffered else AnyOf(((session.fileno(), session.interest()),))
        yield from _until(need, deadline, _LATE)
        session.advance()
        if deadline.expired and not exchange.done:  # also where the server always has a little more to say
            raise DeadlineExceeded(errno.ETIMEDOUT, _LATE)
    session.engine.release_buffer()
    if exchange.error is not None:
        raise exchange.error
    _log_agreement(session.engine, target)


def _log_agreement(engine: Engine, target: Target) -> None:
    agreement, export = engine.agreement, engine.agreement.export
    encrypted = "with TLS" if agreement.tls else "without TLS"
    if export is None:
        log.info("connected to %s (%s), %s: negotiating", target.endpoint, agreement.protocol, encrypted)
    else:
        log.info("connected to %s, %s: export %r, %d bytes", target.endpoint, encrypted, export.name, export.size)
    log.debug(
        "agreed with %s: %s, structured replies %s, extended headers %s, contexts %s, block sizes %s",
        target.endpoint,
        agreement.protocol,
        agreement.structured,
        agreement.extended,
        [*agreement.contexts.values()],
        export and export.block_size,
    )


def _until(need: AnyOf, deadline: Deadline, message: str) -> WaitingSteps[Collection[int]]:
    """Wait, no longer than until the deadline. Raises DeadlineExceeded when it passes."""
    remaining = deadline.remaining()
    if remaining is not None and (need.seconds is None or remaining < need.seconds):
        ready: Collection[int] = yield AnyOf(need.waiting, remaining)
    else:
        ready = yield need
    if not ready and deadline.expired:
        raise DeadlineExceeded(errno.ETIMEDOUT, message)
    return ready


# ---------------------------------------------------------------------------------------------- further connections


def _open_further(first: Engine, target: Target, settings: Settings, count: int, deadline: Deadline) -> Steps[list[Session]]:
    """Open up to `count` sessions more, with the same settings; return those that agree with the first one."""
    attempts = [Branch(open_session(Engine(settings), target, deadline)) for _ in range(count)]
    try:
        while any(attempt.need for attempt in attempts):
            ready: Collection[int] = yield any_of(attempts)
            for attempt in attempts:
                attempt.take(ready)
        sessions = [attempt.result for attempt in attempts if attempt.result is not None and not attempt.result.over]
        for session in sessions:
            if not agree(session.engine, first):
                session.engine.submit(disconnect())
                session.send()
                session.close()
    except BaseException:
        for attempt in attempts:
            attempt.close()
            if attempt.result is not None:
                attempt.result.close()
        raise
    return [session for session in sessions if not session.over]


def agree(engine: Engine, first: Engine) -> bool:
    """Whether a request built for the first connection means the same on this one."""
    ours, theirs = engine.agreement, first.agreement
    return engine.limits == first.limits and ours.contexts == theirs.contexts and ours.tls == theirs.tls


# ---------------------------------------------------------------------------------------------- words


def given_up(where: str, exc: BaseException) -> Error:
    """Return what ends a connection whose connecting was broken off by `exc`: an error of ours, or Ctrl-C and the like."""
    return exc if isinstance(exc, Error) else TransportError(0, f"connecting to {where} was given up ({exc!r})")


def closed_meanwhile() -> Disconnected:
    """Return what a connect call raises when the client was closed while it connected."""
    return Disconnected(errno.ENOTCONN, "the connection was closed by this program while connecting")

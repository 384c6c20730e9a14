"""One session in one event loop: the loop says when bytes can be moved, and whoever waits for an outcome is woken by it.

The descriptor is watched for reading as long as the session receives, and for writing only while something is unsent. What is
queued in one turn of the loop is sent at its end, all together: so the requests of many tasks go out in one system call.

What has been received is dealt with to the end first. Then the callers whose commands are done run, one after the other, in the
same turn of the loop, and what they ask next is sent at its end: no thread, no other task and no further turn is in between.

All calls come from the loop's own thread. A caller that is cancelled, or whose time is up, abandons its command: the engine sees
to it that its memory is not touched any more, and the connection goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import types
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from typing import Protocol

from nbdcore.clients.asyncio.waiter import Waiter
from nbdcore.clients.requests.arguments import deadline_after
from nbdcore.clients.session.session import Session, closed_by_program
from nbdcore.errors import DeadlineExceeded, Error, UsageError, copied
from nbdcore.protocol.engine import Engine, Exchange
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission.commands import Command, disconnect
from nbdcore.streams.base import Want
from nbdcore.streams.waiting import Deadline

_READ, _WRITE = int(Want.READ), int(Want.WRITE)
# Where one receive brings so many bytes, more have come when its callers have run, and to look is cheaper than a turn of the
# loop: 64 tasks with 4 KiB reads are 1.7% faster. Its other callbacks wait for three such bursts at most, which take 0.6 ms.
_BURST, _RECEIVES = 1 << 16, 3


class Shared(Protocol):
    """What callers know of one session in a loop, or of several to the same export. See `LoopSession`."""

    loop: asyncio.AbstractEventLoop

    @property
    def engine(self) -> Engine:
        """The engine, or one that stands for all."""

    def submit(self, command: Command) -> None:
        """Queue a command."""

    def run(self, command: Command, timeout: float | None) -> Awaitable[None]:
        """Run one command and raise its error. At the deadline, or when the task is cancelled, it is abandoned."""

    def abandon(self, command: Command, why: str) -> None:
        """Give a command up without a word to whoever waits for it: its memory is not touched any more."""

    def own(self, error: Error) -> Error:
        """Return the caller's own copy of an error that others may be raising as well."""

    async def exchange(self, start: Callable[[Engine], Exchange], deadline: Deadline, what: str) -> object:
        """Run one conversation with the server and return its result."""

    async def take_leave(self, deadline: Deadline) -> None:
        """Say goodbye, unless another task has, and wait until all has ended."""

    def close(self, error: Error | None = None) -> None:
        """End all now. Callers that wait are woken, and get `error`, or that this program closed it."""

    @property
    def connections(self) -> int:
        """How many connections have not ended."""

    @property
    def inherited(self) -> bool:
        """Whether this is the copy that a fork made of another process's sessions."""


class LoopSession:
    """A session and the loop that it lives in.

    Args:
        session: open, or in opt mode. It belongs to this object.
        loop: running.
    """

    def __init__(self, session: Session, loop: asyncio.AbstractEventLoop) -> None:
        self.engine: Engine = session.engine
        self.loop = loop
        self._session = session
        self._descriptor = session.fileno()
        self._watched = 0  # what the loop watches the descriptor for: the bits of Want, as a plain int
        self._send_due = self._receive_due = self._wake_due = False  # a call of it is scheduled, or will be made
        self._finished: deque[Command] = deque()  # commands that are done, and their callers have not run yet
        self._finish = self._finished.append
        # libuv, under uvloop, tells of a connection that broke only once, and there may be bytes before the error: so everything
        # is received each time. The stock loop tells as long as anything is left, which saves a system call.
        self._tells_once = not isinstance(loop, asyncio.SelectorEventLoop)
        self._leaving = False
        self._ends: list[asyncio.Future[bool]] = []
        # The loop's knowledge of the descriptor must end before its number is free for another.
        session.waited_for = _READ | _WRITE
        self._look()

    @property
    def connections(self) -> int:
        """How many connections have not ended: this one, or none."""
        return 0 if self._session.over else 1

    @property
    def inherited(self) -> bool:
        """Whether this is the copy that a fork made of another process's session."""
        return self._session.inherited

    def __del__(self) -> None:
        # Nobody is left, so the loop does not watch it any more, or is gone itself.
        self._session.waited_for = 0
        self._session.close()

    # ------------------------------------------------------------------------------------------ commands

    def submit(self, command: Command) -> None:
        """Queue a command; it is sent in the loop's next turn, together with all others of this one.

        Raises UsageError in any loop but its own, whose thread alone may touch it, and what ended the connection once it is over.
        """
        if not self._send_due:
            self._send_soon()
        try:
            self.engine.submit(command)
        except UsageError:
            self._refuse_if_over()
            raise

    @types.coroutine
    def run(self, command: Command, timeout: float | None) -> Generator[Waiter, None, None]:
        """Run one command and raise its error. At the deadline, or when the task is cancelled, it is abandoned."""
        seconds = None if timeout is None else deadline_after(timeout).remaining()
        if not self._send_due:  # as `submit` does: this is once a small read
            self._send_soon()
        self.engine.submit(command)
        command.completion = self._finish
        waiter = command.tag = Waiter(self.loop)
        alarm = None if seconds is None else self.loop.call_later(seconds, self.expire, command)
        try:
            yield waiter
        except BaseException as exc:
            # Its own words only: the traceback would hold on to the caller's memory for as long as the late answer takes.
            self.abandon(command, repr(exc))
            raise
        finally:
            if alarm is not None:
                alarm.cancel()
        if command.error is not None:
            self.raise_error(command)

    def abandon(self, command: Command, why: str) -> None:
        """Give a command up without a word to whoever waits for it: its memory is not touched any more."""
        command.completion = command.target = None
        self.engine.abandon(command, DeadlineExceeded(errno.ETIMEDOUT, f"given up by the program ({why})"))

    def expire(self, command: Command) -> None:
        """The time of a command is up: it fails, and whoever waits for it is told."""
        self.engine.abandon(command, DeadlineExceeded(errno.ETIMEDOUT, f"no answer from the server in time ({command})"))
        self._wake_soon()

    def own(self, error: Error) -> Error:
        """Return the caller's own copy of an error that others may be raising as well."""
        return copied(error) if error is self.engine.error else error

    def raise_error(self, command: Command) -> None:
        """Raise the error of a finished command, if it has one."""
        error = command.error
        if error is None:
            return
        # The error's traceback leads to the command, which must not hold on to the caller's memory, nor to the error.
        command.target = None
        if error is self.engine.error or command.discard:
            error = copied(error)
        else:
            command.error = None
        try:
            raise error
        finally:
            del error  # its traceback leads here

    # ------------------------------------------------------------------------------------------ conversations

    async def exchange(self, start: Callable[[Engine], Exchange], deadline: Deadline, what: str) -> object:
        """Run one conversation with the server and return its result. At the deadline, or when cancelled, the connection dies."""
        self._refuse_if_over()
        exchange = start(self.engine)
        waiter: asyncio.Future[bool] = self.loop.create_future()
        exchange.completion = lambda _: settle(waiter)
        self._move(self._session.advance)
        self.engine.release_buffer()
        alarm = None
        if not exchange.done:
            remaining = deadline.remaining()
            late = DeadlineExceeded(errno.ETIMEDOUT, f"no answer from the server in time ({what})")
            alarm = None if remaining is None else self.loop.call_later(remaining, self.close, late)
            try:
                await waiter
            except BaseException as exc:
                self.close(DeadlineExceeded(errno.ETIMEDOUT, f"{what} was given up ({exc!r})"))
                raise
            finally:
                if alarm is not None:
                    alarm.cancel()
        if exchange.error is not None:
            raise copied(exchange.error)
        return exchange.result

    # ------------------------------------------------------------------------------------------ the end

    async def take_leave(self, deadline: Deadline) -> None:
        """Say goodbye, unless another task has, and wait until the connection has ended."""
        if self._session.over or self.inherited:
            return
        if not self._leaving:
            self._leaving = True
            self.submit(disconnect())
        waiter: asyncio.Future[bool] = self.loop.create_future()
        self._ends.append(waiter)
        remaining = deadline.remaining()
        alarm = None if remaining is None else self.loop.call_later(remaining, settle, waiter, False)
        try:
            if not await waiter:
                raise DeadlineExceeded(errno.ETIMEDOUT, "no answer from the server in time (the server was to hang up)")
        finally:
            if alarm is not None:
                alarm.cancel()

    def close(self, error: Error | None = None) -> None:
        """End the connection now. Callers that wait are woken, and get `error`, or that this program closed it."""
        if self._session.inherited:  # the loop shares what it watches with the parent's, and must not be touched
            self._session.close()
            return
        # A loop that was closed with callers waiting can wake nobody.
        with contextlib.suppress(RuntimeError) if self.loop.is_closed() else contextlib.nullcontext():
            if error is not None:
                self._session.fail(error)
            self._session.close()
        self._look()

    def _refuse_if_over(self) -> None:
        if self._session.over:
            error = self.engine.error
            raise copied(error) if error else closed_by_program()

    # ------------------------------------------------------------------------------------------ called by the loop

    def _readable(self) -> None:
        """Receive, and let callers go on; again at once while the server answers so fast that a turn of the loop is felt."""
        for _ in range(_RECEIVES):
            before = self.engine.traffic.bytes_received
            self._receive()
            if self._tells_once or self._session.over or self.engine.traffic.bytes_received - before < _BURST:
                break

    def _receive(self) -> None:
        session, engine = self._session, self.engine
        self._send_due = self._wake_due = True
        try:
            while True:
                before = engine.traffic.bytes_received
                self._move(session.receive if engine.phase is Phase.CONNECTED else session.advance)
                if not self._tells_once or session.over or engine.traffic.bytes_received == before:
                    break
            engine.release_buffer()
        finally:
            self._turn_to_callers()

    def _receive_more(self) -> None:
        self._receive_due = False
        self._readable()

    def _turn_to_callers(self) -> None:
        """Let the callers run whose commands are done, and send what they ask next."""
        try:
            self._wake()
        finally:
            self._send_due = False
            if self.engine.has_outgoing:
                self._move(self._session.send)

    def _send_soon(self) -> None:
        check_runs(self.loop)
        self._send_due = True
        self.loop.call_soon(self._send)

    def _send(self) -> None:
        self._send_due = False
        self._move(self._session.send)

    def _wake(self) -> None:
        """Let the callers run whose commands are done. No task runs yet, and nothing is in the middle of being received."""
        try:
            Waiter.wake_all(self._finished)
        finally:
            self._wake_due = False
            self._wake_soon()  # the rest, where one of them ended the program

    def _wake_soon(self) -> None:
        if self._finished and not self._wake_due and not self.loop.is_closed():
            self._wake_due = True
            self.loop.call_soon(self._wake)

    def _move(self, move: Callable[[], None]) -> None:
        """Move bytes for everybody, then look what there is to wait for."""
        try:
            move()
        except BaseException as exc:
            self._session.give_up(exc)  # a second Ctrl-C, say
            raise
        finally:
            self._look()

    def _look(self) -> None:
        """Have the loop watch for what the session waits for now."""
        session = self._session
        if self._finished:
            self._wake_soon()
        if session.over:
            self._leave_loop()
            return
        if session.buffered and not self._receive_due:
            self._receive_due = True
            self.loop.call_soon(self._receive_more)
        wanted = session.wanted()
        if wanted != self._watched:
            self._watch(wanted)

    def _watch(self, wanted: int) -> None:
        changed, loop, descriptor = wanted ^ self._watched, self.loop, self._descriptor
        self._watched = wanted
        if loop.is_closed():
            return
        if changed & wanted & _READ:
            loop.add_reader(descriptor, self._readable)
        elif changed & _READ:
            loop.remove_reader(descriptor)
        if changed & wanted & _WRITE:
            loop.add_writer(descriptor, self._send)
        elif changed & _WRITE:
            loop.remove_writer(descriptor)

    def _leave_loop(self) -> None:
        if self._watched:
            self._watch(0)
        self._session.waited_for = 0
        self._session.close()
        if not self.loop.is_closed():  # else nobody is left to wait
            for waiter in self._ends:
                settle(waiter)
        self._ends.clear()


def check_runs(loop: asyncio.AbstractEventLoop) -> None:
    """Raise UsageError unless this loop is running: then the caller is in it, or asyncio finds out that it is not."""
    # Before Python 3.12 asking which loop runs here costs a system call.
    if not loop.is_running():
        raise UsageError(errno.EINVAL, "the client belongs to the event loop that it was connected in, and this is another")


def close_in_loop(live: Shared) -> None:
    """End all now, from wherever this is called. In the copy that a fork made, the loop is the parent's as well."""
    if live.inherited:
        live.close()
    else:
        call_in(live.loop, live.close)


def call_in(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Call now if this is the loop's thread, or the loop is no more; else as soon as the loop has a turn."""
    try:
        here = asyncio.get_running_loop() is loop
    except RuntimeError:  # no loop runs here
        here = False
    if here or loop.is_closed():
        call()
    else:
        loop.call_soon_threadsafe(call)


def settle(waiter: asyncio.Future[bool], result: bool = True) -> None:
    """Wake whoever waits for this future, unless that has happened. Results, not exceptions: nobody may be left to take one."""
    if not waiter.done():
        waiter.set_result(result)

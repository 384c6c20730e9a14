"""Several connections to one export, each with its own callers: which one a call goes to, and a pipeline that has more than one.

Each connection has its own lock, and its own callers that watch it (`threads`). Nothing is held over all of them: so nobody who
waits for one connection is needed by another's callers, and threads move large data side by side.

A call goes to one connection and stays there: to one that is idle, or else to the one with the fewest commands under way. A
pipeline, the requests of one `pread_many` or its kind, has every connection that nobody else uses, and where there is none, it
joins the one with the fewest users. So one pipeline has all connections; as many as there are connections soon have one each.

A pipeline on one connection waits as any caller does. On several it watches those that nobody watches, and is parked at the
others, where it is not woken by a lock but by a bell: a descriptor that it waits for together with those that it watches.

The end of a connection is the end of its own commands only. One that ends while nobody watches it is noticed by the next call
after a moment, before a command goes there. So are answers to commands that were given up.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from nbdcore.clients.blocking.threads import WAITING, SharedSession
from nbdcore.clients.blocking.waiters import Wait
from nbdcore.clients.session.group import Group
from nbdcore.clients.session.pipeline import Pipeline
from nbdcore.clients.session.session import Session, closed_by_program
from nbdcore.errors import DeadlineExceeded, Error
from nbdcore.protocol.engine import Engine
from nbdcore.protocol.transmission.commands import Command
from nbdcore.streams.base import WANTS, Want
from nbdcore.streams.bell import Bell
from nbdcore.streams.waiting import LOOK_AGAIN, Deadline, Watch, sooner, wait_any

# Seconds after which a call looks at connections that nobody watches: often enough that few commands go to one that has ended,
# and that one with late answers is not taken for busy; rarely enough to cost a busy pool nothing.
_LOOK_AT_UNWATCHED = 0.1
_READ = int(Want.READ)


class SharedSessions:
    """Several sessions, and the callers that wait on them. Safe to use from any thread.

    Args:
        sessions: open.
    """

    def __init__(self, sessions: Sequence[Session]) -> None:
        self._connections = [SharedSession(session) for session in sessions]
        self._group = Group([connection.engine for connection in self._connections])
        self._waits: dict[Pipeline, _WaitOnSeveral] = {}
        self._looked = 0.0  # when unwatched connections were looked at, by the clock of time.monotonic

    @property
    def engine(self) -> Engine:
        """The engine that speaks for all."""
        return self._group.speaker

    @property
    def connections(self) -> int:
        """How many connections have not ended."""
        return len(self._group.live)

    @property
    def inherited(self) -> bool:
        """Whether this is the copy that a fork made: the connections are the parent's."""
        return self._connections[0].inherited

    # ------------------------------------------------------------------------------------------ single commands

    def run_command(self, command: Command, deadline: Deadline) -> None:
        """Run one command and raise its error. At the deadline, or when the caller is interrupted, it is abandoned."""
        while True:
            connection = self._choose(command)
            try:
                connection.assigned[command] = None
                connection.run_command(command, deadline, retry_elsewhere=True)
            except Error as exc:
                if command.mark is not None:
                    raise
                # Where it ended, or began to, before it had the command, another one takes that.
                if connection.takes_commands or not any(one.takes_commands for one in self._connections):
                    connection.abandon((command,), exc)
                    raise
                command.error, command.done = None, False
            else:
                return
            finally:
                connection.assigned.pop(command, None)

    def _choose(self, command: Command) -> SharedSession:
        """Return the connection for one more command: an idle one, or the one with the fewest under way."""
        self._refuse_if_interrupted(command)
        if time.monotonic() - self._looked > _LOOK_AT_UNWATCHED:
            self._look_at_unwatched()
        best, fewest = None, 0
        for connection in self._connections:
            if not connection.takes_commands:
                continue
            pending = connection.engine.pending
            if connection.assigned:  # some may be about to submit
                pending += sum(one.mark is None for one in [*connection.assigned])
            if best is None or pending < fewest:
                best, fewest = connection, pending
                if not pending:
                    break
        return best or self._speaker

    @property
    def _speaker(self) -> SharedSession:
        engine = self._group.speaker
        return next(connection for connection in self._connections if connection.engine is engine)

    def _refuse_if_interrupted(self, what: object) -> None:
        for connection in self._connections:
            connection.refuse_if_interrupted(what)

    def _look_at_unwatched(self) -> None:
        self._looked = time.monotonic()
        for connection in self._connections:
            connection.look_if_unwatched()

    # ------------------------------------------------------------------------------------------ the end

    def take_leave(self, deadline: Deadline) -> None:
        """Say goodbye, unless another caller has, and wait until every connection has ended."""
        for connection in self._connections:
            connection.say_goodbye()
        for connection in self._connections:
            connection.await_end(deadline)

    def close(self, error: Error | None = None) -> None:
        """End all now. Callers that wait are woken, and get `error`, or that this program closed it."""
        for connection in self._connections:
            connection.close(error)

    def abandon(self, commands: Iterable[Command], why: BaseException) -> None:
        """Give commands up: their memory is not touched any more, and answers that come are thrown away."""
        unfinished = [*commands]
        for connection in self._connections:
            connection.abandon([command for command in unfinished if connection.engine.knows(command)], why)

    def own(self, error: Error) -> Error:
        """Return the caller's own copy of an error that others may be raising as well."""
        return self._group.own(error)

    # ------------------------------------------------------------------------------------------ pipelines

    def wait_for_any(self, pipeline: Pipeline, commands: Sequence[Command], deadline: Deadline) -> None:
        """Submit a pipeline's commands, and wait until there is something for it to settle."""
        self._refuse_if_interrupted(pipeline)
        if time.monotonic() - self._looked > _LOOK_AT_UNWATCHED:
            self._look_at_unwatched()
        wait = self._waits.get(pipeline)
        if wait is None:
            wait = self._waits[pipeline] = _WaitOnSeveral(pipeline)
        if commands:
            self._submit(pipeline, commands)
        used = self._used_by(pipeline)
        if len(used) == 1:
            used[0].wait(pipeline, deadline, pipeline, any_of_several=True)
        else:
            wait.wait(used, deadline)

    def forget(self, pipeline: Pipeline) -> None:
        """A pipeline has ended, and has no commands under way any more."""
        for connection in self._connections:
            connection.pipelines.pop(pipeline, None)
        wait = self._waits.pop(pipeline, None)
        if wait is not None:
            wait.close()

    def _submit(self, pipeline: Pipeline, commands: Sequence[Command]) -> None:
        """Queue commands, each where the fewest are under way. Where no connection is left, that is their outcome."""
        while commands:
            try:
                places = self._places(pipeline)
            except Error as exc:
                pipeline.refuse(commands, exc)
                return
            shares = {places[0]: [*commands]} if len(places) == 1 else _shared_out(commands, places)
            refused: list[Command] = []
            for connection, share in shares.items():
                connection.pipelines[pipeline] = None
                if not connection.submit(share):
                    refused += share
            commands = refused

    def _places(self, pipeline: Pipeline) -> list[SharedSession]:
        """Return where a pipeline's next commands may go. Raises what ended the connections where none is left."""
        live = [connection for connection in self._connections if connection.takes_commands]
        if not live:
            error = self.engine.error
            raise self.own(error) if error else closed_by_program()
        others = {one: len(one.assigned) + len(one.pipelines) - (pipeline in one.pipelines) for one in live}
        free = [connection for connection in live if not others[connection]]
        return free or [min(live, key=lambda connection: (others[connection], connection.engine.pending))]

    def _used_by(self, pipeline: Pipeline) -> list[SharedSession]:
        """Return the connections that have commands of a pipeline under way, or have just finished some."""
        used = [connection for connection in self._connections if pipeline in connection.pipelines]
        if len(used) == 1:
            return used
        unfinished = pipeline.unfinished()
        for connection in used[:]:
            if not any(connection.engine.knows(command) for command in unfinished):
                del connection.pipelines[pipeline]
                used.remove(connection)
        return used


#: What the calls of a blocking client wait on.
Shared: TypeAlias = SharedSession | SharedSessions


def _shared_out(commands: Sequence[Command], places: Sequence[SharedSession]) -> dict[SharedSession, list[Command]]:
    """Give each command to the place with the fewest."""
    shares: dict[SharedSession, list[Command]] = {place: [] for place in places}
    pending = {place: place.engine.pending for place in places}
    for command in commands:
        place = min(places, key=pending.__getitem__)
        pending[place] += 1
        shares[place].append(command)
    return {place: share for place, share in shares.items() if share}


class _WaitOnSeveral:
    """A pipeline's wait on several connections at once."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._watch = Watch()
        self._bell = Bell()

    def close(self) -> None:
        self._bell.close()

    def wait(self, connections: Sequence[SharedSession], deadline: Deadline) -> None:
        """Wait until the pipeline has something to settle, doing on each connection what nobody else does there."""
        pipeline = self._pipeline
        for connection in connections:
            connection.refuse_if_beneath(pipeline)
        waits = {connection: Wait(pipeline, (), any_of_several=True, gate=self._bell) for connection in connections}
        expired = False
        try:
            while True:
                for connection, wait in waits.items():
                    connection.step(wait, expired=expired)
                if pipeline.done or expired:
                    break
                self._look(waits, deadline)
                expired = deadline.at is not None and deadline.expired
            for connection, wait in waits.items():
                connection.stop(wait)
        except BaseException:
            for connection, wait in waits.items():
                connection.stop(wait, interrupted=True)
            raise
        if not pipeline.done:
            raise DeadlineExceeded(errno.ETIMEDOUT, f"no answer from the server in time ({pipeline})")

    def _look(self, waits: dict[SharedSession, Wait], deadline: Deadline) -> None:
        """Wait for what is watched and for the bell, and note where something is to be done."""
        watching = {connection.fileno(): wait for connection, wait in waits.items() if wait.watched}
        for wait in watching.values():
            wait.ready = wait.at_once
        if any(wait.ready for wait in watching.values()):
            return
        wanted = {fd: wait.watched for fd, wait in watching.items()}
        all_tell = all(wait.alone for wait in watching.values())  # where not, see `SharedSession._look`
        if len(watching) < len(waits):  # it is parked at the others
            bell = self._bell.fileno()  # made before `rung` is looked at
            if bell < 0:
                all_tell = False
            else:
                wanted[bell] = _READ
        if not self._bell.rung:
            ready = self._ready(wanted, deadline if all_tell else sooner(Deadline.after(LOOK_AGAIN), deadline))
            for fd, wait in watching.items():
                wait.ready = fd in ready
        if self._bell.rung:
            self._bell.silence()

    def _ready(self, wanted: dict[int, int], deadline: Deadline) -> set[int]:
        """Wait for descriptors, each for the bits of a Want, and return those that are ready."""
        if wanted and all(bits == _READ for bits in wanted.values()):
            return set(self._watch.wait(tuple(wanted), deadline))
        return {fd for fd, _ in wait_any([(fd, WANTS[bits]) for fd, bits in wanted.items()], deadline)}


WAITING.add(_WaitOnSeveral.wait.__code__)

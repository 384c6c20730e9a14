"""The requests of one caller, several under way at a time: how many more may begin, which have finished, and the first error.

It never waits, and sends nothing: a front end submits what `begin` returns and waits until `done`. A request too large for the
server is several commands, which count as one request when all have finished. After the first error no more is begun; what is
under way is waited for. Whoever leaves early gives up what is `unfinished`, so that no buffer of the caller's is written to any
more.

Outcomes come in bursts, one receive's worth, and requests go out likewise: when the caller has taken one burst, as many new ones
as there is room for. While the caller is busy with a burst, the server has all the others to work on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from nbdcore.clients.requests.batches import SplitRequest
from nbdcore.errors import Error
from nbdcore.protocol.transmission.commands import Command

# The list of what has begun is looked through when it has grown to so many times the depth: to find each command that finishes
# would cost more than to keep some that have.
_KEPT = 4


class Pipeline:
    """Commands under way, as one thing to wait for: any of them.

    Args:
        fresh: the commands, made when they are wanted.
        depth: how many may be under way at a time.
        own: returns the caller's own copy of an error that others may be raising as well.
        finish: called with a command when it has finished; it must put that into `finished`. Left out, nothing else happens.

    Attributes:
        finished: commands that have finished and have not been settled, in the order in which they finished.
        under_way: how many have not been settled.
        failed: the first error, of a command or of the caller's own input.
        completion: for whoever waits; nothing here calls it.
    """

    __slots__ = ("_begun", "_depth", "_finish", "_fresh", "_own", "completion", "failed", "finished", "under_way")

    def __init__(
        self,
        fresh: Iterator[Command],
        depth: int,
        own: Callable[[Error], Error],
        finish: Callable[[Command], None] | None = None,
    ) -> None:
        self.finished: deque[Command] = deque()
        self.under_way: int = 0
        self.failed: Exception | None = None
        self.completion: Any = None
        self._fresh = fresh
        self._depth = depth
        self._own = own
        self._finish = finish or self.finished.append
        self._begun: list[Command] = []  # all that have not finished, and some that have

    def begin(self) -> list[Command]:
        """Take as many fresh commands as there is room for. Returns those that are to be submitted."""
        commands: list[Command] = []
        if self.failed is not None:
            return commands
        try:
            commands.extend(islice(self._fresh, self._depth - self.under_way))
        except Exception as exc:  # noqa: BLE001 (of the caller's own input too: raised when the rest has settled)
            self.failed = exc
        self.under_way += len(commands)
        finish, done = self._finish, False
        for command in commands:
            command.completion = finish
            if command.done:
                done = True
        if done:  # some are for no bytes: they are not sent
            self.finished += [command for command in commands if command.done]
            commands = [command for command in commands if not command.done]
        self._begun += commands
        if len(self._begun) > _KEPT * self._depth:
            self._begun = self.unfinished()
        return commands

    def refuse(self, commands: Iterable[Command], error: Error) -> None:
        """None of these could be submitted: that is their outcome. What is under way has one of its own."""
        for command in commands:
            command.error, command.done = error, True
            self._finish(command)

    def settle(self, command: Command) -> Command | SplitRequest | None:
        """Look at one that was taken out of `finished`. Returns the request that has finished well with it, if one has."""
        self.under_way -= 1
        split: SplitRequest | None = command.tag
        if command.error is not None:
            self.failed = self.failed or self._own(command.error)
            command.error = command.target = None  # an error's traceback leads to the command
            return None
        if split is None:
            return command
        command.target = None  # the caller's memory is theirs again
        split.left -= 1
        return None if split.left else split

    def owns(self, command: Command) -> bool:
        """Whether a command that has not finished is one of these."""
        return command.completion == self._finish

    @property
    def done(self) -> bool:
        """Whether there is something to settle, or nothing to wait for."""
        return bool(self.finished) or not self.under_way

    def unfinished(self) -> list[Command]:
        """Return the commands that have not finished."""
        return [command for command in self._begun if not command.done]

    def close(self) -> None:
        """Nothing more is wanted: let go of everything of the caller's."""
        self.under_way = 0
        self.finished.clear()
        self._begun.clear()
        self._fresh = iter(())
        self.failed = None  # its traceback leads here

    def __str__(self) -> str:
        return str(next(iter(self.unfinished()), "nothing is under way"))

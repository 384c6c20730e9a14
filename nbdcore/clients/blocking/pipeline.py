"""Many requests in a loop of a blocking client: up to so many under way at a time, outcomes in the order in which they come.

The input is consumed as fast as the server answers, and never further than `depth` requests ahead of the caller. A request too
large for the server goes out in pieces, and counts as finished when all of them have. After the first error no more is asked;
what is under way is waited for and given to the caller, then the error is raised. Leaving the loop early, by whatever way,
gives up what is under way: no buffer is written to any more, and the connection goes on.

Outcomes come in bursts, one receive's worth, and requests go out likewise: when the caller has taken one burst, as many new ones
as there is room for. While the caller is busy with a burst, the server has all the others to work on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from itertools import islice
from typing import Any, TypeVar

from nbdcore.clients.blocking.threads import SharedSession
from nbdcore.clients.requests.arguments import deadline_after
from nbdcore.clients.requests.batches import Whole
from nbdcore.errors import DeadlineExceeded
from nbdcore.protocol.transmission.commands import Command

Item = TypeVar("Item")


class _Pipeline:
    """Commands under way, as one thing to wait for: any of them.

    Attributes:
        finished: those to be looked at, in the order in which they finished.
        under_way: how many have not been looked at.
    """

    __slots__ = ("_begun", "_depth", "completion", "finished", "under_way")

    def __init__(self, depth: int) -> None:
        self.finished: deque[Command] = deque()
        self.under_way = 0
        self.completion: Any = None
        self._begun: list[Command] = []  # all that have not finished, and some that have
        self._depth = depth

    def begin(self, fresh: Generator[Command]) -> tuple[list[Command], Exception | None]:
        """Take as many fresh commands as there is room for. Returns them, to be submitted, and what kept from taking more."""
        commands: list[Command] = []
        failed: Exception | None = None
        try:
            commands.extend(islice(fresh, self._depth - self.under_way))
        except Exception as exc:  # noqa: BLE001 (of the caller's own input too: raised when the rest has settled)
            failed = exc
        finish = self.finished.append
        for command in commands:
            command.completion = finish
        self.under_way += len(commands)
        self._begun += commands
        # Looked through now and then only: finding each one that finishes would cost more than to keep some that have.
        if len(self._begun) > 4 * self._depth:
            self._begun = self.unfinished()
        return commands, failed

    @property
    def done(self) -> bool:
        """Whether there is something to look at, or nothing to wait for."""
        return bool(self.finished) or not self.under_way

    def unfinished(self) -> list[Command]:
        """Return the commands that have not finished."""
        return [command for command in self._begun if not command.done]

    def __str__(self) -> str:
        return str(next(iter(self.unfinished()), "nothing is under way"))


def run_many(  # noqa: C901 (its inner loop runs once a request, where a call costs as much as what it would hide)
    shared: SharedSession,
    fresh: Generator[Command],
    pick: Callable[[Command | Whole], Item],
    *,
    depth: int,
    seconds: float | None,
    held: object,  # noqa: ARG001 (the client, which nobody else may hold: this frame keeps it open as long as the loop lasts)
) -> Generator[Item]:
    """Run the commands that `fresh` yields, and yield what `pick` makes of each request that has finished well."""
    pipeline = _Pipeline(depth)
    finished = pipeline.finished
    failed: Exception | None = None
    try:
        while True:
            commands: list[Command] = []
            if failed is None:
                commands, failed = pipeline.begin(fresh)
            if not pipeline.under_way:
                break
            shared.wait(pipeline, deadline_after(seconds), pipeline, submit=commands, any_of_several=True)
            while finished:
                command = finished.popleft()
                pipeline.under_way -= 1
                whole: Whole | None = command.tag
                if whole is not None:
                    whole.left -= 1
                if command.error is not None:
                    command.target = None
                    failed = failed or shared.own(command.error)
                elif whole is None:
                    item = pick(command)
                    command.target = command.data = None  # the caller's memory is theirs again
                    yield item
                else:
                    command.target = None
                    if not whole.left:
                        yield pick(whole)
        if failed is not None:
            raise failed
    finally:
        fresh.close()
        if pipeline.under_way:
            shared.abandon(pipeline.unfinished(), _UNWANTED)
        failed = None  # its traceback leads here


_UNWANTED = DeadlineExceeded("given up by the program (the rest is not wanted any more)")

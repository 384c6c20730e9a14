"""Many requests of a blocking caller: a loop over their outcomes, and the pieces of one that is too large for the server."""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator
from typing import TypeVar

from nbdcore.clients.blocking.several import Shared
from nbdcore.clients.requests.arguments import deadline_after
from nbdcore.clients.requests.batches import SplitRequest
from nbdcore.clients.requests.single import PIECES_AT_A_TIME, Pieces
from nbdcore.clients.session.pipeline import Pipeline
from nbdcore.errors import DeadlineExceeded
from nbdcore.protocol.transmission.commands import Command
from nbdcore.streams.waiting import Deadline

Item = TypeVar("Item")


def run_many(
    shared: Shared,
    fresh: Generator[Command],
    pick: Callable[[Command | SplitRequest], Item],
    *,
    depth: int,
    seconds: float | None,
    held: object,  # noqa: ARG001 (the client, which nobody else may hold: this frame keeps it open as long as the loop lasts)
) -> Generator[Item]:
    """Run the commands that `fresh` yields, and yield what `pick` makes of each request that has finished well.

    The input is consumed as fast as the server answers, and never further than `depth` requests ahead of the caller. After an
    error the rest is waited for and given to the caller, then it is raised. `seconds` is for each wait.
    """
    pipeline = Pipeline(fresh, depth, shared.own)
    finished = pipeline.finished
    try:
        while True:
            commands = pipeline.begin()
            if not pipeline.under_way:
                break
            shared.wait_for_any(pipeline, commands, deadline_after(seconds))
            while finished:
                command = finished.popleft()
                if command.error is None and command.tag is None:
                    # As `settle` does. To call it would cost as much as all the rest.
                    pipeline.under_way -= 1
                    item = pick(command)
                    command.target = command.data = None  # the caller's memory is theirs again
                    yield item
                elif (request := pipeline.settle(command)) is not None:
                    yield pick(request)
        if pipeline.failed is not None:
            raise pipeline.failed
    finally:
        fresh.close()
        if pipeline.under_way:
            shared.abandon(pipeline.unfinished(), _UNWANTED)
        shared.forget(pipeline)
        pipeline.close()


def run_pieces(shared: Shared, pieces: Pieces, deadline: Deadline) -> None:
    """Run the pieces of one request, then raise the first error of any. At the deadline those under way are given up."""
    pipeline = Pipeline(pieces, PIECES_AT_A_TIME, shared.own)
    try:
        while True:
            commands = pipeline.begin()
            if not pipeline.under_way:
                break
            shared.wait_for_any(pipeline, commands, deadline)
            while pipeline.finished:
                pipeline.settle(pipeline.finished.popleft())
    except BaseException as exc:
        shared.abandon(pipeline.unfinished(), exc)
        pipeline.close()
        raise
    finally:
        shared.forget(pipeline)
        pieces.close()
    try:
        if pipeline.failed is not None:
            raise pipeline.failed
    finally:
        pipeline.close()


_UNWANTED = DeadlineExceeded(errno.ETIMEDOUT, "given up by the program (the rest is not wanted any more)")

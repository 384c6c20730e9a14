"""How far a command is that takes a while: a bar on standard error, if that is a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

__all__ = ["bar"]

# Seconds before it is drawn: what is over by then needs none, and what draws it need not be loaded.
_UNHURRIED = 0.5


@contextlib.contextmanager
def bar(what: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """Give what is to be told how many bytes are done, and of how many; None where nobody would see it."""
    if quiet or sys.stderr is None or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":  # which wipes nothing away
        yield None
        return
    with contextlib.ExitStack() as stack:
        begun = time.monotonic()
        drawn: Callable[[int, int], None] | None = None

        def told(done: int, total: int) -> None:
            nonlocal drawn
            if drawn is None and time.monotonic() - begun > _UNHURRIED:
                drawn = _drawn(what, stack)
            if drawn is not None:
                drawn(done, total)

        yield told


def _drawn(what: str, stack: contextlib.ExitStack) -> Callable[[int, int], None]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    shown = stack.enter_context(progress.Progress(*columns, console=Console(stderr=True), transient=True))
    task = shown.add_task(what)
    return lambda done, total: shown.update(task, completed=done, total=total)

"""How far a long command is: a bar on standard error, or lines for a program that reads them.

The one place beside `output` that writes, since a bar is drawn again and again in the same place.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from nbdcore.cli.output import Failure
from nbdcore.cli.sizes import rounded

if TYPE_CHECKING:
    from rich.progress import Progress

    from nbdcore.disk.copying.result import CopyProgress

__all__ = ["BAR", "bar", "shown"]

#: As the value of --progress: a bar.
BAR = "bar"

# Seconds before a bar is drawn: what is over by then needs none, and rich need not be loaded for it.
_UNHURRIED = 0.5
# Seconds between two pictures of it.
_FRAME = 0.1

Telling = Callable[["CopyProgress"], object]


@contextlib.contextmanager
def shown(wanted: str | None, *, quiet: bool) -> Iterator[Telling | None]:
    """Give what is to be told of progress, or None. `wanted`: BAR, a file descriptor, or None: a bar, if a terminal shows it."""
    if quiet:
        yield None
    elif wanted not in (None, BAR):
        yield _Lines(_descriptor(wanted))
    elif wanted == BAR or (sys.stderr is not None and sys.stderr.isatty()):
        bar = _Bar(at_once=wanted == BAR)
        try:
            yield bar
        finally:
            bar.close()
    else:
        yield None


@contextlib.contextmanager
def bar(what: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """Give what is to be told how many bytes are done, and of how many; None where nobody would see it. It is gone at the end."""
    if quiet or sys.stderr is None or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":  # which wipes nothing away
        yield None
        return
    begun = time.monotonic()
    drawn = _Bar(at_once=False, what=what)
    try:
        yield lambda done, total: drawn.draw(done, total, time.monotonic() - begun)
    finally:
        drawn.close()


def _descriptor(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise click.BadParameter(f"--progress={text}: write the number of a file descriptor, as in --progress=3")
    try:
        os.fstat(int(text))
    except OSError as error:
        raise Failure(f"--progress={text}: {error.strerror}") from error
    return int(text)


class _Lines:
    """Lines such as 50/100, each when it changes."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._last = -1

    def __call__(self, now: CopyProgress) -> None:
        percent = (100 * now.done // now.size if now.size else 100) if now.size is not None else 0
        if percent != self._last:
            self._last = percent
            os.write(self._fd, b"%d/100\n" % percent)


class _Bar:
    """A bar, with the rate, the time left and how much was zero. What is no terminal gets it once, at the end."""

    def __init__(self, *, at_once: bool, what: str = "") -> None:
        self._at_once = at_once
        self._what = what  # named before the bar, which does not stay then
        self._drawn: Progress | None = None
        self._next = 0.0

    def __call__(self, now: CopyProgress) -> None:
        self.draw(now.done, now.size, now.seconds, now.zeroes)

    def draw(self, done: int, size: int | None, seconds: float, zeroes: int = 0) -> None:
        """Draw it, if it is time to."""
        if seconds < self._next and done != size:
            return
        self._next = seconds + _FRAME
        if self._drawn is None:
            if not self._at_once and seconds < _UNHURRIED:
                return
            self._drawn = _drawn(self._what)
            self._drawn.add_task(self._what, total=size, rate="", done="", zeroes="")
            self._drawn.start()
        rate = f"{rounded(int(done / seconds))}/s" if seconds else ""
        zero = f"{rounded(zeroes)} zero" if zeroes else ""
        self._drawn.update(self._drawn.task_ids[0], completed=done, total=size, rate=rate, done=rounded(done), zeroes=zero)
        self._drawn.refresh()

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._drawn is not None:
            self._drawn.stop()


def _drawn(what: str) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    texts = [TextColumn(f"{{task.fields[{name}]}}") for name in ("done", "rate", "zeroes")]
    columns = [BarColumn(), TaskProgressColumn(), *texts, TimeRemainingColumn(compact=True, elapsed_when_finished=True)]
    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    if what:
        return Progress(TextColumn("{task.description}"), *columns, console=console, auto_refresh=False, transient=True)
    return Progress(*columns, console=console, auto_refresh=False)

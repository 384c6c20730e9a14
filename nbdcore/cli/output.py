"""How every command speaks: results on standard output, all else on standard error, a failure as one line and exit status 1.

The one place that writes. It never lets a terminal's control characters through: names, descriptions and error texts come from
servers. Colours and wrapping are for terminals only; what is piped is plain, and one line stays one line.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import IO, TYPE_CHECKING, Any

import click

from nbdcore.errors import Error, UsageError, printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

__all__ = [
    "Failure",
    "canvas",
    "described",
    "draw",
    "escaped",
    "paragraph",
    "pour",
    "prepare",
    "printer",
    "reported",
    "say",
    "table",
    "warn",
]

# What a shell makes of a program that ended by a signal: 128 and its number. Not every platform has SIGPIPE.
_INTERRUPTED = 128 + signal.SIGINT
_READER_GONE = 128 + 13

_program = "nbdcore"


class Failure(click.ClickException):
    """What was asked for cannot be done: `nbdcore: MESSAGE` on standard error, exit status 1."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line."""
        if file is None:
            warn(self.message)
        else:
            click.echo(_line(self.message), file=file)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turn the errors that a command expects into a Failure, and Ctrl-C into its exit status, without a word."""
    try:
        yield
    except KeyboardInterrupt:
        raise click.exceptions.Exit(_INTERRUPTED) from None
    except (OSError, Error) as error:
        raise Failure(described(error)) from error


def prepare(name: str = "nbdcore") -> None:
    """Set this process up: any name can be printed in any encoding, and a warning is a line, not two of Python's.

    `name` is what lines on standard error begin with: that of the program.
    """
    global _program  # noqa: PLW0603 (a process is one program)
    _program = name
    # A program may be started without them: what it prints goes nowhere, and there is nothing to read.
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: PTH123, SIM115 (a device, open as long as the process is)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 (as above)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr] # the interpreter's own TextIOWrapper
    warnings.showwarning = lambda message, *_, **__: warn(f"warning: {message}")


def described(error: OSError | Error) -> str:
    """Return an error as a user should read it."""
    if isinstance(error, UsageError):
        return error.message  # it says what is wrong with which word; an error number adds nothing
    if isinstance(error, Error) or error.strerror is None:
        return str(error) or type(error).__name__
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
    return f"{where}{error.strerror}"


def escaped(text: str) -> str:
    """Return untrusted text with its control characters escaped, in full."""
    return "".join(printable(char) for char in text)


def say(text: str, *, newline: bool = True) -> None:
    """Print a result, and make sure that it has left. Ends the command where nobody takes it."""
    # In one write: whoever reads the first line and goes away has read all of it.
    _write([f"{text}\n" if newline else text])


def pour(pieces: Iterable[str]) -> None:
    """Print a long result piece by piece, and the end of its last line. Ends the command as `say` does."""
    _write(chain(pieces, ["\n"]))


def _write(pieces: Iterable[str]) -> None:
    try:
        for piece in pieces:
            click.echo(piece, nl=False)
    except BrokenPipeError:
        discard_output()
        raise click.exceptions.Exit(_READER_GONE) from None
    except OSError as error:
        discard_output()
        raise Failure(f"cannot write to standard output: {error.strerror}") from error


def printer(text: Callable[[click.Context], str]) -> Callable[[click.Context, click.Parameter, bool], None]:
    """Return the callback of an option that prints something, such as --version, and ends the command."""

    def print_it(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
        if wanted and not ctx.resilient_parsing:
            say(text(ctx))
            ctx.exit()

    return print_it


def discard_output() -> None:
    """Send what is still buffered for standard output nowhere: the interpreter would try again at its end, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def warn(text: str) -> None:
    """Print a line on standard error; where nobody takes it, that is all that is lost."""
    with contextlib.suppress(OSError):
        click.echo(_line(text), err=True)


def paragraph(text: str) -> None:
    """Print a sentence, wrapped between words where it is a terminal that shows it."""
    from rich.text import Text

    console = _console()
    say(_rendered(console, Text(text), soft_wrap=not console.is_terminal))


def table(columns: Sequence[str], rows: Sequence[Sequence[str | Text]], *, numbers: Sequence[str] = ()) -> None:
    """Print a table; on a terminal too narrow for it, each row as a block of lines. `numbers` are aligned to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = _console()
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in columns:
        drawn.add_column(column, no_wrap=True, justify="right" if column in numbers else "left")
    cells = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    for row in cells:
        drawn.add_row(*row)
    width = console.measure(drawn, options=console.options.update(max_width=sys.maxsize)).maximum
    if width <= console.width or not console.is_terminal:
        console.width = width
        say(_rendered(console, drawn))
        return
    margin = max(map(len, columns)) + 2
    blocks = [
        Text("\n").join(Text.assemble(f"{column}:".ljust(margin), cell) for column, cell in zip(columns, row, strict=True))
        for row in cells
    ]
    say(_rendered(console, Text("\n\n").join(blocks)))


def canvas() -> tuple[int, str]:
    """Return how many columns a drawing may have, and in which encoding it will be shown."""
    console = _console()
    return console.width, console.encoding


def draw(what: Text, *, color: bool) -> None:
    """Print a drawing, which fits the canvas, in colour or in none."""
    if not color:
        say(what.plain)
        return
    from rich.console import Console

    width, _ = canvas()
    say(_rendered(Console(file=_Sheet(), force_terminal=True, no_color=False, width=width, highlight=False), what))


def _console() -> Console:
    """Return what draws for the standard output there is; writing is left to `say`."""
    from rich.console import Console

    shown = sys.stdout is not None and sys.stdout.isatty()
    return Console(file=_Sheet(), force_terminal=shown, markup=False, highlight=False, emoji=False)


class _Sheet(io.StringIO):
    """Takes what is drawn, and knows in which encoding it will be shown: not every one has lines to draw tables with."""

    encoding = "utf-8"  # of the class, since StringIO's own cannot be assigned to

    def __init__(self) -> None:
        super().__init__()
        if sys.stdout is not None:
            self.encoding = sys.stdout.encoding


def _rendered(console: Console, what: RenderableType, *, soft_wrap: bool = False) -> str:
    with console.capture() as capture:
        console.print(what, soft_wrap=soft_wrap)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _line(text: str) -> str:
    return f"{_program}: {escaped(text)}"

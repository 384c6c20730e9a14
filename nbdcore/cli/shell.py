"""`nbdcore shell`: Python with a disk at hand, interactively or for one line of a script, as the program nbdsh is.

What the command line asks for is done in its order. All of it sees one set of names: `nbd` is the drop-in for libnbd's module,
`h` a handle of it, and where there is a URI, `disk` is a client of nbdcore's own. `disk` connects when its name is first used:
a server may allow one connection only, and scripts written for nbdsh know nothing of a second.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from itertools import count
from typing import Any

import click

from nbdcore import BASE_ALLOCATION, Client, Error
from nbdcore.cli.access import Access, Place
from nbdcore.cli.output import Failure, say, warn
from nbdcore.cli.spellings import SpelledOption
from nbdcore.cli.versions import version_option

__all__ = ["shell"]

# Where the order of the options is kept.
_ORDER = "nbdcore.cli.shell.order"
# Seconds for `disk` to connect, and for each of its answers, as for all commands.
_TIMEOUT = 30.0


class _ShellCommand(click.Command):
    """A command that knows the order of its options: what each asks for depends on those before it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line, and keep the order."""
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        ctx.meta[_ORDER] = [parameter.name for parameter in order]
        return super().parse_args(ctx, args)


@click.command(cls=_ShellCommand, short_help="Use a disk from Python.")
@click.option("-c", "--command", multiple=True, metavar="TEXT", help="Run Python statements, or with - those on standard input.")
@click.option(
    "-u", "--uri", cls=SpelledOption, spellings=["--connect"], multiple=True, metavar="URI", help="Connect h to a disk."
)
@click.option("--base-allocation", count=True, help="Have h ask for base:allocation when it connects: where data and holes are.")
@click.option("--opt-mode", count=True, help="Have h stop in opt mode when it connects, before it opens the disk.")
@click.option("-n", "no_handle", is_flag=True, help="Make no handle h.")
@click.option("-v", "--verbose", is_flag=True, help="Print what handles do, and where in a script something failed.")
@version_option
@click.pass_context
def shell(
    ctx: click.Context,
    *,
    command: Sequence[str],
    uri: Sequence[str],
    base_allocation: int,
    opt_mode: int,
    no_handle: bool,
    verbose: bool,
) -> None:
    """Use a disk from Python: interactively, in IPython where that is installed, or with -c for one thing.

    The options are carried out in their order. The names at hand are those of the program nbdsh, nbd and h, which have the API
    of libnbd. With a URI there is disk too, a client with nbdcore's own API; it opens a connection of its own when it is used.

    \b
    nbdcore shell -u nbd://localhost/
    nbdcore shell -u nbd://localhost/ -c 'print(h.get_size())'
    nbdcore shell -u nbd://localhost/ -c 'print(disk.pread(4, 0))'
    nbdcore shell --opt-mode -u nbd://localhost/ -c - < script.py
    """  # noqa: D301 (a real backspace is how click is told not to wrap)
    if no_handle and (uri or base_allocation or opt_mode):
        raise Failure("-n makes no handle, which --uri, --base-allocation and --opt-mode are about: leave one of them out")
    if verbose:
        os.environ["LIBNBD_DEBUG"] = "1"
    with _names(with_handle=not no_handle) as names, _output_sent():
        waiting: dict[str, Iterator[Any]] = {"command": iter(command), "uri": iter(uri)}
        with _failures_shown():
            for option in ctx.meta[_ORDER]:
                if option in _ACTIONS:
                    _ACTIONS[option](names, next(waiting.get(option, iter([None]))))
            if not command:
                _interact(names)


# ---------------------------------------------------------------------------------------------- names


class _Names(dict[str, Any]):
    """The names that a script sees. `disk` is there from its first use on, if there is a URI."""

    def __init__(self) -> None:
        super().__init__({"__name__": "__main__"})
        self.uri = ""
        self._client: Client | None = None

    def __missing__(self, name: str) -> Any:
        if name != "disk" or not self.uri:
            raise KeyError(name)
        self["disk"] = self._client = Access(_TIMEOUT, None).client(Place(self.uri), contexts=[BASE_ALLOCATION])
        return self._client

    def close(self) -> None:
        """Close what `disk` has opened."""
        if self._client is not None:
            self._client.close()


@contextlib.contextmanager
def _names(*, with_handle: bool) -> Iterator[_Names]:
    """Give the names, and close at the end what they were connected to."""
    from nbdcore import libnbd

    libnbd.install()  # a script may import nbd by itself
    names = _Names()
    names["nbd"] = libnbd
    with contextlib.ExitStack() as stack:
        stack.callback(names.close)
        if with_handle:
            handle = libnbd.NBD()
            stack.callback(_close, handle)
            handle.set_handle_name("nbdsh")
            handle.set_uri_allow_local_file(True)  # whoever types a URI means what it says
            names["h"] = handle
        yield names


def _close(handle: Any) -> None:
    from nbdcore.libnbd import ClosedHandle

    with contextlib.suppress(ClosedHandle):
        handle.close()


# ---------------------------------------------------------------------------------------------- what is asked for

_numbers = count(1)


def _run(names: _Names, text: str) -> None:
    """Run Python statements."""
    if text == "-":
        text = sys.stdin.read()
    name = f"<command {next(_numbers)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)  # for tracebacks
    exec(compile(text, name, "exec", dont_inherit=True), names)  # noqa: S102 (the caller's own program)


def _connect(names: _Names, uri: str) -> None:
    names["h"].connect_uri(uri)
    names.uri = uri


def _ask_for_allocation(names: _Names, _: None) -> None:
    names["h"].add_meta_context(BASE_ALLOCATION)


def _ask_for_opt_mode(names: _Names, _: None) -> None:
    names["h"].set_opt_mode(True)


# By the option's name.
_ACTIONS: dict[str, Callable[[_Names, Any], None]] = {
    "command": _run,
    "uri": _connect,
    "base_allocation": _ask_for_allocation,
    "opt_mode": _ask_for_opt_mode,
}


@contextlib.contextmanager
def _output_sent() -> Iterator[None]:
    """However the script ends: what it has printed leaves now, while a failure can still be told."""
    try:
        yield
    finally:
        if sys.stdout is not None and not sys.stdout.closed:
            say("", newline=False)


@contextlib.contextmanager
def _failures_shown() -> Iterator[None]:
    """End the command where the script ends it: what NBD has to say is one line, any other exception a traceback."""
    from nbdcore.libnbd import Error as LibnbdError

    try:
        yield
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)  # noqa: T201 (as Python does with what a script says at its end)
            raise click.exceptions.Exit(1) from end
        raise click.exceptions.Exit(end.code or 0) from end
    except (LibnbdError, Error) as error:
        if os.environ.get("LIBNBD_DEBUG") == "1":
            _print_traceback(error)
        else:
            warn(f"command line script failed: {error.string if isinstance(error, LibnbdError) else error}")
        raise click.exceptions.Exit(1) from error
    except Exception as error:
        _print_traceback(error)
        raise click.exceptions.Exit(1) from error


def _print_traceback(error: BaseException) -> None:
    """Print it from where the script begins: how the command got there is nobody's business."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    traceback.print_exception(error.with_traceback(frames))


# ---------------------------------------------------------------------------------------------- interactively


def _interact(names: _Names) -> None:
    """Read statements and run them, until the end of standard input."""
    ipython = _ipython() if sys.stdin.isatty() and sys.stdout.isatty() else None
    if ipython is not None:
        config = import_module("traitlets.config").Config()
        config.TerminalInteractiveShell.banner1 = _banner(names)
        ipython.start_ipython(argv=[], user_ns=names, config=config)
        return
    import code

    _complete_with_tab(names)
    before = getattr(sys, "ps1", None)
    sys.ps1 = "nbd> "
    try:
        code.interact(_banner(names), local=names, exitmsg="")
    finally:
        if before is None:
            del sys.ps1
        else:
            sys.ps1 = before


def _ipython() -> Any:
    try:
        return import_module("IPython")
    except ModuleNotFoundError:
        return None


def _complete_with_tab(names: _Names) -> None:
    try:
        import readline
    except ImportError:  # on Windows
        return
    from rlcompleter import Completer

    readline.set_completer(Completer(names).complete)
    readline.parse_and_bind("tab: complete")


def _banner(names: _Names) -> str:
    lines = ["", "Python with NBD, the Network Block Device protocol.", "", "nbd    the API of libnbd's module: help(nbd)"]
    if "h" in names:
        state = names["h"].connection_state().partition(":")[0]
        example = "h.get_size()" if names.uri else "h.connect_uri('nbd://localhost/')"
        lines.append(f"h      a handle of it, in state {state}: {example}")
    if names.uri:
        lines.append("disk   the same disk with nbdcore's own API: disk.pread(512, 0); its first use opens a second connection")
    return "\n".join([*lines, "", "exit() or Ctrl-D ends this.", ""])

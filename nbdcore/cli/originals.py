"""The commands under the names of libnbd's programs, so that scripts written for those run unchanged.

`nbdcore.libnbd.tools` puts programs of these names into a folder. A command that runs as one of them says that name wherever it
says its own, and has the options that libnbd's programs have in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from functools import partial

import click

from nbdcore.cli.output import printer
from nbdcore.cli.versions import version_option

__all__ = ["COMMANDS", "disguised", "spelled_out"]

#: Each name, and the command that is behind it.
COMMANDS = {"nbdinfo": "info", "nbdcopy": "copy", "nbddump": "dump", "nbdsh": "shell"}


def disguised(name: str, command: click.Command) -> click.Command:
    """Return a command under the name of a program of libnbd's."""
    found = copy(command)
    found.name = name
    found.params = [parameter for parameter in command.params if "--version" not in parameter.opts]
    found = version_option(found)
    for option, dashes in (("--short-options", 1), ("--long-options", 2)):
        callback = printer(partial(_list, dashes))
        found = click.option(option, is_flag=True, is_eager=True, expose_value=False, hidden=True, callback=callback)(found)
    return found


def spelled_out(command: click.Command, words: Sequence[str]) -> list[str]:
    """Return the words of a command line with the names of options in full: one may be cut short as long as no other begins so.

    What is between brackets, or behind --, is left as it is.
    """
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        name, *value = word.split("=", 1)
        found.append("=".join([_whole(command, name), *value]) if word.startswith("--") else word)
        if word in _LEFT_ALONE_UNTIL:
            found.extend(_through(rest, _LEFT_ALONE_UNTIL[word]))
    return found


# What begins words that are left as they are, and what ends them; None: the end of all.
_LEFT_ALONE_UNTIL = {"[": "]", "--": None}


def _through(words: Iterator[str], last: str | None) -> Iterator[str]:
    for word in words:
        yield word
        if word == last:
            return


def _whole(command: click.Command, beginning: str) -> str:
    """Return the name of the only option that begins so, else the same word: the parser says what is wrong with it."""
    spellings = [["--help"], *(names for option in command.params for names in (option.opts, option.secondary_opts))]
    if beginning == "--" or any(beginning in names for names in spellings):
        return beginning
    meant = [name for names in spellings if (name := next((name for name in names if name.startswith(beginning)), ""))]
    return meant[0] if len(meant) == 1 else beginning


def _list(dashes: int, ctx: click.Context) -> str:
    """Return, for a shell that completes words, the names of options that begin with so many dashes, one a line."""
    return "\n".join(sorted({name for name in _names(ctx) if len(name) - len(name.lstrip("-")) == dashes}))


def _names(ctx: click.Context) -> Iterable[str]:
    for parameter in ctx.command.get_params(ctx):
        if isinstance(parameter, click.Option) and not parameter.hidden:
            yield from parameter.opts
            yield from parameter.secondary_opts

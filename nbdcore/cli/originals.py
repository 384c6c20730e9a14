"""The commands under the names of libnbd's programs, so that scripts written for those run unchanged.

`nbdcore.libnbd.tools` puts programs of these names into a folder. A command that runs as one of them says that name wherever it
says its own, and has the options that libnbd's programs have in common.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from functools import partial

import click

from nbdcore.cli.output import printer
from nbdcore.cli.versions import version_option

__all__ = ["COMMANDS", "disguised"]

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


def _list(dashes: int, ctx: click.Context) -> str:
    """Return, for a shell that completes words, the names of options that begin with so many dashes, one a line."""
    return "\n".join(sorted({name for name in _names(ctx) if len(name) - len(name.lstrip("-")) == dashes}))


def _names(ctx: click.Context) -> Iterable[str]:
    for parameter in ctx.command.get_params(ctx):
        if isinstance(parameter, click.Option) and not parameter.hidden:
            yield from parameter.opts
            yield from parameter.secondary_opts

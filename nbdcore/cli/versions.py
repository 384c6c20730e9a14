"""What a command with the name of one of libnbd's answers to --version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

import nbdcore
from nbdcore.cli.output import printer

__all__ = ["version_option"]

# A command, or the function that becomes one.
_Command = TypeVar("_Command", bound=Callable[..., Any])


def _version(ctx: click.Context) -> str:
    from nbdcore.libnbd import __version__ as libnbd_version  # which takes a moment

    # The number that scripts look at is the second word: the release of libnbd that is stood in for.
    return f"{ctx.command_path} {libnbd_version} (libnbd drop-in of nbdcore {nbdcore.__version__})\nlibnbd {libnbd_version}"


def version_option(function: _Command) -> _Command:
    """Give a command the options -V and --version."""
    return click.option(
        "-V",
        "--version",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=printer(_version),
        help="Print the version of this program and of the libnbd that it stands in for.",
    )(function)

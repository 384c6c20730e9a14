"""The commands, put together. A command is a module: it parses its own options, and writes through `nbdcore.cli.output` only.

A module is imported when its command is wanted: the others', and what they stand on, would take longer than most commands do.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import click

import nbdcore
from nbdcore.cli import originals
from nbdcore.cli.output import described, discard_output, prepare, printer, reported, warn
from nbdcore.cli.spellings import shown_names_suggested

__all__ = ["program", "run"]

# Each is a module here, and the command in it has its name. In the order in which a newcomer wants them.
_COMMANDS = ("demo", "info", "map", "copy", "checksum", "compare", "dump", "shell", "transports", "serve", "completion")

# The variable by which a shell asks for the words that fit; see `nbdcore.cli.completion`.
_COMPLETION = "_NBDCORE_COMPLETE"


class _Program(click.Group):
    """All errors that a command expects pass here. Earlier than in click's own hands, where a server's EPIPE would be silent."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's own signature)
        """Return the names of all commands."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of a name; None where there is none."""
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"nbdcore.cli.{cmd_name}"), cmd_name)
        _say_help(command.get_help_option(ctx))
        return command

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """Return the option --help of the program itself."""
        return _say_help(super().get_help_option(ctx))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        with reported(), shown_names_suggested():
            return super().invoke(ctx)


class _Originals(_Program):
    """The commands whose names are those of libnbd's programs."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's own signature)
        """Return those names."""
        return list(originals.COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command behind a name; None where there is none."""
        command = super().get_command(ctx, originals.COMMANDS.get(cmd_name, ""))
        return command and originals.disguised(cmd_name, command)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, and the words that are for it: libnbd's programs understand options that are cut short."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command, originals.spelled_out(command, rest) if command else rest


def _say_help(option: click.Option | None) -> click.Option | None:
    """Have --help print as commands do: click has a message of its own for output that cannot be written."""
    if option is not None:
        option.callback = printer(click.Context.get_help)
    return option


_SETTINGS = {"help_option_names": ["-h", "--help"]}


@click.group(cls=_Program, context_settings=_SETTINGS, short_help="Look at, copy and serve disks over NBD.")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=printer(lambda _: f"nbdcore {nbdcore.__version__}"),
    help="Show the version and exit.",
)
def program() -> None:
    """Look at and serve disks over NBD, the Network Block Device protocol, by which a program uses a disk that another one has.

    Begin with "nbdcore demo", which shows what works on this machine.
    """


def run(name: str = "nbdcore") -> int:
    """Run the command line of this process, and return its exit status. `name` may be that of a program of libnbd's."""
    prepare(name)
    if _COMPLETION in os.environ:  # a shell asks; the module takes a moment
        import_module("nbdcore.cli.completion").register()
    try:
        if name in originals.COMMANDS:
            # The name is the command; the group around it has none that a message could say.
            _Originals(context_settings=_SETTINGS)([name, *sys.argv[1:]], prog_name="")
        else:
            program(prog_name=name)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except OSError as error:  # click's own writing, of wrong usage, which no command hears of
        discard_output()
        warn(f"cannot write: {described(error)}")
        return 1
    return 0

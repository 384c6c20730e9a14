"""The commands, put together. A command is a module: it parses its own options, and writes through `nbdcore.cli.output` only."""

from __future__ import annotations

from typing import Any

import click

import nbdcore
from nbdcore.cli.demo import demo
from nbdcore.cli.info import info
from nbdcore.cli.output import described, discard_output, prepare, reported, warn
from nbdcore.cli.serve import serve
from nbdcore.cli.transports import transports

__all__ = ["program", "run"]


class _Program(click.Group):
    """All errors that a command expects pass here. Earlier than in click's own hands, where a server's EPIPE would be silent."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        with reported():
            return super().invoke(ctx)


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(nbdcore.__version__, prog_name="nbdcore", message="%(prog)s %(version)s")
def program() -> None:
    """Look at and serve disks over NBD, the Network Block Device protocol, by which a program uses a disk that another one has.

    Begin with "nbdcore demo", which shows what works on this machine.
    """


for _command in (demo, info, transports, serve):
    program.add_command(_command)


def run() -> int:
    """Run the command line of this process, and return its exit status."""
    prepare()
    try:
        program(prog_name="nbdcore")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except OSError as error:  # click's own writing, of help and versions, which no command hears of
        discard_output()
        warn(f"cannot write: {described(error)}")
        return 1
    return 0

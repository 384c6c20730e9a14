"""Running the `nbdcore` command: in this process where only words count, in one of its own where signals and pipes do."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from click.testing import CliRunner, Result

from nbdcore.cli.app import program
from tests.interop.programs import DIES_WITH_US

#: Seconds that nothing here comes near.
DEADLINE = 30

COMMAND = (sys.executable, "-m", "nbdcore")


def invoke(*arguments: str | Path) -> Result:
    """Run a command in this process, standard output and error apart."""
    return CliRunner().invoke(program, list(map(str, arguments)), prog_name="nbdcore")


def run(
    *arguments: str | Path, command: Sequence[str] = COMMAND, stdout: int | None = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, to its end."""
    return subprocess.run(
        [*DIES_WITH_US, *command, *map(str, arguments)],
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=DEADLINE,
        env={**os.environ, **environment},
    )


class Serving:
    """A running `nbdcore serve`: what it said, and the URI of each place it listens at."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said: list[str] = []
        assert process.stdout is not None
        for line in process.stdout:
            self.said.append(line.rstrip("\n"))
            if line.startswith("Ready"):
                break
        self.uris = [line.split()[1] for line in self.said[1:-1]]

    @property
    def uri(self) -> str:
        """The URI of the only place."""
        [uri] = self.uris
        return uri

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str, str]:
        """Send a signal; return the exit status, the rest of standard output, and all of standard error."""
        self.process.send_signal(number)
        rest, errors = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, rest, errors


@contextlib.contextmanager
def serving(*arguments: str | Path, command: Sequence[str] = COMMAND, words: Sequence[str] = ("serve",)) -> Iterator[Serving]:
    """Run `nbdcore serve` until the end of the context."""
    with subprocess.Popen(
        [*DIES_WITH_US, *command, *words, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            server = Serving(process)
            assert server.said, process.communicate(timeout=DEADLINE)
            yield server
        finally:
            process.kill()

"""Whole commands, as they are typed: measured from outside and from start to end, the interpreter's start and all.

What the server of a case gives is split at spaces: a command names the first word `{0}`, such as a URI, and the second `{1}`,
which may be the URI of another server or the path of a file.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.bench.programs import Program, Task, Tools, found, options
from tests.bench.results import Sample
from tests.bench.running import run

#: Where in a command its settings stand.
SETTINGS = "SETTINGS"


@dataclass(frozen=True, slots=True)
class Command(Program):
    """A command.

    Attributes:
        line: the tool, as `Tools` has it ("nbdcore" is run by our Python), and its arguments.
        counted: what a run does, as the task's counts have it; "": one run is one.
        shell: whether the line is for a shell, since it is several commands; then the memory is the shell's alone.
    """

    line: tuple[str, ...]
    counted: str = "mebibytes"
    shell: bool = False

    def sample(self, tools: Tools, task: Task, variant: Mapping[str, Any]) -> Sample:
        settings = options(variant)
        words: list[str] = []
        for word in self.line:
            words += settings if word == SETTINGS else [word.format(*task.uri.split())]
        line = _tool(tools, words[0]) + words[1:]
        done = run(["sh", "-c", _for_shell(line)] if self.shell else line, limit=task.limit)
        return Sample(task.counts[self.counted] if self.counted else 1, done.seconds, done.cpu, done.memory)


def _tool(tools: Tools, name: str) -> list[str]:
    if name == "nbdcore":
        return [found(tools.python), "-m", "nbdcore"]
    return [found(getattr(tools, name.replace("-", "_")))]


def _for_shell(words: list[str]) -> str:
    return " ".join(word if word == "|" else shlex.quote(word) for word in words)

"""Draws into the pages what has its one source elsewhere, when the site is built: legal calls, libnbd's, the help, measurements.

A page says where with a line of its own, such as `<!-- drawn: legal calls -->`. mkdocs calls `on_page_markdown`; the functions
behind it need nothing of mkdocs, so that the tests call them too.
"""  # noqa: INP001 (a file that mkdocs runs, in no package)

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click

from nbdcore.cli.app import program
from nbdcore.libnbd.calls import ANY, CALLS, ELSEWHERE
from nbdcore.protocol.state import LEGAL, Phase
from tests.bench import chart, report
from tests.bench.results import Result

_PLACE = re.compile(r"^<!-- drawn: (.+) -->$", re.MULTILINE)
# Characters in a line of help: what a code block on a page has room for.
_WIDTH = 84


def legal_calls() -> str:
    """Return the table of calls and phases, as `nbdcore.protocol.state` has it."""
    header = ["call", *(phase.value for phase in Phase)]
    rows = [[f"`{call}`", *("yes" if phase in legal else "-" for phase in Phase)] for call, legal in LEGAL.items()]
    rule = ["---", *(":-:" for _ in Phase)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def libnbd_calls() -> str:
    """Return the table of libnbd's calls, as `nbdcore.libnbd.calls` has it."""
    rows = [["call", "since libnbd", "permitted while"], ["---", "---", "---"]]
    for name, call in sorted(CALLS.items()):
        rows.append([f"`{name}`", call.first_version, "in any state" if call.permitted == ANY else call.states])
    rows += [[f"`{name}`", "1.0", f"in Python: {way}"] for name, way in ELSEWHERE.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def commands() -> str:
    """Return the help of the program and of each of its commands, as they print it."""
    return "\n\n".join(f"{heading}\n\n```text\n{text}\n```" for heading, text in _helps())


def _helps() -> Iterator[tuple[str, str]]:
    outer = click.Context(program, info_name="nbdcore", terminal_width=_WIDTH, **program.context_settings)
    yield "## nbdcore", _help(program, outer)
    for name in program.list_commands(outer):
        command = program.get_command(outer, name)
        assert command is not None, f"{name} is listed"
        yield f"## nbdcore {name}", _help(command, click.Context(command, info_name=name, parent=outer, terminal_width=_WIDTH))


def _help(command: click.Command, context: click.Context) -> str:
    return command.get_help(context).replace("\b", "")


@cache
def _measured() -> Result:
    """Return what `python -m tests.bench --publish` left."""
    return Result.load(Path(__file__).with_name("assets") / "speed.json")


def speed_chart() -> str:
    """Return the picture of what was measured; a figure, so that Markdown leaves what is in it alone."""
    return f"<figure>\n{chart.svg(_measured())}</figure>"


DRAWN: dict[str, Callable[[], str]] = {
    "legal calls": legal_calls,
    "libnbd calls": libnbd_calls,
    "commands": commands,
    "speed: heading": lambda: report.heading(_measured()),
    "speed: chart": speed_chart,
    "speed: bars": lambda: report.markdown_bars(_measured()),
    "speed: programs": lambda: report.markdown_taken(_measured()),
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what is drawn in the places for it. Raises KeyError for a place that nothing is drawn for."""
    return _PLACE.sub(lambda place: DRAWN[place[1]](), markdown)

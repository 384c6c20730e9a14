"""The manual pages: current, complete, and roff that nothing complains about."""

from __future__ import annotations

import re
import subprocess

import click
import pytest

from nbdcore.cli import manual
from nbdcore.cli.app import program
from nbdcore.cli.spellings import shown_names
from tests.interop.programs import REPOSITORY

PAGES = manual.pages()
CONTEXT = click.Context(program, info_name="nbdcore")
COMMANDS = {f"nbdcore-{name}.1": program.get_command(CONTEXT, name) for name in program.list_commands(CONTEXT)}


def test_pages_that_are_shipped_are_current():
    shipped = {path.name: path.read_text(encoding="utf-8") for path in (REPOSITORY / "man").iterdir()}
    assert shipped == PAGES, "make man"


def test_each_command_has_a_page_that_has_all_its_options():
    assert PAGES.keys() == {"nbdcore.1", *COMMANDS}
    for name, command in COMMANDS.items():
        page = PAGES[name].replace("\\", "")
        for option in command.params:
            if isinstance(option, click.Option):
                assert all(f"fB{word}fR" in page for names in shown_names(option) for word in names), (name, option)


@pytest.mark.parametrize("name", ["nbdcore.1", "nbdcore-dump.1"])
def test_sections_are_in_their_order(name):
    found = re.findall(r"^\.SH (.+)$", PAGES[name], re.MULTILINE)
    expected = ["NAME", "SYNOPSIS", "DESCRIPTION", "COMMANDS", "OPTIONS", "EXIT STATUS", "EXAMPLES", "SEE ALSO"]
    assert found == [section for section in expected if section != ("EXAMPLES" if name == "nbdcore.1" else "COMMANDS")]


def made(**options):
    """Return the page of a command that is made of these parts, as a reader sees it line by line."""
    command = click.Command("odd", **options)
    return manual._page("nbdcore-odd", command, click.Context(command, info_name="odd", parent=CONTEXT), {}).splitlines()


def test_text_is_never_taken_for_a_request():
    lines = made(help=".SH what\n\n'tis \\fB a \"--dash-ed\" word\n\n\b\n.nf 'x' ~ \\n")
    assert {"\\&.SH what", '\\&\'tis \\efB a "\\-\\-dash\\-ed" word', "\\&.nf \\(aqx\\(aq \\(ti \\en"} <= {*lines}


def test_command_that_says_its_own_exit_statuses_has_those():
    lines = made(help="Compare.\n\nThe exit status is 0 for equal, 1 for different, 2 for an error.")
    assert "All was done." not in lines
    assert lines.index(".SH EXIT STATUS") + 1 == lines.index("The exit status is 0 for equal, 1 for different, 2 for an error.")


def test_pages_of_commands_that_are_no_more_go(tmp_path):
    (tmp_path / "nbdcore-gone.1").touch()
    (tmp_path / "other.1").touch()
    manual.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*PAGES, "other.1"}


@pytest.mark.interop("groff")
def test_groff_complains_of_nothing():
    done = subprocess.run(
        ["groff", "-man", "-ww", "-z"], input="".join(PAGES.values()), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""

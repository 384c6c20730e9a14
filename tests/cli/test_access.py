from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from nbdcore.cli.access import Access, DiskCommand, DiskType, Place, with_access
from tests.cli.commands import invoke
from tests.interop import programs


@click.command(cls=DiskCommand)
@click.argument("source", type=DiskType())
@click.argument("destination", type=DiskType(), required=False)
@click.option("--flag", is_flag=True)
@with_access
def command(source: Place, destination: Place | None, *, flag: bool, access: Access) -> None:
    click.echo(repr((source, destination, flag, access.timeout)))


def parsed(*words):
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


SERVER = Place(argv=("server", "--flag", "-r", "--", "x"))


@pytest.mark.parametrize("dashes", [(), ("--",)])
def test_words_between_brackets_are_the_servers_options_too(dashes):
    assert parsed(*dashes, "[", *SERVER.argv, "]") == repr((SERVER, None, False, 30.0))


def test_options_are_found_on_both_sides_of_brackets():
    words = ("--timeout", "5", "[", *SERVER.argv, "]", "[", "another", "]", "--flag")
    assert parsed(*words) == repr((SERVER, Place(argv=("another",)), True, 5.0))


def test_a_bracket_that_is_part_of_a_word_is_none():
    assert parsed("nbd://[::1]/a[b]") == repr((Place("nbd://[::1]/a[b]"), None, False, 30.0))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("[", "server"), 'no "]" ends it'),
        (("[", "]"), "belongs the command line of a server"),
        (("disk.img",), "'disk.img' is no disk"),
        ((), "Missing argument"),
        (("[", "server", "]", "--nonsense"), "No such option"),
    ],
)
def test_wrong_words_are_said_with_status_1(words, said):
    done = CliRunner().invoke(command, words)
    assert said in done.stderr
    assert (done.exit_code, done.stdout) == (1, "")


@pytest.mark.interop("nbdkit")
def test_server_between_brackets_is_started_and_ends_with_the_command():
    assert invoke("info", "--size", "[", programs.path_of("nbdkit"), "-r", "memory", "1M", "]").stdout == "1048576\n"

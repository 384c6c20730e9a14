from __future__ import annotations

import errno
import io
import sys

import click
import pytest

from nbdcore import Disconnected, UsageError
from nbdcore.cli import output
from nbdcore.cli.output import Failure, described, escaped, paragraph, reported, table, warn


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Makes standard output a terminal of so many columns."""

    def make(columns):
        shown = Terminal()
        monkeypatch.setattr(sys, "stdout", shown)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        return shown

    return make


COLUMNS = ["name", "speed"]
ROWS = [["tcp", "1 MB/s"], ["something longer", "1,000 MB/s"]]


def test_table_that_is_piped_is_plain_and_never_wrapped(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    table(COLUMNS, ROWS, numbers=["speed"])
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert head == "name                   speed"
    assert set(rule) == {"─"}
    assert rows == ["tcp                   1 MB/s", "something longer  1,000 MB/s"]


def test_table_on_a_terminal_has_bold_headings(terminal):
    shown = terminal(80)
    table(COLUMNS, ROWS)
    assert "\x1b[1mname" in shown.getvalue()


def test_table_on_a_terminal_too_narrow_becomes_blocks(terminal):
    shown = terminal(24)
    table(COLUMNS, ROWS)
    assert shown.getvalue() == "name:  tcp\nspeed: 1 MB/s\n\nname:  something longer\nspeed: 1,000 MB/s\n"


def test_table_for_an_encoding_without_lines_has_none(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    table(COLUMNS, ROWS)
    shown.seek(0)
    assert "-----" in shown.read()


def test_cells_are_taken_literally(capsys):
    table(["[bold]x"], [["[red]:smile:[/red]"]])
    assert "[red]:smile:[/red]" in capsys.readouterr().out


def test_paragraph_is_wrapped_between_words_on_a_terminal_only(terminal, capsys):
    paragraph("one two three four")
    assert capsys.readouterr().out == "one two three four\n"
    shown = terminal(10)
    paragraph("one two three four")
    assert shown.getvalue() == "one two\nthree four\n"


def test_warning_is_one_line_without_control_characters(capsys):
    warn("a\nb\x1b[31m\x07")
    assert capsys.readouterr() == ("", "nbdcore: a\\x0ab\\x1b[31m\\x07\n")


def test_untrusted_text_is_escaped_in_full():
    assert escaped("é\n" * 4096) == "é\\x0a" * 4096


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "disk.img"), "disk.img: No such file or directory"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", b"disk.img"), "disk.img: No such file or directory"),
        (OSError(errno.EBADF, "Bad file descriptor"), "Bad file descriptor"),
        (OSError("no number"), "no number"),
        (OSError(), "OSError"),
        (UsageError(errno.EINVAL, "not like that"), "not like that"),
        (Disconnected(errno.EPIPE, "it is gone"), "it is gone (EPIPE)"),
    ],
)
def test_error_is_described_for_its_reader(error, text):
    assert described(error) == text


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), Disconnected(errno.EPIPE, "it is gone")])
def test_expected_error_becomes_one_line_and_status_1(error, capsys):
    with pytest.raises(Failure) as failed, reported():
        raise error
    failed.value.show()
    assert failed.value.exit_code == 1
    assert capsys.readouterr() == ("", f"nbdcore: {described(error)}\n")


def test_failure_is_shown_where_it_is_asked_for():
    shown = io.StringIO()
    Failure("not now").show(shown)
    assert shown.getvalue() == "nbdcore: not now\n"


def test_interrupt_is_quiet_and_has_its_status(capsys):
    with pytest.raises(click.exceptions.Exit) as ended, reported():
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130
    assert capsys.readouterr() == ("", "")


def test_unexpected_error_is_not_hidden():
    with pytest.raises(ZeroDivisionError), reported():
        raise ZeroDivisionError


def test_warning_that_nobody_takes_is_lost_and_nothing_else(monkeypatch):
    class Gone(io.StringIO):
        def write(self, *_):
            raise BrokenPipeError(errno.EPIPE, "gone")

    monkeypatch.setattr(sys, "stderr", Gone())
    warn("nobody")


def test_everything_public_is_there():
    assert all(hasattr(output, name) for name in output.__all__)

"""Completion: the words that fit, and bash itself asking for them by the script that it was given."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys

import pytest
from click.shell_completion import get_completion_class

from nbdcore.cli import completion
from nbdcore.cli.app import program
from tests.cli.commands import COMMAND, DEADLINE, invoke
from tests.interop.programs import DIES_WITH_US


@pytest.fixture(scope="module", autouse=True)
def _registered():
    before = {shell: get_completion_class(shell) for shell in ("bash", "zsh", "fish")}
    completion.register()
    yield
    for shell, kind in before.items():
        completion.add_completion_class(kind, shell)


def fitting(*words):
    """Return what is offered for the last word: words, or "file" for the names of files."""
    *args, incomplete = words
    found = get_completion_class("bash")(program, {}, "nbdcore", "").get_completions(args, incomplete)
    return [item.type if item.type == "file" else item.value for item in found]


def test_commands_and_options_are_offered():
    assert fitting("d") == ["demo", "dump"]
    assert fitting("dump", "--t") == ["--timeout", "--tls-certificates", "--tls-psk", "--tls-hostname"]
    assert fitting("completion", "f") == ["fish"]


def test_further_spellings_are_not_offered():
    assert fitting("dump", "--c") == ["--color"]
    assert fitting("dump", "--no-c") == ["--no-color"]
    assert fitting("info", "--ha") == ["--has", "--hasnt"]
    assert fitting("map", "--c") == ["--context", "--csv", "--color"]


@pytest.mark.parametrize(
    "words",
    [("serve", "di"), ("info", ""), ("info", "--tls-certificates", "pk"), ("dump", "nbd://localhost/", "--tls-psk", "=", "k")],
)
def test_files_are_offered_where_nothing_else_is(words):
    assert fitting(*words) == ["file"]


@pytest.mark.parametrize("words", [("nonsense",), ("dump", "--nonsense")])
def test_nothing_is_offered_where_nothing_fits(words):
    assert fitting(*words) == []


@pytest.mark.parametrize("words", [("[", "/usr/bin/nb"), ("[", "nbdkit", "--"), ("[", "file", ""), ("--", "[", "-x", "d")])
def test_between_brackets_it_is_the_servers_own_business(words):
    assert fitting("dump", *words) == ["file"]


def test_servers_that_are_installed_are_offered_behind_a_bracket(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert fitting("dump", "[", "") == ["nbdkit", "qemu-nbd"]
    assert fitting("dump", "[", "q") == ["qemu-nbd"]


def test_behind_brackets_the_commands_own_options_are_offered():
    assert fitting("dump", "[", "nbdkit", "--", "--offset", "]", "--off") == ["--offset"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_asks_by_the_variable_that_is_answered(shell):
    assert "_NBDCORE_COMPLETE" in invoke("completion", shell).stdout


def test_shell_that_is_not_known_is_wrong_usage():
    assert invoke("completion", "csh").exit_code == 2


@pytest.mark.skipif(sys.platform == "win32", reason="bash is a unix shell")
def test_bash_completes_with_the_script(tmp_path):
    nbdcore = tmp_path / "nbdcore"
    nbdcore.write_text(f'#!/bin/sh\nexec {shlex.join(COMMAND)} "$@"\n')
    nbdcore.chmod(0o755)
    script = f"""
        eval "$(nbdcore completion bash)"
        complete -p nbdcore
        compopt() {{ echo "files"; }}
        complete_last() {{
            COMP_WORDS=(nbdcore "$@"); COMP_CWORD=$#; COMPREPLY=(); _nbdcore_completion nbdcore; echo "${{COMPREPLY[*]}}"
        }}
        complete_last dum
        complete_last dump [ nbdkit -- memory ] --off
        complete_last serve {tmp_path}/nb
    """
    done = subprocess.run(
        [*DIES_WITH_US, "bash", "--norc", "-c", script],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.stderr == ""
    assert done.stdout.split("\n") == ["complete -o nosort -F _nbdcore_completion nbdcore", "dump", "--offset", "files", "", ""]

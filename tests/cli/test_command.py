"""The command as a process: without its extra, with its output going wrong, interrupted."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest

import nbdcore
from nbdcore.cli.app import program
from tests.cli.commands import COMMAND, DEADLINE, invoke, run
from tests.interop.programs import DIES_WITH_US

CONTEXT = click.Context(program)
NAMES = program.list_commands(CONTEXT)

STRANGERS = (sys.executable, str(Path(__file__).with_name("strangers.py")))


def python(code):
    return (sys.executable, "-c", code)


WITHOUT = "import sys; sys.modules[{!r}] = None; from nbdcore.cli import main; sys.exit(main())"


@pytest.mark.parametrize("missing", ["click", "rich"])
@pytest.mark.parametrize("arguments", [(), ("demo",), ("--help",), ("info", "nbd://localhost")])
def test_without_the_extra_it_says_in_one_line_what_to_install(missing, arguments):
    done = run(*arguments, command=python(WITHOUT.format(missing)))
    [line] = done.stderr.splitlines()
    assert "pip install 'nbdcore[cli]'" in line
    assert missing in line
    assert (done.stdout, done.returncode) == ("", 1)


def test_importing_the_command_needs_no_extra():
    done = run(command=python("import sys, nbdcore.cli; print({'click', 'rich'} & set(sys.modules))"))
    assert done.stdout == "set()\n", done.stderr


def test_help_names_every_command():
    done = run("--help")
    assert re.findall(r"^  (\w+)  ", done.stdout, re.MULTILINE) == NAMES
    assert done.returncode == 0


@pytest.mark.parametrize("command", NAMES)
def test_every_command_has_its_help(command):
    assert invoke(command, "-h").output.startswith(f"Usage: nbdcore {command}")


@pytest.mark.parametrize("command", [(), *((name,) for name in NAMES)], ids=" ".join)
def test_help_fits_into_80_columns_and_nothing_is_cut_off(command):
    done = run(*command, "--help", COLUMNS="80")
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    assert "..." not in done.stdout.replace("[ARGS]...", "")
    chosen = program.get_command(CONTEXT, command[0]) if command else program
    examples = [line.strip() for line in (chosen.help or "").splitlines() if line.strip().startswith("nbdcore ")]
    assert set(examples) <= {line.strip() for line in done.stdout.splitlines()}


def test_version():
    assert invoke("--version").output == f"nbdcore {nbdcore.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "status"),
    # Of a disk, 2 says that something is not so: what asks about disks has 1, as libnbd's tools have.
    [(("inof",), 2), (("info",), 1), (("info", "--nonsense"), 1), (("transports", "surplus"), 2)],
    ids=str,
)
def test_wrong_usage_has_its_exit_status(arguments, status):
    done = invoke(*arguments)
    assert (done.exit_code, done.stdout) == (status, "")
    assert "Usage: nbdcore" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("info", "--colou"), "No such option '--colou'. (Did you mean one of: '--color', '--no-color'?)"),
        (("dump", "--skip", "far", "nbd://localhost"), "Invalid value for '-o' / '--offset': 'far' is no size"),
    ],
    ids=str,
)
def test_wrong_usage_is_told_in_the_names_that_help_shows(arguments, said):
    assert f"Error: {said}" in invoke(*arguments).stderr


@pytest.mark.parametrize("arguments", [("transports",), ("transports", "--json"), ("--help",), ("dump", "--help"), ("demo",)])
def test_output_that_cannot_be_written_is_one_line_and_status_1(arguments):
    with Path(os.devnull).open("rb") as not_for_writing:
        done = run(*arguments, stdout=not_for_writing.fileno())
    assert re.fullmatch(r"nbdcore: cannot write.*\n", done.stderr)
    assert done.returncode == 1


@pytest.mark.parametrize("arguments", [("transports",), ("demo",), ("--help",), ("--version",), ("info", "--help")])
def test_reader_that_went_away_is_no_news(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run(*arguments, stdout=writer)
    finally:
        os.close(writer)
    assert (done.stderr, done.returncode) == ("", 141)


@pytest.mark.parametrize(
    ("words", "redirection", "name"),
    [
        (("checksum", "-"), "<&-", "standard input"),
        (("copy", "-", "new"), "<&-", "standard input"),
        (("copy", "disk", "-"), ">&-", "standard output"),
        (("copy", "/dev/stdin", "new"), "<&-", "standard input"),
        (("copy", "disk", "/dev/stdout"), ">&-", "standard output"),
    ],
    ids=str,
)
def test_disk_that_would_go_through_a_stream_that_is_closed_is_an_error(words, redirection, name, tmp_path):
    (tmp_path / "disk").write_bytes(b"x")
    paths = [tmp_path / word if word in ("disk", "new") else word for word in words]
    done = run(*paths, command=("sh", "-c", f'exec "$@" {redirection}', "sh", *COMMAND))
    assert (done.stdout, done.returncode) == ("", 1)
    assert re.fullmatch(rf"nbdcore: {name} is closed, so .*\n", done.stderr)
    assert not (tmp_path / "new").exists()


def test_ctrl_c_while_a_module_makes_its_dataclasses_is_the_exit_status_as_ever(tmp_path):
    (tmp_path / "stopped.py").write_text(
        "import sys\nfrom nbdcore import cli\nfrom nbdcore.cli import app\n"
        "app.run = lambda name: exec('raise KeyboardInterrupt')\nsys.exit(cli.main())\n"
    )
    done = subprocess.run([sys.executable, "-m", "stopped"], cwd=tmp_path, capture_output=True, timeout=DEADLINE, check=False)
    assert (done.stdout, done.stderr, done.returncode) == (b"", b"", 130)


@pytest.mark.parametrize("arguments", ["transports", "demo"])
def test_without_any_standard_output_it_does_its_work(arguments):
    code = "import sys; sys.stdout = None; from nbdcore.cli import main; sys.exit(main())"
    done = run(arguments, command=python(code))
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_names_beyond_the_outputs_encoding_are_escaped():
    code = "import sys; from nbdcore.cli.output import prepare, say; prepare(); say('disk \u03a9\\ud800')"
    assert run(command=python(code), PYTHONIOENCODING="cp1252").stdout == "disk \\u03a9\\ud800\n"


def test_interrupt_while_waiting_for_a_server_is_quiet():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(DEADLINE)
        with subprocess.Popen(
            [*DIES_WITH_US, *COMMAND, "info", f"nbd://127.0.0.1:{silent.getsockname()[1]}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A test run in the background may have been told to ignore it, and hand that down.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 (no threads here)
        ) as process:
            client, _ = silent.accept()
            with client:
                process.send_signal(signal.SIGINT)
                assert process.communicate(timeout=DEADLINE) == (b"", b"")
    assert process.returncode == 130


def test_broken_transport_plugin_is_one_line_of_warning():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        uri = f"nbd://127.0.0.1:{unused.getsockname()[1]}"
    done = run("broken", "info", uri, command=STRANGERS)
    warning, error = done.stderr.splitlines()
    assert re.match("nbdcore: warning: transport plugin broken .* breaks the contract", warning)
    assert "cannot connect to TCP 127.0.0.1" in error
    assert done.returncode == 1

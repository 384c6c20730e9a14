from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from nbdcore import libnbd
from nbdcore.cli.app import program
from nbdcore.server import MemoryDisk, Server
from tests.cli.commands import COMMAND, invoke, run

SIZE = 1 << 20


@pytest.fixture(autouse=True)
def _nbd_stays_what_it_was(monkeypatch):
    monkeypatch.setitem(sys.modules, "nbd", None)
    monkeypatch.delenv("LIBNBD_DEBUG", raising=False)


@pytest.fixture
def server():
    with Server(MemoryDisk(SIZE), max_clients=1) as server:
        listener = server.listen("tcp", host="127.0.0.1", port=0)
        server.start()
        server.at = server.uri(listener)
        yield server


def said(*words):
    done = invoke("shell", *words)
    assert (done.stderr, done.exit_code) == ("", 0)
    return done.stdout


def typed(text, *words):
    done = CliRunner().invoke(program, ["shell", *words], input=text, prog_name="nbdcore")
    assert done.exit_code == 0
    return done


def test_statements_share_their_names():
    assert said("-c", "x = 41", "--command", "print(x + 1)") == "42\n"


def test_nbd_is_the_drop_in_under_its_own_name_too():
    assert said("-c", "import nbd as again; print(nbd is again, nbd.__name__)") == "True nbdcore.libnbd\n"


def test_h_is_a_new_handle():
    assert said("-c", "print(type(h) is nbd.NBD, h.get_handle_name(), h.aio_is_created())") == "True nbdsh True\n"


@pytest.mark.parametrize("option", ["-u", "--uri", "--connect"])
def test_uri_connects_h_and_nothing_else(server, option):
    # A second connection would be refused.
    assert said(option, server.at, "-c", "print(h.get_size())") == f"{SIZE}\n"


def test_disk_connects_when_it_is_first_used():
    with Server(MemoryDisk(SIZE)) as server:
        listener = server.listen("tcp", host="127.0.0.1", port=0)
        server.start()
        script = "def read(): return disk.pread(4, 0)\nh.pwrite(b'data', 0)\nprint(read(), disk is disk, disk.contexts)"
        printed = said("-u", server.uri(listener), "-c", script)
        assert printed == "b'data' True ('base:allocation',)\n"


@pytest.mark.parametrize(("words", "name"), [((), "disk"), (("-n",), "h")], ids=str)
def test_name_that_is_not_there_is_an_error(words, name):
    done = invoke("shell", *words, "-c", name)
    assert done.stderr.splitlines()[-1] == f"NameError: name '{name}' is not defined"
    assert (done.stdout, done.exit_code) == ("", 1)


def test_options_are_carried_out_in_their_order(server):
    asked = "print(h.get_nr_meta_contexts(), h.get_opt_mode(), h.aio_is_created(), h.aio_is_negotiating())"
    words = ("-c", asked, "--base-allocation", "-c", asked, "--opt-mode", "-c", asked, "-u", server.at, "-c", asked)
    assert said(*words) == "0 False True False\n1 False True False\n1 True True False\n1 True False True\n"


def test_standard_input_is_a_script():
    assert typed("if True:\n    x = 1\n    print('ran', x)\n", "-c", "-").stdout == "ran 1\n"


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("h.pread(1, 0)", "nbd_pread: invalid state: START: .*: Transport endpoint is not connected"),
        ("import nbdcore; nbdcore.connect('nbd://localhost', contexts=[7])", ".*contexts.*"),
    ],
)
def test_what_nbd_refuses_is_one_line(script, line):
    done = invoke("shell", "-c", "print('before')", "-c", script)
    assert re.fullmatch(f"nbdcore: command line script failed: {line}\n", done.stderr)
    assert (done.stdout, done.exit_code) == ("before\n", 1)


def test_with_verbose_it_is_a_traceback_and_handles_say_what_they_do():
    done = run("shell", "-v", "-c", "h.pread(1, 0)")
    assert "libnbd: debug: nbdsh: nbd_pread: enter: " in done.stderr
    assert 'Traceback (most recent call last):\n  File "<command 1>", line 1, in <module>\n    h.pread(1, 0)\n' in done.stderr
    assert done.returncode == 1


def test_another_exception_has_its_traceback_from_the_script_on():
    done = invoke("shell", "-c", "def f():\n    1 / 0\nf()")
    first, begin, *_, last = done.stderr.splitlines()
    assert first == "Traceback (most recent call last):"
    assert begin.endswith(", line 3, in <module>")
    assert "    1 / 0" in done.stderr.splitlines()
    assert last == "ZeroDivisionError: division by zero"
    assert done.exit_code == 1


@pytest.mark.parametrize(
    ("script", "status", "message"),
    [("raise SystemExit", 0, ""), ("import sys; sys.exit(7)", 7, ""), ("raise SystemExit('no more')", 1, "no more\n")],
)
def test_script_ends_the_command_as_it_likes(script, status, message):
    done = invoke("shell", "-c", script, "-c", "print('not reached')")
    assert (done.stdout, done.stderr, done.exit_code) == ("", message, status)


def test_server_that_is_not_there_is_one_line():
    done = invoke("shell", "-u", "nbd+unix:///?socket=/nonexistent", "-c", "print(1)")
    assert done.stderr.startswith("nbdcore: command line script failed: nbd_connect_uri: ")
    assert (done.stdout, done.exit_code) == ("", 1)


@pytest.mark.parametrize("option", [("--base-allocation",), ("--opt-mode",), ("-u", "nbd://localhost/")], ids=str)
def test_no_handle_contradicts_what_is_about_one(option):
    done = invoke("shell", "-n", *option, "-c", "1")
    assert done.stderr.startswith("nbdcore: -n makes no handle")
    assert (done.stdout, done.exit_code) == ("", 1)


def test_wrong_option_has_status_2():
    assert invoke("shell", "--nonsense").exit_code == 2


def test_version_names_both():
    first, second = said("--version").splitlines()
    assert first.startswith(f"nbdcore shell {libnbd.__version__} (libnbd drop-in of nbdcore ")
    assert second == f"libnbd {libnbd.__version__}"


def test_interactively_it_says_what_is_there_and_runs_what_is_typed(server):
    done = typed("h.get_size()\nx = 1\nx + 1\n", "-u", server.at)
    assert done.stdout == f"nbd> {SIZE}\nnbd> nbd> 2\nnbd> "
    assert "a handle of it, in state READY: h.get_size()" in done.stderr
    assert "its first use opens a second connection" in done.stderr


def test_exit_ends_it():
    assert typed("raise SystemExit\nprint('not reached')\n").stdout == "nbd> "


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("end", ["raise ValueError", "exit(3)", "h.pread(1, 0)"])
def test_output_that_cannot_be_written_is_told_however_the_script_ends(end):
    with Path("/dev/full").open("w") as full:
        done = run("shell", "-c", f"print(1); {end}", stdout=full.fileno(), PYTHONUNBUFFERED="")
    assert done.stderr.splitlines()[-1] == "nbdcore: cannot write to standard output: No space left on device"
    assert done.returncode == 1


def test_script_may_close_standard_output():
    done = run("shell", "-c", "import sys; print(1); sys.stdout.close()")
    assert (done.stdout, done.stderr, done.returncode) == ("1\n", "", 0)


def test_shell_without_a_standard_input_ends_at_once():
    done = run("shell", "-n", command=("sh", "-c", 'exec "$@" <&-', "sh", *COMMAND))
    assert done.returncode == 0
    assert "Traceback" not in done.stderr

"""The folder that stands in for an installed libnbd: its commands and its module, run as scripts run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nbdcore import libnbd
from nbdcore.cli import originals
from nbdcore.libnbd import tools
from nbdcore.server import MemoryDisk, Server
from tests.interop.programs import DIES_WITH_US, REPOSITORY

DEADLINE = 60

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the commands are scripts of a unix shell")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools") / "it's new"
    tools.install(folder)
    return folder


def run(folder, *words, cwd=None):
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": f"{folder}:{REPOSITORY}"}
    return subprocess.run(
        [*DIES_WITH_US, *words],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_commands_have_the_names_that_the_command_line_knows():
    assert tuple(originals.COMMANDS) == tools.NAMES


def test_command_does_what_its_name_says(folder):
    with Server(MemoryDisk(1 << 20)) as server:
        listener = server.listen("tcp", host="127.0.0.1", port=0)
        server.start()
        uri = server.uri(listener)
        assert run(folder, "nbdinfo", "--size", "--", uri).stdout == "1048576\n"
        assert run(folder, "nbddump", "--length=0", uri).returncode == 0
        assert run(folder, "nbdsh", "-u", uri, "-c", "print(h.get_size())").stdout == "1048576\n"


def test_command_says_its_own_name(folder):
    failed = run(folder, "nbdinfo", "nbd+unix:///?socket=/nonexistent")
    assert failed.stderr.startswith("nbdinfo: ")
    assert (failed.stdout, failed.returncode) == ("", 1)
    wrong = run(folder, "nbdsh", "--nonsense")
    assert wrong.stderr.startswith("Usage: nbdsh ")
    assert wrong.returncode == 2


def test_command_tells_its_version_and_its_options(folder):
    assert run(folder, "nbddump", "--version").stdout.startswith(f"nbddump {libnbd.__version__} (libnbd drop-in of nbdcore ")
    assert {"-n", "-V"} <= {*run(folder, "nbddump", "--short-options").stdout.split()}
    long = run(folder, "nbddump", "--long-options").stdout.splitlines()
    assert {"--length", "--limit", "--color", "--no-colours", "--help", "--version"} <= {*long}
    assert "--long-options" not in long


def test_command_imports_nothing_from_where_it_is_used(folder, tmp_path):
    (tmp_path / "click.py").write_text("raise SystemExit('imported')")
    assert run(folder, "nbdinfo", "--version", cwd=tmp_path).returncode == 0


def test_module_is_found_by_programs_and_runs_as_the_shell(folder):
    assert run(folder, sys.executable, "-c", "import nbd; print(nbd.NBD.__module__)").stdout == "nbdcore.libnbd.handle\n"
    assert run(folder, sys.executable, "-m", "nbd", "-c", "print(h.get_handle_name())").stdout == "nbdsh\n"


def test_both_command_lines_install_and_say_how_to_use_it(tmp_path):
    for module in ("nbdcore.libnbd.tools", "nbdcore.libnbd"):
        folder = tmp_path / module
        done = run(tmp_path, sys.executable, "-m", module, "--install", folder)
        assert f"PATH={folder}:$PATH" in done.stdout
        assert sorted(path.name for path in folder.iterdir()) == sorted([*tools.NAMES, "nbd.py"])


def test_it_replaces_what_it_made_and_nothing_else(tmp_path, capsys):
    tools.install(tmp_path)
    tools.install(tmp_path)
    (tmp_path / "nbdsh").write_text("another's")
    (tmp_path / "nbdinfo").unlink()
    assert tools.main(["--install", str(tmp_path)]) == 1
    assert f"{tmp_path / 'nbdsh'} is something else" in capsys.readouterr().err
    assert (tmp_path / "nbdsh").read_text() == "another's"
    assert not Path(tmp_path / "nbdinfo").exists()


def test_link_that_leads_nowhere_is_not_replaced(tmp_path):
    (tmp_path / "nbdinfo").symlink_to(tmp_path / "unmounted")
    with pytest.raises(FileExistsError, match="nbdinfo is something else"):
        tools.install(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["nbdinfo"]


def test_what_the_system_refuses_is_told_with_its_path(tmp_path, capsys):
    (tmp_path / "nbdsh").mkdir()
    assert tools.main(["--install", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"python -m nbdcore.libnbd.tools: {tmp_path}/nbdsh: Is a directory\n"

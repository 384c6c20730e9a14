"""What mypy and pyright, each at its strictest, say of users' programs: nothing of right ones, each marked line of wrong ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.typing

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


def mypy(program: Path, folder: Path) -> set[int]:
    """Return the lines that mypy reports."""
    arguments = ["--strict", "--config-file=", f"--cache-dir={folder}", "--no-error-summary", str(program)]
    printed = run("mypy", arguments, folder)
    return {int(line) for line in re.findall(r"^\S+:(\d+): error", printed, re.MULTILINE)}


def pyright(program: Path, folder: Path) -> set[int]:
    """Return the lines that pyright reports."""
    (folder / "pyrightconfig.json").write_text(json.dumps({"include": [str(program)], "typeCheckingMode": "strict"}))
    printed = run("pyright", ["--pythonpath", sys.executable, "--project", str(folder), "--outputjson"], folder)
    report = json.loads(printed[printed.index("{") :])
    assert report["summary"]["filesAnalyzed"] == 1
    return {found["range"]["start"]["line"] + 1 for found in report["generalDiagnostics"] if found["severity"] == "error"}


def run(module: str, arguments: list[str], folder: Path, **environment: str) -> str:
    # Both exit with 1 when they report something; anything else is a failure of their own.
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1",
            "MYPYPATH": f"{REPOSITORY}:{REPOSITORY / 'transports'}",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("checker", [mypy, pyright])
@pytest.mark.parametrize("name", ["right", "wrong"])
def test_checker_reports_the_lines_marked_as_wrong_and_no_others(checker, name, tmp_path):
    program = tmp_path / f"{name}.py"
    text = (HERE / program.name).read_text()
    program.write_text(text)
    marked = {number for number, line in enumerate(text.splitlines(), 1) if line.endswith("# wrong")}
    assert bool(marked) == (name == "wrong")
    assert checker(program, tmp_path) == marked


def test_pyright_finds_the_type_of_every_public_name_complete(tmp_path):
    # It takes the package from the Python that the path leads to.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    printed = run("pyright", ["--verifytypes", "nbdcore", "--ignoreexternal", "--outputjson"], tmp_path, PATH=path)
    report = json.loads(printed[printed.index("{") :])["typeCompleteness"]
    incomplete = [symbol["name"] for symbol in report["symbols"] if symbol["isExported"] and not symbol["isTypeKnown"]]
    assert (incomplete, report["completenessScore"]) == ([], 1)

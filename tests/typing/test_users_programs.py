"""What mypy and pyright, each at its strictest, say of users' programs: nothing of right ones, each marked line of wrong ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

pytestmark = pytest.mark.typing

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


#: The lines that a checker reports, by the name of their program.
Lines = dict[str, set[int]]


def mypy(programs: list[Path], folder: Path) -> Lines:
    arguments = ["--strict", "--config-file=", f"--cache-dir={folder}", "--no-error-summary", *map(str, programs)]
    printed = run("mypy", arguments, folder)
    return reported((Path(found[1]).name, int(found[2])) for found in re.finditer(r"^(\S+):(\d+): error", printed, re.MULTILINE))


def pyright(programs: list[Path], folder: Path) -> Lines:
    settings = {"include": [str(program) for program in programs], "typeCheckingMode": "strict"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    printed = run("pyright", ["--pythonpath", sys.executable, "--project", str(folder), "--outputjson"], folder)
    report = json.loads(printed[printed.index("{") :])
    assert report["summary"]["filesAnalyzed"] == len(programs)
    errors = [found for found in report["generalDiagnostics"] if found["severity"] == "error"]
    return reported((Path(found["file"]).name, found["range"]["start"]["line"] + 1) for found in errors)


def reported(places: Iterable[tuple[str, int]]) -> Lines:
    lines: Lines = {}
    for name, line in places:
        lines.setdefault(name, set()).add(line)
    return lines


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


# Both programs at once: most of a checker's time goes into nbdcore and the standard library.
@pytest.mark.parametrize("checker", [mypy, pyright])
def test_checker_reports_the_lines_marked_as_wrong_and_no_others(checker, tmp_path):
    programs = [tmp_path / name for name in ("right.py", "wrong.py")]
    marked = []
    for program in programs:
        text = (HERE / program.name).read_text()
        program.write_text(text)
        marked += [(program.name, number) for number, line in enumerate(text.splitlines(), 1) if line.endswith("# wrong")]
    assert {name for name, _ in marked} == {"wrong.py"}
    assert checker(programs, tmp_path) == reported(marked)


def test_pyright_finds_the_type_of_every_public_name_complete(tmp_path):
    # It takes the package from the Python that the path leads to.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    printed = run("pyright", ["--verifytypes", "nbdcore", "--ignoreexternal", "--outputjson"], tmp_path, PATH=path)
    report = json.loads(printed[printed.index("{") :])["typeCompleteness"]
    incomplete = [symbol["name"] for symbol in report["symbols"] if symbol["isExported"] and not symbol["isTypeKnown"]]
    assert (incomplete, report["completenessScore"]) == ([], 1)

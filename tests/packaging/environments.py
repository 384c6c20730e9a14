"""Wheels, and fresh virtual environments to install them into."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

PROJECT = Path(__file__).parents[2]
HERE = Path(__file__).parent

#: Seconds that no build, installation or program here comes near.
DEADLINE = 100

#: What a build of nbdcore needs, without what else lies in a developer's checkout.
SOURCES = ("nbdcore", "transports", "man", "pyproject.toml", "hatch_build.py", "README.md", "LICENSE")


def run(*command: str | Path, fails: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a clean environment; asserts that it succeeds, or with `fails` that it exits with an error status."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "NBDCORE", "VIRTUAL_ENV"))}
    done = subprocess.run(
        list(map(str, command)),
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        stdin=subprocess.DEVNULL,
        cwd=HERE,  # never the checkout's root, from which nbdcore could be imported
        env={**inherited, **environment},
    )
    assert (done.returncode != 0) is fails, f"{command} exited with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done


def build(source: Path, out: Path, kind: str = "wheel", **environment: str) -> Path:
    """Build a wheel or an sdist of the project in `source`, with the build tools that the tests' own environment has."""
    run(sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", out, source, **environment)
    [built] = out.iterdir()
    return built


def copy_sources(destination: Path) -> Path:
    """Copy what a build needs, so that a test can change it."""
    destination.mkdir()
    for name in SOURCES:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, destination / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, destination)
    return destination


class Environment:
    """A fresh virtual environment that contains what is installed into it, and nothing else."""

    def __init__(self, directory: Path) -> None:
        venv.create(directory, with_pip=False, symlinks=os.name != "nt")
        self.programs = directory / ("Scripts" if os.name == "nt" else "bin")

    def install(self, *requirements: str | Path) -> None:
        """Install wheels, extras as in `wheel[cli]`, and what they depend on."""
        pip = (sys.executable, "-m", "pip", "--python", self.programs / "python", "--disable-pip-version-check")
        # Most of what is installed is never imported: compiling all of it would take longer than the tests.
        run(*pip, "install", "--quiet", "--no-compile", *requirements)

    def python(self, *arguments: str | Path, **environment: str) -> str:
        """Run Python and return what it printed. Its warnings are errors, unless a `-W` says otherwise."""
        return run(self.programs / "python", "-W", "error", *arguments, **environment).stdout

    def nbdcore(self, *arguments: str | Path, fails: bool = False) -> subprocess.CompletedProcess[str]:
        """Run the `nbdcore` command."""
        return run(self.programs / "nbdcore", *arguments, fails=fails)

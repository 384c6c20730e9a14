"""The real NBD programs that the interop tests run: where they are, and how to run one so that it cannot outlive the test.

A test names what it needs in its marker, `@pytest.mark.interop("nbdkit", "qemu-img")`; the name is a key of PROGRAMS.
Where one is missing the test is left out, and in CI that is an error (see tests/conftest.py).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

#: QEMU 8.2 or newer, for extended headers; tests/setup/qemu10 brings it.
QEMU_NBD_10 = "qemu-nbd-10"

#: Name in a marker: what is looked for, in the path or as a file.
PROGRAMS: Mapping[str, str] = {
    **{
        name: name
        for name in (
            "nbdkit",
            "qemu-nbd",
            "qemu-img",
            "qemu-io",
            "nbd-server",
            "nbdinfo",
            "nbdcopy",
            "nbddump",
            "nbdsh",
            "fio",
            "openssl",
            "groff",
        )
    },
    QEMU_NBD_10: str(REPOSITORY / ".cache/qemu10/qemu-nbd"),
}

# Servers stand in sbin on Debian, which a user's own path may leave out.
SEARCH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

# SIGKILL for the program when the thread that started it ends, however that ends; kept over exec. So start servers on the main
# thread. Elsewhere than on Linux only the context managers end what a test started.
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--") if sys.platform == "linux" else ()


def find(name: str) -> str | None:
    """Return the path of a program of PROGRAMS, or None where this machine lacks it."""
    return shutil.which(PROGRAMS[name], path=SEARCH)


def missing(names: Iterable[str]) -> list[str]:
    """Return those of the programs that this machine lacks; no name at all stands for every one of them."""
    return sorted(name for name in (tuple(names) or PROGRAMS) if find(name) is None)


def path_of(name: str) -> str:
    """Return the path of a program of PROGRAMS, which must be there."""
    program = find(name)
    if program is None:
        raise LookupError(f"{name} is not on this machine: tests/setup/servers installs it")
    return program


def version_of(name: str) -> tuple[int, ...]:
    """Return the version that a program of PROGRAMS prints for `--version`, such as (1, 22, 2)."""
    printed = subprocess.run([path_of(name), "--version"], capture_output=True, text=True, timeout=10, check=True)
    found = re.search(r"\d+(?:\.\d+)+", printed.stdout + printed.stderr)
    assert found, printed
    return tuple(map(int, found[0].split(".")))


def command(name: str, *arguments: str | Path, launcher: Sequence[str] = ()) -> list[str]:
    """Return the command line that runs a program of PROGRAMS, through `launcher`, so that it dies with this process."""
    return [*DIES_WITH_US, *launcher, path_of(name), *map(str, arguments)]


def run(
    name: str,
    *arguments: str | Path,
    deadline: float = 30,
    check: bool = True,
    text: bool = True,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """Run a client program to its end, within `deadline` seconds; with `check`, a status but 0 fails with what it said."""
    done = subprocess.run(
        command(name, *arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=text,
        timeout=deadline,
        check=False,
        env={**os.environ, "LC_ALL": "C.UTF-8", **(environment or {})},
    )
    if check and done.returncode != 0:
        raise AssertionError(
            f"{name} {' '.join(map(str, arguments))} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        )
    return done

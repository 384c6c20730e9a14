"""Says what a result was measured on and with: figures of two machines, or of two versions, are no comparison."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import nbdcore
from tests.bench.programs import Tools
from tests.bench.running import Failed, run
from tests.interop.programs import find

_LIMIT = 20


def describe(tools: Tools) -> dict[str, str]:
    """Return what there is to know, by name; what is not on this machine is left out."""
    asked = {
        "Python": [tools.python, "--version"],
        "numpy": [tools.python, "-c", "import numpy; print(numpy.__version__)"],
        "Python of libnbd's module": [tools.peer_python, "--version"],
        "libnbd's Python module": [tools.peer_python, "-c", "import nbd; print(nbd.NBD().get_version())"],
        "nbdcopy": [tools.nbdcopy, "--version"],
        "fio": [tools.fio, "--version"],
        "nbdkit": [find("nbdkit") or "nbdkit", "--version"],
    }
    known = {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}, {_distribution()}",
        "nbdcore": nbdcore.__version__,
        **{name: _version(line) for name, line in asked.items()},
    }
    return {name: value for name, value in known.items() if value}


def _version(line: list[str]) -> str:
    try:
        found = re.search(r"\d+(\.\d+)+", run(line, limit=_LIMIT).output)
    except (Failed, OSError):
        return ""
    return found[0] if found else ""


def _processor() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return "unknown distribution"

"""What is on a disk, by its first bytes: the words of libmagic, asked for as python-magic or as the program `file`."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from importlib import import_module

__all__ = ["content_of"]

# Seconds that the program may take for a few thousand bytes, which is a thousand times what it needs.
_PATIENCE = 10


def content_of(beginning: bytes) -> str:
    """Return what a disk that begins so seems to be, such as "DOS/MBR boot sector"; "" where nothing here can tell."""
    try:
        found: object = import_module("magic").from_buffer(beginning)
    except Exception:  # noqa: BLE001 (not installed, without its library, or another module of that name)
        return _by_program(beginning)
    return str(found).strip()


def _by_program(beginning: bytes) -> str:
    program = shutil.which("file")
    if program is None:
        return ""
    try:
        with tempfile.NamedTemporaryFile(prefix="nbdcore-") as file:  # of a pipe it would know less, and say it in other words
            file.write(beginning)
            file.flush()
            done = subprocess.run(  # noqa: S603 (no word of the command line is a stranger's)
                [program, "--brief", file.name], stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace").strip()

"""`python -m nbdcore.libnbd.tools --install DIR`: a folder that stands in for an installed libnbd, its commands and its module.

    DIR/nbdinfo, nbdcopy, nbddump, nbdsh    for scripts: with DIR first in PATH
    DIR/nbd.py                              for programs in Python: with DIR in PYTHONPATH

Each is a few lines that hand over to nbdcore, which they look up when they run: so they stay as they are when nbdcore gets newer.
The commands need its extra `cli`. Nothing but DIR is changed, and no file in it that is not of this kind.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["NAMES", "install", "main"]

#: The commands, by libnbd's names for them.
NAMES = ("nbdinfo", "nbdcopy", "nbddump", "nbdsh")

_MADE_HERE = "# Made by python -m nbdcore.libnbd.tools, which may replace it."
# -P keeps Python from looking for modules in the folder where the command is used.
_COMMAND = """\
#!/bin/sh
{made_here}
exec {python} -P -c 'import sys; from nbdcore.cli import main; sys.exit(main("{name}"))' "$@"
"""
_MODULE = """\
{made_here}
import sys

if __name__ == "__main__":
    from nbdcore.cli import main

    sys.exit(main("nbdsh"))

from nbdcore.libnbd import install

install()
"""


def install(folder: str | os.PathLike[str]) -> list[Path]:
    """Put the commands and the module into a folder, which is made if there is none. Returns their paths.

    The commands run the interpreter that runs this. Raises FileExistsError, with nothing changed, where one of the files is there
    and was not made here; OSError where it cannot be written.
    """
    where = Path(folder)
    texts = {where / name: _COMMAND.format(made_here=_MADE_HERE, python=shlex.quote(sys.executable), name=name) for name in NAMES}
    texts[where / "nbd.py"] = _MODULE.format(made_here=_MADE_HERE)
    for path in texts:
        if os.path.lexists(path) and _MADE_HERE not in _text_of(path):
            raise FileExistsError(f"{path} is something else, and is left as it is: choose a folder of its own")
    where.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.unlink(missing_ok=True)  # a link would be written through
        path.write_text(text, encoding="utf-8")
        path.chmod(0o644 if path.suffix else 0o755)
    return list(texts)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # a link that leads nowhere, just now
        return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m nbdcore.libnbd.tools",
        description="Put commands with the names of libnbd's, and a module nbd, into a folder: they are nbdcore's.",
    )
    parser.add_argument("--install", metavar="DIR", required=True, help="the folder; it is made if there is none")
    folder = Path(parser.parse_args(arguments).install).absolute()
    try:
        made = install(folder)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"{parser.prog}: {reason}", file=sys.stderr)  # noqa: T201 (a program of its own, beside the command)
        return 1
    quoted = shlex.quote(str(folder))
    print(f"Made in {folder}: {', '.join(path.name for path in made)}.")  # noqa: T201 (as above)
    print(f"For scripts:  PATH={quoted}:$PATH")  # noqa: T201
    print(f"For Python:   PYTHONPATH={quoted}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())

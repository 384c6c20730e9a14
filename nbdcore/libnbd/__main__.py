"""`python -m nbdcore.libnbd [-m | -c] PROGRAM [ARGUMENTS]`: run a program whose `import nbd` is to find this module.

`python -m nbdcore.libnbd --install DIR` does so for programs to come, and for libnbd's commands: see `nbdcore.libnbd.tools`.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from nbdcore.libnbd import tools
from nbdcore.libnbd.alias import install

_USAGE = "usage: python -m nbdcore.libnbd [-m | -c] PROGRAM [ARGUMENTS], or python -m nbdcore.libnbd --install DIR"


def main() -> None:
    """Run the program that the command line names, as python itself would: a file, a module (-m), or the text itself (-c)."""
    if sys.argv[1:2] == ["--install"]:
        sys.exit(tools.main(sys.argv[1:]))
    how, *arguments = sys.argv[1:] if sys.argv[1:2] in (["-m"], ["-c"]) else ["", *sys.argv[1:]]
    if not arguments:
        sys.exit(_USAGE)
    install()
    program, *others = arguments
    sys.argv = ["-c" if how == "-c" else program, *others]
    if how == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    elif how == "-c":
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})  # noqa: S102 (the caller's own program)
    else:
        sys.path.insert(0, str(Path(program).resolve().parent))
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()

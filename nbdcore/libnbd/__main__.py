"""`python -m nbdcore.libnbd [-m] PROGRAM [ARGUMENTS]`: run a program whose `import nbd` is to find this module."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from nbdcore.libnbd.alias import install


def main() -> None:
    """Run the program that the command line names, as python itself would."""
    arguments = sys.argv[1:]
    as_module = arguments[:1] == ["-m"]
    if as_module:
        del arguments[0]
    if not arguments:
        sys.exit("usage: python -m nbdcore.libnbd [-m] PROGRAM [ARGUMENTS]")
    install()
    sys.argv = arguments
    if as_module:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()

"""The `nbdcore` command. It comes with the extra `cli`: without click and rich it says in one line what to install.

Nothing here imports either of them before that is known, and nothing but `nbdcore.cli.app` is imported after it.
"""

from __future__ import annotations

import gc
import os
import sys

__all__ = ["main"]

# A start makes some 30,000 objects, which live to the end. To look for garbage after every 700 of them, as Python does, takes a
# tenth of the start.
_OBJECTS = 50_000

# What a shell makes of a program that ended by SIGINT.
_INTERRUPTED = 130


def main(name: str = "nbdcore") -> int:
    """Run the command with this process's arguments, and return its exit status.

    `name` is the program's: with that of one of libnbd's, such as nbdinfo, it is the command that stands in for it.
    """
    _fill_standard_descriptors()
    gc.set_threshold(_OBJECTS)
    try:
        try:
            import click  # noqa: F401 (looked for, not used)
            import rich  # noqa: F401 (as above)
        except ModuleNotFoundError as missing:
            sys.stderr.write(f"{name}: the command needs {missing.name}, the library does not: pip install 'nbdcore[cli]'\n")
            return 1
        from nbdcore.cli.app import run

        return run(name)
    except KeyboardInterrupt:
        return _INTERRUPTED
    finally:
        # A KeyboardInterrupt that passed through exec of a string, as dataclasses do when they are imported, is kept in mind by
        # CPython: it ends a program of `python -m` by SIGINT, whatever its exit status. The next exec has it forgotten.
        exec("")  # noqa: S102 (nothing)
        gc.freeze()  # or the interpreter looks through all of them several times while it ends, a sixth of a short command


def _fill_standard_descriptors() -> None:
    """Open the null device as each of descriptors 0 to 2 that is closed, before anything else is opened.

    Otherwise a disk or a socket would get the number, and what the interpreter or a library in C says on standard error would be
    written into it.
    """
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:  # the lowest that is free
            os.close(descriptor)
            return
        os.set_inheritable(descriptor, True)

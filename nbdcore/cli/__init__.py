"""The `nbdcore` command. It comes with the extra `cli`: without click and rich it says in one line what to install.

Nothing here imports either of them before that is known, and nothing but `nbdcore.cli.app` is imported after it.
"""

from __future__ import annotations

import sys

__all__ = ["main"]

# What a shell makes of a program that ended by SIGINT.
_INTERRUPTED = 130


def main() -> int:
    """Run the command with this process's arguments, and return its exit status."""
    try:
        try:
            import click  # noqa: F401 (looked for, not used)
            import rich  # noqa: F401 (as above)
        except ModuleNotFoundError as missing:
            sys.stderr.write(f"nbdcore: the command needs {missing.name}, the library does not: pip install 'nbdcore[cli]'\n")
            return 1
        from nbdcore.cli.app import run

        return run()
    except KeyboardInterrupt:
        return _INTERRUPTED

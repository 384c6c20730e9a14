"""`install`: have `import nbd` find this module. Nothing else does that, and importing nbdcore does not."""

from __future__ import annotations

import sys

__all__ = ["install"]


def install() -> None:
    """Make every later `import nbd` of this process find `nbdcore.libnbd`. A module `nbd` that is imported already is replaced.

    To run a program unchanged that does not call this: `python -m nbdcore.libnbd PROGRAM [ARGUMENTS]`, or `-m MODULE`
    or `-c TEXT` in place of the program, as for python itself. For many programs and processes: `nbdcore.libnbd.tools`.
    """
    sys.modules["nbd"] = sys.modules["nbdcore.libnbd"]

"""`python -m nbdcore` is the `nbdcore` command."""

from __future__ import annotations

import sys

from nbdcore.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""What the harness's own tests call in the guest."""

from __future__ import annotations

import subprocess
import sys
import time


def fails() -> None:
    print("what it wrote", file=sys.stderr)
    raise LookupError("as it was told to")


def hangs() -> None:
    time.sleep(600)


def leaves_a_process() -> int:
    return subprocess.Popen(["sleep", "600"], start_new_session=True).pid

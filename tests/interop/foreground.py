"""Keeps a server that can only be a daemon in the foreground: python foreground.py /PATH/TO/PROGRAM ARGUMENT...

nbd-server's own option for that serves one client and ends. This process adopts the daemon that the program becomes, ends when
the daemon and its children did, passes SIGTERM on to them, and makes a SIGKILL of SIGUSR1, which it also gets when its parent
dies. Signals are waited for, never handled: none can slip in between a look and a wait. It needs the standard library and Linux
only, and is run with -I -S to start at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

PASSED_ON = {signal.SIGTERM: signal.SIGTERM, signal.SIGUSR1: signal.SIGKILL}


def reap(statuses: dict[int, int]) -> bool:
    """Note the status of each child that ended; return whether any is left."""
    try:
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            statuses[ended[0]] = os.waitstatus_to_exitcode(ended[1])
    except ChildProcessError:
        return False
    return True


def main() -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, [*PASSED_ON, signal.SIGCHLD])
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGUSR1), 0, 0, 0)
    program = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, setsigmask=())
    statuses: dict[int, int] = {}
    wanted = None
    while reap(statuses):
        wanted = PASSED_ON.get(signal.sigwait([*PASSED_ON, signal.SIGCHLD]), wanted)
        if wanted is not None:  # after a SIGCHLD again: a daemon's own children have become ours
            for process in Path("/proc/thread-self/children").read_text().split():
                os.kill(int(process), wanted)
    return statuses[program]


if __name__ == "__main__":
    sys.exit(main())

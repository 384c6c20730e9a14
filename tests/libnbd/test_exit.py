"""How programs end: with handles still open, with children still running, and in forks. Each is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
import nbdcore.libnbd as nbd
h = nbd.NBD()
"""


def run(program, *arguments):
    """Run a program as `python -c`, whose globals go only when the interpreter itself does."""
    line = [sys.executable, "-X", "dev", "-c", PROGRAM + program, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.interop("nbdkit")
@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "sys.handle = h", "h.close()"])
@pytest.mark.parametrize(
    "connect",
    [
        "connect_command(['nbdkit', '--exit-with-parent', '-sv', 'null'])",
        "connect_systemd_socket_activation(['nbdkit', '-v', 'null'])",
    ],
)
def test_program_that_exits_without_closing_takes_its_server_along(connect, end):
    done = run(f"h.{connect}\nprint(h.get_subprocess_pid(), flush=True)\n{end}\n")

    assert done.returncode == (3 if "3" in end else 0)
    assert not is_running(int(done.stdout))
    assert "cleanup" in done.stderr, "the server's last words are shown"


@pytest.mark.parametrize("end", ["", "sys.handle = h", "h.close()"])
def test_program_that_exits_in_the_middle_of_commands_ends_at_once(end, server):
    done = run(
        f"h.connect_tcp('127.0.0.1', sys.argv[1])\n"
        f"for _ in range(64): h.aio_pread(nbd.Buffer(4096), 0, lambda error: print(error.value))\n{end}\n",
        server,
    )

    assert done.returncode == 0
    assert done.stdout.split() in ([], ["107"] * 64)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("drop", ["", "del h", "h.close()"])
def test_fork_that_ends_leaves_the_parents_connection_alone(drop, server):
    done = run(
        f"h.connect_tcp('127.0.0.1', sys.argv[1])\n"
        f"if not os.fork():\n    {drop or 'pass'}\n    raise SystemExit(7)\n"
        f"assert os.waitstatus_to_exitcode(os.wait()[1]) == 7\n"
        f"print(len(h.pread(512, 0)))\n",
        server,
    )

    assert done.stdout.split() == ["512"]


@pytest.mark.interop("nbdkit")
@pytest.mark.parametrize("drop", ["", "del h", "h.close()"])
def test_fork_that_ends_leaves_the_parents_server_alone(drop):
    done = run(
        f"h.connect_command(['nbdkit', '--exit-with-parent', '-s', 'null', '1M'])\n"
        f"if not os.fork():\n    {drop or 'pass'}\n    raise SystemExit(7)\n"
        f"assert os.waitstatus_to_exitcode(os.wait()[1]) == 7\n"
        f"print(len(h.pread(512, 0)))\n"
    )

    assert done.stdout.split() == ["512"]

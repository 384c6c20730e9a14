"""The harness itself: what goes wrong in the guest shows here as what it is, and nothing outlives its starter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.interop.programs import DIES_WITH_US
from tests.vm import probes
from tests.vm.guest import Guest, GuestError, GuestFailure
from tests.vm.machine import REPOSITORY

pytestmark = [pytest.mark.vm, pytest.mark.xdist_group("vm")]

# As the kernel names a process: 15 characters. The vsock device runs by the loader of its C library.
HELPERS = {"virtiofsd", "ld-linux-x86-64", "qemu-system-x86"}
START_A_GUEST = "from tests.vm.guest import Guest\nwith Guest():\n    input()\n"


def test_exception_in_the_guest_fails_the_call_with_its_traceback_and_output(bare_guest: Guest) -> None:
    with pytest.raises(GuestFailure, match=r"(?s)line \d+, in fails.*LookupError: as it was told to.*its errors:\nwhat it wrote"):
        bare_guest.call(probes.fails)


def test_call_that_hangs_is_ended_and_says_where_it_hung(bare_guest: Guest) -> None:
    with pytest.raises(GuestFailure, match=r"(?s)no answer within 1 s.*line \d+ in hangs"):
        bare_guest.call(probes.hangs, deadline=1)


def test_process_left_by_a_call_is_ended_with_it(bare_guest: Guest) -> None:
    process = bare_guest.call(probes.leaves_a_process)
    assert not bare_guest.call(os.path.exists, path=f"/proc/{process}")


def test_port_on_which_nobody_in_the_guest_listens_is_named(guest: Guest) -> None:
    with pytest.raises(GuestError, match="listens on vsock port 4242"):
        guest.connect(4242, deadline=1)


def test_killed_test_process_takes_its_guest_along(short_folder: Path, eventually: Callable[..., None]) -> None:
    starter = subprocess.Popen(
        [*DIES_WITH_US, sys.executable, "-c", START_A_GUEST],
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(short_folder), "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
    )
    with starter:
        eventually(lambda: _names_using(short_folder) >= HELPERS, "it is booting")
        starter.kill()
    eventually(lambda: not _names_using(short_folder), "what the guest needed has ended")
    eventually(lambda: not list(short_folder.iterdir()), "its files are gone")


def _names_using(folder: Path) -> set[str]:
    """Return the names of the processes that have `folder` for their temporary files."""
    wanted = f"TMPDIR={folder}".encode()
    names = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                names.add((process / "comm").read_text().strip())
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it ended just now, or is somebody else's
            continue
    return names

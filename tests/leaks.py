"""What a test, or a session of them, may have left behind: child processes, open descriptors, threads, listening unix sockets.

Each function names what it finds, so that the message leads to the test that did it. On a platform without /proc and /dev/fd
there is nothing to look at, and nothing is found; Linux is where leaks are caught.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

_DESCRIPTORS = Path("/dev/fd")

Found = TypeVar("Found", dict[int, str], list[Path], list[str])

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def adopt_orphans() -> None:
    """Make this process the parent of whatever its children leave behind, so that `children` sees it too."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def open_descriptors() -> dict[int, str]:
    """Return this process's open descriptors, each with what it leads to.

    The standard streams are left out: pytest changes what they lead to, and back when it is interrupted.
    """
    return _described(_descriptor_numbers())


def _described(numbers: Iterable[int]) -> dict[int, str]:
    found = {}
    for number in numbers:
        with contextlib.suppress(OSError):  # closed meanwhile
            found[number] = _destination(number)
    return found


def _descriptor_numbers() -> set[int]:
    """Return their numbers alone, as most tests need them, twice each."""
    numbers = map(int, os.listdir(_DESCRIPTORS)) if _DESCRIPTORS.exists() else ()  # noqa: PTH208 (text is all that is wanted)
    return {number for number in numbers if number > 2 and _is_open(number)}


def _is_open(number: int) -> bool:
    """Whether it is open: the listing's own descriptor is not any more."""
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _destination(number: int) -> str:
    kind = stat.filemode(os.fstat(number).st_mode)[0]
    try:
        return f"{Path(f'/proc/self/fd/{number}').readlink()} ({kind})"
    except FileNotFoundError:  # no /proc here: the kind must do
        return kind


def children() -> dict[int, str]:
    """Return the living child processes of this one, each with its command line; reaps the dead ones it adopted."""
    return {process: _command_line(process) for process in _child_numbers() if not _reaped(process)}


def workers_of(process: int) -> set[int]:
    """Return the children of a process that `multiprocessing` has spawned. Unlike `children` it reaps none."""
    return {number for number in _child_numbers(process) if "spawn_main" in _command_line(number)}


def is_running(process: int) -> bool:
    """Whether a process has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _child_numbers(process: int | None = None) -> list[int]:
    numbers = []
    for task in Path(f"/proc/{process or 'self'}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread has ended, and another has its children
            numbers += map(int, task.read_text().split())
    return numbers


def _reaped(process: int) -> bool:
    """Whether the process was a dead one; a Popen object that nobody waited for has its own warning, which is an error here."""
    try:
        return os.waitpid(process, os.WNOHANG)[0] == process
    except ChildProcessError:
        return True


def _command_line(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):  # before it is opened, or after
        return "(just ended)"


def listening_sockets(folders: Iterable[Path]) -> list[Path]:
    """Return the unix sockets under these folders on which something still listens."""
    return [path for folder in folders for path in folder.rglob("*") if path.is_socket() and _listens(path)]


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)  # a full backlog is somebody listening too
        try:
            probe.connect(str(path))
        except TimeoutError:
            return True
        except OSError:
            return False
    return True


# Seconds for what ends by itself. A command that does not has 5 until it is sent SIGTERM.
_MOMENT = 15


def settled(look: Callable[[], Found], *, seconds: float = _MOMENT) -> Found:
    """Return what `look` still finds when it has had `seconds` to find nothing: a process takes a moment to end."""
    end = time.monotonic() + seconds
    while (found := look()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


@contextlib.contextmanager
def none_left_open(*, seconds: float = _MOMENT) -> Iterator[None]:
    """Fail where, `seconds` after the end of the block, a descriptor is open or a thread runs that was not at its beginning."""
    before = _descriptor_numbers()
    threads = set(threading.enumerate())
    yield
    if _descriptor_numbers() - before or set(threading.enumerate()) - threads:
        gc.collect()  # what is only garbage is not left. Where nothing is there, this would look for it for some milliseconds
    left = settled(lambda: _described(_descriptor_numbers() - before), seconds=seconds)
    assert not left, f"descriptors left open: {left}"
    # What reaps a child process ends with it.
    running = settled(lambda: [thread.name for thread in set(threading.enumerate()) - threads], seconds=seconds)
    assert not running, f"threads left running: {running}"

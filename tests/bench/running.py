"""Runs one program to its end, or to its time limit, and sees what it took. Knows nothing of what the programs do."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.interop.programs import DIES_WITH_US, REPOSITORY

# Seconds between looks at the memory of a running program. What it grew in its last moment may be missed.
_LOOK = 0.01
# At most so many characters of a failed program's last words.
_WORDS = 300


class Failed(Exception):
    """The program did not do what it was to do; the text says why."""


@dataclass(frozen=True, slots=True)
class Finished:
    """What a program printed, and what it took: seconds, processor seconds, bytes of memory at its largest."""

    output: str
    seconds: float
    cpu: float
    memory: int


def run(line: Sequence[str | Path], *, limit: float) -> Finished:
    """Run a command line. Raises Failed if it ends with an error, or does not end within `limit` seconds."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        process = subprocess.Popen(
            [*DIES_WITH_US, *map(str, line)],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            process_group=0,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
        with _ended_with_us(process):
            memory = _watch(process.pid, began + limit)
            seconds = time.perf_counter() - began
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise Failed(f"it ended with {process.returncode}: {_last_words(errors)}")
        return Finished(_text(output), seconds, used.ru_utime + used.ru_stime, memory)


@contextlib.contextmanager
def _ended_with_us(process: subprocess.Popen) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # the usual case: nobody of its group is left
            os.killpg(process.pid, signal.SIGKILL)
        if process.returncode is None:
            process.wait()


def _watch(process: int, end: float) -> int:
    """Wait until the process has ended, which leaves it to be reaped. Returns the most memory that was seen, in bytes."""
    memory = 0
    descriptor = os.pidfd_open(process)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while not poll.poll(_LOOK * 1000):
            if time.perf_counter() > end:
                raise Failed("it did not end within its time limit")
            memory = max(memory, _peak(process))
    finally:
        os.close(descriptor)
    return memory


def _peak(process: int) -> int:
    # Not the resource usage at its end: that counts what the process was before it became this program.
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return 0


def _last_words(errors: object) -> str:
    return (_text(errors).strip().splitlines() or [""])[-1][:_WORDS]


def _text(file: object) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")

"""The programs that are measured: how each is called, and how its answer is read.

Ours and those over libnbd's Python module are scripts in `measured`, which measure themselves around the work alone. fio does so
too. nbdcopy does not: it is measured from outside, and what its start alone takes, as `nbdcopy --version` shows, is taken off.
"""

from __future__ import annotations

import json
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.bench.measured import measuring
from tests.bench.results import Sample
from tests.bench.running import Failed, Finished, run
from tests.interop.programs import REPOSITORY

_SCRIPTS = Path(__file__).with_name("measured")


@dataclass(frozen=True, slots=True)
class Tools:
    """Where the programs are: paths, or names that are looked up."""

    python: str = sys.executable
    peer_python: str = "/usr/bin/python3"
    fio: str = "fio"
    nbdcopy: str = "nbdcopy"
    nbdinfo: str = "nbdinfo"
    qemu_img: str = "qemu-img"
    cc: str = "cc"


@dataclass(frozen=True, slots=True)
class Task:
    """What all programs of a case are told.

    Attributes:
        uri: the server.
        seconds: how long to go on, for work that has no end of its own.
        verify: whether to compare every byte first; only where the data are the benchmark's own.
        limit: seconds after which a program that has not ended is killed.
        counts: how many extents and connections there are to be, and mebibytes on the disk.
    """

    uri: str
    seconds: float
    verify: bool
    limit: float
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Program(ABC):
    """One program of a case.

    Attributes:
        label: what the tables call it.
        variants: settings to try, of which the best are measured.
        server: the server it runs on; "": that of its case.
    """

    label: str
    variants: tuple[Mapping[str, Any], ...] = field(default=({},), kw_only=True)
    server: str = field(default="", kw_only=True)

    @abstractmethod
    def sample(self, tools: Tools, task: Task, variant: Mapping[str, Any]) -> Sample:
        """Run it once. Raises Failed."""


@dataclass(frozen=True, slots=True)
class Script(Program):
    """A program of `measured`."""

    script: str
    work: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    for_peer: bool = False

    def sample(self, tools: Tools, task: Task, variant: Mapping[str, Any]) -> Sample:
        python = tools.peer_python if self.for_peer else tools.python
        told = {"work": self.work, "uri": task.uri, "seconds": task.seconds, "verify": task.verify, **task.counts}
        line = [found(python), _SCRIPTS / f"{self.script}.py", json.dumps({**told, **self.settings, **variant})]
        return Sample(**json.loads(run(line, limit=task.limit).output.splitlines()[-1]))


@dataclass(frozen=True, slots=True)
class Fio(Program):
    """fio with its nbd engine: libnbd's C library at work.

    It is spared the clock calls that its own statistics of latencies take: the other programs keep none.
    """

    work: str
    depth: int
    jobs: int = 1

    def sample(self, tools: Tools, task: Task, variant: Mapping[str, Any]) -> Sample:
        line = [
            found(tools.fio),
            f"--numjobs={self.jobs}",
            "--group_reporting",
            "--name=bench",
            "--ioengine=nbd",
            f"--uri={task.uri}",
            f"--rw={self.work}",
            f"--bs={measuring.SMALL}",
            f"--iodepth={self.depth}",
            f"--size={measuring.AREA}",
            "--time_based",
            f"--runtime={task.seconds * 1000:.0f}ms",
            "--ramp_time=200ms",
            "--norandommap",
            "--gtod_reduce=1",
            "--scramble_buffers=0",
            "--thread",  # or its work would be in a child, whose memory nobody sees
            "--output-format=json",
            *options(variant),
        ]
        return self._read(run(line, limit=task.limit))

    def _read(self, finished: Finished) -> Sample:
        begin = finished.output.find("{\n")
        if begin < 0:
            raise Failed(f"it printed no JSON: {finished.output[-200:]}")
        job = json.loads(finished.output[begin:])["jobs"][0]
        done = job["read" if self.work.endswith("read") else "write"]
        seconds = done["runtime"] / 1000
        # Percents of one processor, of the jobs alone: of the time that all of them took together.
        cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
        return Sample(done["total_ios"], seconds, cpu, finished.memory)


@dataclass(frozen=True, slots=True)
class Nbdcopy(Program):
    """nbdcopy to nowhere. Without extents: it would not read holes, and ours do."""

    def sample(self, tools: Tools, task: Task, variant: Mapping[str, Any]) -> Sample:
        nbdcopy = found(tools.nbdcopy)
        start = run([nbdcopy, "--version"], limit=task.limit)
        done = run([nbdcopy, "--no-extents", *options(variant), "--", task.uri, "null:"], limit=task.limit)
        return Sample(task.counts["mebibytes"], done.seconds - start.seconds, done.cpu - start.cpu, done.memory)


@dataclass(frozen=True, slots=True)
class Ceiling(Program):
    """What the kernel and the server leave possible: a few lines of C that do no more than they must. They are compiled here."""

    work: str
    depth: int

    def sample(self, tools: Tools, task: Task, variant: Mapping[str, Any]) -> Sample:  # noqa: ARG002 (it has no settings)
        program = _ceiling(found(tools.cc), task.limit)
        (path,) = parse_qs(urlsplit(task.uri).query)["socket"]
        line = [program, path, self.work, measuring.SMALL, self.depth, task.seconds]
        return Sample(**json.loads(run(list(map(str, line)), limit=task.limit).output))


@cache
def _ceiling(compiler: str, limit: float) -> Path:
    """Compile it, once a run, and return the program."""
    program = REPOSITORY / ".cache/bench/ceiling"
    program.parent.mkdir(parents=True, exist_ok=True)
    run([compiler, "-O2", "-o", program, _SCRIPTS / "ceiling.c"], limit=limit)
    return program


def options(variant: Mapping[str, Any]) -> list[str]:
    """Return settings as a command line has them."""
    return [f"--{name}={value}" for name, value in variant.items()]


def found(program: str) -> str:
    """Return the path of a program. Raises Failed."""
    path = shutil.which(program)
    if path is None:
        raise Failed(f"{program} is not on this machine")
    return path

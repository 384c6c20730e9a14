"""What is compared with what, on which server, and what is asked of us: the one place that has the bars.

Every case has `ours`, or several programs of ours, and its peers. What a title says of sizes is filled in when they are known.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import product
from typing import Any

from tests.bench.case import Case
from tests.bench.programs import Ceiling, Fio, Nbdcopy, Program, Script
from tests.bench.results import Bar
from tests.bench.tool_cases import TOOL_CASES

#: Requests in flight, where there are many.
DEPTH = 64

_KIB = 1 << 10
_MIB = 1 << 20


def _many(work: str, label: str, **settings: Any) -> Script:
    return Script(f"nbdcore {label}", "nbdcore_blocking", work, {"depth": DEPTH, **settings})


def _module(work: str, *, ours: bool = False) -> Script:
    """Return a program written for libnbd's Python module, over that module or over ours."""
    module = "nbdcore.libnbd" if ours else "nbd"
    label = "nbdcore.libnbd" if ours else "libnbd's Python module"
    return Script(label, "libnbd_module", work, {"module": module, "depth": DEPTH}, for_peer=not ours)


def _aio(work: str) -> dict[str, Program]:
    return {"ours": _module(work, ours=True), "libnbd": _module(work)}


# Settings for copies of the disk. nbdcopy spreads its connections over a thread for each processor; ours are all in one thread,
# or each in one of its own. Our depth is that of a thread: with 1 it is a loop over `pread_into`. nbdcopy's requests are those of
# a connection; its queue of 16 MiB is made longer where that holds fewer.
_SIZES, _DEPTHS = (256 * _KIB, 512 * _KIB, _MIB, 2 * _MIB), (4, 16)
_OURS_TO_TRY: tuple[Mapping[str, Any], ...] = tuple(
    {"threads": threads, "connections": connections, "request": request, "depth": depth}
    for (threads, connections), request, depth in product(((1, 1), (1, 2), (1, 4), (2, 1), (4, 1)), _SIZES, (1, *_DEPTHS))
    if depth > 1 or connections == 1  # with one at a time, more connections of one thread are idle
)
_NBDCOPY_AS_IT_COMES = {"request-size": 256 * _KIB}
_NBDCOPY_TO_TRY: tuple[Mapping[str, Any], ...] = (
    _NBDCOPY_AS_IT_COMES,
    *(
        {"connections": connections, "request-size": size, "requests": requests, "queue-size": max(requests * size, 16 * _MIB)}
        for connections, size, requests in product((1, 2, 4), _SIZES, _DEPTHS)
    ),
)


def _copy(label: str, ours: tuple[Mapping[str, Any], ...], theirs: tuple[Mapping[str, Any], ...]) -> dict[str, Program]:
    return {
        "ours": Script(f"nbdcore {label}", "nbdcore_blocking", "copy", variants=ours),
        "nbdcopy": Nbdcopy("nbdcopy to null:", variants=theirs),
    }


# Servers are compared by what one and the same client gets from them: one process against nbdkit's threads, or as many processes
# as there are processors.
JOBS = os.cpu_count() or 1
_ONE_PROCESS = "nbdcore memory, one process"


def _served(
    name: str,
    title: str,
    work: str,
    ours: str,
    theirs: str,
    at_least: float,
    *,
    jobs: int = 1,
    labels: tuple[str, str] = ("nbdcore serve", "nbdkit"),
) -> Case:
    programs = {
        "ours": Fio(labels[0], work, DEPTH, jobs, server=ours),
        "nbdkit": Fio(labels[1], work, DEPTH, jobs, server=theirs),
    }
    bars = (Bar("ours", "nbdkit", "speed", at_least=at_least),)
    return Case(name, title, "request", theirs, programs, bars, writes=work == "randwrite", own_server=True)


# Connections that move at the same time, with few settings to try: the whole grid for each would take half an hour.
_CORES = (1, 2, 4, 8)


def _cores(connections: int) -> Case:
    ours = tuple({"connections": connections, "request": request, "depth": depth} for request, depth in product(_SIZES, (1, 4)))
    theirs = tuple(
        {"connections": connections, "threads": connections, "request-size": request, "requests": 4, "queue-size": 64 * _MIB}
        for request in _SIZES
    )
    return Case(
        f"cores-{connections}",
        f"read {{disk}}, {connections} connection{'s' if connections > 1 else ''}, each in a thread or a process of its own",
        "MiB",
        "memory",
        {
            "threads": Script("nbdcore Pool, a thread each", "nbdcore_blocking", "pool", variants=ours),
            "processes": Script("nbdcore map_ranges", "nbdcore_blocking", "processes", variants=ours),
            "nbdcopy": Nbdcopy("nbdcopy to null:", variants=theirs),
        },
        (Bar("threads", "nbdcopy", "speed", at_least=1.0), Bar("processes", "nbdcopy", "speed", at_least=0.9)),
        own_server=True,
    )


CASES = (
    Case(
        "reads",
        "4 KiB random reads, 64 in flight, one connection",
        "request",
        "memory",
        {
            "ours": _many("reads", "pread_many"),
            "simple": _many("reads", "pread_many, simple replies", structured_replies=False),
            "fio": Fio("fio, nbd engine", "randread", DEPTH),
            "ceiling": Ceiling("ceiling: C, simple replies", "read", DEPTH),
        },
        (
            Bar("ours", "fio", "speed", at_least=1.5),
            Bar("ours", "fio", "CPU time", at_most=0.6),
            Bar("simple", "fio", "speed"),
            Bar("simple", "fio", "CPU time"),
            Bar("ours", "ceiling", "speed", at_least=0.85),
            Bar("simple", "ceiling", "speed", at_least=0.85),
        ),
    ),
    Case(
        "tasks",
        "4 KiB random reads, 64 asyncio tasks",
        "request",
        "memory",
        {
            "ours": Script("nbdcore.aio pread", "nbdcore_asyncio", "tasks", {"depth": DEPTH}),
            "libnbd": _module("reads"),
            "fio": Fio("fio, nbd engine", "randread", DEPTH),
        },
        (Bar("ours", "libnbd", "speed", at_least=3), Bar("ours", "fio", "speed", at_least=0.9)),
    ),
    Case(
        "tasks-uvloop",
        "4 KiB random reads, 64 tasks on uvloop",
        "request",
        "memory",
        {
            "uvloop": Script("nbdcore.aio pread, uvloop", "nbdcore_asyncio", "tasks", {"depth": DEPTH, "loop": "uvloop"}),
            "asyncio": Script("nbdcore.aio pread, asyncio", "nbdcore_asyncio", "tasks", {"depth": DEPTH}),
        },
        (Bar("uvloop", "asyncio", "speed"),),
        extra=True,
    ),
    Case(
        "one",
        "4 KiB random reads, one at a time",
        "request",
        "memory",
        {"ours": _many("one_by_one", "pread"), "libnbd": _module("one_by_one")},
        (Bar("ours", "libnbd", "speed", at_least=1.2),),
    ),
    Case(
        "threads",
        "4 KiB random reads, 16 threads on one client",
        "request",
        "memory",
        {"ours": _many("threads", "pread"), "libnbd": _module("threads")},
        (Bar("ours", "libnbd", "speed", at_least=2),),
    ),
    Case(
        "libnbd",
        "libnbd's aio_pread with callbacks and poll, 4 KiB, 64 in flight",
        "request",
        "memory",
        _aio("reads"),
        (Bar("ours", "libnbd", "speed", at_least=1.5),),
    ),
    Case(
        "libnbd-cookies",
        "libnbd's aio_pread, retired by cookie, 4 KiB, 64 in flight",
        "request",
        "memory",
        _aio("reads_by_cookies"),
        (Bar("ours", "libnbd", "speed"),),
        extra=True,
    ),
    Case(
        "copy",
        "read {disk}, 256 KiB to 2 MiB requests, best settings of each",
        "MiB",
        "memory",
        _copy("pread_into", _OURS_TO_TRY, _NBDCOPY_TO_TRY),
        (Bar("ours", "nbdcopy", "speed", at_least=1.1),),
    ),
    Case(
        "writes",
        "4 KiB random writes, 64 in flight, one connection",
        "request",
        "scratch",
        {
            "ours": _many("writes", "pwrite_many"),
            "fio": Fio("fio, nbd engine", "randwrite", DEPTH),
            "ceiling": Ceiling("ceiling: C, simple replies", "write", DEPTH),
        },
        (Bar("ours", "fio", "speed", at_least=1.2), Bar("ours", "ceiling", "speed", at_least=0.85)),
        writes=True,
    ),
    Case(
        "one-write",
        "4 KiB random writes, one at a time",
        "request",
        "scratch",
        {"ours": _many("write_one_by_one", "pwrite"), "libnbd": _module("write_one_by_one")},
        (Bar("ours", "libnbd", "speed", at_least=1.2),),
        writes=True,
    ),
    Case(
        "libnbd-writes",
        "libnbd's aio_pwrite with callbacks and poll, 4 KiB, 64 in flight",
        "request",
        "scratch",
        _aio("writes"),
        (Bar("ours", "libnbd", "speed"),),
        writes=True,
        extra=True,
    ),
    Case(
        "latency",
        "read {disk}, 10 ms of latency, 256 KiB requests, 4 connections",
        "MiB",
        "slow",
        _copy(
            "Pool",
            tuple({"threads": 1, "connections": 4, "request": 256 * _KIB, "depth": depth} for depth in (64, 256)),
            (_NBDCOPY_AS_IT_COMES,),
        ),
        (Bar("ours", "nbdcopy", "speed", at_least=1.0),),
        own_server=True,
    ),
    Case(
        "tls",
        "read {disk} over TLS, best settings of each",
        "MiB",
        "encrypted",
        _copy("pread_into", _OURS_TO_TRY, _NBDCOPY_TO_TRY),
        (Bar("ours", "nbdcopy", "speed", at_least=0.95),),
        own_server=True,
    ),
    Case(
        "extents",
        "all {extents} of a disk",
        "extent",
        "alternating",
        {
            "columns": Script("nbdcore columns", "nbdcore_blocking", "extents_columns", {"numpy": True}),
            "plain": Script("nbdcore columns, no numpy", "nbdcore_blocking", "extents_columns", {"numpy": False}),
            "objects": Script("nbdcore Extent objects", "nbdcore_blocking", "extents_objects", {"numpy": True}),
            "lists": Script("libnbd's module, three lists", "libnbd_module", "extents_columns", {"module": "nbd"}, for_peer=True),
            "tuples": Script("libnbd's module, tuples", "libnbd_module", "extents_tuples", {"module": "nbd"}, for_peer=True),
        },
        (
            Bar("columns", "lists", "work per CPU second", at_least=1.2),
            Bar("plain", "lists", "work per CPU second"),
            Bar("objects", "lists", "work per CPU second", at_least=0.5),
            Bar("objects", "tuples", "work per CPU second"),
        ),
        own_server=True,
    ),
    Case(
        "idle",
        "{connections} idle connections under asyncio, each after one read",
        "connection",
        "many clients",
        {"ours": Script("nbdcore.aio", "nbdcore_asyncio", "idle")},
        (Bar("ours", None, "memory", at_most=50 * _KIB),),
        own_server=True,
    ),
    _served("serve-reads", "one fio job reads 4 KiB, 64 in flight: a disk in memory", "randread", _ONE_PROCESS, "scratch", 0.9),
    _served(
        "serve-writes", "one fio job writes 4 KiB, 64 in flight: a disk in memory", "randwrite", _ONE_PROCESS, "scratch", 0.9
    ),
    _served(
        "serve-jobs",
        "{jobs} fio jobs read 4 KiB, 64 in flight each: a disk in memory",
        "randread",
        "nbdcore memory",
        "scratch",
        0.7,
        jobs=JOBS,
    ),
    _served(
        "serve-file",
        "{jobs} fio jobs read 4 KiB, 64 in flight each: a file",
        "randread",
        "nbdcore file",
        "nbdkit file",
        0.7,
        jobs=JOBS,
    ),
    _served(
        "serve-object",
        "one fio job reads 4 KiB, 64 in flight: a Python object",
        "randread",
        "nbdcore object",
        "nbdkit python",
        2.0,
        labels=("nbdcore.server", "nbdkit, python plugin"),
    ),
    *map(_cores, _CORES),
    *TOOL_CASES,
)

"""The commands beside libnbd's and QEMU's tools: what they are compared with, on what, and the bars."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

from tests.bench.case import Case
from tests.bench.commands import SETTINGS, Command
from tests.bench.results import Bar

_KIB, _MIB = 1 << 10, 1 << 20

# nbdcopy's best is looked for; ours is measured as it comes, and as somebody would try it.
_THEIRS: tuple[Mapping[str, Any], ...] = (
    {"request-size": 256 * _KIB},
    *(
        {"connections": connections, "request-size": size}
        for connections, size in product((1, 2, 4), (512 * _KIB, _MIB, 2 * _MIB))
    ),
)
_OURS: tuple[Mapping[str, Any], ...] = (
    {},
    {"connections": 1},
    {"connections": 2},
    {"connections": 2, "request-size": 512 * _KIB},
)


def _copy(
    name: str, title: str, server: str, source: str, destination: str, *, convert: tuple[str, ...] = (), tried: bool = True
) -> Case:
    """Return a case of a copy of data.

    Args:
        name, title, server: of the case.
        source, destination: as the commands name them.
        convert: the formats that qemu-img is told, where it can do the same.
        tried: whether the best settings are looked for; else both are measured as they come.
    """
    ours, theirs = (_OURS, _THEIRS) if tried else (({},), ({},))
    programs = {
        "ours": Command("nbdcore copy", ("nbdcore", "copy", SETTINGS, "--", source, destination), variants=ours),
        "nbdcopy": Command("nbdcopy", ("nbdcopy", SETTINGS, "--", source, destination), variants=theirs),
    }
    bars = [Bar("ours", "nbdcopy", "speed", at_least=1.0), Bar("ours", None, "most memory", at_most=96 << 20)]
    if convert:
        line = ("qemu-img", "convert", *_QEMU, *convert, source, destination)
        programs["qemu"] = Command("qemu-img convert", line)
        bars.insert(1, Bar("ours", "qemu", "speed", at_least=1.2))
    return Case(name, title, "MiB", server, programs, tuple(bars), writes=True, own_server=True)


_RAW = ("-f", "raw", "-O", "raw")
# As many requests at a time as it can have, in any order.
_QEMU = ("-m", "16", "-W")

TOOL_CASES = (
    Case(
        "copy-null",
        "copy {disk} of data: a server to nowhere",
        "MiB",
        "memory",
        {
            "ours": Command("nbdcore copy", ("nbdcore", "copy", SETTINGS, "--", "{0}", "null:"), variants=_OURS),
            "nbdcopy": Command("nbdcopy", ("nbdcopy", SETTINGS, "--", "{0}", "null:"), variants=_THEIRS),
        },
        (Bar("ours", "nbdcopy", "speed", at_least=1.0), Bar("ours", None, "most memory", at_most=96 << 20)),
        own_server=True,
    ),
    Case(
        "checksum",
        "checksum of {disk}, sha256 of 64 KiB blocks",
        "MiB",
        "memory",
        {
            "ours": Command("nbdcore checksum", ("nbdcore", "checksum", "{0}")),
            # nbdcopy before 1.24 computes none; OpenSSL, which Python's hashlib stands on too, does no more than hash what comes.
            "nbdcopy": Command("nbdcopy to openssl dgst", ("nbdcopy", "{0}", "-", "|", "openssl", "dgst", "-sha256"), shell=True),
        },
        (Bar("ours", "nbdcopy", "speed", at_least=1.0),),
        own_server=True,
    ),
    Case(
        "info-size",
        "the size of a disk, from start to end",
        "run",
        "memory",
        {
            "ours": Command("nbdcore info --size", ("nbdcore", "info", "--size", "{0}"), counted=""),
            "nbdinfo": Command("nbdinfo --size", ("nbdinfo", "--size", "{0}"), counted=""),
        },
        (
            Bar("ours", None, "time", at_most=0.2),
            Bar("ours", None, "most memory", at_most=30 << 20),
            Bar("ours", "nbdinfo", "speed"),
        ),
        own_server=True,
    ),
    _copy("copy-file", "copy {disk} of data: a server to a file in memory", "memory and a file", "{0}", "{1}", convert=_RAW),
    _copy("copy-disk", "copy {disk} of data: a server to another", "two disks", "{0}", "{1}", convert=("-n", *_RAW)),
    _copy(
        "copy-back", "copy {disk} of data: a file in memory to a server", "a file and memory", "{0}", "{1}", convert=("-n", *_RAW)
    ),
    # A run takes a quarter of a minute: to try settings would take longer than all else.
    _copy(
        "copy-islands",
        "copy 8 TiB with {disk} of data in 10,000 islands: a server to a file",
        "islands",
        "{0}",
        "{1}",
        tried=False,
    ),
    Case(
        "copy-small",
        "copy 1 MiB: a server to a file, from start to end",
        "run",
        "small and a file",
        {
            "ours": Command("nbdcore copy", ("nbdcore", "copy", "--", "{0}", "{1}"), counted=""),
            "nbdcopy": Command("nbdcopy", ("nbdcopy", "--", "{0}", "{1}"), counted=""),
        },
        (Bar("ours", None, "time", at_most=0.3), Bar("ours", "nbdcopy", "speed")),
        own_server=True,
    ),
    Case(
        "map",
        "map of {extents} as JSON",
        "extent",
        "alternating",
        {
            "ours": Command("nbdcore info --map", ("nbdcore", "info", "--map", "--json", "{0}"), "extents"),
            "nbdinfo": Command("nbdinfo --map", ("nbdinfo", "--map", "--json", "{0}"), "extents"),
        },
        (Bar("ours", "nbdinfo", "speed", at_least=1.0),),
        own_server=True,
    ),
)

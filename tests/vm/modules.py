"""Kernel modules and the order in which they must be loaded, by what each module itself says that it depends on.

Debian's package holds no modules.dep (it is made at installation), and the machine may have no kmod: a module names its
dependencies in its .modinfo section, as `depends=a,b`. The order is worked out on the host; `load` runs in the guest.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


def load_order(folder: Path, wanted: Iterable[str]) -> list[Path]:
    """Return the files of the modules named `wanted` under `folder`, each after all that it depends on.

    What the kernel has built in is in its list of these, `modules.builtin`, and needs no file.
    """
    built_in = {_name(Path(line)) for line in (folder / "modules.builtin").read_text().splitlines()}
    files = {_name(path): path for path in folder.rglob("*.ko")}
    ordered: dict[str, Path] = {}

    def visit(name: str) -> None:
        if name not in ordered and name not in built_in:
            for dependency in _dependencies(files[name]):
                visit(dependency)
            ordered[name] = files[name]

    for name in wanted:
        visit(name)
    return list(ordered.values())


def load(paths: Iterable[str]) -> None:
    """Load these modules into the kernel that this runs on, but for those that it has."""
    loaded = {line.split()[0] for line in Path("/proc/modules").read_text().splitlines()}
    for path in paths:
        if _name(Path(path)) not in loaded:
            subprocess.run(["/bin/busybox", "insmod", path], check=True)


def _name(path: Path) -> str:
    return path.stem.replace("-", "_")


def _dependencies(module: Path) -> list[str]:
    found = _DEPENDS.search(module.read_bytes())
    return [name.replace("-", "_") for name in found[1].decode().split(",") if name] if found else []

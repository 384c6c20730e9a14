"""Kernel modules and the order in which they must be loaded, by what each module itself says that it depends on.

Debian's package holds no modules.dep (it is made at installation), and the machine may have no kmod: a module names its
dependencies in its .modinfo section, as `depends=a,b`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


def load_order(folder: Path, wanted: Iterable[str]) -> list[Path]:
    """Return the files of the modules named `wanted` under `folder`, each after all that it depends on."""
    files = {_name(path): path for path in folder.rglob("*.ko")}
    ordered: dict[str, Path] = {}

    def visit(name: str) -> None:
        if name not in ordered:
            for dependency in _dependencies(files[name]):
                visit(dependency)
            ordered[name] = files[name]

    for name in wanted:
        visit(name)
    return list(ordered.values())


def _name(path: Path) -> str:
    return path.stem.replace("-", "_")


def _dependencies(module: Path) -> list[str]:
    found = _DEPENDS.search(module.read_bytes())
    return [name.replace("-", "_") for name in found[1].decode().split(",") if name] if found else []

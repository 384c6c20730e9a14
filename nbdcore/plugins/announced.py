"""Which plugins the installed distributions announce: entry points of the group `nbdcore.transports`.

Distributions lie in folders on `sys.path` nearly always, each with its metadata in a `.dist-info`. One of the files there has
lines `name = module:object` below the name of a group. These files are read here: importing importlib_metadata takes 30 ms and
its search 15, of the 200 that a command may take, and this 2. Where there is anything else to search (an archive, an egg, an
import system of somebody's own), importlib_metadata searches.

One distribution's broken metadata, of whatever kind, must not hide everybody else's transports.
"""

# ruff: noqa: PTH118, PTH119, PTH122, PTH123, PTH208 (pathlib, with all that it imports, is another 8 ms)

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from functools import partial, reduce
from importlib.machinery import PathFinder
from typing import Protocol

from nbdcore.plugins.loading import Plugin, described

__all__ = ["announced_plugins"]

# A line at the top of a distribution's METADATA.
_FIELD = re.compile(r"^(Name|Version): *(\S+)\s*$", re.MULTILINE)
# What an entry point names: a module, and perhaps an object in it. What is behind them, extras, is for installers.
_VALUE = re.compile(r"([\w.]+)\s*(?::\s*([\w.]+)\s*)?(?:\[.*\]\s*)?$")


class _Distribution(Protocol):
    """What is asked of a distribution; those of importlib_metadata are such."""

    @property
    def name(self) -> str | None: ...

    @property
    def version(self) -> str | None: ...

    def read_text(self, filename: str) -> str | None: ...


def announced_plugins(complaints: list[str]) -> list[Plugin]:
    """Return the plugins that installed distributions announce, in no order; adds to `complaints` what cannot even be read."""
    from nbdcore.plugins.spec import GROUP

    plugins: dict[tuple[str, str], Plugin] = {}  # of two copies on sys.path the first one is the one that gets imported
    for distribution in _distributions():
        try:
            text = distribution.read_text("entry_points.txt") or ""
            if GROUP not in text:  # most distributions announce none
                continue
            owner, version = _name_and_version(distribution)
            for name, value in _entry_points(text, GROUP):
                plugins.setdefault((name, owner), Plugin(name, value, partial(_named_object, value), owner, version))
        except Exception as error:  # noqa: BLE001 (as above, and this is the culprit)
            complaints.append(f"the entry points of distribution {_name_of(distribution)} cannot be read: {described(error)}")
    return list(plugins.values())


def _distributions() -> Iterable[_Distribution]:
    try:
        if not any(_finds_distributions(finder) for finder in sys.meta_path):
            return list(_in_folders())
    except NotADirectoryError:  # an archive
        pass
    import importlib_metadata

    return importlib_metadata.distributions()


def _finds_distributions(finder: object) -> bool:
    """Return whether a finder of modules finds distributions that are not in folders on sys.path."""
    known = finder is PathFinder or type(finder).__module__ == "importlib_metadata"
    return not known and hasattr(finder, "find_distributions")


def _in_folders() -> Iterator[_Folder]:
    """Find the distributions on sys.path. Raises NotADirectoryError where they may be in something that is no folder."""
    for place in dict.fromkeys(sys.path):
        if not isinstance(place, str):  # which the import system passes over
            continue
        if place.endswith(".egg"):
            raise NotADirectoryError(place)
        try:
            names = os.listdir(place or os.curdir)
        except NotADirectoryError:
            raise
        except (OSError, ValueError):  # what cannot be looked into has nothing that could be imported
            continue
        for name in names:
            if name.endswith((".dist-info", ".egg-info")):
                yield _Folder(os.path.join(place, name))


class _Folder:
    """A distribution's metadata in a folder. The folder's name has its name and version, as file names may."""

    def __init__(self, path: str) -> None:
        self._path = path
        stem = os.path.splitext(os.path.basename(path))[0]
        self.name, _, self.version = stem.partition("-")

    def read_text(self, filename: str) -> str | None:
        """Return a file's text; None where there is none."""
        try:
            with open(os.path.join(self._path, filename), encoding="utf-8") as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return None


def _entry_points(text: str, group: str) -> Iterator[tuple[str, str]]:
    """Return names and values of a group's entry points. Raises ValueError for a line that is none."""
    current = ""
    for line in map(str.strip, text.splitlines()):
        if not line or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            current = line[1:-1].strip()
        elif current == group:
            name, equals, value = line.partition("=")
            if not equals:
                raise ValueError(f"no entry point: {line}")
            yield name.strip(), value.strip()


def _named_object(value: str) -> object:
    """Import what an entry point names."""
    match = _VALUE.match(value)
    if match is None:
        raise ValueError(f"its entry point names neither a module nor an object in one: {value}")
    module, attributes = match.groups()
    return reduce(getattr, attributes.split(".") if attributes else (), importlib.import_module(module))


def _name_and_version(distribution: _Distribution) -> tuple[str, str]:
    """Return name and version of a distribution, "" for what its metadata lacks.

    Read as lines where they can be: importlib_metadata would import a parser of mail for them, which takes 30 ms.
    """
    head = (distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or "").partition("\n\n")[0]
    known = dict(_FIELD.findall(head))
    if len(known) == 2:
        return known["Name"], known["Version"]
    return distribution.name or "", distribution.version or ""


def _name_of(distribution: _Distribution) -> str:
    try:
        return str(distribution.name)
    except Exception:  # noqa: BLE001 (metadata that is broken may raise anything)
        return "without a readable name"

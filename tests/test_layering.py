"""Who may import whom: the house rules of docs (explanation, architecture), as a table that every import is held against.

Imports inside functions count like those at the top of a module. A module without a row in the table fails too: a new part of the
house says first where it stands.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class May:
    """What a part of the house may import beside the standard library and itself: modules (or packages, whole), distributions."""

    ours: tuple[str, ...] = ()
    theirs: tuple[str, ...] = ()
    itself: bool = True


A_TRANSPORT = May(("nbdcore.plugins", "nbdcore.streams", "nbdcore.uri", "nbdcore.errors"), itself=False)
A_FRONT_END = May(
    (
        "nbdcore.clients.connect",
        "nbdcore.clients.extents",
        "nbdcore.clients.requests",
        "nbdcore.clients.session",
        "nbdcore.protocol",
        "nbdcore.streams.base",
        "nbdcore.streams.bell",
        "nbdcore.streams.waiting",
        "nbdcore.streams.connecting",
        "nbdcore.errors",
    ),
)
PUBLIC = ("nbdcore", "nbdcore.errors", "nbdcore.uri", "nbdcore.protocol", "nbdcore.streams", "nbdcore.plugins", "nbdcore.clients")

# The row of a module is that of the longest prefix of its name.
TABLE = {
    # The public names, and nothing else of its own.
    "nbdcore": May((*PUBLIC, "nbdcore.aio", "nbdcore.disk", "nbdcore.libnbd", "nbdcore.server"), itself=False),
    "nbdcore.__main__": May(("nbdcore.cli",)),
    "nbdcore.errors": May(),
    "nbdcore.uri": May(("nbdcore.errors",)),
    "nbdcore.processes": May(),
    "nbdcore.logs": May(),
    # Holes in files, which the server makes for its clients, and a copy for itself.
    "nbdcore.holes": May(),
    # It knows no stream at all.
    "nbdcore.protocol": May(("nbdcore.errors",)),
    # The one interface that the core stands on.
    "nbdcore.streams.base": May(),
    # The one module that waits, shared by client and server: no stream knows it, and it knows no stream but the interface.
    "nbdcore.streams.waiting": May(("nbdcore.streams.base", "nbdcore.errors")),
    # Plain sockets, and their errors, are what other streams are made of.
    "nbdcore.streams": May(("nbdcore.streams.base", "nbdcore.streams.sockets", "nbdcore.errors"), itself=False),
    # TLS over any of them: it knows the interface only.
    "nbdcore.streams.tls": May(("nbdcore.streams.base", "nbdcore.errors")),
    # A child process behind a socket, or one that is connected to by its path.
    "nbdcore.streams.process": May(
        ("nbdcore.streams.base", "nbdcore.streams.sockets", "nbdcore.streams.connecting", "nbdcore.processes", "nbdcore.errors"),
        itself=False,
    ),
    "nbdcore.plugins": May(("nbdcore.streams", "nbdcore.uri", "nbdcore.errors"), ("pluggy", "importlib_metadata")),
    "nbdcore.clients": May(itself=False),
    "nbdcore.clients.log": May(),
    # Arguments made into commands, and replies into extents: no stream, but deadlines.
    "nbdcore.clients.requests": May(
        ("nbdcore.clients.extents", "nbdcore.protocol", "nbdcore.streams.waiting", "nbdcore.errors"),
    ),
    "nbdcore.clients.extents": May(("nbdcore.protocol", "nbdcore.errors")),
    # Its stream comes as an argument.
    "nbdcore.clients.session": May(
        ("nbdcore.clients.requests", "nbdcore.protocol", "nbdcore.streams.base", "nbdcore.clients.log", "nbdcore.errors")
    ),
    # The one part of the clients that knows transports.
    "nbdcore.clients.connect": May(
        (
            "nbdcore.clients.requests",
            "nbdcore.clients.session",
            "nbdcore.clients.log",
            "nbdcore.plugins",
            "nbdcore.protocol",
            "nbdcore.streams",
            "nbdcore.uri",
            "nbdcore.errors",
        ),
    ),
    # The three front ends stand on those four, and never on each other.
    "nbdcore.clients.blocking": A_FRONT_END,
    "nbdcore.clients.asyncio": A_FRONT_END,
    "nbdcore.clients.polled": A_FRONT_END,
    # What callers pass in; the name of its buffers comes from typing_extensions, for type checkers only.
    "nbdcore.clients.requests.arguments": May(("nbdcore.errors", "nbdcore.streams"), ("typing_extensions",), itself=False),
    # Extents in arrays, numpy's where it is installed.
    "nbdcore.clients.extents.columns": May(("nbdcore.protocol",), ("numpy",), itself=False),
    # The client for asyncio, by its own name: `import nbdcore` does not bring it.
    "nbdcore.aio": May(("nbdcore.clients", "nbdcore.disk", "nbdcore.protocol", "nbdcore.streams.base"), itself=False),
    # It hands on what the clients do, under other names: it must know their values and errors.
    "nbdcore.libnbd": May(
        ("nbdcore.clients", "nbdcore.protocol", "nbdcore.plugins", "nbdcore.streams", "nbdcore.uri", "nbdcore.errors")
    ),
    "nbdcore.disk": May(
        ("nbdcore.clients", "nbdcore.protocol.constants", "nbdcore.holes", "nbdcore.uri", "nbdcore.processes", "nbdcore.errors"),
        ("typing_extensions",),
    ),
    "nbdcore.server": May(
        (
            "nbdcore.protocol.constants",
            "nbdcore.protocol.wire",
            "nbdcore.streams",
            "nbdcore.plugins",
            "nbdcore.uri",
            "nbdcore.holes",
            "nbdcore.processes",
            "nbdcore.logs",
            "nbdcore.errors",
        ),
    ),
    "nbdcore.cli": May(
        (*PUBLIC, "nbdcore.libnbd", "nbdcore.disk", "nbdcore.processes", "nbdcore.logs", "nbdcore.server"), ("click", "rich")
    ),
    # Kits for the tests of others: they may use whatever those could.
    "nbdcore.testing": May((*PUBLIC, "nbdcore.server")),
    # Shaped as a stranger's: alone in its module, on what plugins are offered. Nobody imports one.
    "nbdcore_command": A_TRANSPORT,
    "nbdcore_ssh": A_TRANSPORT,
    "nbdcore_tcp": A_TRANSPORT,
    "nbdcore_unix": A_TRANSPORT,
    "nbdcore_vsock": A_TRANSPORT,
}

#: Bytes in, bytes out: nothing that waits, tells the time, opens a socket or configures logging.
NOT_IN_PROTOCOL = {
    "asyncio",
    "concurrent",
    "logging",
    "multiprocessing",
    "select",
    "selectors",
    "socket",
    "ssl",
    "threading",
    "time",
}

#: What `import nbdcore` must not cost.
NOT_AT_IMPORT = ("pluggy", "asyncio", "ssl", "click", "rich", "importlib_metadata", "importlib.metadata")


def modules() -> Iterator[tuple[str, Path]]:
    """Yield the name and file of each module of the project."""
    for source_root, pattern in ((REPOSITORY, "nbdcore/**/*.py"), (REPOSITORY / "transports", "*.py")):
        for path in sorted(source_root.glob(pattern)):
            parts = path.relative_to(source_root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def imports(source: str) -> Iterator[str]:
    """Yield the full name of each thing that the source imports: the module, or the submodule that it takes from a package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (imported_from(node, alias.name) for alias in node.names)


def imported_from(node: ast.ImportFrom, name: str) -> str:
    if node.level:
        return "." * node.level  # relative: in no row of the table, and so an error
    submodule = f"{node.module}.{name}"
    return submodule if submodule in MODULES else str(node.module)


def row_of(module: str) -> str | None:
    """Return the row that speaks for a module: its own, or its nearest package's; but `nbdcore` speaks for itself only."""
    while module and module not in TABLE:
        module = module.rpartition(".")[0]
        if module == "nbdcore":
            return None
    return module or None


def within(name: str, package: str) -> bool:
    return name == package or (package != "nbdcore" and name.startswith(f"{package}."))


def is_allowed(name: str, row: str) -> bool:
    may = TABLE[row]
    top = name.partition(".")[0]
    return (
        top in sys.stdlib_module_names
        or top in may.theirs
        or any(within(name, ours) for ours in may.ours)
        or (may.itself and within(name, row))
    )


def offences(module: str, source: str) -> list[str]:
    row = row_of(module)
    if row is None:
        return [f"{module} has no row in the table of {Path(__file__).name}"]
    return sorted({f"{module} imports {name}" for name in imports(source) if not is_allowed(name, row)})


def test_a_module_imports_only_what_the_table_allows():
    assert [found for module, path in MODULES.items() for found in offences(module, path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nbdcore.uri", "import nbdcore.clients.blocking.client"),
        ("nbdcore.uri", "import pluggy"),
        ("nbdcore.protocol.engine", "from nbdcore.streams.base import Stream"),
        ("nbdcore.protocol.engine", "def f():\n    from nbdcore import streams"),
        ("nbdcore.streams.sockets", "from nbdcore.streams.waiting import wait"),
        ("nbdcore.streams.sockets", "from .base import Stream"),
        ("nbdcore.clients.session.session", "from nbdcore.clients.blocking.client import Client"),
        ("nbdcore.clients.blocking.client", "import nbdcore_tcp"),
        ("nbdcore.server.serving", "from nbdcore.protocol.engine import Engine"),
        ("nbdcore_tcp", "import nbdcore_unix"),
        ("nbdcore_tcp", "import nbdcore"),
        ("nbdcore.gadgets", ""),
        ("nbdcore.gadgets.gears", "import os"),
    ],
)
def test_the_table_sees_an_offence(module, source):
    assert len(offences(module, source)) == 1


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return modules of which each imports the next, and the last the first; none where there is no such circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        return list(exc.args[1])
    return []


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: {*imports(path.read_text(encoding="utf-8"))} & MODULES.keys() for module, path in MODULES.items()}
    assert circle(graph) == []


def test_a_circle_is_seen():
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("nbdcore.protocol")])
def test_the_protocol_core_neither_waits_nor_knows_a_socket(module):
    names = {name.partition(".")[0] for name in imports(MODULES[module].read_text(encoding="utf-8"))}
    assert names.isdisjoint(NOT_IN_PROTOCOL)


def test_import_nbdcore_is_cheap():
    code = f"import nbdcore, sys; print([name for name in {NOT_AT_IMPORT!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"

"""Real distributions for the registry to find: a directory on sys.path with modules and their installed metadata."""

from __future__ import annotations

import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdcore.plugins.registry import supports

#: A plugin that loads. It connects nowhere: these tests are about finding it.
TRANSPORT = """
    from nbdcore.plugins.spec import Transport, hookimpl

    class Example(Transport):
        name = {name!r}
        schemes = {schemes!r}

        def address(self, **parts): raise NotImplementedError
        def parse(self, uri): raise NotImplementedError
        def connect(self, address, *, timeout=None): raise NotImplementedError

    @hookimpl
    def nbdcore_transports():
        return [Example()]
"""


@dataclass
class Site:
    """A directory of installed distributions."""

    directory: Path

    def install(self, distribution: str, entry_points: dict[str, str], version: str = "1.0", **modules: str) -> None:
        metadata = self.directory / f"{distribution.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = ["[nbdcore.transports]", *(f"{name} = {value}" for name, value in entry_points.items())]
        (metadata / "entry_points.txt").write_text("\n".join(lines))
        for name, source in modules.items():
            (self.directory / f"{name}.py").write_text(textwrap.dedent(source))

    def install_transport(self, distribution: str, name: str, schemes: tuple[str, ...] | None = None) -> None:
        """Install a transport that loads, in a module named after its distribution."""
        module = distribution.replace("-", "_")
        schemes = (f"nbd+{name}",) if schemes is None else schemes
        self.install(distribution, {name: module}, **{module: TRANSPORT.format(name=name, schemes=schemes)})


@pytest.fixture
def site(tmp_path, monkeypatch):
    supports("tcp")  # the registry that the whole process shares has looked around before, and never meets these
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield Site(tmp_path)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]

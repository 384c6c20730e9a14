"""The names of `nbdcore.disk`: there when they are used, and none costs what another needs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from nbdcore import disk


def test_what_type_checkers_see_is_what_programs_get():
    tree = ast.parse(Path(disk.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert declared == disk._HOME
    assert sorted(disk.__all__) == sorted(declared)
    assert set(disk.__all__) <= set(dir(disk))
    for name, module in declared.items():
        assert getattr(disk, name) is getattr(importlib.import_module(module), name)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'defragment'"):
        disk.defragment  # noqa: B018 (the look-up is the test)


def test_checksum_does_not_import_what_starts_processes():
    code = "import sys; from nbdcore.disk import checksum; print('multiprocessing' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout == "False\n"
    )

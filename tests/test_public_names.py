from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import nbdcore


def declared_imports() -> dict[str, str]:
    """Name -> module, as the type checkers' block of nbdcore/__init__.py has it."""
    tree = ast.parse(Path(nbdcore.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}


def test_what_type_checkers_see_is_what_programs_get():
    assert declared_imports() == nbdcore._HOME | dict.fromkeys(nbdcore._SUBMODULES, "nbdcore")
    assert sorted(nbdcore.__all__) == sorted(nbdcore._HOME)


@pytest.mark.parametrize("name", nbdcore.__all__)
def test_public_name_is_the_object_of_its_module(name):
    assert getattr(nbdcore, name) is getattr(importlib.import_module(nbdcore._HOME[name]), name)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'connect_pigeon'"):
        nbdcore.connect_pigeon  # noqa: B018 (the look-up is the test)


@pytest.mark.parametrize("name", nbdcore._SUBMODULES)
def test_submodule_is_there_after_the_import_of_the_package_alone(name):
    program = f"import sys, nbdcore; assert 'nbdcore.{name}' not in sys.modules; print(nbdcore.{name}.__name__)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == f"nbdcore.{name}\n"
    assert name in dir(nbdcore)


def test_dir_lists_names_before_their_first_use():
    assert set(nbdcore.__all__) <= set(dir(nbdcore))

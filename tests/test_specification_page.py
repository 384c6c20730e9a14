"""The page about the specification names places in the code and tests; each must be there."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs" / "reference" / "specification.md").read_text()

_TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")
_PLACE = re.compile(r"`(nbdcore\w*(?:\.\w+)*)(?::([\w.]+))?`")

NAMED_TESTS = sorted(set(_TEST.findall(TEXT)))
PLACES = sorted(set(_PLACE.findall(TEXT)))


def test_every_test_that_the_page_names_exists():
    there = {(file, name) for file in {file for file, _ in NAMED_TESTS} for name in functions(file)}
    assert set(NAMED_TESTS) <= there, set(NAMED_TESTS) - there
    assert all(name.startswith("test_") for _, name in NAMED_TESTS)


def functions(file):
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_place_that_the_page_names_exists():
    for module, path in PLACES:
        found = importlib.import_module(module)
        for name in filter(None, path.split(".")):
            assert hasattr(found, name), f"{module}:{path}"
            found = getattr(found, name)


def test_every_row_names_a_place_and_a_test():
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith(("| Demand", "| ---"))]
    assert len(rows) > 20
    for row in rows:
        demand, places, tests = row.removeprefix("| ").removesuffix(" |").split(" | ")
        assert demand.endswith("."), row
        assert _PLACE.search(places), row
        assert _TEST.search(tests), row

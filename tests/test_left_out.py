"""Tests whose servers this machine lacks are left out, and said to be; in CI none is, so that it fails."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests import conftest

LACKING = ["the virtual machine's parts"]


@pytest.fixture
def incomplete(monkeypatch, tmp_path, request) -> pytest.Item:
    """A test of a virtual machine that is not there."""
    monkeypatch.setattr(conftest, "VM_PARTS", tmp_path)
    item: pytest.Item = request.node
    item.add_marker("vm")
    return item


@pytest.mark.parametrize(("ci", "out"), [(None, True), ("", True), ("false", True), ("true", False)])
def test_a_missing_part_leaves_a_test_out_but_not_in_ci(incomplete, monkeypatch, ci, out):
    monkeypatch.delenv("CI", raising=False) if ci is None else monkeypatch.setenv("CI", ci)
    said: list[str] = []
    left_out: list[pytest.Item] = []
    items = [incomplete]

    def deselected(items: list[pytest.Item]) -> None:  # a hook's arguments are named
        left_out.extend(items)

    hook = SimpleNamespace(pytest_deselected=deselected)
    conftest.pytest_collection_modifyitems(SimpleNamespace(hook=hook, getoption=lambda _: False), items)
    conftest.pytest_terminal_summary(SimpleNamespace(line=said.append))
    assert (items, left_out) == (([], [incomplete]) if out else ([incomplete], []))
    assert [LACKING[0] in line for line in said] == ([True] if out else [])

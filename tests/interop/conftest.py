"""Fixtures for tests against real servers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.interop.servers import Server

STARTED = pytest.StashKey[list[Server]]()
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder is an interop one; without a marker of its own it needs every program."""
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("interop") is None:
            item.add_marker("interop")


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[Callable[[contextlib.AbstractContextManager[Server]], Server]]:
    """Start a server that lives as long as the test: `server = start(nbdkit("memory", "1M"))`."""
    with contextlib.ExitStack() as running:
        started = request.node.stash.setdefault(STARTED, [])

        def start_one(server: contextlib.AbstractContextManager[Server]) -> Server:
            started.append(running.enter_context(server))
            return started[-1]

        yield start_one


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show with a failure what the servers of `start` had to say: they are still running when the test fails."""
    report = yield
    if report.when == "call" and report.failed:
        for server in item.stash.get(STARTED, ()):
            report.sections.append((f"standard error of {' '.join(map(str, server.process.args))}", server.messages()))
    return report

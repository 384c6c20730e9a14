"""Each test of the clients ends with every thread and descriptor gone that it began with.

A platform without unix sockets, or without signals for threads, has fewer tests.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdcore.plugins.registry import registry
from tests import leaks

collect_ignore = [] if hasattr(signal, "pthread_kill") else ["test_interrupts.py"]
if not hasattr(socket, "AF_UNIX"):  # through which programs are talked to
    collect_ignore += ["test_connect_methods.py", "test_connect_methods_alike.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(socket, "AF_UNIX"):
        here = Path(__file__).parent
        left_out = [item for item in items if here in item.path.parents and "socket_path" in item.fixturenames]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def _nothing_left_open() -> Iterator[None]:
    registry.statuses()  # the scan happens once a process, and is no test's own
    with leaks.none_left_open():
        yield

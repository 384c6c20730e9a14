"""Each test of the clients ends with every thread and descriptor gone that it began with."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from nbdcore.plugins.registry import registry
from tests import leaks


@pytest.fixture(autouse=True)
def _nothing_left_open() -> Iterator[None]:
    registry.statuses()  # the scan happens once a process, and is no test's own
    before = leaks.open_descriptors()
    threads = set(threading.enumerate())
    yield
    gc.collect()
    left = leaks.settled(lambda: {number: what for number, what in leaks.open_descriptors().items() if number not in before})
    assert left == {}, "descriptors left open"
    assert [thread.name for thread in set(threading.enumerate()) - threads] == [], "threads left running"

"""Which of a test's many sets of parameters stands for all of them, where another Python or platform runs the tests once more.

It is chosen by the test's name: the same every time, and another one for another test, so that among hundreds of tests every call
and every front end gets its share.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from itertools import groupby

import pytest


def one_of_each(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Return one item for each test function, in their order."""
    return [_chosen(function, list(of_it)) for function, of_it in groupby(items, key=_function)]


def _chosen(function: str, of_it: list[pytest.Item]) -> pytest.Item:
    return of_it[zlib.crc32(function.encode()) % len(of_it)]


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]

"""In which pieces, and in which order, the tests go to the workers of a session.

pytest-xdist sends what has no group one by one, and for each looks through all that was sent before. With ten thousand tests this
takes longer than most of them do. Here the sets of parameters of one test go together, in a few pieces so that no worker has all
of a long one.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.scheduler import LoadGroupScheduling

#: Pieces of one test.
_MOST = 8

#: What takes long, and of what one worker has all. Begun last, the others would have nothing to do for as long as they take.
_LONG = ("vm", "packaging", "typing", "long")


def longest_first(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(item.get_closest_marker(name) for name in _LONG))


def piece_of(test: str) -> str:
    """Return the piece that a test without a group belongs to."""
    function, _, parameters = test.partition("[")
    return f"{function} {zlib.crc32(parameters.encode()) % _MOST}"


def scheduling(config: pytest.Config, log: object) -> LoadGroupScheduling | None:
    """Return what `--dist loadgroup` is done with; None where another way was asked for."""
    from xdist.scheduler import LoadGroupScheduling  # it may be turned off

    class Scheduling(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scope = super()._split_scope(nodeid)
            return piece_of(nodeid) if scope == nodeid else scope

    return Scheduling(config, log) if config.getoption("dist") == "loadgroup" else None

"""A small request of a handle goes through few functions of Python's."""

from __future__ import annotations

import pytest

import nbdcore.libnbd as nbd
from tests.frames import fewest_frames

#: The most for each. The last is a command that is started, waited for and retired.
MOST = {"pread": 36, "pwrite": 40, "aio_pread": 63}


@pytest.mark.parametrize("name", MOST)
def test_small_request_enters_few_functions(connected, name):
    buffer = nbd.Buffer(4096)

    def started():
        connected.aio_pread(buffer, 0, lambda _: 1)
        while connected.aio_in_flight():
            connected.poll(-1)

    calls = {"pread": lambda: connected.pread(4096, 0), "pwrite": lambda: connected.pwrite(bytes(4096), 0), "aio_pread": started}
    entered = fewest_frames(calls[name])
    assert len(entered) <= MOST[name], entered

"""A small request of a client goes through few functions of Python's."""

from __future__ import annotations

import pytest

import nbdcore
from nbdcore.server import MemoryDisk, Server
from tests.clients.talking import PATIENCE
from tests.frames import fewest_frames

#: The most for a small read. A write has a view of the caller's data to make as well.
MOST = {"pread": 14, "pwrite": 16}


@pytest.fixture
def disk(socket_path):
    with Server(MemoryDisk(1 << 20)) as server:
        uri = server.listen("unix", path=str(socket_path)).address.uri()
        with nbdcore.connect(uri, timeout=PATIENCE) as client:
            yield client


@pytest.mark.parametrize("name", MOST)
def test_small_request_enters_few_functions(disk, name):
    call = {"pread": lambda: disk.pread(4096, 0), "pwrite": lambda: disk.pwrite(bytes(4096), 0)}[name]
    entered = fewest_frames(call)
    assert len(entered) <= MOST[name], entered

"""How many functions of Python's a small request goes through: each costs, and nobody notices when one more is added."""

from __future__ import annotations

import sys

import pytest

import nbdcore
from nbdcore.server import MemoryDisk, Server
from tests.clients.talking import PATIENCE

#: The most for a small read. A write has a view of the caller's data to make as well.
MOST = {"pread": 20, "pwrite": 24}


@pytest.fixture
def disk(socket_path):
    with Server(MemoryDisk(1 << 20)) as server:
        uri = server.listen("unix", path=str(socket_path)).address.uri()
        with nbdcore.connect(uri, timeout=PATIENCE) as client:
            yield client


def frames(call):
    """Return the functions that a call enters, itself left out. The first calls do what is done once."""
    for _ in range(20):
        call()
    entered = []

    def note(frame, event, _):
        if event == "call":
            entered.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered[1:]


@pytest.mark.parametrize("name", MOST)
def test_small_request_enters_few_functions(disk, name):
    call = {"pread": lambda: disk.pread(4096, 0), "pwrite": lambda: disk.pwrite(bytes(4096), 0)}[name]
    # Where the answer is not there at the first look, a few more are entered: the fewest of several counts.
    entered = min((frames(call) for _ in range(20)), key=len)
    assert len(entered) <= MOST[name], entered

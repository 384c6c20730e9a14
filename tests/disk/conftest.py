"""What tests of work on whole disks must not leave."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.leaks import none_left_open


@pytest.fixture
def nothing_left_behind() -> Iterator[None]:
    """Fails a test after which a descriptor is open or a thread runs, one of ours even while it ends."""
    with none_left_open():
        yield
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("nbdcore-disk")]

"""The guest that all VM tests share: one boot for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vm.guest import Guest


@pytest.fixture(scope="session")
def bare_guest() -> Iterator[Guest]:
    """A guest whose kernel has no vsock, until somebody loads its modules."""
    with Guest() as guest:
        yield guest

"""The guest that all VM tests share: one boot for all of them, and how connecting fails on the way there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.vm import checks
from tests.vm.guest import Guest

# Emulated, and on a machine that runs other tests meanwhile: the longest takes 20 s where it has a processor to itself.
_TIMEOUT = 240


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("vm"):
            item.add_marker(pytest.mark.timeout(_TIMEOUT))


Refusals = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def bare_guest() -> Iterator[Guest]:
    """A guest whose kernel has no vsock, until `guest` or `refusals` load its modules."""
    with Guest() as guest:
        yield guest


@pytest.fixture(scope="session")
def refusals(bare_guest: Guest) -> Refusals:
    """How connecting fails in a kernel without vsock, and in one with vsock and no way to lead it anywhere.

    Found out here, once for all, since the modules cannot be taken out again.
    """
    without = bare_guest.call(checks.refusal, cid=1, port=10809)
    bare_guest.load_modules("vsock")
    return {"no module": without, "no transport": bare_guest.call(checks.refusal, cid=1, port=10809)}


@pytest.fixture(scope="session")
def guest(bare_guest: Guest, refusals: Refusals) -> Guest:
    """A guest with a vsock to its host, and to itself."""
    bare_guest.load_modules("vsock_loopback", "vmw_vsock_virtio_transport")
    return bare_guest

"""Where `nbdcore serve` listens."""

from __future__ import annotations

import pytest

import nbdcore
from nbdcore.cli.places import for_clients


@pytest.mark.parametrize(
    ("listening_at", "connected_to", "note"),
    [
        ("nbd://127.0.0.1:10809/disk", "nbd://127.0.0.1:10809/disk", ""),
        ("nbd+unix:///?socket=/run/disk", "nbd+unix:///?socket=/run/disk", ""),
        ("nbd://[::]:10809/", "nbd://[::1]:10809/", "in place of [::1]"),
        ("nbd+vsock://4294967295:10809/disk", "nbd+vsock://2:10809/disk", "for virtual machines of this host"),
        ("nbd+vsock://1:10809/", "nbd+vsock://1:10809/", ""),
    ],
)
def test_uri_for_clients_is_one_that_can_be_connected_to(listening_at, connected_to, note):
    uri, said = for_clients(nbdcore.parse_uri(listening_at))
    assert uri == connected_to
    assert note in said
    assert bool(note) is bool(said)

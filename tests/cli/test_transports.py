from __future__ import annotations

import json

from nbdcore.plugins.registry import registry
from tests.cli.commands import invoke, run
from tests.cli.test_command import STRANGERS


def test_table_has_every_plugin_with_its_state_uris_and_package():
    shown = invoke("transports")
    rows = {row.split()[0]: row for row in shown.output.splitlines() if row}
    for status in registry.statuses():
        assert status.state.value in rows[status.name]
        assert f"{status.distribution} {status.version}" in rows[status.name]
        assert all(f"{scheme}://" in rows[status.name] for scheme in status.schemes)
    assert shown.exit_code == 0


def test_json_has_all_that_is_known():
    listed = json.loads(invoke("transports", "--json").output)
    assert [entry["name"] for entry in listed] == [status.name for status in registry.statuses()]
    [tcp] = [entry for entry in listed if entry["name"] == "tcp"]
    assert tcp.items() >= {"state": "loaded", "schemes": ["nbd"], "module": "nbdcore_tcp", "reason": ""}.items()
    assert tcp["package"] == "nbdcore"


def test_transport_that_cannot_be_used_has_its_reason_below_the_table():
    done = run("transports", NBDCORE_BLOCK_TRANSPORTS="unix")
    assert "unix: blocked by the environment variable NBDCORE_BLOCK_TRANSPORTS" in done.stdout.splitlines()
    assert (done.stderr, done.returncode) == ("", 0)


def test_broken_transport_is_a_row_and_a_reason_and_no_warning():
    done = run("broken", "transports", command=STRANGERS)
    [row] = [line for line in done.stdout.splitlines() if line.startswith("broken  ")]
    assert row.split() == ["broken", "failed", "-", "this", "program"]
    assert "broken: breaks the contract" in done.stdout
    assert (done.stderr, done.returncode) == ("", 0)


def test_without_any_metadata_it_says_so():
    lost = "import nbdcore.plugins.registry as it; it.announced_plugins = lambda complaints: []"
    code = f"{lost}; import nbdcore.__main__ as it; it.main()"
    done = run("transports", command=(STRANGERS[0], "-c", code))
    assert done.stdout.startswith("No transports: ")
    assert run("transports", "--json", command=(STRANGERS[0], "-c", code)).stdout == "[]\n"

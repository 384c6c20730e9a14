from __future__ import annotations

import os
import signal
import subprocess

import pytest

from nbdcore.plugins.registry import registry
from tests.cli.commands import COMMAND, DEADLINE, run
from tests.cli.test_command import STRANGERS
from tests.interop.programs import DIES_WITH_US


@pytest.fixture
def demo(tmp_path):
    """Runs the demo with a temporary folder of its own, and sees that nothing is left there."""

    def run_demo(*arguments, **options):
        done = run(*arguments, "demo", TMPDIR=str(tmp_path), **options)
        assert list(tmp_path.iterdir()) == []
        return done

    return run_demo


def lines_about(name, done):
    return [line for line in done.stdout.splitlines() if line.startswith(f"{name} ")]


def test_demo_tries_every_transport_or_says_why_not(demo):
    done = demo()
    for status in registry.statuses():
        [line] = lines_about(status.name, done)
        assert line.split()[1] == "right" or line.startswith(f"{status.name} was not tried: ")
    assert lines_about("tcp", done)[0].split()[1] == "right"
    assert "nbdcore serve --memory 1G" in done.stdout.splitlines()[-1]
    assert (done.stderr, done.returncode) == ("", 0)


def test_demo_ends_with_a_disk_copied_and_compared(demo):
    done = demo()
    [line] = [line for line in done.stdout.splitlines() if line.startswith("And a disk is copied over tcp to a file: ")]
    assert "of its 64M, 24M were data" in line
    assert "every byte is the same" in line


def test_demo_without_room_for_a_copy_says_so_and_is_no_fault(demo):
    done = demo(command=("sh", "-c", 'ulimit -f 1000; exec "$@"', "sh", *COMMAND))
    [line] = [line for line in done.stdout.splitlines() if line.startswith("A disk could not be copied to a file in ")]
    assert "File too large" in line
    assert done.returncode == 0


def test_demo_that_is_piped_has_no_colours(demo):
    assert "\x1b" not in demo().stdout


def test_third_partys_transport_takes_part(demo):
    done = demo("honest", command=STRANGERS)
    assert lines_about("honest", done)[0].split()[1] == "right"
    assert done.returncode == 0


def test_transport_that_changes_a_bit_is_found_out(demo):
    done = demo("liar", command=STRANGERS)
    row, fault = lines_about("liar", done)
    assert row.split()[1] == "WRONG"
    assert "what was read is not what was written" in fault
    assert lines_about("tcp", done)[0].split()[1] == "right"
    assert done.stderr.startswith("nbdcore: the demo found a fault over liar")
    assert done.returncode == 1


def test_transport_that_raises_anything_harms_no_other(demo):
    done = demo("clumsy", command=STRANGERS)
    row, fault = lines_about("clumsy", done)
    assert row.split()[1] == "WRONG"
    assert "ZeroDivisionError: cannot divide" in fault
    assert lines_about("tcp", done)[0].split()[1] == "right"
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("stranger", "reason"),
    [
        ("homeless", "a server must be told where to listen, and the demo knows no place"),
        ("caller", "it connects to servers, and cannot serve"),
        ("broken", "breaks the contract"),
    ],
)
def test_transport_that_cannot_be_tried_has_its_reason_and_is_no_fault(demo, stranger, reason):
    done = demo(stranger, command=STRANGERS)
    [line] = lines_about(stranger, done)
    assert line.startswith(f"{stranger} was not tried: ")
    assert reason in line
    assert done.returncode == 0


def test_demo_without_any_transport_fails_with_the_reasons(demo):
    names = [status.name for status in registry.statuses()]
    done = demo(NBDCORE_BLOCK_TRANSPORTS=",".join(names))
    assert all(len(lines_about(name, done)) == 1 for name in names)
    assert done.stderr == "nbdcore: no transport could be tried on this machine\n"
    assert done.returncode == 1


@pytest.mark.parametrize("name", ["command", "ssh"])
def test_transport_that_only_connects_says_what_it_is_for_and_no_error(demo, name):
    [line] = lines_about(name, demo())
    assert line.endswith("nothing can be served over it")
    assert "EINVAL" not in line


def test_interrupted_demo_is_quiet_and_leaves_nothing(tmp_path):
    with subprocess.Popen(
        [*DIES_WITH_US, *COMMAND, "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        # A test run in the background may have been told to ignore it, and hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 (no threads here)
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"For each transport")
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=DEADLINE)
    assert (rest.strip(), errors, process.returncode) == (b"", b"", 130)
    assert list(tmp_path.iterdir()) == []

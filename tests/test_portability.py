from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

#: What stands on the platform. Pure code needs no second run, nor does TLS, which stands on a Stream.
PARTS = [
    "--ignore-glob=*/test_tls*.py",
    "tests/streams",
    "tests/transports",
    "tests/plugins",
    "tests/server",
    "tests/clients/test_dying_server.py",
]


@pytest.mark.long
@pytest.mark.timeout(300)
def test_suite_passes_without_unix_sockets_vsock_poll_and_fcntl(tmp_path):
    arguments = [
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-m",
        "not interop and not vm",
        "--one-of-each",
        f"--basetemp={tmp_path}",
        *PARTS,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.portability.elsewhere", *arguments],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_library_says_which_transports_work_there_and_why_the_others_do_not():
    program = """
from tests.portability.elsewhere import take_away
take_away()
import nbdcore
assert (nbdcore.supports_tcp(), nbdcore.supports_unix(), nbdcore.supports_vsock()) == (True, False, False)
for connect in (nbdcore.connect_vsock, lambda: nbdcore.connect_unix("/x")):
    try:
        connect()
    except nbdcore.TransportUnavailable as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "AF_VSOCK" in done.stdout
    assert "AF_UNIX" in done.stdout

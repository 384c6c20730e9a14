"""Pythons without the sockets of a transport: that transport says why it cannot work, and all else does."""

from __future__ import annotations

import subprocess
import sys

import pytest

TAKE_AWAY = """
import socket
for name in {names!r}:
    if hasattr(socket, name):
        delattr(socket, name)
"""


def run(names: list[str], program: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", TAKE_AWAY.format(names=names) + program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("family", "module", "reason"),
    [
        ("AF_VSOCK", "nbdcore_vsock", "this Python has no vsock sockets (socket.AF_VSOCK): they are Linux's"),
        ("AF_UNIX", "nbdcore_unix", "this Python has no unix sockets (socket.AF_UNIX)"),
    ],
)
def test_missing_family_makes_its_transport_unavailable_with_the_reason(family, module, reason):
    program = f"""
from nbdcore.errors import TransportUnavailable
try:
    import {module}
except TransportUnavailable as exc:
    print(exc.message)
    print(exc)
"""
    assert run([family], program) == [reason, f"{reason} (ENOTSUP)"]


def test_all_else_works_without_unix_and_vsock_sockets():
    program = """
import sys
sys.modules["fcntl"] = None
import nbdcore_tcp
from nbdcore.testing.streams import check_stream
from nbdcore.testing.transports import check_transport
from nbdcore.streams.memory import memory_pair
from nbdcore.streams.sockets import connected_pair
(tcp,) = nbdcore_tcp.nbdcore_transports()
check_transport(tcp, tcp.address(port=0))
check_stream(memory_pair)
for end in connected_pair():
    end.close()
print("fine")
"""
    assert run(["AF_UNIX", "AF_VSOCK"], program) == ["fine"]


def test_transports_that_run_programs_load_without_unix_sockets_and_say_what_they_lack():
    program = """
import errno
import nbdcore
print(nbdcore.supports("command"), nbdcore.supports("ssh"))
for call in (lambda: nbdcore.connect_command(["x"]), lambda: nbdcore.connect_ssh("host.invalid")):
    try:
        call()
    except nbdcore.TransportError as exc:
        print(errno.errorcode[exc.errno])
"""
    assert run(["AF_UNIX"], program) == ["True True", "ENOTSUP", "ENOTSUP"]


def test_streams_load_no_plugin_machinery():
    program = """
import sys
import nbdcore.streams.waiting, nbdcore.streams.connecting, nbdcore.streams.memory
print(sorted({"pluggy", "asyncio", "ssl", "importlib_metadata", "concurrent.futures", "logging"} & sys.modules.keys()))
"""
    assert run([], program) == ["[]"]

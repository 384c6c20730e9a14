"""What the logger `nbdcore` tells, and that it is silent where nobody asked."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys

import pytest

import nbdcore
from nbdcore import aio
from nbdcore.server import MemoryDisk, Server
from nbdcore.testing.scripted import ScriptedServer, hang_up, receive
from tests.clients.talking import PATIENCE, script


@pytest.fixture
def uri():
    with Server({"disk": MemoryDisk(1 << 20)}) as server:
        yield server.listen("tcp", host="127.0.0.1", port=0).address.uri("disk")


def told(caplog, level):
    return [record.getMessage() for record in caplog.records if record.name == "nbdcore" and record.levelno == level]


@pytest.mark.parametrize("front_end", ["blocking", "asyncio"])
def test_connection_begins_and_ends_at_info(uri, front_end, caplog):
    async def by_asyncio():
        async with aio.connect(uri, timeout=PATIENCE):
            pass

    caplog.set_level(logging.DEBUG, "nbdcore")
    if front_end == "asyncio":
        asyncio.run(by_asyncio())
    else:
        with nbdcore.connect(uri, timeout=PATIENCE):
            pass
    begun, ended = told(caplog, logging.INFO)
    assert "connected to TCP 127.0.0.1 port" in begun
    assert "without TLS" in begun
    assert "export 'disk', 1048576 bytes" in begun
    assert "ended: this program took leave of the server" in ended
    assert any("structured replies True" in line for line in told(caplog, logging.DEBUG))


def test_lost_connection_is_told_once_with_its_reason(caplog):
    caplog.set_level(logging.INFO, "nbdcore")
    with ScriptedServer(script(receive(28), hang_up), patience=PATIENCE) as server:
        client = nbdcore.Client(server.stream(), timeout=PATIENCE)
        with pytest.raises(nbdcore.Disconnected):
            client.pread(512, 0, timeout=PATIENCE)
        client.close()
    lines = told(caplog, logging.INFO)
    assert len(lines) == 2
    assert len([line for line in lines if "ended: the server closed the connection" in line]) == 1


def test_attempts_while_a_server_is_waited_for_are_told_at_debug(caplog, socket_path):
    caplog.set_level(logging.DEBUG, "nbdcore")
    with pytest.raises(nbdcore.DeadlineExceeded):
        nbdcore.connect_unix(socket_path, wait=0.1)
    assert any("the next attempt is in" in line for line in told(caplog, logging.DEBUG))


def test_steps_of_connecting_are_told_at_debug_and_requests_not_at_all(uri, caplog):
    caplog.set_level(logging.DEBUG, "nbdcore")
    with nbdcore.connect(uri, timeout=PATIENCE) as disk:
        steps = [line.partition(" ")[0] for line in told(caplog, logging.DEBUG)]
        caplog.clear()
        disk.pwrite(disk.pread(512, 0), 512)
        assert [record for record in caplog.records if record.name == "nbdcore"] == []  # the server may still tell of its client
    assert steps == ["connecting", "TCP", "agreed"]


A_CLIENT = "import nbdcore\nwith nbdcore.connect({uri!r}, timeout=10) as disk: disk.pread(512, 0)"
A_SERVER_IN_TROUBLE = """
import socket
from nbdcore.server import Server
class Broken:
    size = 512
    def pread(self, count, offset):
        raise ValueError("broken")
with Server(Broken()) as server:
    address = server.listen("tcp", host="127.0.0.1", port=0).address
    import nbdcore
    with nbdcore.connect(address.uri(), timeout=10) as disk:
        try:
            disk.pread(512, 0)
        except nbdcore.CommandError:
            pass
    with socket.create_connection((address.host, address.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1")
        while stranger.recv(4096):
            pass
"""
WARNS_BEFORE_ANY_CLIENT = "import logging, nbdcore.server; logging.getLogger('nbdcore.server').warning('trouble')"


@pytest.mark.parametrize("program", [A_CLIENT, A_SERVER_IN_TROUBLE, WARNS_BEFORE_ANY_CLIENT])
def test_nothing_is_written_where_nobody_set_logging_up(uri, program):
    program = program.replace("{uri!r}", repr(uri))
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert (found.stdout, found.stderr) == ("", "")


def test_logging_is_not_imported_by_connecting_and_heard_of_once_the_program_has_it(uri):
    program = f"""
import sys, nbdcore
disk = nbdcore.connect({uri!r}, timeout=10)
disk.pread(512, 0)
print("logging" in sys.modules)
import logging
logging.basicConfig(level=logging.INFO, format="%(name)s %(module)s %(message)s", stream=sys.stdout)
disk.close()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    imported, ended = done.stdout.splitlines()
    assert imported == "False"
    assert ended.startswith("nbdcore session the connection to TCP")


def test_logger_is_asked_for_once(uri, monkeypatch):
    # It takes a lock of all threads, which would stay taken after an exception that a signal handler raises in there.
    with nbdcore.connect(uri, timeout=PATIENCE):
        pass
    with monkeypatch.context() as patched:
        patched.setattr(logging, "getLogger", None)
        with nbdcore.connect(uri, timeout=PATIENCE):
            pass

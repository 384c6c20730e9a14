"""The connect methods that open nothing on a network: over a program that this one runs, and over a socket already open."""

from __future__ import annotations

import errno
import json
import os
import socket
import ssl
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdcore
from nbdcore import TLS, Client, Disconnected, Phase, TransportError, UsageError
from nbdcore.testing.scripted import Negotiation, ScriptedServer, answer, data, goodbye, greeting
from tests import leaks
from tests.certificates import CertificateAuthority
from tests.clients.talking import DISK, PATIENCE
from tests.interop.programs import path_of

OPENED = [greeting(), Negotiation(size=DISK)]


@pytest.fixture(autouse=True)
def _programs_end(eventually) -> Iterator[None]:
    """Each program that a test started has ended, and nobody waits for it any more."""
    before = leaks.children().keys()
    yield
    eventually(lambda: leaks.children().keys() <= before, "the programs ended, and were reaped")
    eventually(lambda: not [it for it in threading.enumerate() if it.name == "nbdcore-command"], "their threads ended")


def program(folder: Path, source: str) -> list[str]:
    """Return the command line of a Python program that has the standard library."""
    path = folder / "program.py"
    path.write_text(textwrap.dedent(source))
    return [sys.executable, "-I", "-S", str(path)]


# ---------------------------------------------------------------------------------------------- a command


@pytest.mark.interop("nbdkit")
def test_a_command_is_talked_to_on_its_standard_input_and_output():
    with nbdcore.connect_command([path_of("nbdkit"), "-s", "memory", "1M"], timeout=PATIENCE) as disk:
        disk.pwrite(b"hello", 7)
        assert disk.pread(5, 7) == b"hello"
        assert [export.name for export in disk.list_exports(timeout=PATIENCE)] == [""]
        assert "connected, the command " in repr(disk)


@pytest.mark.interop("nbdkit")
def test_a_command_can_do_tls(tmp_path):
    ca = CertificateAuthority()
    pki = ca.write(tmp_path / "pki", server=ca.issue("server", "db.example"))
    argv = [path_of("nbdkit"), "-s", "--tls=require", f"--tls-certificates={pki}", "memory", "1M"]
    with nbdcore.connect_command(argv, tls=TLS(ca=pki / "ca-cert.pem", hostname="db.example"), timeout=PATIENCE) as disk:
        assert disk.tls
        assert disk.pread(3, 0) == bytes(3)


def test_arguments_are_no_shell_words(tmp_path):
    argv = program(tmp_path, "import json, sys; sys.exit(json.dumps(sys.argv[1:]))")
    words = ["a b", "$HOME", "`id`", "; false", "", "--", "*", "'", "\udcff"]
    with pytest.raises(Disconnected) as caught:
        nbdcore.connect_command([*argv, *words], timeout=PATIENCE)
    assert json.loads(caught.value.server_text) == words


def test_what_a_failed_command_said_last_is_in_the_error(tmp_path, capfd):
    argv = program(
        tmp_path,
        """
        import sys
        print("early" + "x" * 10000, file=sys.stderr)
        print("cannot open \\x1b[31mthe disk", file=sys.stderr)
        sys.exit(3)
        """,
    )
    client = Client()
    with pytest.raises(Disconnected, match="ended with status 3: ") as caught:
        client.connect_command(argv, timeout=PATIENCE)
    assert caught.value.server_text.endswith("x\ncannot open \x1b[31mthe disk")
    assert 3000 < len(caught.value.server_text) <= 4096
    assert "\x1b" not in str(caught.value)
    assert client.phase is Phase.DEAD


def test_a_command_that_is_killed_is_said_to_be(tmp_path):
    argv = program(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(Disconnected, match="was killed by signal 9"):
        nbdcore.connect_command(argv, timeout=PATIENCE)


def test_a_command_that_dies_without_reading_what_it_was_sent_has_its_say(tmp_path):
    argv = program(
        tmp_path,
        """
        import os, select, sys
        os.write(1, b"NBDMAGICIHAVEOPT\\0\\3")
        select.select([0], [], [], 10)
        sys.exit("the disk is on fire")
        """,
    )
    with pytest.raises(Disconnected, match="ended with status 1: the disk is on fire"):
        nbdcore.connect_command(argv, timeout=PATIENCE)


def test_a_command_that_says_nothing_is_given_up_at_the_deadline(tmp_path):
    argv = program(tmp_path, "import time; time.sleep(60)")
    with pytest.raises(nbdcore.DeadlineExceeded):
        nbdcore.connect_command(argv, timeout=0.2)


def test_a_program_that_is_not_there_is_a_transport_error():
    client = Client()
    with pytest.raises(TransportError, match="cannot run /nonexistent") as caught:
        client.connect_command(["/nonexistent"], timeout=PATIENCE, wait=PATIENCE)
    assert caught.value.errno == errno.ENOENT
    assert client.phase is Phase.DEAD


def test_a_command_gets_no_descriptors_of_this_program(tmp_path):
    argv = program(tmp_path, "import os, sys; sys.exit(' '.join(sorted(os.listdir('/proc/self/fd'))))")
    with (tmp_path / "open").open("w"), socket.socket(), pytest.raises(Disconnected) as caught:
        nbdcore.connect_command(argv, timeout=PATIENCE)
    assert caught.value.server_text == "0 1 2 3"  # the last is the listing's own


# ---------------------------------------------------------------------------------------------- socket activation


@pytest.mark.interop("nbdkit", "qemu-nbd")
def test_a_server_takes_over_a_socket(tmp_path, monkeypatch, short_folder):
    monkeypatch.setattr(tempfile, "tempdir", str(short_folder))
    image = tmp_path / "disk"
    image.write_bytes(bytes(DISK))
    for argv in ([path_of("nbdkit"), "memory", str(DISK)], [path_of("qemu-nbd"), "--format=raw", image]):
        with nbdcore.connect_socket_activation(argv, timeout=PATIENCE) as disk:
            assert disk.size == DISK
        assert list(short_folder.iterdir()) == []


TELLS = """
import json, os, socket, stat, sys
sock = socket.socket(fileno=3)
path = sock.getsockname()
names = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
told = {name: os.environ.get(name) for name in names}
told["LISTEN_PID"] = told["LISTEN_PID"] == str(os.getpid())
told["listens"] = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
told["folder"] = oct(stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode))
told["input"] = os.readlink("/proc/self/fd/0")
sys.exit(json.dumps(told))
"""


@pytest.mark.parametrize("name", [None, "disk-1.example"])
def test_a_server_is_told_what_it_has_by_systemds_protocol(tmp_path, name, monkeypatch, short_folder):
    monkeypatch.setattr(tempfile, "tempdir", str(short_folder))
    monkeypatch.setenv("LISTEN_FDNAMES", "another's")
    argv = program(tmp_path, TELLS)
    with pytest.raises(Disconnected) as caught:
        nbdcore.connect_socket_activation(argv, timeout=PATIENCE, **({} if name is None else {"name": name}))
    assert json.loads(caught.value.server_text) == {
        "LISTEN_PID": True,
        "LISTEN_FDS": "1",
        "LISTEN_FDNAMES": name or "unknown",
        "listens": 1,
        "folder": "0o700",
        "input": "/dev/null",
    }
    assert list(short_folder.iterdir()) == []


@pytest.mark.parametrize("name", ["", "a:b", "a\n", "ä", "x" * 256, 5])
def test_a_name_that_systemd_would_not_take_is_refused(name):
    client = Client()
    with pytest.raises(UsageError, match="the name of an activated socket is"):
        client.connect_socket_activation(["true"], name=name)
    assert client.phase is Phase.CREATED


def test_a_server_that_is_not_there_is_an_error_and_leaves_nothing(monkeypatch, short_folder):
    monkeypatch.setattr(tempfile, "tempdir", str(short_folder))
    with pytest.raises(Disconnected, match=r"not found|No such file"):
        nbdcore.connect_socket_activation(["/nonexistent"], timeout=PATIENCE)
    assert list(short_folder.iterdir()) == []


@pytest.mark.parametrize("argv", [[], "nbdkit", b"nbdkit", None, 5, [""], ["a", 5], ["a", b"b"], ["a\0b"], ["a", None]])
def test_what_is_no_command_is_refused(argv):
    for call in (Client.connect_command, Client.connect_socket_activation):
        client = Client()
        with pytest.raises(UsageError, match="command"):
            call(client, argv)
        assert client.phase is Phase.CREATED


# ---------------------------------------------------------------------------------------------- an open socket


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer([*OPENED, answer(data(b"eight")), goodbye], patience=PATIENCE) as playing:
        yield playing


def check_used(client: Client) -> None:
    assert client.pread(5, 0, timeout=PATIENCE) == b"eight"
    client.disconnect(timeout=PATIENCE)


def test_a_connected_socket_belongs_to_the_client(server):
    sock = server.socket()
    check_used(nbdcore.connect_socket(sock, timeout=PATIENCE))
    assert sock.fileno() == -1


def test_so_does_a_descriptor(server):
    number = server.socket().detach()
    check_used(nbdcore.connect_socket(number, timeout=PATIENCE))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_a_socket_of_tcp_will_do(server):
    port = server.listen_tcp()
    check_used(nbdcore.connect_socket(socket.create_connection(("127.0.0.1", port)), timeout=PATIENCE))


def test_an_inherited_descriptor_is_not_inherited_further(server):
    sock = server.socket()
    sock.set_inheritable(True)
    number = sock.detach()
    client = nbdcore.connect_socket(number, timeout=PATIENCE)
    assert not os.get_inheritable(number)
    check_used(client)


def wrong_sockets(folder: Path) -> Iterator[tuple[object, str]]:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        yield near, "a stream socket is needed"
        yield near.fileno(), "a stream socket is needed"
    with socket.socket() as unconnected:
        yield unconnected, "an open and connected socket is needed"
        yield unconnected.fileno(), "an open and connected socket is needed"
        unconnected.bind(("127.0.0.1", 0))
        unconnected.listen()
        yield unconnected, "an open and connected socket is needed"
    yield unconnected, "an open and connected socket is needed"
    with (folder / "file").open("w") as file:
        yield file.fileno(), "is no descriptor of a socket"
        yield file, "a socket or its descriptor is needed, not TextIOWrapper"
    yield True, "a socket or its descriptor is needed, not bool"
    yield -1, "is no descriptor of a socket"
    yield 1 << 40, "is no descriptor of a socket"
    yield None, "a socket or its descriptor is needed, not NoneType"
    yield "3", "a socket or its descriptor is needed, not str"


def test_anything_else_is_refused_and_stays_the_callers(tmp_path):
    for wrong, said in wrong_sockets(tmp_path):
        client = Client()
        with pytest.raises(UsageError, match=said):
            client.connect_socket(wrong, timeout=PATIENCE)
        assert client.phase is Phase.CREATED
        if isinstance(wrong, int) and 0 <= wrong < 1 << 20 and wrong is not True:
            os.fstat(wrong)
        client.close()


def test_a_socket_that_is_encrypted_already_is_refused():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    near, far = socket.socketpair()
    with far, context.wrap_socket(near, do_handshake_on_connect=False, server_hostname="db.example") as wrapped:
        client = Client()
        with pytest.raises(UsageError, match="an SSLSocket is encrypted already"):
            client.connect_socket(wrapped)
        assert client.phase is Phase.CREATED


def test_a_file_of_credentials_that_is_missing_leaves_the_socket_alone(tmp_path):
    near, far = socket.socketpair()
    with near, far:
        with pytest.raises(UsageError):
            nbdcore.connect_socket(near, tls=TLS(ca=tmp_path / "none"))
        near.send(b"still open")
        assert far.recv(20) == b"still open"


def test_no_more_exports_can_be_asked_for_over_a_socket(server):
    client = nbdcore.connect_socket(server.socket(), timeout=PATIENCE)
    with pytest.raises(UsageError, match="cannot open another"):
        client.list_exports()
    check_used(client)

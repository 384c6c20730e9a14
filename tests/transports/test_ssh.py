"""The ssh transport: what its command lines are made of, and a way to a server through a stand-in for ssh.

The stand-in is a program named ssh, first on PATH: it notes down its arguments, and does what the remote command says on this
machine. No other machine is contacted.
"""

from __future__ import annotations

import errno
import shlex
import threading
from collections.abc import Callable, Iterator

import pytest

import nbdcore
import nbdcore_ssh
from nbdcore import TLS, Client, DeadlineExceeded, Disconnected, Phase, TransportError, UsageError
from nbdcore.clients.connect.target import endpoint_by_name
from nbdcore.errors import printable
from nbdcore.server import MemoryDisk, Server, ServerTLS
from nbdcore.testing.transports import check_address
from nbdcore.uri import parse_uri
from tests import leaks
from tests.certificates import CertificateAuthority
from tests.cli.commands import run
from tests.transports.ssh_stand_in import StandIn

(transport,) = nbdcore_ssh.nbdcore_transports()

PATIENCE = 20.0
DISK = 1 << 20

#: What ssh reads as anything but a plain name, or a shell in its ProxyCommand does.
HOSTILE = [
    "-oProxyCommand=touch${IFS}pwned",
    "-F/tmp/config",
    "-",
    "--",
    "",
    " ",
    "a b",
    "a\tb",
    "a\nb",
    "a\0b",
    "a\x7fb",
    "\x1b[31m",
    "a;b",
    "a|b",
    "a&b",
    "a>b",
    "$(id)",
    "`id`",
    "a'b",
    'a"b',
    "a\\b",
    "a/b",
    "a*",
    "a?b",
    "ssh://host",
    "#",
    "~root",
    "höst",
    "\udcff",
]


# ---------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("parts", "argv", "uri"),
    [
        ({"host": "db.example"}, ["--", "db.example", "nc localhost 10809"], "nbd+ssh://db.example/"),
        ({"host": "db", "port": 1}, ["--", "db", "nc localhost 1"], "nbd+ssh://db/?nbd-port=1"),
        ({"host": "db", "ssh_port": 2222}, ["-p", "2222", "--", "db", "nc localhost 10809"], "nbd+ssh://db:2222/"),
        ({"host": "db", "compress": True}, ["-C", "--", "db", "nc localhost 10809"], "nbd+ssh://db/?compress=true"),
        (
            {"host": "db", "compress": False},
            ["-o", "Compression=no", "--", "db", "nc localhost 10809"],
            "nbd+ssh://db/?compress=false",
        ),
        ({"host": "db", "user": "bob"}, ["-l", "bob", "--", "db", "nc localhost 10809"], "nbd+ssh://bob@db/"),
        ({"host": "db", "user": "bob@corp"}, ["-l", "bob@corp", "--", "db", "nc localhost 10809"], "nbd+ssh://bob%40corp@db/"),
        ({"host": "db", "socket": "/run/nbd"}, ["--", "db", "nc -U /run/nbd"], "nbd+ssh://db/?socket=/run/nbd"),
        ({"host": "::1"}, ["--", "::1", "nc localhost 10809"], "nbd+ssh://[::1]/"),
        ({"host": "192.0.2.1"}, ["--", "192.0.2.1", "nc localhost 10809"], "nbd+ssh://192.0.2.1/"),
        (
            {"host": "db", "socket": "/a b;$(id)'\"|&~*ü"},
            ["--", "db", "nc -U '/a b;$(id)'\"'\"'\"|&~*ü'"],
            "nbd+ssh://db/?socket=/a%20b%3B$(id)'%22%7C%26%7E*%C3%BC",
        ),
    ],
)
def test_the_command_line_and_the_uri(parts, argv, uri):
    address = transport.address(**parts)
    assert address.argv == ("ssh", "-T", *argv)
    assert address.uri() == uri.replace("%7E", "~")
    if "%" not in address.host:
        check_address(transport, address)


def test_the_remote_command_is_one_word_that_a_shell_splits_as_it_was_meant():
    for path in ("/plain", "/a b", "/'; rm -rf ~; '", '/"', "/$HOME", "/`id`", "relative", "/\\"):
        *_, remote = transport.address(host="db", socket=path).argv
        assert shlex.split(remote) == ["nc", "-U", path]


@pytest.mark.parametrize("host", [*HOSTILE, "user@host", "host:22 ", "[::1]"])
def test_a_hostile_host_is_refused(host):
    with pytest.raises(UsageError, match="is no host that ssh may be given") as caught:
        transport.address(host=host)
    assert repr(printable(host)) in str(caught.value)


@pytest.mark.parametrize("user", [*HOSTILE, "-l", "a:b", "a%"])
def test_a_hostile_user_is_refused(user):
    with pytest.raises(UsageError, match="is no user that ssh may be given"):
        transport.address(host="db", user=user)


@pytest.mark.parametrize("path", ["", "-", "-e/bin/sh", "-U", "a\0b", "a\nb", "\x1b", 5, b"/run/nbd", "\udcff"])
def test_a_hostile_socket_is_refused(path):
    with pytest.raises(UsageError, match="is no path of a socket on another machine"):
        transport.address(host="db", socket=path)


@pytest.mark.parametrize("part", ["port", "ssh_port"])
@pytest.mark.parametrize("port", [0, -1, 65536, "22", 22.0, True])
def test_a_wrong_port_is_refused(part, port):
    with pytest.raises(UsageError, match="is a number from 1 to 65535"):
        transport.address(host="db", **{part: port})


@pytest.mark.parametrize(
    "parts", [{}, {"host": None}, {"host": "db", "options": "-v"}, {"host": "db", "port": 1, "socket": "/s"}]
)
def test_wrong_parts_are_refused(parts):
    with pytest.raises(UsageError):
        transport.address(**parts)


@pytest.mark.parametrize(
    "uri",
    [
        "nbd+ssh:///",
        "nbd+ssh://-oProxyCommand=x/",
        "nbd+ssh://%2DoProxyCommand=x/",
        "nbd+ssh://-oProxyCommand=touch%20pwned/",
        "nbd+ssh://a%20b/",
        "nbd+ssh://a%0Ab/",
        "nbd+ssh://a%00b/",
        "nbd+ssh://a;b/",
        "nbd+ssh://$(id)/",
        "nbd+ssh://-l@host/",
        "nbd+ssh://%2Dl@host/",
        "nbd+ssh://a%20b@host/",
        "nbd+ssh://@host/",
        "nbd+ssh://host:0/",
        "nbd+ssh://host:65536/",
        "nbd+ssh://host/?socket=",
        "nbd+ssh://host/?socket=-e",
        "nbd+ssh://host/?socket=%2De",
        "nbd+ssh://host/?socket=a%0Ab",
        "nbd+ssh://host/?socket=%00abstract",
        "nbd+ssh://host/?socket=/s&nbd-port=1",
        "nbd+ssh://host/?nbd-port=0",
        "nbd+ssh://host/?compress=nonsense",
        "nbd+ssh://host/?nbd-port=-1",
        "nbd+ssh://host/?nbd-port=",
        "nbd+ssh://host/?nbd-port=%D9%A1",
        "nbd+ssh://host/?nbd-port=99999999999999999999",
        "nbd+ssh://host/?compress=1",
    ],
)
def test_a_hostile_uri_starts_nothing_and_leaves_the_client_newly_created(uri, ssh):
    client = Client(allow_transports=["ssh"])
    with pytest.raises(UsageError):
        client.connect(uri, timeout=PATIENCE)
    assert client.phase is Phase.CREATED
    assert ssh.calls() == []


def test_a_uri_starts_nothing_without_permission(ssh):
    for uri in ("nbd+ssh://host/", "nbds+ssh://host/"):
        with pytest.raises(UsageError, match=r"allow_transports=\['ssh'\]") as caught:
            nbdcore.connect(uri, timeout=PATIENCE)
        assert caught.value.errno == errno.EPERM
        with pytest.raises(UsageError):
            nbdcore.list_exports(uri, timeout=PATIENCE)
    assert ssh.calls() == []


# ---------------------------------------------------------------------------------------------- a way to a server


@pytest.fixture
def ssh(tmp_path, monkeypatch, eventually: Callable[..., None]) -> Iterator[StandIn]:
    before = leaks.children().keys()
    yield StandIn(tmp_path / "bin", monkeypatch)
    eventually(lambda: leaks.children().keys() <= before, "ssh ended, and was reaped")
    eventually(lambda: not [it for it in threading.enumerate() if it.name == "nbdcore-command"], "its threads ended")


@pytest.fixture
def server(socket_path) -> Iterator[Server]:
    with Server({"disk": MemoryDisk(DISK)}) as running:
        running.listen("unix", path=str(socket_path))
        yield running


def test_a_server_behind_ssh_is_used(ssh, server, socket_path):
    with nbdcore.connect_ssh("db.example", socket=str(socket_path), user="bob", timeout=PATIENCE) as disk:
        data = bytes(range(256)) * (DISK // 256)
        disk.pwrite(data, 0)
        assert disk.pread(DISK, 0) == data
        assert [export.name for export in disk.list_exports(timeout=PATIENCE)] == ["disk"]
    called = ["-T", "-l", "bob", "--", "db.example", f"nc -U {socket_path}"]
    assert ssh.calls() == [called, called]


def test_by_a_uri_too(ssh, server, socket_path):
    port = parse_uri(server.uri(server.listen("tcp", host="127.0.0.1", port=0))).port
    for uri in (f"nbd+ssh://db.example:2222/disk?socket={socket_path}", f"nbd+ssh://db.example/disk?nbd-port={port}"):
        with nbdcore.connect(uri, allow_transports=["ssh"], timeout=PATIENCE) as disk:
            assert disk.size == DISK
    assert ssh.calls() == [
        ["-T", "-p", "2222", "--", "db.example", f"nc -U {socket_path}"],
        ["-T", "--", "db.example", f"nc localhost {port}"],
    ]


def test_tls_goes_through_it(ssh, socket_path, tmp_path):
    ca = CertificateAuthority()
    pki = ca.write(tmp_path / "pki", server=ca.issue("server", "db.example"))
    with Server(MemoryDisk(DISK), tls=ServerTLS(certificates=pki)) as server:
        server.listen("unix", path=str(socket_path))
        uri = f"nbds+ssh://ssh.example/?socket={socket_path}&tls-hostname=db.example"
        with nbdcore.connect(uri, tls=TLS(ca=pki / "ca-cert.pem"), allow_transports=["ssh"], timeout=PATIENCE) as disk:
            assert disk.tls
            assert disk.size == DISK


def test_what_ssh_has_to_say_is_in_the_error(ssh):
    with pytest.raises(Disconnected, match="the command ssh ended with status 1: ssh: Could not resolve hostname broken"):
        nbdcore.connect_ssh("broken.example", timeout=PATIENCE)
    with pytest.raises(Disconnected, match=r"nc: .*No such file"):
        nbdcore.connect_ssh("db.example", socket="/nonexistent", timeout=PATIENCE)


def test_what_ssh_has_to_say_is_shown_once_by_the_command(ssh):
    done = run("info", "nbd+ssh://broken.example/")
    assert done.stderr.count("Could not resolve hostname broken.example") == 1
    assert (done.stderr.count("\n"), done.returncode) == (1, 1)


def test_a_server_behind_ssh_is_waited_for(ssh, socket_path):
    with Server(MemoryDisk(DISK)) as server:
        late = threading.Timer(0.5, lambda: server.listen("unix", path=str(socket_path)))
        late.start()
        with nbdcore.connect_ssh("db.example", socket=str(socket_path), wait=PATIENCE) as disk:
            assert disk.size == DISK
        late.join(PATIENCE)
    assert len(ssh.calls()) > 1
    with pytest.raises(DeadlineExceeded, match="nc: ") as caught:
        nbdcore.connect_ssh("db.example", socket="/nonexistent", wait=2.0)
    assert isinstance(caught.value.__cause__, Disconnected)


def test_a_login_that_fails_for_good_is_not_tried_again(ssh):
    with pytest.raises(Disconnected, match="Could not resolve"):
        nbdcore.connect_ssh("broken.example", wait=PATIENCE)
    assert len(ssh.calls()) == 1


@pytest.mark.parametrize(
    ("said", "retryable"),
    [
        ("bob@db.example: Permission denied (publickey,password).", False),
        (
            "Warning: Permanently added 'db' (ED25519) to the list of known hosts.\r\nbob@db: Permission denied (publickey).\r\n",
            False,
        ),
        ("Permission denied (publickey).", False),
        (
            "No ED25519 host key is known for db and you have requested strict checking.\r\nHost key verification failed.\r\n",
            False,
        ),
        ("ssh: Could not resolve hostname db: Name or service not known\r\n", False),
        ("sh: 1: nc: not found", False),
        ("bash: line 1: nc: command not found", False),
        ("ssh: Could not resolve hostname db: Temporary failure in name resolution", True),
        ("ssh: connect to host db port 22: Connection refused", True),
        ("ssh: connect to host db port 22: Connection timed out", True),
        ("ssh: connect to host db port 22: No endpoint to host", True),
        ("kex_exchange_identification: Connection closed by remote host", True),
        ("Connection closed by 192.0.2.1 port 22", True),
        ("nc: unix connect failed: No such file or directory", True),
        ("localhost [127.0.0.1] 10809 (?) : Connection refused", True),
        ("", True),
    ],
)
def test_what_ssh_says_tells_a_login_that_fails_for_good_from_a_machine_that_is_not_up(said, retryable):
    endpoint = endpoint_by_name("ssh", {"host": "db"})
    assert (
        endpoint.is_retryable(Disconnected(0, "the command ssh ended with status 255", server_text=said), heard=False)
        is retryable
    )


def test_without_the_program_ssh_it_is_a_transport_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TransportError, match="cannot run ssh") as caught:
        nbdcore.connect_ssh("db.example", timeout=PATIENCE, wait=PATIENCE)
    assert caught.value.errno == errno.ENOENT


def test_address_with_parts_that_ssh_does_not_have_says_which_it_has():
    (transport,) = nbdcore_ssh.nbdcore_transports()
    with pytest.raises(UsageError, match=r"needs host, and may have .* and compress; given: host, export"):
        transport.address(host="somewhere", export="disk")

"""Every connect method of every front end: blocking, polled by a loop of a stranger, and asyncio. vsock is tested in tests/vm."""

from __future__ import annotations

import asyncio
import errno
import inspect
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdcore import TLS, Client, DeadlineExceeded, Disconnected, NegotiationError, Phase, TLSError, TransportError, UsageError
from nbdcore.aio import AsyncClient
from nbdcore.clients.connect.options import checked_encryption, checked_permissions, checked_settings
from nbdcore.clients.polled import PolledClient
from nbdcore.protocol.transmission import commands
from nbdcore.server import MemoryDisk, Server, ServerTLS
from nbdcore.streams.base import Want
from nbdcore.streams.sockets import SocketStream
from nbdcore.testing.choppy import ChoppyStream
from tests import leaks
from tests.certificates import CertificateAuthority
from tests.clients.talking import PATIENCE
from tests.interop.programs import path_of
from tests.transports.ssh_stand_in import StandIn

DISK = 1 << 20
WORDS = b"at eight"
EXPORT = "disk"


# ---------------------------------------------------------------------------------------------- the front ends


def blocking(call: str, *where: Any, timing: dict[str, float] | None = None, **how: Any) -> tuple[int, bytes, bool]:
    """Connect, read, and take leave; returns the disk's size, eight bytes of it, and whether they came by TLS."""
    where, named, options = _sorted(where, how)
    client = Client(**options)
    getattr(client, call)(*where, **named, **(timing or {"timeout": PATIENCE}))
    found = client.size, client.pread(8, 8, timeout=PATIENCE), client.tls
    client.disconnect(timeout=PATIENCE)
    return found


def asynchronous(call: str, *where: Any, timing: dict[str, float] | None = None, **how: Any) -> tuple[int, bytes, bool]:
    where, named, options = _sorted(where, how)

    async def main() -> tuple[int, bytes, bool]:
        client = AsyncClient(**options)
        await getattr(client, call)(*where, **named, **(timing or {"timeout": PATIENCE}))
        found = client.size, await client.pread(8, 8, timeout=PATIENCE), client.tls
        await client.disconnect(timeout=PATIENCE)
        return found

    return asyncio.run(main())


def polled_client(**options: Any) -> PolledClient:
    return PolledClient(
        checked_settings(options), encryption=checked_encryption(options), permissions=checked_permissions(options)
    )


def polled(call: str, *where: Any, **how: Any) -> tuple[int, bytes, bool]:
    where, named, options = _sorted(where, how)
    client = polled_client(**options)
    getattr(client, call)(*where, **named)
    watch(client, lambda: client.phase is not Phase.CONNECTING)
    if client.error is not None:
        raise client.error
    command = commands.read(client.engine.limits, 8, 8)
    client.submit(command)
    watch(client, lambda: command.done)
    found = client.size, bytes(command.result()), client.engine.agreement.tls
    client.disconnect()
    watch(client, lambda: client.phase is Phase.CLOSED)
    return found


def watch(client: PolledClient, done: Callable[[], bool]) -> None:
    """Be the loop: wait for what the client waits for, and tell it."""
    while not done():
        poll, want = select.poll(), client.direction()
        poll.register(client.fileno(), (select.POLLIN * bool(want & Want.READ)) | (select.POLLOUT * bool(want & Want.WRITE)))
        events = poll.poll(PATIENCE * 1000)
        assert events, "nothing happens"
        try:
            (client.notify_write if events[0][1] == select.POLLOUT else client.notify_read)()
        except Disconnected:
            assert done()


FRONT_ENDS = [blocking, polled, asynchronous]
each_front_end = pytest.mark.parametrize("use", FRONT_ENDS, ids=lambda it: it.__name__)
_OPTIONS = {"export", "tls", "allow_transports", "allow_local_files"}


def _sorted(where: tuple, how: dict[str, Any]) -> tuple[tuple, dict[str, Any], dict[str, Any]]:
    """Tell a call's own arguments from the client's options."""
    return where, {k: v for k, v in how.items() if k not in _OPTIONS}, {k: v for k, v in how.items() if k in _OPTIONS}


# ---------------------------------------------------------------------------------------------- connecting


@pytest.fixture
def server() -> Iterator[Server]:
    disk = MemoryDisk(DISK)
    disk.pwrite(WORDS, 8)
    with Server({EXPORT: disk}) as running:
        yield running


@pytest.fixture
def port(server) -> int:
    return server.listen("tcp", host="127.0.0.1", port=0).address.port


@pytest.fixture
def path(server, socket_path) -> Path:
    server.listen("unix", path=str(socket_path))
    return socket_path


@pytest.fixture
def program(monkeypatch, tmp_path, eventually) -> Iterator[StandIn]:
    """ssh is played, and every program that was run has ended."""
    before = leaks.children().keys()
    yield StandIn(tmp_path / "bin", monkeypatch)
    eventually(lambda: leaks.children().keys() <= before, "the programs ended, and were reaped")
    eventually(lambda: not [it for it in threading.enumerate() if it.name == "nbdcore-command"], "their threads ended")


def connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return sock


REACHED = (DISK, WORDS, False)


@each_front_end
def test_tcp(use, port):
    assert use("connect_tcp", "127.0.0.1", port, export=EXPORT) == REACHED
    assert use("connect_tcp", "localhost", port, keepalive=True, export=EXPORT) == REACHED
    assert use("connect_transport", "tcp", host="127.0.0.1", port=port, export=EXPORT) == REACHED


@each_front_end
def test_unix(use, server, path):
    names = [path, str(path), str(path).encode()]
    if sys.platform == "linux":
        names.append(f"\0nbdcore-{id(server)}")
        server.listen("unix", path=names[-1])
    for name in names:
        assert use("connect_unix", name, export=EXPORT) == REACHED
    assert use("connect_transport", "unix", path=names[-1], export=EXPORT) == REACHED


@each_front_end
def test_uris(use, port, path, program):
    assert use("connect", f"nbd://127.0.0.1:{port}/{EXPORT}") == REACHED
    assert use("connect", f"nbd+unix:///{EXPORT}?socket={path}") == REACHED
    assert use("connect", f"nbd+ssh://db.example/{EXPORT}?socket={path}", allow_transports=["ssh"]) == REACHED
    assert len(program.calls()) == 1


@each_front_end
def test_ssh(use, port, path, program):
    assert use("connect_ssh", "db.example", socket=str(path), user="bob", export=EXPORT) == REACHED
    assert use("connect_ssh", "db.example", port=port, ssh_port=2222, export=EXPORT) == REACHED
    assert program.calls() == [
        ["-T", "-l", "bob", "--", "db.example", f"nc -U {path}"],
        ["-T", "-p", "2222", "--", "db.example", f"nc localhost {port}"],
    ]


@each_front_end
@pytest.mark.interop("nbdkit")
def test_programs(use, program):
    nbdkit = path_of("nbdkit")
    assert use("connect_command", [nbdkit, "-s", "memory", str(DISK)]) == (DISK, bytes(8), False)
    assert use("connect_socket_activation", [nbdkit, "memory", str(DISK)]) == (DISK, bytes(8), False)
    assert use("connect_socket_activation", [nbdkit, "memory", str(DISK)], name="disk-1") == (DISK, bytes(8), False)


@each_front_end
def test_what_is_open_already(use, path):
    assert use("connect_socket", connected(path), export=EXPORT) == REACHED
    assert use("connect_socket", connected(path).detach(), export=EXPORT) == REACHED
    assert use("connect_stream", SocketStream(connected(path)), export=EXPORT) == REACHED
    assert use("connect_stream", ChoppyStream(SocketStream(connected(path)), most=3, seed=1), export=EXPORT) == REACHED


@each_front_end
@pytest.mark.parametrize("method", ["tcp", "unix", "uri", "socket", "stream", "ssh"])
def test_tls_over_every_method(use, method, tmp_path, socket_path, program):
    ca = CertificateAuthority()
    pki = ca.write(tmp_path / "pki", server=ca.issue("server", "127.0.0.1"))
    with Server({EXPORT: MemoryDisk(DISK)}, tls=ServerTLS(certificates=pki)) as server:
        server.listen("unix", path=str(socket_path))
        port = server.listen("tcp", host="127.0.0.1", port=0).address.port
        methods: dict[str, Callable[[], tuple]] = {
            "tcp": lambda: ("connect_tcp", "127.0.0.1", port),
            "unix": lambda: ("connect_unix", socket_path),
            "uri": lambda: ("connect", f"nbds://127.0.0.1:{port}/{EXPORT}"),
            "socket": lambda: ("connect_socket", connected(socket_path)),
            "stream": lambda: ("connect_stream", SocketStream(connected(socket_path))),
            "ssh": lambda: ("connect_transport", "ssh"),
        }
        more = {"host": "db.example", "socket": str(socket_path)} if method == "ssh" else {}
        tls = TLS(ca=pki / "ca-cert.pem")
        assert use(*methods[method](), **more, tls=tls, export=EXPORT) == (DISK, bytes(8), True)
        with pytest.raises(TLSError, match="a CA that is not trusted here"):
            use(*methods[method](), **more, tls=True, export=EXPORT)


@each_front_end
def test_a_uri_may_do_no_more_than_it_is_allowed_to(use, tmp_path):
    for uri, options in [
        ("nbd+ssh://db.example/", {}),
        ("nbd://localhost/", {"allow_transports": ["unix"]}),
        (f"nbds://localhost/?tls-certificates={tmp_path}", {}),
        ("nbds://localhost/?tls-verify-peer=0", {}),
    ]:
        with pytest.raises(UsageError) as caught:
            use("connect", uri, **options)
        assert caught.value.errno == errno.EPERM


@each_front_end
def test_what_cannot_be_reached_is_said_with_its_reason(use, socket_path, program):
    with pytest.raises(TransportError) as caught:
        use("connect_unix", socket_path)
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(TransportError, match="cannot run /nonexistent"):
        use("connect_command", ["/nonexistent"])
    with pytest.raises(Disconnected, match="ended with status 1: no disk today"):
        use("connect_command", [sys.executable, "-I", "-c", "import sys; sys.exit('no disk today')"])


@each_front_end
def test_what_is_no_way_is_a_usage_error_and_stays_the_callers(use):
    near, far = socket.socketpair(type=socket.SOCK_DGRAM)
    with near, far:
        for call, where in [
            ("connect_socket", near),
            ("connect_stream", near),
            ("connect_command", []),
            ("connect_unix", ""),
            ("connect", "nbd+unix:///"),
        ]:
            with pytest.raises(UsageError):
                use(call, where)
        near.send(b"still open")


@pytest.mark.parametrize("use", [blocking, asynchronous], ids=lambda it: it.__name__)
@pytest.mark.parametrize("given", ["socket", "descriptor", "stream"])
def test_what_was_given_stays_the_callers_after_a_wrong_timeout(use, given):
    near, far = socket.socketpair()
    with near, far:
        stream = SocketStream(near.dup())
        call, where = {
            "socket": ("connect_socket", near),
            "descriptor": ("connect_socket", near.fileno()),
            "stream": ("connect_stream", stream),
        }[given]
        with pytest.raises(UsageError, match="a timeout is a number of seconds"):
            use(call, where, timing={"timeout": -1})
        near.send(b"open")
        assert far.recv(4) == b"open"
        assert stream.send([memoryview(b"this too")]) == 8
        stream.close()


@pytest.mark.parametrize("use", [blocking, asynchronous], ids=lambda it: it.__name__)
@pytest.mark.parametrize("call", ["connect_unix", "connect", "connect_transport"])
def test_a_server_that_is_not_up_yet_is_waited_for(use, call, server, socket_path):
    late = threading.Timer(0.2, lambda: server.listen("unix", path=str(socket_path)))
    where = {
        "connect_unix": [socket_path],
        "connect": [f"nbd+unix:///{EXPORT}?socket={socket_path}"],
        "connect_transport": ["unix"],
    }[call]
    more = {"path": str(socket_path)} if call == "connect_transport" else {}
    late.start()
    try:
        assert use(call, *where, **more, timing={"wait": PATIENCE}, export=EXPORT) == REACHED
    finally:
        late.join(PATIENCE)
    with pytest.raises(DeadlineExceeded, match="no server at"):
        use("connect_unix", f"{socket_path}-none", timing={"wait": 0.05})


@pytest.mark.parametrize("use", [blocking, asynchronous], ids=lambda it: it.__name__)
def test_a_server_that_never_comes_up_is_said_to_be_down_in_its_last_words(use, program):
    with pytest.raises(DeadlineExceeded, match=r"no server at the command .* within 0\.3 s \(.*: no disk today\)") as caught:
        use("connect_command", [sys.executable, "-I", "-c", "import sys; sys.exit('no disk today')"], timing={"wait": 0.3})
    assert isinstance(caught.value.__cause__, Disconnected)


@pytest.mark.parametrize("use", [blocking, asynchronous], ids=lambda it: it.__name__)
def test_what_no_waiting_heals_ends_it_at_once(use, path, tmp_path):
    timing = {"wait": PATIENCE}
    with pytest.raises(NegotiationError, match="none"):
        use("connect_unix", path, timing=timing, export="none")
    with pytest.raises(TLSError, match="TLS is required"):
        use("connect_unix", path, timing=timing, export=EXPORT, tls=True)
    ca = CertificateAuthority()
    pki = ca.write(tmp_path / "pki", server=ca.issue("server", "127.0.0.1", days=(-3, -2)))
    with Server(MemoryDisk(DISK), tls=ServerTLS(certificates=pki)) as encrypted:
        port = encrypted.listen("tcp", host="127.0.0.1", port=0).address.port
        with pytest.raises(TLSError, match="has expired"):
            use("connect_tcp", "127.0.0.1", port, timing=timing, tls=TLS(ca=pki / "ca-cert.pem"))


@pytest.mark.parametrize("use", [blocking, asynchronous], ids=lambda it: it.__name__)
def test_a_login_that_is_refused_is_not_waited_for(use, program):
    with pytest.raises(Disconnected, match="Could not resolve"):
        use("connect_ssh", "broken.example", timing={"wait": PATIENCE})
    assert len(program.calls()) == 1


def test_the_front_ends_differ_in_nothing_but_the_waiting():
    """A call of one is a call of all, with the same arguments."""
    calls, asyncios, polleds = (
        {name for name in dir(kind) if name == "connect" or name.startswith("connect_")}
        for kind in (Client, AsyncClient, PolledClient)
    )
    assert calls == asyncios == polleds - {"connect_steps"}
    for call in calls:
        of = {kind: inspect.signature(getattr(kind, call)).parameters for kind in (Client, AsyncClient, PolledClient)}
        said = {kind: [(p.name, p.kind, p.default) for p in of[kind].values()] for kind in of}
        assert said[Client] == said[AsyncClient], call
        assert said[Client] == said[PolledClient], call

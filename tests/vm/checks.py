"""What the VM tests have nbdcore do in the guest: each function is the guest's part of one test of test_vsock.py.

A check that fails raises; what the host must know, it returns. Every wait has a deadline well within that of a call.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbdcore
from nbdcore import aio
from nbdcore.clients.polled import PolledClient
from nbdcore.plugins.registry import registry
from nbdcore.protocol.handshake.agreement import Settings
from nbdcore.protocol.transmission import commands
from nbdcore.server import MemoryDisk, Server
from nbdcore.streams.waiting import NEVER, drive

#: The disks of these tests, in bytes.
SIZE = 1 << 20
#: What the guest changes on a disk: offset, and what it writes there. Neither end of the second is on any block's boundary.
WRITTEN = ((0, b"first"), (300_001, bytes(range(255, -1, -1)) * 400), (SIZE - 4, b"last"))
ZEROED = (65536, 131072)  # offset, length

# The virtual machine itself, over vsock_loopback.
HERE = 1
# Seconds for one step between two programs of the guest, which run 12 to 20 times slower than outside of it, on a busy machine.
STEP = 60.0
COMMAND = Path(sys.executable).with_name("nbdcore")


def original() -> bytes:
    """Return what is on a disk before the guest changes it: no two blocks are equal."""
    period = bytes(range(251))  # a prime number of bytes
    return (period * (SIZE // len(period) + 1))[:SIZE]


def changed() -> bytes:
    """Return what is on it afterwards."""
    disk = bytearray(original())
    for offset, data in WRITTEN:
        disk[offset : offset + len(data)] = data
    offset, length = ZEROED
    disk[offset : offset + length] = bytes(length)
    return bytes(disk)


# What loaded


def prepare() -> None:
    """Look for the plugins: in the agent, once for all checks."""
    nbdcore.supports_vsock()


def supports_vsock() -> bool:
    return nbdcore.supports_vsock()


# The disk of a server on the host


def changes_the_disk(cid: int, port: int) -> None:
    with nbdcore.connect_vsock(cid=cid, port=port, timeout=STEP) as disk:
        check(disk.size, SIZE, "the disk's size")
        check(disk.pread(SIZE, offset=0, timeout=STEP), original(), "the disk's content")
        change(disk)
        check(disk.pread(SIZE, offset=0, timeout=STEP), changed(), "the disk's content once changed")


def change(disk: nbdcore.Client) -> None:
    for offset, data in WRITTEN:
        disk.pwrite(data, offset=offset, timeout=STEP)
    offset, length = ZEROED
    disk.zero(length, offset=offset, timeout=STEP)
    disk.flush(timeout=STEP)


def default_address_leads_to_the_host() -> None:
    """The host's export has one name, and every way to say CID 2, port 10809 must lead to it."""
    ways: dict[str, Callable[[], nbdcore.Client]] = {
        "connect_vsock()": lambda: nbdcore.connect_vsock(timeout=STEP),
        "connect_vsock(2)": lambda: nbdcore.connect_vsock(2, timeout=STEP),
        **{
            uri: lambda uri=uri: nbdcore.connect(uri, timeout=STEP)  # type: ignore[misc]
            for uri in ("nbd+vsock://", "nbd+vsock:///", "nbd+vsock://2", "nbd+vsock://2:10809/")
        },
    }
    for way, connect in ways.items():
        with connect() as disk:
            check(disk.pread(5, offset=0, timeout=STEP), b"hello", way)


def export_is_chosen_by_uri(port: int) -> list[str]:
    with nbdcore.connect(f"nbd+vsock://2:{port}/second%20disk", timeout=STEP) as disk:
        check(disk.pread(6, offset=0, timeout=STEP), b"second", "the named export")
    return [export.name for export in nbdcore.list_exports(f"nbd+vsock://2:{port}", timeout=STEP)]


# Client and server in the guest, over CID 1


def client_talks_to_own_server() -> None:
    disk = MemoryDisk(SIZE)
    disk.pwrite(original(), 0)
    with Server(disk) as server:
        port = _listen(server)
        changes_the_disk(cid=HERE, port=port)
        with nbdcore.connect(f"nbd+vsock://1:{port}", timeout=STEP) as client:
            extents = list(client.extents("base:allocation", timeout=STEP))
    check([(extent.offset, extent.length) for extent in extents if extent.hole], [ZEROED], "the disk's holes")


def every_front_end_talks_to_own_server() -> None:
    disk = MemoryDisk(SIZE)
    disk.pwrite(original(), 0)
    with Server(disk) as server:
        port = _listen(server)
        for connect in (_by_asyncio, _by_polling):
            check(connect(port), original()[4096:8192], f"the disk's content {connect.__name__}")


def _by_asyncio(port: int) -> bytes:
    async def read() -> bytes:
        async with aio.connect_vsock(HERE, port, timeout=STEP) as client:
            return await client.pread(4096, 4096, timeout=STEP)

    return asyncio.run(read())


def _by_polling(port: int) -> bytes:
    client = PolledClient(Settings())
    client.connect_vsock(HERE, port)
    while client.phase is nbdcore.Phase.CONNECTING:
        client.poll(STEP)
    command = commands.read(client.engine.limits, 4096, 4096)
    client.submit(command)
    while not command.done:
        client.poll(STEP)
    client.close()
    return bytes(command.result())


def client_talks_to_nbdkit() -> None:
    with running("nbdkit", "--foreground", "--vsock", "--port=10810", "pattern", f"size={SIZE}") as server:
        _await_listener(server, 10810)
        with nbdcore.connect_vsock(cid=HERE, port=10810, timeout=STEP) as disk:
            check(disk.size, SIZE, "the disk's size")
            check(disk.pread(16, offset=4096, timeout=STEP), (4096).to_bytes(8, "big") + (4104).to_bytes(8, "big"), "its content")


def nbdinfo_talks_to_own_server() -> None:
    with Server(MemoryDisk(SIZE)) as server:
        server.listen("vsock", port=10813)  # nbdinfo takes no port of 2^31 or more, and the kernel may choose one
        size = subprocess.check_output(["nbdinfo", "--size", "nbd+vsock://1:10813/"], timeout=STEP)
    check(size, b"%d\n" % SIZE, "the size that nbdinfo shows")


def command_serves_vsock() -> None:
    with running(COMMAND, "serve", "--memory", "1M", "--vsock", "10811") as server:
        _await_listener(server, 10811)
        with nbdcore.connect_vsock(cid=HERE, port=10811, timeout=STEP) as disk:
            disk.pwrite(b"served", offset=0, timeout=STEP)
            check(disk.pread(7, offset=0, timeout=STEP), b"served\0", "what was written")


def serves_a_client_of_the_host(port: int) -> None:
    """Serve until a client has come, changed the disk, and gone."""
    backend = _Watched()
    with Server(backend) as server:
        server.listen("vsock", port=port)
        check(backend.flushed.wait(STEP), True, "somebody changed the disk, and flushed it, in time")
        check(backend.pread(SIZE, 0), changed(), "the disk's content once changed")


class _Watched(MemoryDisk):
    def __init__(self) -> None:
        super().__init__(SIZE)
        self.pwrite(original(), 0)
        self.flushed = threading.Event()

    def flush(self) -> None:
        super().flush()
        self.flushed.set()


# Errors


def refusal(**address: Any) -> dict[str, Any]:
    """Return how connecting to that address fails."""
    return _error_of(lambda: nbdcore.connect_vsock(**address))


def refusal_by_the_kernel(cid: int, port: int, timeout: float) -> dict[str, Any]:
    """Return how connecting fails where only the kernel's own limit ends it: nobody else here looks at a clock."""
    transport = registry.get("vsock")
    return _error_of(lambda: drive(transport.connect(transport.address(cid=cid, port=port), timeout=timeout), NEVER, "never"))


def listening_twice_is_refused() -> dict[str, Any]:
    with Server(MemoryDisk(SIZE)) as server:
        port = _listen(server)
        return _error_of(lambda: server.listen("vsock", port=port))


def serving_on_a_privileged_port_is_refused() -> dict[str, Any]:
    unprivileged = ["setpriv", "--bounding-set=-net_bind_service", "--inh-caps=-all"]
    command = [*unprivileged, COMMAND, "serve", "--memory", "1M", "--vsock", "1023"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=STEP)
    return {"status": ended.returncode, "output": ended.stdout, "errors": ended.stderr}


def server_dies_in_the_middle_of_a_read() -> dict[str, Any]:
    """The server's answer to a read is to kill itself. The error, and the one of the call after it, are returned."""
    suicide = ["eval", f"get_size=echo {SIZE}", "pread=kill -KILL $PPID; sleep 60"]
    with running("nbdkit", "--foreground", "--vsock", "--port=10812", *suicide) as server:
        _await_listener(server, 10812)
        disk = nbdcore.connect_vsock(cid=HERE, port=10812, timeout=STEP)
        errors = {name: _error_of(lambda: disk.pread(512, offset=0, timeout=STEP)) for name in ("first", "second")}
        disk.close()
    return errors


def _error_of(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        call()
    except nbdcore.Error as error:
        return {"kind": type(error).__name__, "errno": errno.errorcode.get(error.errno or 0), "message": str(error)}
    raise AssertionError("it succeeded")


# Means


def check(found: object, wanted: object, what: str) -> None:
    if found != wanted:
        if isinstance(found, bytes) and isinstance(wanted, bytes):
            differing = (at for at, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1])
            at = next(differing, min(len(found), len(wanted)))
            what, found, wanted = f"{what}, from byte {at} on", found[at : at + 32], wanted[at : at + 32]
        raise AssertionError(f"{what}: found {found!r}, wanted {wanted!r}")


def _listen(server: Server) -> int:
    """Listen on a port that the kernel chooses, and return its number."""
    address: Any = server.listen("vsock", port=0).address
    port: int = address.port
    return port


@contextmanager
def running(*command: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as server:
        try:
            yield server
        finally:
            server.kill()


def _await_listener(server: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + STEP
    while True:
        with socket.socket(socket.AF_VSOCK) as probe:
            probe.settimeout(STEP)
            refused = probe.connect_ex((HERE, port))
        if not refused:
            return
        check(refused, errno.ECONNRESET, f"connecting to a server that starts ({os.strerror(refused)})")
        check(server.poll(), None, "the server's exit status")
        check(time.monotonic() < until, True, f"a server listens on port {port} in time")
        time.sleep(0.02)

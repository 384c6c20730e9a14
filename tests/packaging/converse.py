"""Run by a fresh environment's Python: serve a disk over TCP, and write and read it through the library.

`converse.py` does so over TCP itself, `converse.py proxy` through the third party's proxy transport. What the library says about
its transports is printed as JSON.
"""

from __future__ import annotations

import json
import sys

import proxy_server

import nbdcore
from nbdcore.plugins.registry import registry
from nbdcore.server import MemoryDisk, Server

SIZE = 1 << 20


def converse(uri: str) -> None:
    with nbdcore.connect(uri, timeout=20) as disk:
        assert disk.size == SIZE
        disk.pwrite(b"NBD" * 1000, offset=4095, timeout=20)
    with nbdcore.connect(uri, timeout=20) as disk:
        assert disk.pread(3002, offset=4094, timeout=20) == b"\0" + b"NBD" * 1000 + b"\0"


def main() -> None:
    with Server(MemoryDisk(SIZE)) as server:
        address = server.listen("tcp", host="127.0.0.1", port=0).address
        if sys.argv[1:] == ["proxy"]:
            with proxy_server.proxy() as port:
                converse(f"nbd+proxy://127.0.0.1:{address.port}/?proxy=127.0.0.1:{port}")
        else:
            converse(address.uri())
    states = {status.name: [status.state.value, status.reason, status.distribution] for status in registry.statuses()}
    json.dump({"vsock": nbdcore.supports_vsock(), "tcp": nbdcore.supports_tcp(), "states": states}, sys.stdout)


main()

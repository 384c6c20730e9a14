"""An HTTP proxy that knows CONNECT, for one client at a time, in a thread.

It waits for the server's first words before it answers, and sends both in one go: a client that reads one byte of the answer too
many loses the NBD server's greeting.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator

DEADLINE = 20  # seconds; nothing here may outlive its test


@contextlib.contextmanager
def proxy() -> Iterator[int]:
    """Run the proxy; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_serve, args=(listener,), daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            with contextlib.suppress(OSError):  # wakes accept; not on every system
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            thread.join(DEADLINE)


def _serve(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            client, _ = listener.accept()
            with client:
                client.settimeout(DEADLINE)
                _relay_to_where_asked(client)


def _relay_to_where_asked(client: socket.socket) -> None:
    request = b""
    while not request.endswith(b"\r\n\r\n"):
        request += client.recv(4096)
    host, _, port = request.split()[1].decode().rpartition(":")
    try:
        server = socket.create_connection((host, int(port)), timeout=DEADLINE)
    except OSError:
        client.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
        return
    with server:
        client.sendall(b"HTTP/1.1 200 Connection established\r\nVia: 1.1 test\r\n\r\n" + server.recv(4096))
        _relay(client, server)


def _relay(client: socket.socket, server: socket.socket) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(client, selectors.EVENT_READ, server)
        selector.register(server, selectors.EVENT_READ, client)
        while ready := selector.select(DEADLINE):
            for key, _ in ready:
                data = key.fileobj.recv(65536)
                if not data:
                    return
                key.data.sendall(data)

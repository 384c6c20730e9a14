"""A server of a few dozen lines that behaves as a test says: it knows the handshake, and serves no byte of any disk."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator

DEADLINE = 20  # seconds; nothing here outlives its test

GREETING = struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3)
OLDSTYLE = struct.pack(">QQQI124x", 0x4E42444D41474943, 0x00420281861253, 1 << 20, 1)
LIST, INFO, GO = 3, 6, 7
ACK, SERVER, INFORMATION = 1, 2, 3
UNSUPPORTED, UNKNOWN = 1 << 31 | 1, 1 << 31 | 6

Conversation = Callable[[socket.socket], None]


@contextlib.contextmanager
def listening(conversation: Conversation, *, clients: int = 64) -> Iterator[str]:
    """Hold a conversation with each client, one after another, and no more than `clients`; gives the server's URI.

    Nobody listens any more when the last conversation begins, so that whoever comes later is refused, and not cut off.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE)
        thread = threading.Thread(target=_serve, args=(listener, conversation, clients), daemon=True)
        thread.start()
        try:
            yield f"nbd://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join(DEADLINE)
    assert not thread.is_alive()


def _serve(listener: socket.socket, conversation: Conversation, clients: int) -> None:
    for left in reversed(range(clients)):
        try:
            client, _ = listener.accept()
        except OSError:
            return
        if not left:
            listener.close()
        with client, contextlib.suppress(OSError):
            client.settimeout(DEADLINE)
            conversation(client)


def receive(client: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = client.recv(count - len(data))
        if not more:
            raise ConnectionError
        data += more
    return data


def reply(client: socket.socket, option: int, kind: int, payload: bytes = b"") -> None:
    client.sendall(struct.pack(">QIII", 0x3E889045565A9, option, kind, len(payload)) + payload)


def counted(name: bytes) -> bytes:
    return struct.pack(">I", len(name)) + name


def size_and_flags(size: int) -> bytes:
    return struct.pack(">HQH", 0, size, 1)


def negotiating(answer: Callable[[socket.socket, int, bytes], bool]) -> Conversation:
    """Return the conversation of a fixed newstyle server: `answer(client, option, data)` says whether it goes on."""

    def converse(client: socket.socket) -> None:
        client.sendall(GREETING)
        receive(client, 4)
        while True:
            _, option, length = struct.unpack(">QII", receive(client, 16))
            data = receive(client, length)
            if option == 2 or not answer(client, option, data):  # NBD_OPT_ABORT
                return

    return converse

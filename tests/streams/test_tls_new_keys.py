"""A peer may change its keys at any time (RFC 8446 section 4.6.3), ask for the same in return, and offer to resume the session.

None of that costs us anything unbounded.

Python cannot make such a peer. So records are made here by hand, with the secrets that the `ssl` module logs.
"""

from __future__ import annotations

import struct

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from nbdcore.errors import TLSError
from nbdcore.streams.memory import memory_pair
from nbdcore.streams.tls import stream as tls_stream
from nbdcore.streams.tls.credentials import TLS, ServerTLS
from nbdcore.streams.tls.starting import client_starter, server_starter
from tests.certificates import CertificateAuthority
from tests.streams.tls_pairs import connected, receive, send

#: Handshake message 24, of one byte: update_requested.
KEY_UPDATE = b"\x18\x00\x00\x01\x01"
HANDSHAKE, APPLICATION_DATA = 22, 23


class Writer:
    """What a server says after its handshake: TLS_AES_256_GCM_SHA384 by hand."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret
        self.number = 0

    def record(self, kind: int, content: bytes) -> bytes:
        key, iv = self.derived(b"key", 32), self.derived(b"iv", 12)
        nonce = bytes(a ^ b for a, b in zip(iv, self.number.to_bytes(12, "big"), strict=True))
        self.number += 1
        plain = content + bytes([kind])
        header = struct.pack(">BHH", APPLICATION_DATA, 0x303, len(plain) + 16)
        return header + AESGCM(key).encrypt(nonce, plain, header)

    def key_update(self) -> bytes:
        record = self.record(HANDSHAKE, KEY_UPDATE)
        self.secret, self.number = self.derived(b"traffic upd", 48), 0
        return record

    def ticket(self) -> bytes:
        """Offer to resume the session (RFC 8446 section 4.6.1): a lifetime, an age, a nonce, the ticket, no extensions."""
        body = struct.pack(">II", 1, 2) + b"\x01n" + b"\x00\x01t" + b"\x00\x00"
        return self.record(HANDSHAKE, b"\x04" + len(body).to_bytes(3, "big") + body)

    def derived(self, label: bytes, length: int) -> bytes:
        label = b"tls13 " + label
        info = struct.pack(">HB", length, len(label)) + label + b"\0"
        return HKDFExpand(hashes.SHA384(), length, info).derive(self.secret)


@pytest.fixture
def ends(tmp_path):
    """A client, the plain stream at its other end, and what writes on it as the server."""
    ca = CertificateAuthority()
    folder = ca.write(tmp_path, server=ca.issue("server", "db.example"))
    client = client_starter(TLS(certificates=folder, priority="SECURE256:-VERS-TLS1.2"), "db.example")
    client.keywords["context"].keylog_filename = str(tmp_path / "secrets")
    plain = memory_pair(capacity=4096)
    with connected(client, server_starter(ServerTLS(certificates=folder)), lambda: plain) as (near, _):
        assert near.cipher == "TLS_AES_256_GCM_SHA384"
        secrets = dict(line.split()[::2] for line in (tmp_path / "secrets").read_text().splitlines() if line[0] != "#")
        yield near, plain[1], Writer(bytes.fromhex(secrets["SERVER_TRAFFIC_SECRET_0"]))
        client.keywords["context"].keylog_filename = None  # closes it


def test_new_keys_are_taken_and_the_request_is_answered(ends):
    near, far, writer = ends
    send(far, writer.record(APPLICATION_DATA, b"old keys") + writer.key_update() + writer.record(APPLICATION_DATA, b", new keys"))
    assert receive(near) == b"old keys, new keys"
    # The answer comes before the next data at the latest.
    send(near, b"data")
    answer, data = 5 + len(KEY_UPDATE) + 1 + 16, 5 + len(b"data") + 1 + 16
    assert len(receive(far)) == answer + data


def test_answers_that_nobody_receives_are_bounded(ends):
    near, far, writer = ends
    room = memoryview(bytearray(100))

    def flood() -> None:
        for _ in range(5 * tls_stream._MOST_ANSWERS):
            send(far, writer.key_update())
            near.recv_into(room)

    with pytest.raises(TLSError, match="asks for new keys without end"):
        flood()
    assert len(near._unsent) <= tls_stream._MOST_ANSWERS + 1


class Tickets:
    """A stream below on which there always is one ticket more, and some time data."""

    def __init__(self, stream, writer):
        self._stream = stream
        self._writer = writer
        self._left = 100

    def recv_into(self, room):
        self._left -= 1
        record = self._writer.ticket() if self._left > 0 else self._writer.record(APPLICATION_DATA, b"data")
        room[: len(record)] = record
        return len(record)

    def __getattr__(self, name):
        return getattr(self._stream, name)


def test_peer_that_always_has_another_ticket_does_not_keep_the_caller(ends):
    near, _, writer = ends
    near._stream = Tickets(near._stream, writer)
    room = memoryview(bytearray(100))
    answers = [near.recv_into(room)]
    while answers[-1] is None:
        assert not near.buffered()  # so that nobody comes again before looking at the time
        answers.append(near.recv_into(room))
    assert len(answers) > 2
    assert answers[-1] == 4

"""What a program says about TLS: whom it trusts and what it shows, as frozen values.

`TLS` is a client's, `ServerTLS` a server's. A value holds paths and settings, no key, no open file and no `ssl` object, so it can
be compared, printed and pickled. Its files are read when TLS is made ready to start (see `starting`), and not before.
"""

from __future__ import annotations

import errno
import importlib.util
import os
from dataclasses import dataclass

from nbdcore.errors import UsageError

__all__ = ["TLS", "ServerTLS", "supports_tls", "supports_tls_psk"]

Path = str | os.PathLike[str]


def supports_tls() -> bool:
    """Return whether this Python can do TLS at all: it can be built without."""
    return importlib.util.find_spec("_ssl") is not None


def supports_tls_psk() -> bool:
    """Return whether this Python can do TLS with pre-shared keys: CPython 3.13 or later, and an OpenSSL that was built for it."""
    if not supports_tls():
        return False
    import ssl

    # The attribute itself came with 3.13.
    return bool(getattr(ssl, "HAS_PSK", False))


@dataclass(frozen=True, slots=True, kw_only=True)
class TLS:
    """How a client does TLS; without arguments it trusts the system's CAs and shows no certificate.

    The server's certificate must lead to a trusted CA, always; and it must be for the server's name whenever one is known:
    `hostname`, else the host that was connected to. Over unix sockets, vsock and the like no name is known unless `hostname`
    says one. The name that is checked is also the one that the server is told (SNI), unless it is an address.

    Args:
        certificates: a folder laid out as libnbd's and QEMU's: `ca-cert.pem`, the CAs to trust; optionally `client-cert.pem` and
            `client-key.pem`, what to show; optionally `ca-crl.pem`, the CAs' revocation lists.
        ca: a file of CAs to trust, in place of the folder's.
        certificate: the file of the certificate to show, in place of the folder's; its chain follows it.
        key: the file of its key, not encrypted; left out, it is in the certificate's file.
        verify: False accepts any certificate from anybody, and so anybody in the middle. It has no influence on pre-shared keys.
        hostname: the name or address to check for in place of the host's; "" checks the chain only.
        psk_file: a file of `user:hexkey` lines. Then both sides prove that they know the key, and no certificates are used.
        username: the user whose key is taken, the first in the file; left out, the user that runs the program.
        priority: what GnuTLS calls a priority string, as far as OpenSSL can do the same: "SECURE256", "NORMAL:-VERS-TLS1.2".
        ciphers: an OpenSSL cipher list for TLS 1.2, in place of `priority`. TLS 1.3's ciphers are all good.

    Raises UsageError for arguments that exclude each other.
    """

    certificates: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    verify: bool = True
    hostname: str | None = None
    psk_file: Path | None = None
    username: str | None = None
    priority: str | None = None
    ciphers: str | None = None

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTLS:
    """How a server does TLS: with a certificate, or with pre-shared keys.

    Args:
        certificates: a folder laid out as nbdkit's and QEMU's: `server-cert.pem` and `server-key.pem`, what to show;
            `ca-cert.pem` and optionally `ca-crl.pem`, which clients' certificates are verified with.
        ca: a file of CAs of clients, in place of the folder's.
        certificate: the file of the certificate to show, in place of the folder's; its chain follows it.
        key: the file of its key, not encrypted; left out, it is in the certificate's file.
        verify_clients: turn clients away that show no certificate which leads to one of these CAs.
        psk_file: a file of `user:hexkey` lines: the clients admitted. Then no certificates are used.
        priority: as a client's.
        ciphers: as a client's.

    Raises UsageError for arguments that exclude each other, and for none at all.
    """

    certificates: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    verify_clients: bool = False
    psk_file: Path | None = None
    priority: str | None = None
    ciphers: str | None = None

    def __post_init__(self) -> None:
        _check(self)
        if self.psk_file is None and self.certificates is None and self.certificate is None:
            raise _wrong("a TLS server shows a certificate (certificates=, or certificate= and key=) or takes pre-shared keys")
        if self.verify_clients and self.psk_file is not None:
            raise _wrong("clients with pre-shared keys show no certificates to verify")
        if self.verify_clients and self.certificates is None and self.ca is None:
            raise _wrong("to verify clients takes a CA that issued their certificates: ca=, or a folder with ca-cert.pem")


def _check(credentials: TLS | ServerTLS) -> None:
    """Refuse what contradicts itself: to take one of two would surprise somebody."""
    if credentials.psk_file is not None and not credentials.certificates == credentials.ca == credentials.certificate is None:
        raise _wrong("TLS uses certificates or pre-shared keys: psk_file= excludes certificates=, ca= and certificate=")
    if credentials.key is not None and credentials.certificate is None:
        raise _wrong("key= names the key of a certificate: certificate= is missing")
    if credentials.priority is not None and credentials.ciphers is not None:
        raise _wrong("priority= (GnuTLS' words) and ciphers= (OpenSSL's) say the same thing: give one of them")


def _wrong(message: str) -> UsageError:
    return UsageError(errno.EINVAL, message)

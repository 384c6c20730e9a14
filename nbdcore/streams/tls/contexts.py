"""Credentials turned into what the `ssl` module wants: its contexts.

What holds for every connection is decided in `_context`: TLS 1.2 at least, no renegotiation, no anonymous peers. A client of
pre-shared keys trusts no CA at all: a server that ignores the key and shows a certificate, whoever issued it, fails the
handshake; and what the handshake has come to is looked at afterwards (see `stream`).
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import ipaddress
import os
import ssl
from collections.abc import Iterator
from pathlib import Path

from nbdcore.errors import UsageError, printable
from nbdcore.streams.base import from_signal_handler
from nbdcore.streams.tls.credentials import TLS, ServerTLS
from nbdcore.streams.tls.keys import read_keys
from nbdcore.streams.tls.priorities import Priority, parse_priority

__all__ = ["checked_name", "client_context", "least_bits", "server_context"]

#: The suites of TLS 1.2 whose sessions stay secret when a key becomes known later, the fastest first.
_PSK_CIPHERS = "kDHEPSK+AESGCM:kECDHEPSK+CHACHA20:kDHEPSK+CHACHA20:kECDHEPSK:kDHEPSK:!CAMELLIA:!ARIA:!AESCCM:!SHA1"
#: Ends every list: no anonymous peers, no plain text.
_NEVER_CIPHERS = "!aNULL:!eNULL"

AnyPath = str | os.PathLike[str]


def client_context(credentials: TLS, name: str | None) -> ssl.SSLContext:
    """Return the context of a client that checks certificates for `name`; None checks the chain only."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, credentials)
    if credentials.psk_file is not None:
        context.check_hostname = False
        user = _username(credentials)
        keys = read_keys(credentials.psk_file)
        if user not in keys:
            raise _wrong(f"there is no pre-shared key of the user {printable(user)!r} in {_shown(credentials.psk_file)}")
        # A call that Python before 3.13 does not have: `client_starter` has looked.
        context.set_psk_client_callback(lambda _hint: (user, keys[user]))  # type: ignore[attr-defined]
        return context
    context.check_hostname = credentials.verify and name is not None
    if not credentials.verify:
        context.verify_mode = ssl.CERT_NONE
    _trust(context, credentials)
    _show(context, credentials, "client")
    return context


def server_context(credentials: ServerTLS) -> ssl.SSLContext:
    """Return the context of a server."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, credentials)
    # Nobody resumes sessions of NBD, and a ticket would be the first thing that a client has to receive.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    if credentials.psk_file is not None:
        keys = read_keys(credentials.psk_file)
        context.set_psk_server_callback(lambda user: keys.get(user or "", b""))  # type: ignore[attr-defined]
        return context
    if credentials.verify_clients:
        context.verify_mode = ssl.CERT_REQUIRED
        _trust(context, credentials)
    _show(context, credentials, "server")
    return context


def checked_name(host: str | None) -> str | None:
    """Return the host as certificates have it, None for no name. Raises UsageError for what is neither name nor address."""
    if not host:
        return None
    # What follows in an IPv6 address is about this machine's interfaces; the last dot of a name is the DNS root's.
    name = host.partition("%")[0] if ":" in host else host.removesuffix(".")
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(name))
    try:
        # As the `ssl` module does later, when it would be too late for good words.
        encoded = name.encode("idna")
    except UnicodeError:
        encoded = b""
    if not encoded or encoded.startswith(b".") or b"\0" in encoded:
        raise _wrong(f"{printable(host)!r} is no host name that a certificate could be for")
    return name


def least_bits(credentials: TLS | ServerTLS) -> int:
    """Return how many secret bits the cipher agreed on must have."""
    return _priority(credentials).bits


def _context(protocol: int, credentials: TLS | ServerTLS) -> ssl.SSLContext:
    """Return a context with what all have in common."""
    context = ssl.SSLContext(protocol)
    priority = _priority(credentials)
    context.minimum_version = ssl.TLSVersion.TLSv1_2 if priority.tls12 else ssl.TLSVersion.TLSv1_3
    if not priority.tls13:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    ciphers = credentials.ciphers or (_PSK_CIPHERS if credentials.psk_file is not None else None)
    if ciphers is not None:
        _set_ciphers(context, f"{ciphers}:{_NEVER_CIPHERS}")
    if priority.bits or priority.without:
        wanted = [cipher["name"] for cipher in context.get_ciphers() if _is_wanted(cipher, priority)]
        _set_ciphers(context, ":".join(wanted))
    return context


def _is_wanted(cipher: ssl._Cipher, priority: Priority) -> bool:
    # TLS 1.3's names among those of a list are an error.
    return (
        cipher["protocol"] != "TLSv1.3"
        and cipher["strength_bits"] >= priority.bits
        and cipher["symmetric"] not in priority.without
    )


def _set_ciphers(context: ssl.SSLContext, ciphers: str) -> None:
    try:
        context.set_ciphers(ciphers)
    except (ssl.SSLError, ValueError) as exc:  # a ValueError for a NUL
        raise _wrong(f"OpenSSL knows no cipher among {printable(ciphers)!r}") from exc


def _priority(credentials: TLS | ServerTLS) -> Priority:
    return Priority() if credentials.priority is None else parse_priority(credentials.priority)


def _username(credentials: TLS) -> str:
    if credentials.username is not None:
        return credentials.username
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError) as exc:  # which of them depends on the Python version and the platform
        raise _wrong("nobody knows the user that runs this program: say username=") from exc


# ---------------------------------------------------------------------------------------------- files


def _trust(context: ssl.SSLContext, credentials: TLS | ServerTLS) -> None:
    """Load the CAs: those named, else the folder's, else the system's."""
    folder = None if credentials.certificates is None else Path(credentials.certificates)
    ca = credentials.ca if credentials.ca is not None or folder is None else folder / "ca-cert.pem"
    if ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        return
    with _reading("CA certificates", ca):
        context.load_verify_locations(ca)
    revoked = None if folder is None else folder / "ca-crl.pem"
    if revoked is not None and revoked.exists():
        with _reading("revocation lists", revoked):
            context.load_verify_locations(revoked)
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF


def _show(context: ssl.SSLContext, credentials: TLS | ServerTLS, side: str) -> None:
    """Load the certificate to show. A client's folder may have none."""
    certificate, key = credentials.certificate, credentials.key
    if certificate is None:
        if credentials.certificates is None:
            return
        folder = Path(credentials.certificates)
        certificate, key = folder / f"{side}-cert.pem", folder / f"{side}-key.pem"
        if side == "client" and not certificate.exists() and not key.exists():
            return
    for path in (certificate, key):
        if path is not None:
            with _reading("certificate or key", path), open(path, "rb"):  # noqa: PTH123 (any path-like)
                pass  # the ssl module does not say which of the two is missing
    with _reading("certificate and its key", certificate):
        context.load_cert_chain(certificate, key, password=_refuse_password)


def _refuse_password() -> str:
    # Without this OpenSSL would ask on the terminal.
    raise _wrong("the key is encrypted, which is not supported: decrypt it (openssl pkey) and protect the file")


@contextlib.contextmanager
def _reading(what: str, path: AnyPath) -> Iterator[None]:
    """Put into words why a file of this machine cannot be used."""
    try:
        yield
    except UsageError:
        raise
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise _wrong(f"the key is not that of the certificate {_shown(path)}") from exc
        raise _wrong(f"no {what} in PEM form can be read from {_shown(path)}: {exc.reason or exc}") from exc
    except OSError as exc:
        if from_signal_handler(exc):
            raise
        raise UsageError(exc.errno or 0, f"cannot read the {what} in {_shown(path)}: {exc.strerror}") from exc


def _shown(path: AnyPath) -> str:
    return printable(os.fspath(path))


def _wrong(message: str) -> UsageError:
    return UsageError(errno.EINVAL, message)

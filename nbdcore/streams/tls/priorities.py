"""GnuTLS priority strings in OpenSSL's terms, as far as the two can mean the same.

A priority string is a keyword, then changes to it: `NORMAL:-VERS-TLS1.2`. What every connection here has anyway (TLS 1.2 at
least, no anonymous peers, no compression, no renegotiation) may be said again. What would weaken that, and what Python's `ssl`
module has no way to ask for, is refused: silence would be taken for consent.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from nbdcore.errors import UsageError, printable

__all__ = ["Priority", "parse_priority"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Priority:
    """What a priority string comes to.

    Attributes:
        bits: secret bits that a cipher must have.
        tls12: whether TLS 1.2 is allowed.
        tls13: whether TLS 1.3 is allowed.
        without: ciphers that TLS 1.2 must not use, by OpenSSL's names for the bare cipher: "aes-128-cbc".
    """

    bits: int = 0
    tls12: bool = True
    tls13: bool = True
    without: frozenset[str] = frozenset()


#: Keywords, and the secret bits that they demand.
_KEYWORDS = {"NORMAL": 0, "PERFORMANCE": 0, "PFS": 0, "SECURE128": 128, "SECURE192": 192, "SECURE256": 256}
_VERSIONS = {
    "VERS-TLS1.2": {"tls12"},
    "VERS-TLS1.3": {"tls13"},
    "VERS-ALL": {"tls12", "tls13"},
    "VERS-TLS-ALL": {"tls12", "tls13"},
}
#: Ciphers by GnuTLS' names. Those of TLS 1.3 cannot be chosen among from Python.
_CIPHERS = {
    "AES-128-GCM": "aes-128-gcm",
    "AES-256-GCM": "aes-256-gcm",
    "CHACHA20-POLY1305": "chacha20-poly1305",
    "AES-128-CBC": "aes-128-cbc",
    "AES-256-CBC": "aes-256-cbc",
}
_IN_TLS13 = {"AES-128-GCM", "AES-256-GCM", "CHACHA20-POLY1305"}
#: What is never used here, so that taking it away changes nothing.
_NEVER = {
    *("VERS-SSL3.0", "VERS-TLS1.0", "VERS-TLS1.1", "VERS-DTLS-ALL", "VERS-DTLS0.9", "VERS-DTLS1.0", "VERS-DTLS1.2"),
    *("3DES-CBC", "ARCFOUR-128", "CAMELLIA-128-CBC", "CAMELLIA-256-CBC", "CAMELLIA-128-GCM", "CAMELLIA-256-GCM"),
    *("RSA", "ANON-DH", "ANON-ECDH", "MD5", "SHA1", "COMP-ALL", "COMP-DEFLATE"),
}
#: What is always offered where it can be used, so that adding it changes nothing.
_ALWAYS = {*_CIPHERS, "ECDHE-RSA", "ECDHE-ECDSA", "DHE-RSA", "ECDHE-PSK", "DHE-PSK", "AEAD", "COMP-NULL", "CTYPE-X509"}
_ALWAYS_FLAGS = {"%SAFE_RENEGOTIATION"}


def parse_priority(text: str) -> Priority:
    """Return what the priority string demands. Raises UsageError that names the part which cannot be done."""
    keyword, *changes = text.strip().split(":")
    if keyword.upper() not in _KEYWORDS:
        raise _refused(keyword, text, f"it must begin with one of {', '.join(_KEYWORDS)}")
    versions = {"tls12", "tls13"}
    without: set[str] = set()
    for change in filter(None, changes):
        sign, name = change[0], change[1:].upper()
        adds = sign == "+"
        if sign not in "+-!" and change.upper() not in _ALWAYS_FLAGS:
            raise _refused(change, text, "OpenSSL has nothing like it")
        if name in _VERSIONS:
            versions = versions | _VERSIONS[name] if adds else versions - _VERSIONS[name]
        elif name in _CIPHERS:
            without = without - {name} if adds else without | {name}
        elif sign in "+-!" and name not in (_ALWAYS if adds else _NEVER):
            raise _refused(change, text, "it is never used here" if name in _NEVER else "Python's ssl module cannot do that")
    if not versions:
        raise _refused(text, text, "it leaves no version of TLS; 1.2 and 1.3 are spoken here")
    if "tls13" in versions and without & _IN_TLS13:
        cipher = min(without & _IN_TLS13)
        raise _refused(f"-{cipher}", text, "Python's ssl module cannot choose among TLS 1.3's ciphers: add -VERS-TLS1.3")
    return Priority(
        bits=_KEYWORDS[keyword.upper()],
        tls12="tls12" in versions,
        tls13="tls13" in versions,
        without=frozenset(_CIPHERS[name] for name in without),
    )


def _refused(part: str, text: str, why: str) -> UsageError:
    return UsageError(errno.EINVAL, f"the TLS priority {printable(text)!r} cannot be done, for {printable(part)!r}: {why}")

"""What a failure of TLS means, in words for the person who has to mend it.

OpenSSL names the rule that was broken; a user wants to know which end, which file or which setting to look at. What is not listed
here is told in OpenSSL's own words.
"""

from __future__ import annotations

import ssl

__all__ = ["explain"]

_UNTRUSTED = "its certificate was issued by a CA that is not trusted here: a wrong ca-cert.pem, or a wrong server"
_NO_TLS = "what the {peer} sends is no TLS: not encrypted, or changed on the way"
_CHANGED = "a message was changed on the way, or the pre-shared keys differ"

#: X509_V_ERR_* of OpenSSL's x509_vfy.h, by number: what a certificate is refused for here.
_CERTIFICATES = {
    2: _UNTRUSTED,
    3: "there is no revocation list of its certificate's CA in ca-crl.pem",
    7: "its certificate is not signed by the CA that it names",
    9: "its certificate is not valid yet (or this machine's clock is wrong)",
    10: "its certificate has expired (or this machine's clock is wrong)",
    11: "the revocation list in ca-crl.pem is not valid yet",
    12: "the revocation list in ca-crl.pem has expired",
    18: "its certificate is self-signed and not itself trusted here",
    19: _UNTRUSTED,
    20: _UNTRUSTED,
    21: _UNTRUSTED,
    23: "its certificate was revoked",
    26: "its certificate was issued for another purpose than to be a {peer}",
    62: "its certificate is not for the name {name!r}",
    64: "its certificate is not for the address {name!r}",
}

#: Reasons by OpenSSL's names. An ALERT is what the peer says of this side.
_REASONS = {
    "BAD_RECORD_TYPE": _NO_TLS,
    "HTTPS_PROXY_REQUEST": _NO_TLS,
    "HTTP_REQUEST": _NO_TLS,
    "PACKET_LENGTH_TOO_LONG": _NO_TLS,
    "RECORD_LAYER_FAILURE": _NO_TLS,
    "UNEXPECTED_MESSAGE": _NO_TLS,
    "UNKNOWN_PROTOCOL": _NO_TLS,
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "BAD_RECORD_MAC": _CHANGED,
    "BINDER_DOES_NOT_VERIFY": "the pre-shared key of that user is another one here",
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC": _CHANGED,
    "DIGEST_CHECK_FAILED": _CHANGED,
    "NO_PROTOCOLS_AVAILABLE": "no TLS version is allowed here",
    "NO_SHARED_CIPHER": "the two sides have no cipher in common: one may want a pre-shared key and the other certificates",
    "NO_SUITABLE_SIGNATURE_ALGORITHM": "the two sides have no way of signing in common",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the {peer} showed no certificate, and one is demanded",
    "PSK_IDENTITY_NOT_FOUND": "the {peer}'s user name is not in the file of pre-shared keys",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the {peer} does not accept the certificate of this side",
    "SSLV3_ALERT_BAD_RECORD_MAC": "the {peer} could not decrypt: the pre-shared keys differ, or a message was changed on the way",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the {peer} says that the certificate of this side has expired",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "the {peer} says that the certificate of this side was revoked",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the {peer} does not accept the certificate of this side",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": (
        "the {peer} found nothing in common: it may want a pre-shared key, or a certificate of this side, and was given none"
    ),
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "the {peer} cannot use the certificate of this side",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the {peer} demands a certificate of this side, and was given none",
    "TLSV1_ALERT_ACCESS_DENIED": "the {peer} does not admit this side",
    "TLSV1_ALERT_DECRYPT_ERROR": "the {peer} could not verify this side: the pre-shared keys may differ",
    "TLSV1_ALERT_INSUFFICIENT_SECURITY": "the {peer} demands stronger ciphers",
    "TLSV1_ALERT_PROTOCOL_VERSION": "the {peer} speaks none of the TLS versions offered",
    "TLSV1_ALERT_UNKNOWN_CA": "the {peer} does not trust the CA that issued the certificate of this side",
    "TLSV1_ALERT_UNKNOWN_PSK_IDENTITY": "the {peer} does not know that user name, or has another pre-shared key for it",
    "UNKNOWN_PSK_IDENTITY": "the {peer} does not know that user name, or has another pre-shared key for it",
    "UNSUPPORTED_PROTOCOL": "the {peer} speaks no TLS version that is allowed here",
}


def explain(exc: ssl.SSLError, peer: str, name: str | None, *, psk: bool) -> str:
    """Say what went wrong. `peer` is "server" or "client", `name` the name that a certificate was checked for."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        if psk:
            return f"the {peer} did not use the pre-shared key, and showed a certificate instead"
        reason = _CERTIFICATES.get(exc.verify_code, exc.verify_message)
    else:
        reason = _REASONS.get(exc.reason or "", "")
    # OpenSSL's own words may hold braces.
    return reason.replace("{peer}", peer).replace("{name!r}", repr(name)) or exc.reason or str(exc)

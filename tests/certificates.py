"""Certificates made for a test: a CA, and what it issues, in folders laid out as nbdkit's and QEMU's.

    ca = CertificateAuthority()
    ca.write(folder, server=ca.issue("server", "db.example", "127.0.0.1"), client=ca.issue("client", "alice"))

Keys are of P-256: made in a millisecond, and good enough for every TLS library's defaults.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

#: A pre-shared key, and the line of a file that has it.
PSK_USER, PSK_KEY = "alice", bytes(range(32))
PSK_LINE = f"{PSK_USER}:{PSK_KEY.hex()}\n"

_DAY = dt.timedelta(days=1)
_PURPOSES = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}


@dataclass(frozen=True)
class Issued:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def key_pem(self, password: bytes | None = None) -> bytes:
        encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        return self.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


class CertificateAuthority:
    """Issues certificates. Two of them do not know each other, whatever their names."""

    def __init__(self, name: str = "nbdcore tests") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = x509.KeyUsage(
            digital_signature=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        self.certificate = (
            _builder(self.name, self.name, self.key, days=(-1, 2))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )

    def issue(
        self, purpose: str, *names: str, days: tuple[int, int] = (-1, 2), self_signed: bool = False, common_name: str = "nbdcore"
    ) -> Issued:
        """Issue a certificate for "server" or "client", with host names and addresses, valid from and to days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        signer = key if self_signed else self.key
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        builder = (
            _builder(subject, subject if self_signed else self.name, key, days=days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([_PURPOSES[purpose]]), critical=False)
            # Demanded by the default context of Python 3.13 and later.
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        return Issued(builder.sign(signer, hashes.SHA256()), key)

    def revoke(self, *revoked: Issued) -> bytes:
        """Return a revocation list in PEM form."""
        now = _now()
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.name).last_update(now - _DAY).next_update(now + _DAY)
        for issued in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(issued.certificate.serial_number).revocation_date(now - _DAY)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def write(self, folder: Path, *, server: Issued | None = None, client: Issued | None = None) -> Path:
        """Write a certificates folder with this CA, and return it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ca-cert.pem").write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        for name, issued in (("server", server), ("client", client)):
            if issued is not None:
                (folder / f"{name}-cert.pem").write_bytes(issued.certificate_pem())
                (folder / f"{name}-key.pem").write_bytes(issued.key_pem())
        return folder


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, *, days: tuple[int, int]
) -> x509.CertificateBuilder:
    now = _now()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + days[0] * _DAY)
        .not_valid_after(now + days[1] * _DAY)
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)

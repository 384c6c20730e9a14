"""Whether a client encrypts, and how: what the caller said and what a URI says, joined into one decision before it connects.

The caller's own words go first; a URI, which may come from anywhere, fills in what they left open, and never makes a connection
less secure unless it was allowed to. Nothing here does TLS: `TLS` says how, and makes the function that starts it.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nbdcore.clients.session.session import StartTLS
from nbdcore.errors import UsageError, printable
from nbdcore.protocol.handshake.agreement import TLSPolicy
from nbdcore.streams.base import Stream
from nbdcore.streams.tls.credentials import TLS, supports_tls
from nbdcore.streams.tls.starting import client_starter
from nbdcore.uri import TLS_PARAMETERS, URI

__all__ = ["LOCAL_FILES", "Encryption", "Permissions", "verifies"]

#: doc/uri.md says 0 or 1; the other words are libnbd's.
_YES = frozenset({"1", "true", "t", "yes", "y", "on"})
_NO = frozenset({"0", "false", "f", "no", "n", "off"})

#: The parameters of a URI that name files of this machine.
LOCAL_FILES = ("tls-certificates", "tls-psk-file")

#: The parameters of a URI that say what a field of TLS says.
_FIELDS = {
    "tls-certificates": "certificates",
    "tls-psk-file": "psk_file",
    "tls-hostname": "hostname",
    "tls-username": "username",
    "tls-priority": "priority",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Permissions:
    """What a URI may do.

    Attributes:
        transports: names of the transports that it may use; None: all but those that run programs.
        local_files: name files of this machine.
        unverified: have the server's certificate not verified.
        priority: choose TLS versions and ciphers.
    """

    transports: frozenset[str] | None = None
    local_files: bool = False
    unverified: bool = False
    priority: bool = False


@dataclass(frozen=True, slots=True)
class Encryption:
    """Whether and how to encrypt.

    Attributes:
        policy: whether TLS is asked for; None: nobody has said.
        credentials: how, in the caller's words; None: as `TLS()` says.
        start_tls: the caller's own way to encrypt, in place of credentials.
        forbidden: the caller wants no TLS, not even by hand.
    """

    policy: TLSPolicy | None = None
    credentials: TLS | None = None
    start_tls: StartTLS | None = None
    forbidden: bool = False

    @classmethod
    def of(cls, tls: Any, policy: Any, start_tls: Any) -> Encryption:
        """Return what a client's options say. Raises UsageError for what they cannot say, and for contradictions."""
        if not (tls is None or isinstance(tls, bool | TLS)):
            raise _wrong(f"tls says how to do TLS: a TLS value, True, False or None, not {tls!r:.60}")
        if not (policy is None or isinstance(policy, TLSPolicy)):
            raise _wrong(f"tls_policy is one of {', '.join(map(str, TLSPolicy))}, not {policy!r:.60}")
        if start_tls is not None and not callable(start_tls):
            raise _wrong(f"start_tls is a function that encrypts a stream, not {type(start_tls).__name__}")
        if start_tls is not None and isinstance(tls, TLS):
            raise _wrong("tls and start_tls both say how to encrypt: give one of them")
        if tls is False and (start_tls is not None or policy not in (None, TLSPolicy.DISABLE)):
            raise _wrong("tls=False forbids TLS, and tls_policy or start_tls ask for it")
        if tls is False:
            policy = TLSPolicy.DISABLE
        elif tls is not None and policy is None:
            policy = TLSPolicy.REQUIRE
        return cls(policy, tls if isinstance(tls, TLS) else None, start_tls, tls is False)

    @property
    def settled(self) -> TLSPolicy:
        """The policy, now that nobody else will say anything: without a word no TLS."""
        return TLSPolicy.DISABLE if self.policy is None else self.policy

    def with_uri(self, uri: URI, permissions: Permissions) -> Encryption:
        """Return this with what a URI says. Raises UsageError: EPERM for what it may not say, EINVAL for what is wrong."""
        demanded = self._demanded(uri)
        said = {name: value for name, value in uri.query if name in TLS_PARAMETERS}
        if demanded.settled is TLSPolicy.DISABLE and self.credentials is None:
            if said:
                named = ", ".join(said)
                raise _wrong(f"{named} in a URI without TLS: write {uri.with_tls.scheme}, or pass tls=True")
            return demanded
        if self.start_tls is not None:
            if said:
                raise _wrong(f"{', '.join(said)} in the URI says how to do TLS, and so does start_tls: give one of them")
            return demanded
        _check_permitted(said, permissions)
        credentials = _joined(self.credentials or TLS(), said, uri.user, unverified=permissions.unverified)
        _check_type(said.get("tls-type"), credentials)
        return replace(demanded, credentials=credentials)

    def check_possible(self) -> None:
        """Raise UsageError where TLS can not be asked for by hand either."""
        if self.forbidden:
            raise _wrong("the client was made with tls=False, which forbids TLS")
        if self.start_tls is None and not supports_tls():
            raise UsageError(errno.ENOTSUP, "this Python was built without the ssl module: it has no TLS")

    def reads_files(self, *, by_hand: bool) -> bool:
        """Whether `starter` reads files (certificates, keys, the system's CAs), which may take a while."""
        if self.start_tls is not None or self.forbidden:
            return False
        return self.settled is not TLSPolicy.DISABLE or (by_hand and self.credentials is not None)

    def starter(self, server_name: str | None, *, by_hand: bool) -> StartTLS | None:
        """Return what starts TLS with a server of that name; None where nobody will ask for it.

        `by_hand`: the caller may ask for TLS later, in opt mode. Reads the files. Raises UsageError as `client_starter` does.
        """
        if self.start_tls is not None or self.forbidden:
            return self.start_tls
        if self.reads_files(by_hand=by_hand):
            return client_starter(self.credentials or TLS(), server_name)
        return _later(server_name) if by_hand else None

    def _demanded(self, uri: URI) -> Encryption:
        if not uri.tls:
            return self
        if self.policy is TLSPolicy.DISABLE:
            raise _wrong(f"{uri.scheme} demands TLS, and this client was told not to ask for it")
        return replace(self, policy=TLSPolicy.REQUIRE)


def _later(server_name: str | None) -> StartTLS:
    """Return what starts TLS with the system's CAs, which costs nothing before it is done: most never ask for it."""

    def start(stream: Stream) -> Stream:
        return client_starter(TLS(), server_name)(stream)

    return start


def _check_permitted(said: Mapping[str, str], permissions: Permissions) -> None:
    for name in LOCAL_FILES:
        if name in said and not permissions.local_files:
            raise _not_permitted(f"{name} names files of this machine", "allow_local_files")
    if "tls-priority" in said and not permissions.priority:
        raise _not_permitted("tls-priority chooses TLS versions and ciphers", "allow_priority")


def _joined(credentials: TLS, said: Mapping[str, str], user: str | None, *, unverified: bool) -> TLS:
    """Return the credentials with what a URI says where they say nothing."""
    if said.get("tls-hostname") == "":
        # For TLS it would mean that any name will do.
        raise _wrong("tls-hostname is empty in the URI: leave it out, or name the host that the certificate is for")
    fields: dict[str, Any] = {field: said[name] for name, field in _FIELDS.items() if name in said}
    if user is not None:
        fields.setdefault("username", user)
    fields = {field: value for field, value in fields.items() if getattr(credentials, field) is None}
    verify = verifies(said.get("tls-verify-peer"))
    if verify is False and credentials.verify and not unverified:
        raise _not_permitted("tls-verify-peer=0 has the server's certificate not verified", "allow_unverified")
    return replace(credentials, **fields, verify=credentials.verify if verify is None else verify)


def verifies(value: str | None) -> bool | None:
    """Return what a URI's `tls-verify-peer` says, None where it is absent. Raises UsageError (EINVAL) for neither yes nor no."""
    if value is None:
        return None
    if value.lower() in _YES:
        return True
    if value.lower() in _NO:
        return False
    raise _wrong(f"tls-verify-peer is 0 or 1, not {printable(value)!r}")


def _check_type(kind: str | None, credentials: TLS) -> None:
    """Hold what the URI says of the kind of TLS against what there is."""
    psk = credentials.psk_file is not None
    if kind is None or kind == ("psk" if psk else "x509"):
        return
    if kind == "anon":
        raise UsageError(errno.ENOTSUP, "tls-type=anon is not done: nobody would know who the server is")
    if kind not in ("psk", "x509"):
        raise _wrong(f"tls-type is x509 or psk, not {printable(kind)!r}")
    given = "a file of pre-shared keys was given" if psk else "no file of pre-shared keys was given, as in TLS(psk_file=...)"
    raise _wrong(f"the URI says tls-type={kind}, and {given}")


def _not_permitted(what: str, option: str) -> UsageError:
    return UsageError(errno.EPERM, f"{what}, which a URI may do only where the caller says {option}=True")


def _wrong(message: str) -> UsageError:
    return UsageError(errno.EINVAL, message)

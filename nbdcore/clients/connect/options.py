"""The keyword options of a client, and the settings of the core that they become."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import TypedDict

from nbdcore.clients.connect.tls import Encryption, Permissions
from nbdcore.clients.requests.arguments import text, texts
from nbdcore.clients.session.session import StartTLS
from nbdcore.errors import UsageError
from nbdcore.protocol.constants import BASE_ALLOCATION
from nbdcore.protocol.handshake.agreement import Settings, TLSPolicy
from nbdcore.streams.tls.credentials import TLS


class ClientOptions(TypedDict, total=False):
    """Keyword options of `Client`, which every `connect` function takes too."""

    export: str
    contexts: Iterable[str]
    opt_mode: bool
    structured_replies: bool
    extended_headers: bool
    block_size: bool
    full_info: bool
    tls: TLS | bool | None
    tls_policy: TLSPolicy | None
    start_tls: StartTLS | None
    allow_transports: Iterable[str] | None
    allow_local_files: bool
    allow_unverified: bool
    allow_priority: bool


#: Those that the handshake knows nothing of.
_NOT_SETTINGS = frozenset(
    {"tls", "tls_policy", "start_tls", "allow_transports", "allow_local_files", "allow_unverified", "allow_priority"}
)


def checked_settings(options: ClientOptions) -> Settings:
    """Return the settings that the options ask for. Raises UsageError for what nobody can ask for.

    Whether TLS is asked for is not among them yet: a URI has a word in it.
    """
    unknown = options.keys() - ClientOptions.__annotations__.keys()
    if unknown:
        raise UsageError(
            errno.EINVAL, f"unknown option {', '.join(sorted(unknown))}; there are {', '.join(ClientOptions.__annotations__)}"
        )
    checked = {
        "export": text("an export's name", options.get("export", "")),
        "contexts": texts("contexts", options.get("contexts", (BASE_ALLOCATION,))),
    }
    rest = {name: value for name, value in options.items() if name not in _NOT_SETTINGS}
    return Settings(**{**rest, **checked})  # type: ignore[arg-type]


def checked_encryption(options: ClientOptions) -> Encryption:
    """Return what the options say of TLS. Raises UsageError for what they cannot say."""
    return Encryption.of(options.get("tls"), options.get("tls_policy"), options.get("start_tls"))


def checked_permissions(options: ClientOptions) -> Permissions:
    """Return what a URI may do. Raises UsageError for transports that are no list of names."""
    transports = options.get("allow_transports")
    return Permissions(
        transports=None if transports is None else frozenset(texts("allow_transports", transports)),
        local_files=options.get("allow_local_files", False),
        unverified=options.get("allow_unverified", False),
        priority=options.get("allow_priority", False),
    )

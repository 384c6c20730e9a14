"""The keyword options of a client, and the settings of the core that they become."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any, TypedDict

from nbdcore.clients.connect.tls import Encryption, Permissions
from nbdcore.clients.requests.arguments import deadline_after, text, texts, whole_number
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
    command_timeout: float | None


#: Connections of a pool where the caller does not say: as many as nbdcopy opens.
CONNECTIONS = 4
#: Most that may be asked for. Each is a descriptor, and looked at with every request; a server's threads end far below.
MOST_CONNECTIONS = 128

#: Those that the handshake knows nothing of.
_NOT_SETTINGS = frozenset(
    {
        "tls",
        "tls_policy",
        "start_tls",
        "allow_transports",
        "allow_local_files",
        "allow_unverified",
        "allow_priority",
        "command_timeout",
    }
)


def checked_settings(options: ClientOptions) -> Settings:
    """Return the settings that the options ask for. Raises UsageError for what nobody can ask for.

    Whether TLS is asked for is not among them yet: a URI has a word in it.
    """
    unknown = options.keys() - ClientOptions.__annotations__.keys()
    if unknown:
        known = (
            "a pool of connections is made by create_pool, or Pool"
            if "connections" in unknown
            else (f"there are {', '.join(ClientOptions.__annotations__)}")
        )
        raise UsageError(errno.EINVAL, f"unknown option {', '.join(sorted(unknown))}; {known}")
    checked = {
        "export": text("an export's name", options.get("export", "")),
        "contexts": texts("contexts", options.get("contexts", (BASE_ALLOCATION,))),
    }
    rest = {name: value for name, value in options.items() if name not in _NOT_SETTINGS}
    return Settings(**{**rest, **checked})  # type: ignore[arg-type]


def checked_encryption(options: ClientOptions) -> Encryption:
    """Return what the options say of TLS. Raises UsageError for what they cannot say."""
    return Encryption.of(options.get("tls"), options.get("tls_policy"), options.get("start_tls"))


def checked_timeout(options: ClientOptions) -> float | None:
    """Return the timeout of calls that name none, in seconds. Raises UsageError for what is no timeout."""
    timeout = options.get("command_timeout")
    deadline_after(timeout)
    return timeout


def checked_permissions(options: ClientOptions) -> Permissions:
    """Return what a URI may do. Raises UsageError for transports that are no list of names."""
    transports = options.get("allow_transports")
    return Permissions(
        transports=None if transports is None else frozenset(texts("allow_transports", transports)),
        local_files=options.get("allow_local_files", False),
        unverified=options.get("allow_unverified", False),
        priority=options.get("allow_priority", False),
    )


def checked_connections(connections: Any, options: ClientOptions) -> int:
    """Return the number of connections asked for. Raises UsageError unless it is 1 to 128, and for options of no pool."""
    number = int(whole_number("a pool", "connections", connections))
    if not 1 <= number <= MOST_CONNECTIONS:
        raise UsageError(errno.EINVAL, f"a pool has 1 to {MOST_CONNECTIONS} connections: not {number}")
    if options.get("opt_mode"):
        raise UsageError(errno.EINVAL, "a pool has no opt mode, which is about a single connection: use a client")
    return number

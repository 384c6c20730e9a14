"""The keyword options of a client, and the settings of the core that they become."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import TypedDict

from nbdcore.clients.arguments import text, texts
from nbdcore.clients.session import StartTLS
from nbdcore.errors import UsageError
from nbdcore.protocol.agreement import Settings, TLSPolicy
from nbdcore.protocol.constants import BASE_ALLOCATION


class ClientOptions(TypedDict, total=False):
    """Keyword options of `Client`, which every `connect` function takes too."""

    export: str
    contexts: Iterable[str]
    opt_mode: bool
    structured_replies: bool
    extended_headers: bool
    block_size: bool
    full_info: bool
    tls: TLSPolicy
    start_tls: StartTLS | None


def checked_settings(options: ClientOptions) -> Settings:
    """Return the settings that the options ask for. Raises UsageError for what nobody can ask for."""
    unknown = options.keys() - ClientOptions.__annotations__.keys()
    if unknown:
        raise UsageError(
            errno.EINVAL, f"unknown option {', '.join(sorted(unknown))}; there are {', '.join(ClientOptions.__annotations__)}"
        )
    start_tls = options.get("start_tls")
    policy = options.get("tls", TLSPolicy.DISABLE)
    if not isinstance(policy, TLSPolicy):
        raise UsageError(errno.EINVAL, f"tls is one of {', '.join(map(str, TLSPolicy))}, not {policy!r}")
    if start_tls is not None and not callable(start_tls):
        raise UsageError(errno.EINVAL, f"start_tls is a function that encrypts a stream, not {type(start_tls).__name__}")
    if policy is not TLSPolicy.DISABLE and start_tls is None:
        raise UsageError(errno.EINVAL, "TLS was asked for without start_tls, which says how to encrypt a stream")
    checked = {
        "export": text("an export's name", options.get("export", "")),
        "contexts": texts("contexts", options.get("contexts", (BASE_ALLOCATION,))),
    }
    rest = {name: value for name, value in options.items() if name != "start_tls"}
    return Settings(**{**rest, **checked})  # type: ignore[arg-type]

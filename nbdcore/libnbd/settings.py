"""The settings of a handle as plain values, and those of a handshake that are made of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from nbdcore.libnbd.constants import (
    ALLOW_TRANSPORT_MASK,
    HANDSHAKE_FLAG_MASK,
    STRICT_MASK,
    TLS_ALLOW,
    TLS_DISABLE,
)
from nbdcore.protocol.constants import HandshakeFlag
from nbdcore.protocol.handshake.agreement import Settings, TLSPolicy

__all__ = ["HandleSettings"]


@dataclass(slots=True)
class HandleSettings:
    """The settings of a handle; each field is named after libnbd's `set_` call."""

    export_name: str = ""
    full_info: bool = False
    request_block_size: bool = True
    request_structured_replies: bool = True
    request_extended_headers: bool = True
    request_meta_context: bool = True
    handshake_flags: int = HANDSHAKE_FLAG_MASK
    opt_mode: bool = False
    strict_mode: int = STRICT_MASK
    pread_initialize: bool = True
    meta_contexts: list[str] = field(default_factory=list)

    tls: int = TLS_DISABLE
    tls_certificates: str | None = None
    tls_verify_peer: bool = True
    tls_username: str | None = None
    tls_hostname: str | None = None
    tls_psk_file: str | None = None
    tls_priority: str | None = None

    uri_allow_transports: int = ALLOW_TRANSPORT_MASK
    uri_allow_tls: int = TLS_ALLOW
    uri_allow_local_file: bool = False
    uri_allow_tls_priority: bool = False

    keepalive: bool = False
    tcp_options: dict[int, int] = field(default_factory=dict)
    socket_activation_name: str = ""

    def for_handshake(self) -> Settings:
        """Return what a handshake is to ask the server for."""
        return Settings(
            export=self.export_name,
            contexts=tuple(self.meta_contexts),
            request_contexts=self.request_meta_context,
            opt_mode=self.opt_mode,
            tls=TLSPolicy(self.tls),
            structured_replies=self.request_structured_replies,
            extended_headers=self.request_extended_headers,
            block_size=self.request_block_size,
            full_info=self.full_info,
            handshake_flags=HandshakeFlag(self.handshake_flags),
        )

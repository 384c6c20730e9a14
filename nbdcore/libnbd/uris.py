"""NBD URIs under libnbd's rules: allow-lists limit what a URI may do.

A URI that is wrong in any part is refused before any setting of the handle is changed. What could be read in two ways is wrong:
that is stricter than libnbd (the documentation's page of differences has all of it).
"""

from __future__ import annotations

import errno
from dataclasses import replace

from nbdcore.clients.connect.target import Endpoint
from nbdcore.clients.connect.tls import LOCAL_FILES, verifies
from nbdcore.errors import TransportUnavailable, UsageError, printable
from nbdcore.libnbd import arguments, constants
from nbdcore.libnbd.settings import HandleSettings
from nbdcore.plugins.registry import registry
from nbdcore.uri import TLS_PARAMETERS, URI, parse_uri

__all__ = ["is_uri", "resolve"]

#: The bit of the allow-list for the transport of each scheme. Any other transport needs all bits: nothing may be forbidden then.
_TRANSPORTS = {
    "nbd": constants.ALLOW_TRANSPORT_TCP,
    "nbd+unix": constants.ALLOW_TRANSPORT_UNIX,
    "nbd+vsock": constants.ALLOW_TRANSPORT_VSOCK,
    "nbd+ssh": constants.ALLOW_TRANSPORT_SSH,
}
_SCHEMES = tuple(f"{scheme.replace('nbd', name, 1)}://" for scheme in _TRANSPORTS for name in ("nbd", "nbds"))
# Ports of vsock have 32 bits.
_PORT_DIGITS = 10


def is_uri(text: str) -> bool:
    """Tell whether a text begins like an NBD URI that libnbd knows."""
    return text.lower().startswith(_SCHEMES)


def resolve(text: str, settings: HandleSettings) -> tuple[Endpoint, HandleSettings]:
    """Return the endpoint of a URI's server, and the handle's settings changed as the URI says.

    Raises UsageError: EINVAL for what is no NBD URI, EPERM for what the allow-lists forbid.
    """
    uri = parse_uri(text)
    try:
        transport = registry.for_uri(URI(uri.scheme))
    except TransportUnavailable as exc:
        if uri.transport_scheme not in _TRANSPORTS:
            raise UsageError(errno.EINVAL, f"unknown NBD URI scheme: {uri.scheme}") from exc
        raise
    _check_allowed(uri, settings)
    if uri.parameter("socket") is not None and "socket" not in transport.parameters:
        raise UsageError(
            errno.EINVAL, f"socket parameter is incompatible with {uri.scheme}: did you mean nbd+unix:///?socket=...?"
        )
    _check_spelling(uri, transport.parameters)
    # Port 0 is the default port, as no port is. What is not the transport's own it need not see.
    own = tuple(pair for pair in uri.query if pair[0] in transport.parameters)
    port = (uri.port or None) if "nbd-port" in transport.parameters else _port_of(uri)
    address = transport.parse(replace(uri, query=own, port=port))
    return Endpoint(transport, address), _with(uri, settings)


def _port_of(uri: URI) -> int | None:
    """Return the server's port: that of `nbd-port` before the authority's. The transport judges whether it can be."""
    text = uri.parameter("nbd-port")
    if text is None:
        return uri.port or None
    if not (text.isascii() and text.isdecimal() and len(text) <= _PORT_DIGITS):
        raise UsageError(errno.EINVAL, f"nbd-port is a port number, not {printable(text)!r}")
    return int(text) or None


def _check_allowed(uri: URI, settings: HandleSettings) -> None:
    needed = _TRANSPORTS.get(uri.transport_scheme, constants.ALLOW_TRANSPORT_MASK)
    if settings.uri_allow_transports & needed != needed:
        raise UsageError(errno.EPERM, f"URI transport {uri.scheme} is not permitted")
    forbidden = constants.TLS_DISABLE if uri.tls else constants.TLS_REQUIRE
    if settings.uri_allow_tls == forbidden:
        raise UsageError(errno.EPERM, f"URI TLS setting {uri.scheme} is not permitted")


def _check_spelling(uri: URI, own: tuple[str, ...]) -> None:
    """Refuse an unknown parameter about TLS: the setting that was meant would be missing. Others are ignored, as libnbd does."""
    for name, _ in uri.query:
        if name.startswith("tls") and name not in (*TLS_PARAMETERS, *own):
            raise UsageError(errno.EINVAL, f"unknown query parameter {printable(name)}; known are {', '.join(TLS_PARAMETERS)}")


def _with(uri: URI, settings: HandleSettings) -> HandleSettings:
    """Return the settings with what the URI says. Raises UsageError for what it may not say."""
    for name in LOCAL_FILES:
        if uri.parameter(name) is not None and not settings.uri_allow_local_file:
            raise UsageError(
                errno.EPERM,
                f"local file access ({name}) is not allowed, call nbd_set_uri_allow_local_file to enable this",
            )
    if uri.parameter("tls-priority") is not None and not settings.uri_allow_tls_priority:
        raise UsageError(errno.EPERM, "tls-priority is not allowed, call nbd_set_uri_allow_tls_priority to enable this")
    changed = replace(settings, export_name=arguments.protocol_string(uri.export, "uri", "export name"))
    if uri.tls:
        changed.tls = constants.TLS_REQUIRE
    changed.tls_certificates = _or(uri.parameter("tls-certificates"), settings.tls_certificates)
    changed.tls_psk_file = _or(uri.parameter("tls-psk-file"), settings.tls_psk_file)
    changed.tls_hostname = uri.parameter("tls-hostname") or settings.tls_hostname  # an empty one would mean any name
    changed.tls_priority = _or(uri.parameter("tls-priority"), settings.tls_priority)
    changed.tls_username = _or(uri.user, _or(uri.parameter("tls-username"), settings.tls_username))
    changed.tls_verify_peer = _verifies(uri, settings)
    return changed


def _or(value: str | None, otherwise: str | None) -> str | None:
    return otherwise if value is None else value


def _verifies(uri: URI, settings: HandleSettings) -> bool:
    """Return whether the server must prove itself. A URI from anywhere must not be able to say that it need not."""
    value = verifies(uri.parameter("tls-verify-peer"))
    if value is not False:
        return settings.tls_verify_peer if value is None else value
    if settings.tls_verify_peer and not settings.uri_allow_local_file:
        raise UsageError(
            errno.EPERM,
            "tls-verify-peer=false is not allowed, call nbd_set_uri_allow_local_file or nbd_set_tls_verify_peer to enable this",
        )
    return False

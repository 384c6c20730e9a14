"""Calls that set and get what a program asks for: all of them act on settings, and none talks to the server."""

from __future__ import annotations

import errno
import getpass
import os
import socket
from typing import Any

from nbdcore.errors import UsageError
from nbdcore.libnbd import arguments
from nbdcore.libnbd.calls import CREATED, SETTING_UP, call
from nbdcore.libnbd.constants import (
    ALLOW_TRANSPORT_MASK,
    HANDSHAKE_FLAG_MASK,
    STRICT_MASK,
    TLS_DISABLE,
    TLS_REQUIRE,
)
from nbdcore.libnbd.core import Core
from nbdcore.libnbd.security import supports_tls

_TLS_VALUES = range(TLS_DISABLE, TLS_REQUIRE + 1)
#: The socket options that set_tcp_option takes; not every platform has them all.
_TCP_OPTIONS = frozenset(
    getattr(socket, name) for name in ("TCP_KEEPCNT", "TCP_KEEPIDLE", "TCP_KEEPINTVL") if hasattr(socket, name)
)
#: Longest name of a socket that systemd's socket activation is given (libnbd's limit).
_LONGEST_ACTIVATION_NAME = 32


class ExportSettings(Core):
    """Which export, and what to ask about it."""

    @call("1.0", SETTING_UP)
    def set_export_name(self, export_name: str) -> None:
        """Name the export. Another name than before discards what is known of the export."""
        name = arguments.protocol_string(export_name, "export_name", "export name")
        self._settings.export_name = name
        if self._client is not None:
            self._client.engine.choose_export(name)

    @call("1.0")
    def get_export_name(self) -> str:
        """Return the name asked for."""
        return self._settings.export_name

    @call("1.12", SETTING_UP)
    def set_request_block_size(self, request: bool) -> None:
        """Say whether to ask for block size constraints."""
        self._settings.request_block_size = bool(request)

    @call("1.12")
    def get_request_block_size(self) -> bool:
        """Return whether block size constraints are asked for."""
        return self._settings.request_block_size

    @call("1.4", SETTING_UP)
    def set_full_info(self, request: bool) -> None:
        """Say whether to ask for the export's canonical name and description."""
        self._settings.full_info = bool(request)

    @call("1.4")
    def get_full_info(self) -> bool:
        """Return whether name and description are asked for."""
        return self._settings.full_info

    @call("1.16", SETTING_UP)
    def set_request_meta_context(self, request: bool) -> None:
        """Say whether connecting, opt_info and opt_go select the contexts of add_meta_context by themselves."""
        self._settings.request_meta_context = bool(request)

    @call("1.16")
    def get_request_meta_context(self) -> bool:
        """Return whether contexts are selected without being asked."""
        return self._settings.request_meta_context

    @call("1.0", SETTING_UP)
    def add_meta_context(self, name: str) -> None:
        """Add a metadata context to those to select."""
        self._settings.meta_contexts.append(arguments.protocol_string(name, "name", "meta context name"))

    @call("1.6")
    def get_nr_meta_contexts(self) -> int:
        """Return how many contexts were added."""
        return len(self._settings.meta_contexts)

    @call("1.6")
    def get_meta_context(self, i: int) -> str:
        """Return one of the contexts added. Raises Error (EINVAL) beyond the last."""
        number = arguments.unsigned_64(i, "i")
        if number >= len(self._settings.meta_contexts):
            raise UsageError(errno.EINVAL, "meta context request out of range")
        return self._settings.meta_contexts[number]

    @call("1.6", SETTING_UP)
    def clear_meta_contexts(self) -> None:
        """Forget the contexts added; what is selected stays selected."""
        self._settings.meta_contexts.clear()


class ProtocolSettings(Core):
    """How to talk to the server."""

    @call("1.18", CREATED)
    def set_request_extended_headers(self, request: bool) -> None:
        """Say whether to ask for extended headers."""
        self._settings.request_extended_headers = bool(request)

    @call("1.18")
    def get_request_extended_headers(self) -> bool:
        """Return whether extended headers are asked for."""
        return self._settings.request_extended_headers

    @call("1.2", CREATED)
    def set_request_structured_replies(self, request: bool) -> None:
        """Say whether to ask for structured replies."""
        self._settings.request_structured_replies = bool(request)

    @call("1.2")
    def get_request_structured_replies(self) -> bool:
        """Return whether structured replies are asked for."""
        return self._settings.request_structured_replies

    @call("1.2", CREATED)
    def set_handshake_flags(self, flags: int) -> None:
        """Say which handshake flags may be agreed on."""
        self._settings.handshake_flags = arguments.flags(flags, HANDSHAKE_FLAG_MASK)

    @call("1.2")
    def get_handshake_flags(self) -> int:
        """Return the flags that may be agreed on; once connected, those that were."""
        if self._client is not None and self._client.engine.agreement.protocol:
            return int(self._client.engine.agreement.handshake_flags)
        return self._settings.handshake_flags

    @call("1.4", CREATED)
    def set_opt_mode(self, enable: bool) -> None:
        """Say whether to pause before an export is opened, for the opt_ calls."""
        self._settings.opt_mode = bool(enable)

    @call("1.4")
    def get_opt_mode(self) -> bool:
        """Return whether opt mode was asked for."""
        return self._settings.opt_mode

    @call("1.6")
    def set_strict_mode(self, flags: int) -> None:
        """Choose the checks that are made before a command is sent."""
        self._settings.strict_mode = arguments.flags(flags, STRICT_MASK)
        if self._client is not None:
            self._client.engine.check_strictly(self._settings.strict_mode)

    @call("1.6")
    def get_strict_mode(self) -> int:
        """Return the checks that are made."""
        return self._settings.strict_mode

    @call("1.12")
    def set_pread_initialize(self, request: bool) -> None:
        """Say whether memory is cleared before it is read into."""
        self._settings.pread_initialize = bool(request)

    @call("1.12")
    def get_pread_initialize(self) -> bool:
        """Return whether memory is cleared before it is read into."""
        return self._settings.pread_initialize


class TLSSettings(Core):
    """Whether to ask for TLS, and whom to trust."""

    @call("1.0", CREATED)
    def set_tls(self, tls: int) -> None:
        """Disable, allow or require TLS. Raises Error (ENOTSUP) where Python has no TLS."""
        wanted = arguments.enumerated(tls, _TLS_VALUES, "tls")
        if wanted != TLS_DISABLE and not supports_tls():
            raise UsageError(errno.ENOTSUP, "this Python has no TLS")
        self._settings.tls = wanted

    @call("1.0")
    def get_tls(self) -> int:
        """Return what was asked for."""
        return self._settings.tls

    @call("1.0", CREATED)
    def set_tls_certificates(self, dir: Any) -> None:  # noqa: A002 (libnbd's name)
        """Name the folder of certificates."""
        self._settings.tls_certificates = arguments.path(dir)

    @call("1.0", CREATED)
    def set_tls_verify_peer(self, verify: bool) -> None:
        """Say whether the server must prove who it is."""
        self._settings.tls_verify_peer = bool(verify)

    @call("1.0")
    def get_tls_verify_peer(self) -> bool:
        """Return whether the server must prove who it is."""
        return self._settings.tls_verify_peer

    @call("1.0", CREATED)
    def set_tls_username(self, username: str) -> None:
        """Name the user of a pre-shared key."""
        self._settings.tls_username = arguments.text(username, "username")

    @call("1.0")
    def get_tls_username(self) -> str:
        """Return the user of a pre-shared key; left unset, the one who runs this program."""
        if self._settings.tls_username is not None:
            return self._settings.tls_username
        try:
            return getpass.getuser()
        except (OSError, KeyError, ImportError) as exc:
            raise UsageError(errno.ENXIO, "the user who runs this program has no name") from exc

    @call("1.22", CREATED)
    def set_tls_hostname(self, hostname: str) -> None:
        """Name the host that the server's certificate must be for."""
        self._settings.tls_hostname = arguments.text(hostname, "hostname")

    @call("1.22")
    def get_tls_hostname(self) -> str:
        """Return the name that the certificate must be for: the one set, else the TCP host connected to, else ""."""
        if self._settings.tls_hostname is not None:
            return self._settings.tls_hostname
        return self._reached.host or ""

    @call("1.0", CREATED)
    def set_tls_psk_file(self, filename: Any) -> None:
        """Name the file of pre-shared keys, which are used in place of certificates."""
        self._settings.tls_psk_file = arguments.path(filename)

    @call("1.24", CREATED)
    def set_tls_priority(self, priority: str) -> None:
        """Set a priority string of GnuTLS', as far as OpenSSL can do the same."""
        self._settings.tls_priority = arguments.text(priority, "priority")

    @call("1.24")
    def get_tls_priority(self) -> str:
        """Return the priority string, GnuTLS' usual one where none was set."""
        return "NORMAL" if self._settings.tls_priority is None else self._settings.tls_priority


class ConnectionSettings(Core):
    """What URIs may do, and how sockets are opened."""

    @call("1.2", CREATED)
    def set_uri_allow_transports(self, mask: int) -> None:
        """Say which transports a URI may use."""
        self._settings.uri_allow_transports = arguments.flags(mask, ALLOW_TRANSPORT_MASK, "mask")

    @call("1.2", CREATED)
    def set_uri_allow_tls(self, tls: int) -> None:
        """Say whether URIs with TLS, without, or both are allowed."""
        self._settings.uri_allow_tls = arguments.enumerated(tls, _TLS_VALUES, "tls")

    @call("1.2", CREATED)
    def set_uri_allow_local_file(self, allow: bool) -> None:
        """Say whether a URI may name local files."""
        self._settings.uri_allow_local_file = bool(allow)

    @call("1.24", CREATED)
    def set_uri_allow_tls_priority(self, allow: bool) -> None:
        """Say whether a URI may set the TLS priority."""
        self._settings.uri_allow_tls_priority = bool(allow)

    @call("1.26", CREATED)
    def set_keepalive(self, enable: bool) -> None:
        """Have the system probe an idle TCP connection."""
        self._settings.keepalive = bool(enable)

    @call("1.26")
    def get_keepalive(self) -> bool:
        """Return whether an idle TCP connection is probed; before there is one, whether it is to be."""
        live = self._of_socket(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        return self._settings.keepalive if live is None else bool(live)

    @call("1.26", CREATED)
    def set_tcp_option(self, option: int, v: int) -> None:
        """Set how an idle TCP connection is probed: socket.TCP_KEEPCNT, TCP_KEEPIDLE or TCP_KEEPINTVL."""
        self._settings.tcp_options[_tcp_option(option)] = arguments.c_int(v, "v")

    @call("1.26")
    def get_tcp_option(self, option: int) -> int:
        """Return an option of the TCP connection; before there is one, what was set. Raises Error (EINVAL) where nothing was."""
        number = _tcp_option(option)
        live = self._of_socket(socket.IPPROTO_TCP, number)
        value = self._settings.tcp_options.get(number) if live is None else live
        if value is None:
            raise UsageError(errno.EINVAL, "that option was not set")
        return value

    def _of_socket(self, level: int, option: int) -> int | None:
        """Return an option of the TCP connection's socket, None while there is none."""
        fd = -1 if self._client is None or self._reached.host is None else self._client.fileno()
        if fd < 0:
            return None
        with socket.socket(fileno=os.dup(fd)) as sock:
            return sock.getsockopt(level, option)

    @call("1.16", CREATED)
    def set_socket_activation_name(self, socket_name: str) -> None:
        """Name the socket that systemd's socket activation hands over: letters and digits."""
        name = arguments.text(socket_name, "socket_name")
        if len(name) > _LONGEST_ACTIVATION_NAME:
            raise UsageError(errno.ENAMETOOLONG, f"socket activation name too long: {_LONGEST_ACTIVATION_NAME} at most")
        if name and not (name.isascii() and name.isalnum()):
            raise UsageError(errno.EINVAL, "socket activation name should contain only alphanumeric ASCII characters")
        self._settings.socket_activation_name = name

    @call("1.16")
    def get_socket_activation_name(self) -> str:
        """Return the socket's name, "" where none was set."""
        return self._settings.socket_activation_name


def _tcp_option(option: object) -> int:
    number = arguments.c_int(option, "option")
    if number not in _TCP_OPTIONS:
        raise UsageError(errno.EINVAL, "only TCP_KEEPCNT, TCP_KEEPIDLE and TCP_KEEPINTVL can be set")
    return number

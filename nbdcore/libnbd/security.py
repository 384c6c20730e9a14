"""libnbd's settings of TLS, made into those of the streams."""

from __future__ import annotations

import os
from pathlib import Path

from nbdcore.clients.session.session import StartTLS
from nbdcore.libnbd.settings import HandleSettings
from nbdcore.streams.base import Stream
from nbdcore.streams.tls.credentials import TLS, supports_tls
from nbdcore.streams.tls.starting import client_starter

__all__ = ["start_tls", "supports_tls"]

#: Where libnbd looks for a user's certificates, below the home folder, and for root's.
_USER_FOLDERS = (".pki/libnbd", ".config/pki/libnbd")
_ROOT_FOLDER = "/etc/pki/libnbd"


def start_tls(settings: HandleSettings, host: str | None) -> StartTLS:
    """Return what starts TLS as a handle's settings say, to a server on `host` (None: no name is known).

    Files are read when the server has agreed to TLS: what is wrong with them ends that connection.
    """

    def start(stream: Stream) -> Stream:
        return client_starter(credentials(settings), host)(stream)

    return start


def credentials(settings: HandleSettings) -> TLS:
    """Return whom to trust and what to show. Raises UsageError for settings that contradict each other."""
    folder = None
    if settings.tls_psk_file is None:
        folder = _usual_folder() if settings.tls_certificates is None else settings.tls_certificates
    return TLS(
        certificates=folder,
        verify=settings.tls_verify_peer,
        hostname=settings.tls_hostname,
        psk_file=settings.tls_psk_file,
        username=settings.tls_username,
        priority=settings.tls_priority,
    )


def _usual_folder() -> str | None:
    """Return the folder of certificates that libnbd would take unasked, None where there is none: the system's CAs, then."""
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    folders = [Path(_ROOT_FOLDER)] if is_root else [Path.home() / folder for folder in _USER_FOLDERS]
    return next((str(folder) for folder in folders if os.access(folder / "ca-cert.pem", os.R_OK)), None)

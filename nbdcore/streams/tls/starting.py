"""How TLS is started on a stream: credentials in, out comes what swaps a plain stream for an encrypted one.

The files of the credentials are read here, before anybody is connected to: what is wrong on this machine is said then.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from nbdcore.errors import UsageError
from nbdcore.streams.base import Stream
from nbdcore.streams.tls.credentials import TLS, ServerTLS, supports_tls, supports_tls_psk

if TYPE_CHECKING:
    # Imports ssl, which a program pays for when it starts TLS: so do the imports inside functions below.
    from nbdcore.streams.tls.stream import TLSStream

__all__ = ["client_starter", "server_starter"]


def client_starter(credentials: TLS, host: str | None = None) -> Callable[[Stream], TLSStream]:
    """Read the files, and return what starts TLS on a stream to `host`; None where the host has no name. For many streams.

    Raises UsageError for a file that is missing or wrong, an unknown user, a name that cannot be one, a priority that OpenSSL
    cannot do; with errno ENOTSUP for what this Python cannot do.
    """
    _check_support(credentials)
    from nbdcore.streams.tls.contexts import checked_name, client_context, least_bits
    from nbdcore.streams.tls.stream import TLSStream

    name = checked_name(credentials.hostname if credentials.hostname is not None else host)
    return partial(
        TLSStream,
        context=client_context(credentials, name),
        server_hostname=name,
        psk=credentials.psk_file is not None,
        least_bits=least_bits(credentials),
    )


def server_starter(credentials: ServerTLS) -> Callable[[Stream], TLSStream]:
    """Read the files, and return what starts TLS on a client's stream. For any number of streams.

    Raises UsageError as `client_starter` does.
    """
    _check_support(credentials)
    from nbdcore.streams.tls.contexts import least_bits, server_context
    from nbdcore.streams.tls.stream import TLSStream

    return partial(
        TLSStream,
        context=server_context(credentials),
        server_side=True,
        psk=credentials.psk_file is not None,
        least_bits=least_bits(credentials),
    )


def _check_support(credentials: TLS | ServerTLS) -> None:
    if not supports_tls():
        raise UsageError(errno.ENOTSUP, "this Python was built without the ssl module: it has no TLS")
    if credentials.psk_file is not None and not supports_tls_psk():
        raise UsageError(errno.ENOTSUP, "TLS with pre-shared keys needs Python 3.13 or later; use certificates")

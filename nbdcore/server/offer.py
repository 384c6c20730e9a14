"""What a server offers, and to whom: its exports, and those of them that a client may know of before it has started TLS.

The specification's three modes (section "Server-side requirements" of "TLS support") are one choice here, that of `public`: every
export where there is no TLS (NOTLS), none where all of them need it (FORCEDTLS), else those that do not (SELECTIVETLS). A client
without TLS is only ever served from `public`, so nothing that it must not know of can be told to it by mistake.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdcore.errors import UsageError
from nbdcore.server.exports import ServedExports
from nbdcore.streams.base import Stream
from nbdcore.streams.tls.credentials import ServerTLS
from nbdcore.streams.tls.starting import server_starter

if TYPE_CHECKING:  # at run time it would bring ssl, which only a server with TLS needs
    from nbdcore.streams.tls.stream import TLSStream

__all__ = ["Offer", "StartTLS", "offer_of"]

#: Swaps a client's plain stream for an encrypted one over it.
StartTLS = Callable[[Stream], "TLSStream"]


@dataclass(frozen=True, slots=True)
class Offer:
    """What every client of one server is offered.

    Attributes:
        exports: all exports, for clients with TLS, and for all of them where there is none.
        public: those for clients without TLS.
        start_tls: what starts TLS; None: this server has none.
        forced: whether nothing at all can be done without TLS.
    """

    exports: ServedExports
    public: ServedExports
    start_tls: StartTLS | None = None
    forced: bool = False


def offer_of(exports: ServedExports, tls: ServerTLS | None, *, require_tls: bool | None) -> Offer:
    """Return what a server was told to offer; None for `require_tls` requires it where there is `tls`. Reads the files of `tls`.

    Raises UsageError for files that cannot be used, and where TLS is required that the server does not have.
    """
    public = exports.public()
    if tls is not None:
        forced = require_tls is not False
        return Offer(exports, ServedExports(()) if forced else public, server_starter(tls), forced)
    if require_tls or public is not exports:
        raise UsageError(errno.EINVAL, "require_tls= is nothing without TLS: say tls=ServerTLS(...), with what the server shows")
    return Offer(exports, exports)

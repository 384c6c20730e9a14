"""A Network Block Device (NBD) client and server in pure Python, over pluggable transports.

    import nbdcore

    with nbdcore.connect("nbd+vsock://2:10809/disk") as disk:
        first = disk.pread(4096, 0)

The public names, and nothing else. Each is imported from its module when it is first used, so that `import nbdcore` costs a
program next to nothing until it talks to a server; transport plugins are looked for later still, on the first connection.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdcore import aio as aio
    from nbdcore import disk as disk
    from nbdcore import libnbd as libnbd
    from nbdcore import server as server
    from nbdcore.clients.blocking.client import Client
    from nbdcore.clients.blocking.functions import (
        connect,
        connect_command,
        connect_socket,
        connect_socket_activation,
        connect_ssh,
        connect_stream,
        connect_tcp,
        connect_unix,
        connect_vsock,
        create_pool,
        list_exports,
    )
    from nbdcore.clients.blocking.pool import Pool
    from nbdcore.clients.connect.options import ClientOptions
    from nbdcore.clients.extents.columns import CombinedExtentColumns, ExtentColumns
    from nbdcore.clients.extents.walking import CombinedExtent, Extent
    from nbdcore.errors import (
        ArgumentTypeError as ArgumentTypeError,
    )
    from nbdcore.errors import (
        CommandError,
        DeadlineExceeded,
        Disconnected,
        Error,
        NegotiationError,
        ProtocolViolation,
        TLSError,
        TransportError,
        TransportUnavailable,
        UsageError,
    )
    from nbdcore.plugins.registry import supports, supports_tcp, supports_unix, supports_vsock
    from nbdcore.protocol.constants import BASE_ALLOCATION, AllocationFlag, TransmissionFlag
    from nbdcore.protocol.handshake.agreement import BlockSize, Export, ExportInfo, TLSPolicy
    from nbdcore.protocol.state import Phase
    from nbdcore.streams.tls.credentials import TLS, supports_tls, supports_tls_psk
    from nbdcore.uri import DEFAULT_PORT, URI, is_uri, parse_uri

__all__ = [
    "BASE_ALLOCATION",
    "DEFAULT_PORT",
    "TLS",
    "URI",
    "AllocationFlag",
    "ArgumentTypeError",
    "BlockSize",
    "Client",
    "ClientOptions",
    "CombinedExtent",
    "CombinedExtentColumns",
    "CommandError",
    "DeadlineExceeded",
    "Disconnected",
    "Error",
    "Export",
    "ExportInfo",
    "Extent",
    "ExtentColumns",
    "NegotiationError",
    "Phase",
    "Pool",
    "ProtocolViolation",
    "TLSError",
    "TLSPolicy",
    "TransmissionFlag",
    "TransportError",
    "TransportUnavailable",
    "UsageError",
    "connect",
    "connect_command",
    "connect_socket",
    "connect_socket_activation",
    "connect_ssh",
    "connect_stream",
    "connect_tcp",
    "connect_unix",
    "connect_vsock",
    "create_pool",
    "is_uri",
    "list_exports",
    "parse_uri",
    "supports",
    "supports_tcp",
    "supports_tls",
    "supports_tls_psk",
    "supports_unix",
    "supports_vsock",
]

__version__ = "0.1.0"

# Where each public name lives; a test holds it against the imports above and __all__.
_HOMES = {
    "nbdcore.clients.blocking.client": "Client",
    "nbdcore.clients.blocking.functions": (
        "connect connect_command connect_socket connect_socket_activation connect_ssh connect_stream connect_tcp connect_unix "
        "connect_vsock create_pool list_exports"
    ),
    "nbdcore.clients.blocking.pool": "Pool",
    "nbdcore.clients.extents.columns": "CombinedExtentColumns ExtentColumns",
    "nbdcore.clients.extents.walking": "CombinedExtent Extent",
    "nbdcore.clients.connect.options": "ClientOptions",
    "nbdcore.errors": (
        "ArgumentTypeError CommandError DeadlineExceeded Disconnected Error NegotiationError ProtocolViolation TLSError "
        "TransportError TransportUnavailable UsageError"
    ),
    "nbdcore.plugins.registry": "supports supports_tcp supports_unix supports_vsock",
    "nbdcore.protocol.handshake.agreement": "BlockSize Export ExportInfo TLSPolicy",
    "nbdcore.protocol.constants": "BASE_ALLOCATION AllocationFlag TransmissionFlag",
    "nbdcore.protocol.state": "Phase",
    "nbdcore.streams.tls.credentials": "TLS supports_tls supports_tls_psk",
    "nbdcore.uri": "DEFAULT_PORT URI is_uri parse_uri",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}


# Each by its own name too: `import nbdcore` is enough, and costs nothing until they are used.
_SUBMODULES = ("aio", "disk", "libnbd", "server")


def __getattr__(name: str) -> object:
    module = _HOME.get(name)
    if name in _SUBMODULES:
        return import_module(f"nbdcore.{name}")
    if module is None:
        raise AttributeError(f"module 'nbdcore' has no attribute {name!r}")
    value: object = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})

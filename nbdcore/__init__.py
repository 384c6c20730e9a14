"""A Network Block Device (NBD) client and server in pure Python, over pluggable transports.

    import nbdcore

    with nbdcore.connect("nbd+vsock://2:10809/disk") as disk:
        first = disk.pread(4096, 0)

The public names, and nothing else. Importing this package loads no transport plugin: they are found on first need.
"""

from nbdcore.clients.blocking import (
    Client,
    ClientOptions,
    connect,
    connect_tcp,
    connect_unix,
    connect_vsock,
    list_exports,
)
from nbdcore.clients.extents import CombinedExtent, Extent
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
from nbdcore.protocol.agreement import BlockSize, Export, ExportInfo, TLSPolicy
from nbdcore.protocol.constants import BASE_ALLOCATION, DEFAULT_PORT, AllocationFlag, TransmissionFlag
from nbdcore.protocol.state import Phase
from nbdcore.uri import URI, is_uri, parse_uri

__all__ = [
    "BASE_ALLOCATION",
    "DEFAULT_PORT",
    "URI",
    "AllocationFlag",
    "BlockSize",
    "Client",
    "ClientOptions",
    "CombinedExtent",
    "CommandError",
    "DeadlineExceeded",
    "Disconnected",
    "Error",
    "Export",
    "ExportInfo",
    "Extent",
    "NegotiationError",
    "Phase",
    "ProtocolViolation",
    "TLSError",
    "TLSPolicy",
    "TransmissionFlag",
    "TransportError",
    "TransportUnavailable",
    "UsageError",
    "connect",
    "connect_tcp",
    "connect_unix",
    "connect_vsock",
    "is_uri",
    "list_exports",
    "parse_uri",
    "supports",
    "supports_tcp",
    "supports_unix",
    "supports_vsock",
]

__version__ = "0.1.0"

"""An NBD server to embed: disks in memory, in files or in any Python object, on any loaded transport.

    from nbdcore.server import MemoryDisk, Server

    with Server(MemoryDisk(1 << 30)) as server:
        uri = server.listen("tcp", host="127.0.0.1", port=0).address.uri()

What can be exported says `Backend`; how it is presented, `ExportSettings`; with which credentials, `ServerTLS`.
"""

from nbdcore.server.backend import Backend
from nbdcore.server.files import FileDisk, SharedMemoryDisk
from nbdcore.server.listening import Server
from nbdcore.server.memory import MemoryDisk
from nbdcore.server.settings import BlockSizes, ExportSettings
from nbdcore.streams.tls.credentials import ServerTLS

__all__ = ["Backend", "BlockSizes", "ExportSettings", "FileDisk", "MemoryDisk", "Server", "ServerTLS", "SharedMemoryDisk"]

"""Which tests this platform can have."""

from __future__ import annotations

import socket

collect_ignore = [] if hasattr(socket, "AF_UNIX") else ["test_process.py"]  # programs are talked to through unix sockets

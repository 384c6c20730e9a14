"""Leaves out the tests of a transport whose sockets this platform does not have; test_unavailable.py tests what it says then."""

from __future__ import annotations

import socket

collect_ignore = [f"test_{name}.py" for name in ("unix", "vsock") if not hasattr(socket, f"AF_{name.upper()}")]
collect_ignore += [] if hasattr(socket, "AF_UNIX") else ["test_ssh.py"]  # programs are talked to through unix sockets

"""The two loggers: `nbdcore` for clients, and `nbdcore.server` below it. Both are silent unless the program says otherwise."""

from __future__ import annotations

import logging

__all__ = ["client_log", "server_log"]

#: How connections begin and end is INFO, what was agreed on and which attempts failed is DEBUG.
client_log: logging.Logger = logging.getLogger("nbdcore")
# Without any handler, Python prints warnings to standard error.
client_log.addHandler(logging.NullHandler())

#: What whoever runs a server should know is a WARNING or an ERROR; what clients bring about at will is DEBUG.
server_log: logging.Logger = logging.getLogger("nbdcore.server")

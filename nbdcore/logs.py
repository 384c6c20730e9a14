"""The two loggers: `nbdcore` for clients, and `nbdcore.server` below it. Both are silent unless the program says otherwise."""

from __future__ import annotations

import logging

__all__ = ["client_log", "in_one_line", "server_log"]

#: What clients tell, by way of `nbdcore.clients.log`, and what servers do, whose logger is below it.
client_log: logging.Logger = logging.getLogger("nbdcore")
# Without any handler, Python prints warnings to standard error.
client_log.addHandler(logging.NullHandler())

#: What whoever runs a server should know is a WARNING or an ERROR; which clients come and go is INFO; what else they bring about
#: at will is DEBUG.
server_log: logging.Logger = logging.getLogger("nbdcore.server")


def in_one_line(record: logging.LogRecord) -> str:
    """Return what a record says, and the exception that it is about, without its traceback."""
    return record.getMessage() + (f" ({record.exc_info[1]!r})" if record.exc_info else "")

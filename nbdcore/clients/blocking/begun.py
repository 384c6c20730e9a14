"""A request that was sent, and that its caller waits for later: meanwhile server and caller work side by side.

While the caller is busy nobody receives the answer, unless other callers are on the connection. The system keeps what the server
sends until its buffer is full. So this is for one request ahead; for many there are the calls that work on many ranges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdcore.clients.requests.arguments import deadline_after
from nbdcore.errors import Error
from nbdcore.protocol.transmission.commands import Command, read

if TYPE_CHECKING:
    from nbdcore.clients.blocking.client import Client
    from nbdcore.clients.blocking.pool import Pool
    from nbdcore.clients.blocking.threads import SharedSession

__all__ = ["Begun", "begin_read"]


def begin_read(disk: Client | Pool, view: memoryview, offset: int) -> Begun:
    """Ask for a read into a view, and return without its data. It is one request: no larger than the server's maximum.

    Raises as `pread_into` does for what is known before an answer comes; then nothing has begun.
    """
    limits, shared, timeout = disk._connected("pread_into"), disk._session(), disk._command_timeout  # noqa: SLF001 (of this package)
    command = read(limits, len(view), offset, target=view)
    return Begun(shared.begin(command), command, timeout)


class Begun:
    """One request under way. End it with one of its calls, or memory of the caller's may be written to at any time.

    Args:
        connection: where it was sent.
        command: what was sent.
        timeout: seconds that `finish` waits, where it is not told; None: for ever.
    """

    __slots__ = ("_command", "_connection", "_timeout")

    def __init__(self, connection: SharedSession, command: Command, timeout: float | None) -> None:
        self._connection = connection
        self._command = command
        self._timeout = timeout

    def finish(self, *, timeout: float | None = None) -> int:
        """Wait until it is done. Returns its number of bytes; raises as the call that waits at once does, and has ended then."""
        self._connection.finish(self._command, deadline_after(self._timeout if timeout is None else timeout))
        return self._command.count

    def give_up(self, why: Error) -> None:
        """Do without it: its memory is not touched any more."""
        self._connection.abandon((self._command,), why)

"""The two exceptions of libnbd's Python module, and how an error of nbdcore becomes one.

Texts have libnbd's shape: the call that the program made, what happened, and the system's words for the number where there is
one. What happened is said in nbdcore's words, but where programs are known to look for libnbd's.
"""

from __future__ import annotations

import errno
import os

from nbdcore.errors import CommandError, Disconnected, NegotiationError, printable
from nbdcore.errors import Error as CoreError
from nbdcore.protocol.constants import CommandType, OptionReply
from nbdcore.protocol.transmission.commands import Command

__all__ = ["ClosedHandle", "Error"]

#: What libnbd calls each command in the text of a failure.
_COMMANDS: dict[int, str] = {
    CommandType.READ: "read",
    CommandType.WRITE: "write",
    CommandType.DISC: "disconnect",
    CommandType.FLUSH: "flush",
    CommandType.TRIM: "trim",
    CommandType.CACHE: "cache",
    CommandType.WRITE_ZEROES: "write-zeroes",
    CommandType.BLOCK_STATUS: "block-status",
}

#: Refusals that libnbd gives no number.
_NUMBERLESS = frozenset({OptionReply.ERR_POLICY, OptionReply.ERR_PLATFORM, OptionReply.ERR_EXT_HEADER_REQD})


class Error(Exception):
    """A call of libnbd's API failed.

    Attributes:
        string: the whole text: "nbd_CALL: what happened: the system's words".
        errnum: number of the `errno` module, 0 where none is known.
    """

    def __init__(self, string: str = "", errnum: int = 0) -> None:
        super().__init__(string, errnum)
        self.string = string
        self.errnum = errnum

    @property
    def errno(self) -> str | None:
        """The number's name, such as "EINVAL", or None where there is none."""
        return errno.errorcode.get(self.errnum)

    def __str__(self) -> str:
        return f"{self.string} ({self.errno})" if self.errno else self.string


class ClosedHandle(ValueError):
    """A method was called on a handle after its `close`."""

    def __init__(self, message: str = "libnbd: method called on closed handle") -> None:
        super().__init__(message)


def failure(call: str, message: str, number: int) -> Error:
    """Return the error of a call, by its name in C."""
    words = os.strerror(number) if number else ""
    text = f"{call}: {message}"
    return Error(f"{text}: {words}" if words and not text.endswith(words) else text, number)


def translated(call: str, error: CoreError) -> Error:
    """Return what an error of nbdcore is in libnbd's terms."""
    message = f"{error.message}: {printable(error.server_text)}" if error.server_text else error.message
    return failure(call, message, number_of(error))


def number_of(error: CoreError) -> int:
    """Return the errno that libnbd has for an error."""
    if isinstance(error, NegotiationError) and error.reply in _NUMBERLESS:
        return 0
    if isinstance(error, Disconnected) and error.errno == errno.ENOTCONN:
        return 0  # the server hung up: libnbd has a number only for what the operating system reports
    return error.errno or 0


def command_number(command: Command) -> int:
    """Return the errno that a command ended with, 0 for success. One that the end of the connection caught has ENOTCONN."""
    error = command.error
    if error is None:
        return 0
    return (error.errno or errno.EPROTO) if isinstance(error, CommandError) else errno.ENOTCONN


def command_failure(call: str, command: Command) -> Error:
    """Return the error of a failed command."""
    return failure(call, f"{_COMMANDS[command.type]}: command failed", command_number(command))

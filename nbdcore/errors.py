"""Every error nbdcore raises, sorted by what the caller can still do.

    Error(errno, message)          base of all
    ├── UsageError                 the call was wrong: nothing was sent, the connection is as it was; a ValueError
    │   └── ArgumentTypeError      an argument is of the wrong type; a TypeError too
    ├── CommandError               the server refused one command: the connection lives
    ├── NegotiationError           the server refused an option
    ├── TransportError             the way to the server could not be opened
    │   └── TransportUnavailable   that transport is not loaded here
    ├── TLSError                   encryption was refused or failed
    ├── ProtocolViolation          the server broke the protocol: the connection is dead
    ├── Disconnected               the connection is gone
    └── DeadlineExceeded           the caller's own timeout ran out

What the world did is an OSError as well: all of them but UsageError, which is the program's own mistake. So a program that says
`except OSError: connect again` does not hide a wrong argument. Disconnected is a ConnectionError, and DeadlineExceeded a
TimeoutError.

`errno` is a number from the `errno` module, or 0 where none fits. The message says what happened, to what, and what to try.
The text that a server sent is kept raw in `server_text`; in messages its control characters are escaped, since it is untrusted.
"""

from __future__ import annotations

import copy
import errno as errno_names
from typing import TypeVar

__all__ = [
    "ArgumentTypeError",
    "CommandError",
    "DeadlineExceeded",
    "Disconnected",
    "Error",
    "NegotiationError",
    "ProtocolViolation",
    "TLSError",
    "TransportError",
    "TransportUnavailable",
    "UsageError",
    "copied",
]

# Server text shown in a message. The specification allows 4096 bytes; an error line wants less.
_SHOWN_TEXT = 500


def printable(text: str) -> str:
    """Return untrusted `text` with control and undecodable characters escaped, cut to a length that fits an error line."""
    shown = "".join(char if char.isprintable() else _escaped(char) for char in text[:_SHOWN_TEXT])
    return shown + ("…" if len(text) > _SHOWN_TEXT else "")


def _escaped(char: str) -> str:
    try:
        return "".join(f"\\x{byte:02x}" for byte in char.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # half of a surrogate pair, which stands for no byte
        return f"\\u{ord(char):04x}"


class Error(Exception):
    """Base of all errors of nbdcore.

    What is still usable depends on the subclass; catching this one, assume nothing.

    Attributes:
        errno: a number of the `errno` module, 0 where none fits.
        message: one sentence for a human.
        server_text: what the server said about it, raw, or "" where it said nothing.
        names_disk: whether the message says which disk it is about, as the functions for whole disks have it.
    """

    names_disk: bool = False

    def __init__(self, errno: int, message: str, *, server_text: str = "") -> None:
        super().__init__(errno, message)  # where the class is an OSError too, that one's attributes are set by this
        self.errno: int | None = errno  # as OSError declares it; never None
        self.message = message
        self.server_text = server_text

    def __str__(self) -> str:
        said = printable(self.server_text)
        # Servers often say no more than the error's own words, with which the message ends already.
        text = self.message if self.message.endswith(said) else f"{self.message}: {said}"
        name = errno_names.errorcode.get(self.errno or 0)
        return f"{text} ({name})" if name else text

    def __reduce__(self) -> tuple[object, ...]:
        state = {name: value for name, value in vars(self).items() if name not in ("errno", "message")}
        return (type(self), (self.errno, self.message), state)


class UsageError(Error, ValueError):
    """The call itself was wrong: a bad argument, a flag the export does not offer, or a call not legal in this phase.

    Nothing was sent; the connection is exactly as it was.
    """


class ArgumentTypeError(UsageError, TypeError):
    """An argument is of a type that the call cannot take: text where bytes are needed, say.

    Nothing was sent; the connection is exactly as it was.
    """


class CommandError(Error, OSError):
    """The server answered a command with an error.

    The connection lives and every other command goes on. But where `errno` is ESHUTDOWN the server is shutting down, and the
    connection is closed as soon as the commands in flight are answered.

    `errno` is the specification's error number in this platform's terms. For a failed read no data is returned, and a caller's
    buffer must be taken as undefined.

    Attributes:
        offset: absolute offset in bytes of the failure, where the server named one inside the request; else None.
    """

    def __init__(self, errno: int, message: str, *, server_text: str = "", offset: int | None = None) -> None:
        super().__init__(errno, message, server_text=server_text)
        self.offset = offset


class NegotiationError(Error, OSError):
    """The server refused an option of the handshake: unknown export, TLS required, not allowed.

    In opt mode the connection stays in the negotiating phase. In automatic mode it has been closed; so it has in opt mode where
    the server is shutting down (NBD_REP_ERR_SHUTDOWN).

    Attributes:
        reply: the NBD_REP_ERR_* number, 0 where the refusal was no reply of the server.
    """

    def __init__(self, errno: int, message: str, *, server_text: str = "", reply: int = 0) -> None:
        super().__init__(errno, message, server_text=server_text)
        self.reply = reply


class TransportError(Error, OSError):
    """The way to the server could not be opened; the cause is the operating system's own error.

    That client cannot be connected any more: make a new one to try again.

    Attributes:
        failures: where several addresses were tried, what came of each, in order; else empty.
    """

    failures: tuple[Error, ...] = ()


class TransportUnavailable(TransportError):
    """The transport needed is not loaded: it is not installed, was blocked, or cannot work on this platform.

    Raised by a transport plugin at import to say that it cannot work here, with the reason; raised to the caller who needs it.
    `TransportUnavailable("reason")` is short for `TransportUnavailable(errno.ENOTSUP, "reason")`. Nothing was opened.
    """

    def __init__(self, errno: int | str, message: str | None = None, *, server_text: str = "") -> None:
        """Take errno and message as every error does, or, for a plugin that cannot work here, the reason alone: ENOTSUP."""
        number, reason = (errno_names.ENOTSUP, errno) if isinstance(errno, str) else (errno, message or "")
        super().__init__(number, reason, server_text=server_text)


class TLSError(Error, OSError):
    """TLS was required and refused, or its handshake or a certificate check failed.

    The connection is dead, and nothing but the handshake was sent in the clear.
    """


class ProtocolViolation(Error, OSError):
    """The server sent what the specification forbids, and the two sides no longer agree where a message begins.

    The connection is dead; every command that was in flight failed.
    """


class Disconnected(Error, ConnectionError):
    """The connection is gone: closed by the server, broken on the way, or closed by another thread of this program.

    Every command that was in flight failed; whether the server carried out a write or a zero is unknown. Later calls that need
    the connection raise it as well, unless it was this program that closed it (that is a UsageError).
    """


class DeadlineExceeded(Error, TimeoutError):
    """The caller's timeout ran out before the answer came; `errno` is ETIMEDOUT.

    A command is abandoned: its buffer is not written to any more, whether the server carried it out is unknown, and the
    connection stays usable. While connecting or negotiating the connection is dead.
    """


AnyError = TypeVar("AnyError", bound=Error)


def copied(error: AnyError) -> AnyError:
    """Return a copy of an error with its cause, and without its traceback: for each of several callers that raise it."""
    mine = copy.copy(error)
    mine.__cause__ = error.__cause__
    return mine

"""The error of a copy that failed on its way."""

from __future__ import annotations

import os

from nbdcore.errors import CommandError, Error, printable

__all__ = ["CopyError", "described", "failed"]


class CopyError(Error, OSError):
    """A copy failed, and the destination is not a copy of the source.

    The message names the range and the side, and says what the destination is now. The cause is the side's own error: what a
    client raised, or the operating system. Clients that the caller had opened are as that error leaves them; what the copy opened
    is closed.

    Attributes:
        offset: where the range begins that could not be copied, in bytes; None where the failure is about no range.
        count: how many bytes it has; None likewise.
    """

    def __init__(self, errno: int, message: str, *, offset: int | None = None, count: int | None = None) -> None:
        super().__init__(errno, message)
        self.offset = offset
        self.count = count

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.errno, self.message), {"offset": self.offset, "count": self.count})


def described(problem: OSError | Error) -> str:
    """Return an error's words, without the range and the number that a copy's own error has."""
    if isinstance(problem, CommandError):
        return printable(problem.server_text) or os.strerror(problem.errno or 0)
    if isinstance(problem, Error):
        return problem.message
    return problem.strerror or str(problem)


def failed(what: str, count: int, offset: int, name: str, problem: OSError | Error) -> CopyError:
    """Return the error of a copy for that of one of its ends: what could not be done, with which range."""
    message = f"cannot {what} {count} bytes at offset {offset} of {name}: {described(problem)}"
    return CopyError(problem.errno or 0, message, offset=offset, count=count)

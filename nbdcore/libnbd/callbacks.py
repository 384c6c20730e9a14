"""The calling of a program's callbacks, and the commands that are done and not yet retired.

Every callback is called from here. One that raises is reported by `sys.excepthook` and counts as -1: it never breaks the decoder
that called it. A `Callbacks` does not know the handle it belongs to, so commands in flight do not keep a dropped handle alive.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import Any

from nbdcore.errors import CommandError
from nbdcore.libnbd.constants import READ_DATA, READ_ERROR, READ_HOLE
from nbdcore.libnbd.errors import command_number
from nbdcore.protocol.constants import Chunk
from nbdcore.protocol.transmission.commands import Command, Numbers

__all__ = ["Callbacks", "ErrorNumber"]

_STATUS: dict[int, int] = {Chunk.OFFSET_DATA: READ_DATA, Chunk.OFFSET_HOLE: READ_HOLE, Chunk.ERROR_OFFSET: READ_ERROR}
#: Largest number that an entry of the 32-bit block status call can hold.
_MOST_32 = (1 << 32) - 1
#: What longer extents are cut to there: a multiple of every block size in use (libnbd's choice).
_CUT_32 = (1 << 32) - (64 << 20)


class ErrorNumber:
    """An errno that a callback can read and replace, as `value`."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value: int = value

    def __repr__(self) -> str:
        return f"ErrorNumber({self.value!r})"


class Callbacks:
    """Finished commands of one handle, and the calling of callbacks.

    Attributes:
        finished: commands that are done and not retired, by cookie, in the order in which they were done.
        interruption: what interrupted a callback (KeyboardInterrupt or the like), else None.
        calling: whether a callback is being called.
    """

    def __init__(self) -> None:
        self.finished: dict[int, Command] = {}
        self.interruption: BaseException | None = None
        self.calling: bool = False

    # ------------------------------------------------------------------------------------------ calling

    def call(self, callback: Callable[..., Any], *arguments: Any) -> int:
        """Call a program's callback. What it returns counts if it is an int, else 0; what it raises counts as -1."""
        before, self.calling = self.calling, True
        try:
            result = callback(*arguments)
        except BaseException as exc:  # noqa: BLE001 (the program's own: see `_raised`)
            return self._raised(exc)
        finally:
            self.calling = before
        return result if isinstance(result, int) else 0

    def _raised(self, exc: BaseException) -> int:
        """Report what a callback raised and go on, as libnbd does. What is to interrupt the program is kept for `interrupt`."""
        if isinstance(exc, Exception):
            own = exc.with_traceback(exc.__traceback__ and exc.__traceback__.tb_next)  # the program's frames, without ours
            sys.excepthook(type(own), own, own.__traceback__)
        else:  # KeyboardInterrupt and the like: raised once the bytes received have been dealt with
            self.interruption = self.interruption or exc
        return -1

    def interrupt(self) -> None:
        """Raise what interrupted a callback, if anything did."""
        if self.interruption is not None:
            interruption, self.interruption = self.interruption, None
            raise interruption

    # ------------------------------------------------------------------------------------------ the end of a command

    def complete(self, command: Command) -> None:
        """A command of an aio call is done: tell its completion callback (the tag), which may retire it."""
        callback = command.tag
        if callback is not None:
            command.tag = None
            error = ErrorNumber(0 if command.error is None else command_number(command))
            self.calling = True
            try:  # as `call` does: this is once a command
                result = callback(error)
            except BaseException as exc:  # noqa: BLE001 (the program's own: see `_raised`)
                result = self._raised(exc)
            self.calling = False
            if isinstance(result, int):
                if result == 1:
                    return
                if result == -1 and error.value:
                    command.error = _failed(command, error.value)
        command.on_chunk = command.on_extents = None
        self.finished[command.cookie] = command

    # ------------------------------------------------------------------------------------------ in the middle of a command

    def reports_chunks(self, command: Command, chunk: Callable[..., Any]) -> None:
        """Have each piece of a read reported to `chunk`."""

        def on_chunk(command: Command, kind: int, offset: int, length: int, number: int) -> None:
            begin = offset - command.offset
            error = ErrorNumber(number or command_number(command))
            data = command.allocate()[begin : begin + length].toreadonly()
            if self.call(chunk, data, offset, _STATUS[kind], error) == -1:
                _spoil(command, error)

        command.on_chunk = on_chunk

    def reports_extents(self, command: Command, extent: Callable[..., Any]) -> None:
        """Have block status reported to `extent`, as one flat list of 32-bit numbers."""

        def on_extents(command: Command, context: str, lengths: Numbers, flags: Numbers) -> None:
            entries, overflow = _narrow(lengths, flags)
            if overflow and command.error is None:
                command.error = _failed(command, errno.EOVERFLOW)
            error = ErrorNumber(command_number(command))
            if self.call(extent, context, command.offset, entries, error) == -1:
                _spoil(command, error)

        command.on_extents = on_extents

    def reports_extents_64(self, command: Command, extent: Callable[..., Any]) -> None:
        """Have block status reported to `extent`, as a list of (length, flags)."""

        def on_extents(command: Command, context: str, lengths: Numbers, flags: Numbers) -> None:
            error = ErrorNumber(command_number(command))
            if self.call(extent, context, command.offset, list(zip(lengths, flags, strict=True)), error) == -1:
                _spoil(command, error)

        command.on_extents = on_extents


def _failed(command: Command, number: int) -> CommandError:
    return CommandError(number, f"{command} failed")


def _spoil(command: Command, error: ErrorNumber) -> None:
    """A callback wants the command to fail; the first error counts."""
    if command.error is None:
        command.error = _failed(command, error.value or errno.EPROTO)


def _narrow(lengths: Numbers, flags: Numbers) -> tuple[list[int], bool]:
    """Return extents as a flat list of what fits 32 bits, and whether the flags of the very first did not fit (CVE-2023-5871)."""
    entries: list[int] = []
    if lengths.typecode == "I":  # they came as 32 bits, and all fit: a million in 45 ms, one by one in 75
        entries = [0] * (2 * len(lengths))
        entries[0::2], entries[1::2] = lengths, flags
        return entries, False
    for length, flag in zip(lengths, flags, strict=True):
        if flag > _MOST_32:
            return (entries, False) if entries else ([min(length, _CUT_32), flag & _MOST_32], True)
        if length > _MOST_32:
            return [*entries, _CUT_32, flag], False
        entries += (length, flag)
    return entries, False

"""Calls that start a command and do not wait, and calls for a program's own event loop, which tell it the outcome."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from nbdcore.errors import UsageError
from nbdcore.libnbd import arguments
from nbdcore.libnbd.buffer import Buffer
from nbdcore.libnbd.calls import CONNECTED, COUNTING, call
from nbdcore.libnbd.commands import CommandBuilders
from nbdcore.libnbd.constants import CMD_FLAG_DF
from nbdcore.libnbd.errors import command_failure
from nbdcore.libnbd.fast_calls import check, listed, question, transfer
from nbdcore.protocol.state import Phase
from nbdcore.protocol.transmission import commands
from nbdcore.protocol.transmission.commands import Command, Limits
from nbdcore.streams.base import Want

Callback = Callable[..., Any]

_CONNECTED = Phase.CONNECTED


class AioCommandCalls(CommandBuilders):
    """Commands that are started."""

    def _queue(self, command: Command, completion: Any) -> int:
        if completion is not None:
            command.tag = completion if callable(completion) else arguments.callback(completion, "completion")
        command.completion = self._complete_command
        client = self._client
        assert client is not None, "a command was built for it"
        return client.submit(command)

    @transfer("1.0")
    def aio_pread(self, limits: Limits, buf: Any, offset: int, flags: int) -> Command:
        """Start reading into an `nbd.Buffer` or any writable buffer."""
        clear = self._settings.pread_initialize
        target = buf.writable(clear=clear) if buf.__class__ is Buffer else arguments.target(buf, clear=clear)
        if flags or flags.__class__ is not int:
            flags = self._flags(flags, 0)
        return commands.read(limits, len(target), offset, target=target, flags=flags)

    @call("1.0", CONNECTED)
    def aio_pread_structured(
        self, buf: Any, offset: int, chunk: Callback, completion: Callback | None = None, flags: int = 0
    ) -> int:
        """Start reading, and tell `chunk` each piece as it comes."""
        target = arguments.target(buf, clear=self._settings.pread_initialize)
        callback = arguments.callback(chunk, "chunk")
        command = self._read(target, len(target), offset, flags, CMD_FLAG_DF)
        self._callbacks.reports_chunks(command, callback)
        return self._queue(command, completion)

    @transfer("1.0")
    def aio_pwrite(self, limits: Limits, buf: Any, offset: int, flags: int) -> Command:
        """Start writing an `nbd.Buffer` or any buffer, which must not change until the command is done."""
        return self._write(limits, arguments.source(buf), offset, flags)

    @call("1.0", CONNECTED)
    def aio_flush(self, completion: Callback | None = None, flags: int = 0) -> int:
        """Start what `flush` does."""
        return self._queue(self._flush(flags), completion)

    @call("1.0", CONNECTED)
    def aio_trim(self, count: int, offset: int, completion: Callback | None = None, flags: int = 0) -> int:
        """Start what `trim` does."""
        return self._queue(self._trim(count, offset, flags), completion)

    @call("1.0", CONNECTED)
    def aio_cache(self, count: int, offset: int, completion: Callback | None = None, flags: int = 0) -> int:
        """Start what `cache` does."""
        return self._queue(self._cache(count, offset, flags), completion)

    @call("1.0", CONNECTED)
    def aio_zero(self, count: int, offset: int, completion: Callback | None = None, flags: int = 0) -> int:
        """Start what `zero` does."""
        return self._queue(self._zero(count, offset, flags), completion)

    @call("1.0", CONNECTED)
    def aio_block_status(
        self, count: int, offset: int, extent: Callback, completion: Callback | None = None, flags: int = 0
    ) -> int:
        """Start what `block_status` does."""
        return self._queue(self._status(count, offset, extent, flags), completion)

    @call("1.18", CONNECTED)
    def aio_block_status_64(
        self, count: int, offset: int, extent64: Callback, completion: Callback | None = None, flags: int = 0
    ) -> int:
        """Start what `block_status_64` does."""
        return self._queue(self._status_64(count, offset, extent64, flags), completion)

    @call("1.18", CONNECTED)
    def aio_block_status_filter(
        self,
        count: int,
        offset: int,
        contexts: list[str],
        extent64: Callback,
        completion: Callback | None = None,
        flags: int = 0,
    ) -> int:
        """Start what `block_status_filter` does."""
        return self._queue(self._status_filter(count, offset, contexts, extent64, flags), completion)

    @call("1.0", CONNECTED)
    def aio_disconnect(self, flags: int = 0) -> None:
        """Queue the goodbye; no command may follow."""
        self._flags(flags, 0)
        self._connection.disconnect()
        self._disconnecting = True


class AioCalls(CommandBuilders):
    """Event loops, and the outcome of commands."""

    # ------------------------------------------------------------------------------------------ commands

    @call("1.0")
    def aio_command_completed(self, cookie: int) -> bool:
        """Return whether a command succeeded, and retire it. False: it is under way, unknown, or retired before.

        Raises Error for one that failed, and retires it too.
        """
        number = arguments.unsigned_64(cookie, "cookie")
        if not number:
            raise UsageError(errno.EINVAL, "invalid aio cookie 0")
        command = self._callbacks.finished.pop(number, None)
        if command is None:
            return False
        if command.error is not None:
            raise command_failure("nbd_aio_command_completed", command) from command.error
        return True

    @call("1.0")
    def aio_peek_command_completed(self) -> int:
        """Return the cookie of the command that was done first, of those not yet retired; 0 where all are under way.

        Raises Error (EINVAL) where there is none.
        """
        for cookie in self._callbacks.finished:
            return cookie
        if self._phase is _CONNECTED and self.aio_in_flight():
            return 0
        raise UsageError(errno.EINVAL, "no commands are in flight")

    @listed("1.0", COUNTING)
    def aio_in_flight(self) -> int:
        """Return how many commands are under way, the goodbye included."""
        client = self._client
        if self._closed or client is None or client.engine.phase is not _CONNECTED:
            check(AioCalls.aio_in_flight, self)
            return 0
        engine = client.engine
        pending = engine.pending
        return pending + 1 if self._disconnecting and engine.finished_sending else pending

    # ------------------------------------------------------------------------------------------ loops

    @call("1.0")
    def aio_get_fd(self) -> int:
        """Return the descriptor to wait on."""
        fd = -1 if self._client is None else self._client.fileno()
        if fd < 0:
            raise UsageError(errno.EINVAL, "connection is not in a connected state")
        return fd

    @question("1.0")
    def aio_get_direction(self) -> int:
        """Return what to wait for: AIO_DIRECTION_READ, AIO_DIRECTION_WRITE, both or neither."""
        return 0 if self._client is None else int(self._client.direction())

    @call("1.0", moves_bytes=True)
    def aio_notify_read(self) -> None:
        """The descriptor is readable, or both readable and writable."""
        self._notify(Want.READ, 0)

    @call("1.0", moves_bytes=True)
    def aio_notify_write(self) -> None:
        """The descriptor is writable."""
        self._notify(Want.WRITE, 1)

    def _notify(self, event: Want, number: int) -> None:
        client = self._client
        if client is None or not client.direction() & event:
            raise UsageError(errno.EINVAL, f"external event {number} is invalid in state {self._state_name}")
        try:
            client.advance()
        finally:
            self._back_to_created()

    @call("1.0", moves_bytes=True)
    def poll(self, timeout: int) -> int:
        """Wait up to `timeout` milliseconds, -1 for ever. Returns 1 after progress, 0 when the time was up."""
        return self._poll(-1, timeout)

    @call("1.16", moves_bytes=True)
    def poll2(self, fd: int, timeout: int) -> int:
        """Wait as `poll` does, and until another descriptor is readable; nothing is read from it."""
        return self._poll(arguments.c_int(fd, "fd"), timeout)

    def _poll(self, fd: int, timeout: int) -> int:
        milliseconds = arguments.c_int(timeout, "timeout")
        client = self._client
        if client is None or not (client.engine.phase is _CONNECTED or client.direction()):
            raise UsageError(errno.EINVAL, f"nothing to poll for in state {self._state_name}")
        try:
            return int(self._poll_once(None if milliseconds < 0 else milliseconds / 1000, also=fd))
        finally:
            self._back_to_created()

    # ------------------------------------------------------------------------------------------ states

    @question("1.0")
    def aio_is_created(self) -> bool:
        """Return whether no connect call was made yet."""
        return self._phase is Phase.CREATED

    @question("1.0")
    def aio_is_connecting(self) -> bool:
        """Return whether the server is being connected to, or answers an option."""
        return self._phase is Phase.CONNECTING

    @question("1.4")
    def aio_is_negotiating(self) -> bool:
        """Return whether the handle pauses in opt mode."""
        return self._phase is Phase.NEGOTIATING

    @question("1.0")
    def aio_is_ready(self) -> bool:
        """Return whether the connection is open and idle on this side."""
        return self._phase is Phase.CONNECTED and self._state_name == "READY"

    @question("1.0")
    def aio_is_processing(self) -> bool:
        """Return whether a request is being sent or a reply received."""
        return self._phase is Phase.CONNECTED and self._state_name != "READY"

    @question("1.0")
    def aio_is_dead(self) -> bool:
        """Return whether the connection broke."""
        return self._phase is Phase.DEAD

    @question("1.0")
    def aio_is_closed(self) -> bool:
        """Return whether the connection came to its end in order."""
        return self._phase is Phase.CLOSED

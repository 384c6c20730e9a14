"""The handle: the class that has every call, how it is closed, and the calls about debugging, the module and a server process."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

from nbdcore.errors import UsageError
from nbdcore.libnbd import arguments, security, uris
from nbdcore.libnbd.aio import AioCalls, AioCommandCalls
from nbdcore.libnbd.calls import call
from nbdcore.libnbd.commands import CommandCalls
from nbdcore.libnbd.connecting import ConnectCalls
from nbdcore.libnbd.core import Core
from nbdcore.libnbd.errors import ClosedHandle
from nbdcore.libnbd.fast_calls import question
from nbdcore.libnbd.options import OptionCalls
from nbdcore.libnbd.queries import ConnectionQueries, ExportQueries
from nbdcore.libnbd.setting_calls import ConnectionSettings, ExportSettings, ProtocolSettings, TLSSettings
from nbdcore.plugins.registry import registry
from nbdcore.protocol.handshake.agreement import Traffic
from nbdcore.protocol.state import Phase
from nbdcore.streams.process import Child

__all__ = ["NBD", "nbd"]

PACKAGE_NAME = "libnbd"
#: The release of libnbd whose behaviour this module has. Calls that came later are there as well.
VERSION = "1.24.4"

_EXPLANATIONS = {
    Phase.CREATED: "no connect call has been made yet",
    Phase.CONNECTING: "the server is being connected to, or answers an option",
    Phase.NEGOTIATING: "options can be sent",
    Phase.CONNECTED: "commands can be sent",
    Phase.CLOSED: "the connection came to its end in order",
    Phase.DEAD: "the connection broke: the handle can only be closed",
}
_NO_TRAFFIC = Traffic()


class DebugCalls(Core):
    """Debug messages, statistics, and what a program attaches to a handle."""

    @call("1.0")
    def set_debug(self, debug: bool) -> None:
        """Say whether debug messages are wanted."""
        self._debug = self._slow_path = bool(debug)

    @call("1.0")
    def get_debug(self) -> bool:
        """Return whether debug messages are wanted."""
        return self._debug

    @call("1.0")
    def set_debug_callback(self, debug: Callable[..., Any]) -> None:
        """Have debug messages given to `debug(context, message)` rather than written to standard error."""
        self._debug_callback = arguments.callback(debug, "debug")

    @call("1.0")
    def clear_debug_callback(self) -> None:
        """Have debug messages written to standard error."""
        self._debug_callback = None

    @call("1.0")
    def set_handle_name(self, handle_name: str) -> None:
        """Name the handle for debug messages."""
        self._name = arguments.text(handle_name, "handle_name")

    @call("1.0")
    def get_handle_name(self) -> str:
        """Return the handle's name."""
        return self._name

    @call("1.8", lock_free=True)
    def set_private_data(self, private_data: int) -> int:
        """Attach a number of 32 bits. Returns the one before."""
        before, self._private_data = self._private_data, arguments.private(private_data)
        return before

    @question("1.8")
    def get_private_data(self) -> int:
        """Return the number attached, 0 where none was."""
        return self._private_data

    @call("1.0")
    def connection_state(self) -> str:
        """Return the state in words, for humans."""
        return f"{self._state_name}: {_EXPLANATIONS[self._phase]}"

    @property
    def _traffic(self) -> Traffic:
        return _NO_TRAFFIC if self._client is None else self._client.traffic

    @call("1.16")
    def stats_bytes_sent(self) -> int:
        """Return how many bytes were sent."""
        return self._traffic.bytes_sent

    @call("1.16")
    def stats_chunks_sent(self) -> int:
        """Return how many requests were sent, of options and of commands."""
        return self._traffic.chunks_sent

    @call("1.16")
    def stats_bytes_received(self) -> int:
        """Return how many bytes were received."""
        return self._traffic.bytes_received

    @call("1.16")
    def stats_chunks_received(self) -> int:
        """Return how many replies to commands were received; the server's greeting counts as one."""
        return self._traffic.chunks_received


class ModuleCalls(Core):
    """What this module is and can do: the answers are the same for every handle."""

    @question("1.0")
    def get_package_name(self) -> str:
        """Return "libnbd"."""
        return PACKAGE_NAME

    @question("1.0")
    def get_version(self) -> str:
        """Return the release of libnbd whose behaviour this module has."""
        return VERSION

    @question("1.24")
    def get_version_extra(self) -> str:
        """Return what whoever packaged this module says of its version: nothing."""
        return ""

    @question("1.24")
    def get_handle_size(self) -> int:
        """Return how many bytes of memory the handle object itself takes."""
        return self.__sizeof__()

    @question("1.0")
    def supports_tls(self) -> bool:
        """Return whether TLS works here."""
        return security.supports_tls()

    @question("1.16")
    def supports_vsock(self) -> bool:
        """Return whether vsock works here."""
        return registry.supports("vsock")

    @question("1.0")
    def supports_uri(self) -> bool:
        """Return whether URIs work: always."""
        return True

    @call("1.22")
    def is_uri(self, uri: str) -> bool:
        """Return whether a text begins like an NBD URI."""
        return uris.is_uri(arguments.text(uri, "uri"))


class ProcessCalls(Core):
    """The process behind the connection, where there is one."""

    def _kill(self, signum: int) -> None:
        number = arguments.c_int(signum, "signum")
        if number < 0:
            raise UsageError(errno.EINVAL, "signal number must be positive")
        try:
            self._child().signal(number or signal.SIGTERM)
        except OSError as exc:
            raise UsageError(exc.errno or 0, "kill") from exc

    def _child(self) -> Child:
        if self._reached.child is None:
            raise UsageError(errno.ESRCH, "no subprocess exists")
        return self._reached.child

    @call("1.0", moves_bytes=True, in_the_middle=_kill)
    def kill_subprocess(self, signum: int) -> None:
        """Send the process a signal, SIGTERM for 0. Raises Error (ESRCH) where there is none."""
        if self._client is not None:
            self._client.send()  # what was submitted before goes before
        self._kill(signum)

    @call("1.22")
    def get_subprocess_pid(self) -> int:
        """Return the number of the process. Raises Error (ESRCH) where there is none."""
        return self._child().process.pid


class NBD(
    OptionCalls,
    CommandCalls,
    AioCommandCalls,
    AioCalls,
    ConnectCalls,
    ExportSettings,
    ProtocolSettings,
    TLSSettings,
    ConnectionSettings,
    ExportQueries,
    ConnectionQueries,
    DebugCalls,
    ModuleCalls,
    ProcessCalls,
):
    """A handle of libnbd's API: one connection to an NBD server, or the settings of one to come."""

    def __init__(self) -> None:
        super().__init__()
        self._close_callbacks: list[Callable[[], Any]] = []
        if self._debug:
            self._say("nbd_create", "opening handle")

    @call("1.26")
    def add_close_callback(self, close: Callable[[], Any]) -> None:
        """Have `close()` called when the handle is closed, before the completions of what is still under way."""
        self._close_callbacks.append(arguments.callback(close, "close"))

    @call("1.16", lock_free=True)
    def close(self) -> None:
        """Close the connection at once, without taking leave; what is under way completes with ENOTCONN.

        In a signal handler or a callback, the call in whose middle that is ends first: until then nothing is completed. Raises
        ClosedHandle on a handle that is closed already.
        """
        if self._process != os.getpid():
            self._leave_to_parent()
            return
        if self._in_a_call():
            self._closed = self._slow_path = self._closing = True
            self._hang_up()
            return
        with self._lock:
            if self._closed and not self._closing:  # closing: by a signal handler in between
                raise ClosedHandle
            self._finish()
        self._callbacks.interrupt()

    def _end_call(self) -> None:
        if self._in_a_call():
            return
        with self._lock:  # a call of another thread may be over first
            if self._closing:
                self._finish()
        self._callbacks.interrupt()

    def _leave_to_parent(self) -> None:
        self._closed = self._slow_path = True
        if self._reached.stream is not None:
            self._reached.stream.close()
        elif self._client is not None:
            self._client.close()  # no command is under way before there is a stream

    def _finish(self) -> None:
        self._closed = self._slow_path = True
        self._closing = False
        if self._debug:
            self._say("nbd_close", "closing handle")
        for callback in self._close_callbacks:
            self._callbacks.call(callback)
        if self._client is not None:
            self._client.close()
        self._callbacks.finished.clear()
        if self._reached.child is not None:
            self._reached.child.join()

    def __del__(self) -> None:
        if getattr(self, "_closed", True):
            return
        if self._process != os.getpid():
            self._leave_to_parent()
        else:
            self._finish()


@contextlib.contextmanager
def nbd() -> Iterator[NBD]:
    """Make a handle for a `with` block, closed at the block's end whatever happened in it.

    Raises ClosedHandle at the end of a block that has closed the handle by itself.
    """
    handle = NBD()
    try:
        yield handle
    except BaseException:
        with contextlib.suppress(ClosedHandle):
            handle.close()
        raise
    handle.close()

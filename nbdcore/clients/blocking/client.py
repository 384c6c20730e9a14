"""The blocking client: one connection, whose calls wait for their outcome. Safe to use from several threads at once.

What it does with an open export is in `calls`, opt mode in `options`, and how it connects in `connecting`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import Any, Unpack

from nbdcore.clients.blocking.calls import BlockingCalls
from nbdcore.clients.blocking.opt_mode import OptionCalls
from nbdcore.clients.blocking.threads import SharedSession
from nbdcore.clients.connect.options import ClientOptions
from nbdcore.clients.connect.target import already_found, target_of_another
from nbdcore.clients.requests.arguments import deadline_after
from nbdcore.errors import DeadlineExceeded, Error, UsageError
from nbdcore.protocol.engine import Engine, Exchange
from nbdcore.protocol.handshake.agreement import Export
from nbdcore.protocol.state import Phase
from nbdcore.streams.base import Stream
from nbdcore.streams.waiting import Deadline


class Client(BlockingCalls["Client"], OptionCalls):
    """A connection to one export of an NBD server.

    Newly created it is not connected: call one of its `connect` methods once, or use the functions `nbdcore.connect` and its
    kind, which do both. As a context manager it says goodbye and closes at the end.

    Every call that waits takes a `timeout` in seconds and raises DeadlineExceeded when it runs out; a command is then abandoned
    and the connection stays usable. None stands for the client's `command_timeout`, or for ever; `math.inf` is always for ever.

    Any command raises UsageError for arguments that are wrong (nothing is sent), CommandError when the server refuses it (the
    connection lives), Disconnected or ProtocolViolation when the connection ended. Offsets and counts are bytes. Reading,
    writing, zeroing or trimming no bytes does nothing. May be used from several threads at once.

    Ctrl-C, or whatever else a signal handler raises, while a command waits costs that command only; if it hits in the few
    microseconds in which bytes are moved, the connection ends, since nobody knows how many of them have been.

    Args:
        stream: connect over this open stream at once, as `connect_stream` does.
        export: name of the export; "" is the server's default one. A name in a URI goes first.
        contexts: metadata contexts for `extents` and `block_status`, such as "base:allocation" or "qemu:dirty-bitmap:NAME".
        opt_mode: stop before the export is opened, for the `opt_` calls.
        structured_replies: ask for structured replies; without them there is no block status.
        extended_headers: ask for extended headers, with lengths of 64 bits.
        block_size: ask for block size constraints, and promise to obey them.
        full_info: ask for the export's own name and description.
        tls: how to do TLS: a `TLS` value, or True for the system's CAs; then it is required. False forbids it. By default only
            an `nbds` URI asks for it.
        tls_policy: whether to ask for TLS, if not as `tls` says: ALLOW takes it from a server that has it, and goes on in the
            clear with any other, which a man in the middle can be; DISABLE leaves it to `opt_starttls`.
        start_tls: makes an encrypted stream out of a plain one, in place of `tls`.
        allow_transports: names of the transports that a URI may use; None: all but those that run programs (ssh).
        allow_local_files: whether a URI may name files of this machine (tls-certificates, tls-psk-file).
        allow_unverified: whether a URI may switch the verification of the server's certificate off (tls-verify-peer=0).
        allow_priority: whether a URI may choose TLS versions and ciphers (tls-priority).
        command_timeout: seconds for every call that names no `timeout` of its own, connecting and disconnecting aside.
        timeout: for `stream` only.
    """

    def __init__(
        self,
        stream: Stream | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[ClientOptions],
    ) -> None:
        super().__init__(options)
        if stream is not None:
            self.connect_stream(stream, timeout=timeout)

    # ------------------------------------------------------------------------------------------ what else the server has

    def list_exports(self, *, timeout: float | None = None) -> list[Export]:
        """Ask which exports the server has (section NBD_OPT_LIST).

        In opt mode on this connection; otherwise on one more connection to the same server, opened for the question. Raises
        UsageError where no other can be opened: before connecting, and after `connect_stream` and `connect_socket`.
        """
        if self.phase is Phase.NEGOTIATING:
            return self.opt_list(timeout=timeout)
        target = target_of_another(self._target)
        deadline = deadline_after(timeout)
        with Client(opt_mode=True) as other:
            other._connect("connect", partial(already_found, target), timeout, None)
            return other.opt_list(timeout=deadline.remaining())

    # ------------------------------------------------------------------------------------------ conversations

    def _exchange(self, start: Callable[[Engine], Exchange], deadline: Deadline, what: str) -> Any:
        """Run one conversation with the server. At the deadline the connection is dead."""
        shared = self._session()
        assert isinstance(shared, SharedSession), "a client has one connection"
        try:
            exchange = shared.run(start, deadline, what)
        except UsageError:
            raise
        except BaseException as exc:
            shared.close(exc if isinstance(exc, Error) else DeadlineExceeded(errno.ETIMEDOUT, f"{what} was given up ({exc!r})"))
            raise
        if exchange.error is not None:
            raise exchange.error
        return exchange.result

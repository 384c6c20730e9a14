"""Conversations under way: one at a time is run, from what it says to what it waits for, until it has an outcome.

A conversation of `negotiation` is a generator: it yields messages to send, numbers of bytes to receive, or the wish for TLS. The
runner keeps what is said until the engine takes it, and has room for what is waited for. What the outcome means for the
connection, and who is told of it, is the engine's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nbdcore.errors import Error, NegotiationError, UsageError
from nbdcore.protocol.constants import OptionReply
from nbdcore.protocol.handshake.negotiation import HANDOVER, Conversation

__all__ = ["Exchange", "Runner"]


class Exchange:
    """A conversation under way, and its outcome.

    Attributes:
        enters: success leads to the transmission phase, unless the result is False.
        fatal: a refusal by the server ends the connection.
        result: what the conversation returned.
        error: why it failed, else None.
        done: whether the outcome is final.
        completion: called once with the exchange when it is done.
    """

    __slots__ = ("completion", "conversation", "done", "enters", "error", "fatal", "result")

    def __init__(self, conversation: Conversation[Any], *, enters: bool, fatal: bool) -> None:
        self.conversation: Conversation[Any] = conversation
        self.enters: bool = enters
        self.fatal: bool = fatal
        self.result: Any = None
        self.error: Error | None = None
        self.done: bool = False
        self.completion: Callable[[Exchange], Any] | None = None

    @property
    def ends_connection(self) -> bool:
        """Whether its error is the end of the connection. In opt mode a refusal is an answer like others.

        That the server is shutting down is none: the client must say goodbye then (section "Termination of the session").
        """
        error = self.error
        if error is None:
            return False
        return self.fatal or not isinstance(error, NegotiationError) or error.reply == OptionReply.ERR_SHUTDOWN

    def complete(self) -> None:
        """Its outcome is final: tell whoever waits for it."""
        self.done = True
        if self.completion is not None:
            self.completion(self)


class Runner:
    """Runs conversations.

    Each step returns the exchange that has come to its end by it, with a result or an error, or None.

    Attributes:
        wants_tls: the stream is to be swapped for an encrypted one; then call `tls_started`.
    """

    def __init__(self) -> None:
        self.wants_tls: bool = False
        self._current: Exchange | None = None
        self._said: list[bytes] = []
        self._reading = memoryview(b"")
        self._filled = 0

    def begin(self, exchange: Exchange) -> Exchange | None:
        """Let a conversation take its first step. Raises UsageError, with nothing said, for arguments that cannot be sent."""
        return self._step(exchange, None)

    def take_said(self) -> list[bytes]:
        """Return what conversations have said since the last time."""
        said, self._said = self._said, []
        return said

    def room(self) -> memoryview:
        """Return where the bytes go that the conversation waits for; empty when it waits for none."""
        return self._reading[self._filled :]

    @property
    def waits_in_vain(self) -> bool:
        """Whether none of the bytes that the conversation waits for has come."""
        return not self._filled

    def received(self, count: int) -> Exchange | None:
        """Take in `count` bytes that were put into `room()`."""
        self._filled += count
        return self._advance(bytes(self._reading)) if self._filled == len(self._reading) else None

    def tls_started(self) -> Exchange | None:
        """The stream is encrypted now, as `wants_tls` asked."""
        self.wants_tls = False
        return self._advance(b"")

    def stop(self) -> Exchange | None:
        """The connection has ended. Returns the exchange that was under way, whose conversation goes on no more."""
        self.wants_tls = False
        self._reading, self._filled = memoryview(b""), 0
        exchange, self._current = self._current, None
        if exchange is not None:
            exchange.conversation.close()
        return exchange

    def _advance(self, data: bytes) -> Exchange | None:
        """The bytes that the current conversation asked for are here."""
        self._reading, self._filled = memoryview(b""), 0
        return None if self._current is None else self._step(self._current, data)

    def _step(self, exchange: Exchange, data: bytes | None) -> Exchange | None:
        """Let a conversation go on until it needs bytes again, or is over."""
        send = exchange.conversation.send
        try:
            wanted = next(exchange.conversation) if data is None else send(data)
            while isinstance(wanted, bytes):
                self._said.append(wanted)
                wanted = send(b"")
        except StopIteration as stop:
            exchange.result = stop.value
        except UsageError:
            # Wrong arguments show at a conversation's first step, before anything is sent: the caller's to handle.
            raise
        except Error as exc:
            exchange.error = exc
        else:
            self._current = exchange
            if wanted is HANDOVER:
                self.wants_tls = True
            elif isinstance(wanted, int):
                self._reading, self._filled = memoryview(bytearray(wanted)), 0
            return None
        self._current = None
        return exchange

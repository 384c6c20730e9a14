"""Conversations under way: one at a time is run, from what it says to what it waits for, until it has an outcome.

A conversation of `negotiation` is a generator: it yields messages to send, numbers of bytes to receive, or the wish for TLS. What
follows from its outcome for the connection is the engine's business, which these methods are the lower half of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from nbdcore.errors import Error, NegotiationError, UsageError
from nbdcore.protocol.constants import OptionReply
from nbdcore.protocol.handshake.negotiation import HANDOVER, Conversation

__all__ = ["Exchange", "Exchanges"]


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


class Exchanges(ABC):
    """Runs conversations.

    Attributes:
        wants_tls: the stream is to be swapped for an encrypted one; then call `tls_started`.
    """

    def __init__(self) -> None:
        self.wants_tls: bool = False
        self._exchange: Exchange | None = None
        self._reading = memoryview(b"")
        self._filled = 0

    @abstractmethod
    def _say(self, message: bytes) -> None:
        """Send what a conversation says."""

    @abstractmethod
    def _say_abort(self) -> None:
        """Send the goodbye of the handshake, where one may be said."""

    @abstractmethod
    def _settle(self, exchange: Exchange) -> None:
        """A conversation has come to its end, or was refused without harm: draw the conclusions, before its completion runs."""

    @abstractmethod
    def fail(self, error: Error) -> None:
        """End the connection, and what is under way with it (`_break_off`)."""

    def _begin(self, exchange: Exchange) -> Exchange:
        self._step(exchange, None)
        return exchange

    def _room_for_exchange(self) -> memoryview:
        """Return where the bytes go that the conversation waits for; empty when it waits for none."""
        return self._reading[self._filled :]

    def _received_for_exchange(self, count: int) -> None:
        self._filled += count
        if self._filled == len(self._reading):
            self._advance(bytes(self._reading))

    def tls_started(self) -> None:
        """The stream is encrypted now, as `wants_tls` asked."""
        self.wants_tls = False
        self._advance(b"")

    def _advance(self, data: bytes) -> None:
        """The bytes that the current conversation asked for are here."""
        self._reading, self._filled = memoryview(b""), 0
        if self._exchange is not None:
            self._step(self._exchange, data)

    def _step(self, exchange: Exchange, data: bytes | None) -> None:
        """Let a conversation go on until it needs bytes again, or is over."""
        send = exchange.conversation.send
        try:
            wanted = next(exchange.conversation) if data is None else send(data)
            while isinstance(wanted, bytes):
                self._say(wanted)
                wanted = send(b"")
        except StopIteration as stop:
            exchange.result = stop.value
            self._finish(exchange)
        except UsageError:
            # Wrong arguments show at a conversation's first step, before anything is sent: the caller's to handle.
            raise
        except Error as exc:
            self._refused(exchange, exc)
        else:
            self._exchange = exchange
            if wanted is HANDOVER:
                self.wants_tls = True
            elif isinstance(wanted, int):
                self._reading, self._filled = memoryview(bytearray(wanted)), 0

    def _refused(self, exchange: Exchange, error: Error) -> None:
        """A conversation failed. A refusal in opt mode is an answer like others; everything else ends the connection.

        So does a server that shuts down: the client must say goodbye then (section "Termination of the session").
        """
        if isinstance(error, NegotiationError) and not (exchange.fatal or error.reply == OptionReply.ERR_SHUTDOWN):
            exchange.error = error
            self._finish(exchange)
        else:
            if isinstance(error, NegotiationError):
                self._say_abort()
            self._exchange = exchange
            self.fail(error)

    def _finish(self, exchange: Exchange) -> None:
        self._exchange = None
        exchange.done = True
        self._settle(exchange)
        if exchange.completion is not None:
            exchange.completion(exchange)

    def _break_off(self, error: Error) -> None:
        """The connection has ended: so has the conversation under way, if there is one."""
        self.wants_tls = False
        self._reading, self._filled = memoryview(b""), 0
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.conversation.close()
            exchange.error, exchange.done = error, True
            if exchange.completion is not None:
                exchange.completion(exchange)

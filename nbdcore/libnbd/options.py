"""Calls of opt mode: one option of the handshake at a time. `aio_opt_...` starts what `opt_...` waits for."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import Any

from nbdcore.errors import NegotiationError, UsageError
from nbdcore.libnbd import arguments
from nbdcore.libnbd.callbacks import ErrorNumber
from nbdcore.libnbd.calls import NEGOTIATING, call
from nbdcore.libnbd.core import Core
from nbdcore.libnbd.errors import number_of
from nbdcore.libnbd.security import supports_tls
from nbdcore.protocol.engine import Exchange
from nbdcore.protocol.handshake import negotiation

Callback = Callable[..., Any]


class OptionCalls(Core):
    """The handshake, step by step."""

    # ------------------------------------------------------------------------------------------ the export

    @call("1.4", NEGOTIATING)
    def opt_go(self) -> None:
        """Open the export, after selecting the contexts added."""
        self._exchange(self._go)

    @call("1.4", NEGOTIATING)
    def aio_opt_go(self, completion: Callback | None = None) -> None:
        """Start what `opt_go` does."""
        callback = arguments.completion(completion)
        self._complete(self._go(), callback)

    def _go(self) -> Exchange:
        return self._ask(negotiation.enter, self._settings.export_name, enters=True, anew=True)

    @call("1.4", NEGOTIATING)
    def opt_info(self) -> None:
        """Ask about the export without opening it."""
        self._exchange(self._info)

    @call("1.4", NEGOTIATING)
    def aio_opt_info(self, completion: Callback | None = None) -> None:
        """Start what `opt_info` does."""
        callback = arguments.completion(completion)
        self._complete(self._info(), callback)

    def _info(self) -> Exchange:
        return self._ask(negotiation.inspect, self._settings.export_name)

    @call("1.4", NEGOTIATING)
    def opt_abort(self) -> None:
        """Say goodbye, and close."""
        self._say_goodbye()

    @call("1.4", NEGOTIATING)
    def aio_opt_abort(self) -> None:
        """Do what `opt_abort` does: there is nothing to wait for."""
        self._say_goodbye()

    @call("1.4", NEGOTIATING)
    def opt_list(self, list: Callback) -> int:  # noqa: A002 (libnbd's name)
        """Tell `list` the name and description of each of the server's exports. Returns how many there are."""
        callback = arguments.callback(list, "list")
        return self._count(lambda: self._list(callback))

    @call("1.4", NEGOTIATING)
    def aio_opt_list(self, list: Callback, completion: Callback | None = None) -> None:  # noqa: A002 (libnbd's name)
        """Start what `opt_list` does."""
        callback, completed = arguments.callback(list, "list"), arguments.completion(completion)
        self._complete(self._list(callback), completed, refused=errno.ENOTSUP)

    def _list(self, callback: Callback) -> Exchange:
        def report(exports: Iterable[Any]) -> None:
            for export in exports:
                self._callbacks.call(callback, export.name, export.description)

        return self._ask(negotiation.list_exports, report=report)

    # ------------------------------------------------------------------------------------------ what lasts for the connection

    @call("1.16", NEGOTIATING)
    def opt_starttls(self) -> bool:
        """Ask for TLS. Returns whether the server agreed."""
        return bool(self._exchange(self._starttls))

    @call("1.16", NEGOTIATING)
    def aio_opt_starttls(self, completion: Callback | None = None) -> None:
        """Start what `opt_starttls` does."""
        callback = arguments.completion(completion)
        self._complete(self._starttls(), callback)

    def _starttls(self) -> Exchange:
        if not supports_tls():
            raise UsageError(errno.ENOTSUP, "this Python has no TLS")
        return self._ask(negotiation.starttls)

    @call("1.18", NEGOTIATING)
    def opt_extended_headers(self) -> bool:
        """Ask for extended headers. Returns whether the server agreed."""
        return bool(self._exchange(lambda: self._ask(negotiation.extended_headers)))

    @call("1.18", NEGOTIATING)
    def aio_opt_extended_headers(self, completion: Callback | None = None) -> None:
        """Start what `opt_extended_headers` does."""
        callback = arguments.completion(completion)
        self._complete(self._ask(negotiation.extended_headers), callback)

    @call("1.16", NEGOTIATING)
    def opt_structured_reply(self) -> bool:
        """Ask for structured replies. Returns whether the server agreed."""
        return bool(self._exchange(lambda: self._ask(negotiation.structured_reply)))

    @call("1.16", NEGOTIATING)
    def aio_opt_structured_reply(self, completion: Callback | None = None) -> None:
        """Start what `opt_structured_reply` does."""
        callback = arguments.completion(completion)
        self._complete(self._ask(negotiation.structured_reply), callback)

    # ------------------------------------------------------------------------------------------ metadata contexts

    @call("1.6", NEGOTIATING)
    def opt_list_meta_context(self, context: Callback) -> int:
        """Tell `context` the names of the server's contexts that match those added, all of them where none was."""
        return self._number(negotiation.list_meta_context, self._settings.meta_contexts, context)

    @call("1.16", NEGOTIATING)
    def opt_list_meta_context_queries(self, queries: list[str], context: Callback) -> int:
        """Tell `context` the names of the server's contexts that match the queries, all of them where there is none."""
        return self._number(negotiation.list_meta_context, arguments.strings(queries, "queries"), context)

    @call("1.16", NEGOTIATING)
    def opt_set_meta_context(self, context: Callback) -> int:
        """Select the contexts added, and tell `context` which are selected."""
        return self._number(negotiation.set_meta_context, self._settings.meta_contexts, context)

    @call("1.16", NEGOTIATING)
    def opt_set_meta_context_queries(self, queries: list[str], context: Callback) -> int:
        """Select the contexts that match the queries, and tell `context` which are selected."""
        return self._number(negotiation.set_meta_context, arguments.strings(queries, "queries"), context)

    @call("1.6", NEGOTIATING)
    def aio_opt_list_meta_context(self, context: Callback, completion: Callback | None = None) -> int:
        """Start what `opt_list_meta_context` does."""
        return self._start(negotiation.list_meta_context, self._settings.meta_contexts, context, completion)

    @call("1.16", NEGOTIATING)
    def aio_opt_list_meta_context_queries(self, queries: list[str], context: Callback, completion: Callback | None = None) -> int:
        """Start what `opt_list_meta_context_queries` does."""
        return self._start(negotiation.list_meta_context, arguments.strings(queries, "queries"), context, completion)

    @call("1.16", NEGOTIATING)
    def aio_opt_set_meta_context(self, context: Callback, completion: Callback | None = None) -> int:
        """Start what `opt_set_meta_context` does."""
        return self._start(negotiation.set_meta_context, self._settings.meta_contexts, context, completion)

    @call("1.16", NEGOTIATING)
    def aio_opt_set_meta_context_queries(self, queries: list[str], context: Callback, completion: Callback | None = None) -> int:
        """Start what `opt_set_meta_context_queries` does."""
        return self._start(negotiation.set_meta_context, arguments.strings(queries, "queries"), context, completion)

    def _number(self, ask: Callable[..., Any], queries: list[str], context: Callback) -> int:
        callback = arguments.callback(context, "context")
        return self._count(lambda: self._contexts(ask, queries, callback))

    def _start(self, ask: Callable[..., Any], queries: list[str], context: Callback, completion: Callback | None) -> int:
        callback, completed = arguments.callback(context, "context"), arguments.completion(completion)
        self._complete(self._contexts(ask, queries, callback), completed, refused=errno.ENOTSUP)
        return 0

    def _contexts(self, ask: Callable[..., Any], queries: list[str], callback: Callback) -> Exchange:
        def report(names: Iterable[str]) -> None:
            for name in names:
                self._callbacks.call(callback, name)

        return self._ask(ask, self._settings.export_name, tuple(queries), report=report)

    # ------------------------------------------------------------------------------------------ what they share

    def _ask(
        self,
        ask: Callable[..., Any],
        *details: Any,
        enters: bool = False,
        report: Callable[[Any], None] | None = None,
        **more: Any,
    ) -> Exchange:
        """Start a conversation, under the settings as they are now. `report` is given what it returned, before it is done."""
        client = self._connection
        engine = client.engine
        engine.settings = self._settings.for_handshake()
        conversation = ask(engine.agreement, engine.settings, *details, **more)
        return client.exchange(conversation if report is None else _reported(conversation, report), enters=enters)

    def _count(self, start: Callable[[], Exchange]) -> int:
        """Run an exchange that lists something, and return how many there are. Every refusal of one is ENOTSUP, as in libnbd."""
        try:
            return len(self._exchange(start))
        except NegotiationError as exc:
            raise NegotiationError(errno.ENOTSUP, exc.message, server_text=exc.server_text) from exc

    def _complete(self, exchange: Exchange, completion: Callback | None, *, refused: int = 0) -> None:
        """Have a completion callback told the outcome of an exchange, now or later; `refused` is the errno of every refusal."""

        def tell(exchange: Exchange) -> None:
            if completion is not None:
                self._callbacks.call(completion, ErrorNumber(_outcome(exchange, refused)))

        if exchange.done:
            tell(exchange)
        else:
            exchange.completion = tell


def _reported(conversation: Any, report: Callable[[Any], None]) -> Any:
    result = yield from conversation
    report(result)
    return result


def _outcome(exchange: Exchange, refused: int) -> int:
    """Return the errno of an exchange's outcome, 0 for success. Where libnbd has no number it takes ENOTSUP."""
    error = exchange.error
    if error is None:
        return errno.ENOTSUP if exchange.result is False else 0
    if isinstance(error, NegotiationError):
        return refused or number_of(error) or errno.ENOTSUP
    return error.errno or errno.ENOTCONN

"""Opt mode in an event loop: one option of the handshake at a time, between connecting and opening an export."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from nbdcore.clients.connect.tls import Encryption
from nbdcore.clients.requests.arguments import deadline_after, text, texts
from nbdcore.clients.session.info import Info
from nbdcore.protocol.engine import Engine, Exchange
from nbdcore.protocol.handshake import negotiation
from nbdcore.protocol.handshake.agreement import Export, ExportInfo
from nbdcore.protocol.handshake.negotiation import Conversation
from nbdcore.streams.waiting import Deadline

Result = TypeVar("Result")


class AsyncOptionCalls(Info):
    """The `opt_` calls, legal while negotiating (`opt_mode=True`).

    A refusal by the server raises NegotiationError and leaves the connection negotiating; a timeout or a cancelled task ends it.
    """

    _encryption: Encryption
    _command_timeout: float | None

    @abstractmethod
    async def _exchange(self, start: Callable[[Engine], Exchange], deadline: Deadline, what: str) -> Any:
        """Run one conversation with the server and return its result; `what` is how messages name it."""

    @abstractmethod
    async def close(self) -> None:
        """Close the connection now."""

    async def opt_list(self, *, timeout: float | None = None) -> list[Export]:
        """Ask which exports there are (section NBD_OPT_LIST)."""
        return await self._ask("opt_list", negotiation.list_exports, timeout)

    async def opt_info(self, export: str | None = None, *, timeout: float | None = None) -> ExportInfo:
        """Ask about an export without opening it (section NBD_OPT_INFO). None is the one the client was made for."""
        return await self._ask("opt_info", negotiation.info, timeout, self._name(export))

    async def opt_go(self, export: str | None = None, *, timeout: float | None = None) -> None:
        """Open an export and enter the transmission phase (section NBD_OPT_GO).

        The client's metadata contexts are selected first, unless `opt_set_meta_context` has selected some for this export.
        """
        await self._ask("opt_go", negotiation.enter, timeout, self._name(export), enters=True)

    async def opt_abort(self) -> None:
        """Say goodbye and close (section NBD_OPT_ABORT)."""
        self._legal("opt_abort")
        await self.close()

    async def opt_starttls(self, *, timeout: float | None = None) -> bool:
        """Ask for TLS (section NBD_OPT_STARTTLS). Returns whether the connection is encrypted now.

        Everything learnt before is forgotten then, structured replies and extended headers included. A handshake of TLS that
        fails ends the connection. Raises UsageError where TLS was forbidden (`tls=False`) or is on, or Python has none.
        """
        self._legal("opt_starttls")
        self._encryption.check_possible()
        return await self._ask("opt_starttls", negotiation.starttls, timeout)

    async def opt_structured_reply(self, *, timeout: float | None = None) -> bool:
        """Ask for structured replies (section NBD_OPT_STRUCTURED_REPLY). Returns whether they were granted."""
        return await self._ask("opt_structured_reply", negotiation.structured_reply, timeout)

    async def opt_extended_headers(self, *, timeout: float | None = None) -> bool:
        """Ask for extended headers (section NBD_OPT_EXTENDED_HEADERS). Returns whether they were granted."""
        return await self._ask("opt_extended_headers", negotiation.extended_headers, timeout)

    async def opt_list_meta_context(
        self, queries: Iterable[str] = (), *, export: str | None = None, timeout: float | None = None
    ) -> list[str]:
        """Ask which metadata contexts match (section NBD_OPT_LIST_META_CONTEXT); without queries, which there are."""
        wanted = texts("queries", queries)
        return await self._ask("opt_list_meta_context", negotiation.list_meta_context, timeout, self._name(export), wanted)

    async def opt_set_meta_context(
        self, queries: Iterable[str], *, export: str | None = None, timeout: float | None = None
    ) -> list[str]:
        """Select metadata contexts in place of all selected before (section NBD_OPT_SET_META_CONTEXT). Returns those selected.

        Raises UsageError before structured replies were agreed on.
        """
        wanted = texts("queries", queries)
        return await self._ask("opt_set_meta_context", negotiation.set_meta_context, timeout, self._name(export), wanted)

    def _name(self, export: str | None) -> str:
        return self._engine.settings.export if export is None else text("an export's name", export)

    async def _ask(
        self, call: str, ask: Callable[..., Conversation[Result]], timeout: float | None, *arguments: Any, enters: bool = False
    ) -> Result:
        self._legal(call)

        def start(engine: Engine) -> Exchange:
            return engine.option(ask(engine.agreement, engine.settings, *arguments), enters=enters, call=call)

        deadline = deadline_after(self._command_timeout if timeout is None else timeout)
        result: Result = await self._exchange(start, deadline, call)
        return result

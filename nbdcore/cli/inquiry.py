"""Questions to one server about its disks, over as few connections as it allows: what `nbdcore info` asks.

Exports are asked about while the handshake goes on, and opened only where a server does not tell what holds before, or where the
beginning of the disk is to be read. A connection on which an export was opened serves no other one.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Self

from nbdcore import Client, Error, Export, NegotiationError, Phase, UsageError, parse_uri
from nbdcore.cli.access import Access, Place
from nbdcore.cli.output import Failure, described

__all__ = ["BLOCK_SIZES", "FLAGS", "Facts", "Inquiry", "hinted"]

#: What is known of a server, or of an export, under the names that JSON has for it.
Facts = dict[str, Any]

#: What a server says an export is and can do, by those names, and by those of a client's attributes.
FLAGS = {
    "is_rotational": "rotational",
    "is_read_only": "read_only",
    "can_block_status_payload": "can_block_status_payload",
    "can_cache": "can_cache",
    "can_df": "can_df",
    "can_fast_zero": "can_fast_zero",
    "can_flush": "can_flush",
    "can_fua": "can_fua",
    "can_multi_conn": "can_multi_conn",
    "can_trim": "can_trim",
    "can_zero": "can_zero",
}
BLOCK_SIZES = ("block_size_minimum", "block_size_preferred", "block_size_maximum")

# What nbdinfo reads of a disk to learn what is on it.
_BEGINNING = 8192


class Inquiry:
    """Questions to one server.

    Attributes:
        chosen: the export that the place names.
        server: what is known of the server; after the first question.
    """

    def __init__(self, place: Place, access: Access) -> None:
        self._place = place
        self._access = access
        self._uri = parse_uri(place.uri) if place.uri else None
        self.chosen: str = self._uri.export if self._uri else ""
        self.server: Facts = {}
        self._client: Client | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._client is not None:
            self._client.__exit__(kind, *rest)

    def exports(self) -> list[Export]:
        """Return what the server lists; of one that chooses for its clients, that one."""
        client = self.connection()
        if client.phase is Phase.CONNECTED:
            return [Export("")]
        return client.opt_list(timeout=self._access.timeout)

    def asked(self, name: str) -> Client:
        """Return a connection that knows what an export is. Raises NegotiationError where the server refuses."""
        client = self.connection()
        if client.phase is Phase.NEGOTIATING:
            self._ask(client, name)
        return client

    def facts(self, name: str, description: str = "", *, content: bool = False) -> Facts:
        """Return all that is known of an export; `description` is what the list said of it, `content` whether to look into it."""
        contexts = self._contexts(name)
        client = self.asked(name)
        facts: Facts = {"export-name": client.export_name}
        if client.description or description:
            facts["description"] = client.description or description
        if (uri := self.uri(client.export_name)) is not None:
            facts["uri"] = uri
        if contexts is not None:
            facts["contexts"] = contexts
        facts.update((key, getattr(client, attribute)) for key, attribute in FLAGS.items())
        facts.update(_sizes(client))
        if content and (found := self._content(client, name)):
            facts["content"] = found
        return facts

    def uri(self, name: str) -> str | None:
        """Return the URI of an export; None where it has none: on a server of our own, or with a name that no URI can have."""
        if self._uri is None:
            return None
        try:
            return str(replace(self._uri, export=name))
        except UsageError:
            return None

    def connection(self) -> Client:
        """Return a connection on which nothing has been opened yet: the one there is, unless it was used up or has ended."""
        if self._client is None or self._client.phase is not Phase.NEGOTIATING:
            if self._client is not None:
                self._client.__exit__(None, None, None)
            self._client = self._access.client(self._place, opt_mode=True, export=self.chosen)
            self.server = {
                "protocol": self._client.protocol,
                "TLS": self._client.tls,
                "structured": self._client.structured_replies,
                "extended": self._client.extended_headers,
            }
        return self._client

    def _contexts(self, name: str) -> list[str] | None:
        client = self.connection()
        if client.phase is Phase.NEGOTIATING and client.structured_replies:  # without those no context is of any use
            with contextlib.suppress(NegotiationError):  # a server without metadata contexts, or without that export
                return client.opt_list_meta_context(export=name, timeout=self._access.timeout)
        return None

    def _ask(self, client: Client, name: str) -> None:
        """Learn what an export is, by opening it where the server tells nothing that holds before."""
        try:
            client.opt_info(name, timeout=self._access.timeout)
            settled = not _is_empty(client)
        except NegotiationError:  # older servers know no INFO; others refuse again
            settled = False
        if not settled:
            # nbd-server answers INFO with a size of 0, and GO with the true one.
            client.opt_go(name, timeout=self._access.timeout)

    def _content(self, client: Client, name: str) -> str:
        """Return what the beginning of an export looks like; "" where nothing can tell, or read it: it is no more than a hint.

        Nobody asked to read the disk, so nobody is told where that fails, and nbdinfo tells nobody either.
        """
        from nbdcore.cli.content import content_of

        try:
            if client.phase is Phase.NEGOTIATING:
                client.opt_go(name, timeout=self._access.timeout)
            step = client.block_size.minimum
            count = min(-(-_BEGINNING // step) * step, client.size)
            beginning = client.pread(count, 0, timeout=self._access.timeout)[:_BEGINNING]
        except Error:
            return ""
        return content_of(beginning)


@contextlib.contextmanager
def hinted() -> Iterator[None]:
    """Tell a user whose server has no such export how to see those that it has."""
    try:
        yield
    except NegotiationError as error:
        hint = "; nbdcore info --list shows those that it has" if error.errno == errno.ENOENT else ""
        raise Failure(described(error) + hint) from error


def _is_empty(client: Client) -> bool:
    try:
        return client.size == 0
    except UsageError:  # more than can be addressed
        return False


def _sizes(client: Client) -> Facts:
    from nbdcore.cli.sizes import exact

    facts: Facts = {}
    block_size = client.block_size
    if block_size.advertised:
        sizes = (block_size.minimum, block_size.preferred, block_size.maximum)
        facts.update((key, size) for key, size in zip(BLOCK_SIZES, sizes, strict=True) if size)
    try:
        facts["export-size"] = client.size
        facts["export-size-str"] = exact(client.size)
    except UsageError:  # more than can be addressed
        facts["export-size-str"] = "unavailable"
    return facts

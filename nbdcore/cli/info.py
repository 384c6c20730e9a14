"""`nbdcore info`: what a server says of itself and its exports, without opening them where it lets us.

The JSON has the keys of `nbdinfo --json`, so that programs written for that one read it. A key whose answer is not known is left
out. Nothing is printed before all is known, but for a list as text, which may be long.
"""

from __future__ import annotations

import contextlib
import errno
import json
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Self

import click

from nbdcore import (
    Client,
    DeadlineExceeded,
    Disconnected,
    Export,
    NegotiationError,
    Phase,
    ProtocolViolation,
    UsageError,
    parse_uri,
)
from nbdcore.cli.access import Access, DiskCommand, DiskType, Place, with_access
from nbdcore.cli.output import Failure, described, escaped, say, warn
from nbdcore.cli.sizes import exact, rounded

__all__ = ["info"]

_FLAGS = (
    ("is_rotational", "rotational"),
    ("is_read_only", "read_only"),
    ("can_block_status_payload", "can_block_status_payload"),
    ("can_cache", "can_cache"),
    ("can_df", "can_df"),
    ("can_fast_zero", "can_fast_zero"),
    ("can_flush", "can_flush"),
    ("can_fua", "can_fua"),
    ("can_multi_conn", "can_multi_conn"),
    ("can_trim", "can_trim"),
    ("can_zero", "can_zero"),
)
_BLOCK_SIZES = ("block_size_minimum", "block_size_preferred", "block_size_maximum")

#: What is known of an export, under the JSON's keys.
Facts = dict[str, Any]


@click.command(cls=DiskCommand, short_help="Describe a disk, or all that a server has.")
@click.argument("disk", type=DiskType())
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the keys of nbdinfo --json.")
@click.option("--size", "only_size", is_flag=True, help="Print the size in bytes, and nothing else.")
@click.option("--list", "all_exports", is_flag=True, help="Describe all the disks of the server, whichever URI names.")
@with_access
def info(
    disk: Place,
    *,
    access: Access,
    as_json: bool,
    only_size: bool,
    all_exports: bool,
) -> None:
    """Describe the disk that DISK names (NBD calls it an export): its size, and what the server can do with it.

    The words are those of the program nbdinfo; the page "Command line" of the documentation explains each.

    \b
    nbdcore info nbd://localhost/
    nbdcore info 'nbd+unix:///EXPORT?socket=PATH'
    nbdcore info nbd+vsock://2:10809/
    nbdcore info nbds://disks.example/ --tls-certificates pki
    nbdcore info [ nbdkit memory 1G ]
    """  # noqa: D301 (a real backspace is how click is told not to wrap)
    if only_size and all_exports:
        raise click.UsageError("--size is about one export, --list about all: use one of them.")
    with _Inquiry(disk, access) as inquiry:
        if all_exports:
            _describe_all(inquiry, as_json=as_json)
        else:
            _describe_one(inquiry, as_json=as_json, only_size=only_size)


def _describe_one(inquiry: _Inquiry, *, as_json: bool, only_size: bool) -> None:
    try:
        facts = inquiry.facts(inquiry.chosen)
    except NegotiationError as error:
        hint = "; nbdcore info --list shows those that it has" if error.errno == errno.ENOENT else ""
        raise Failure(described(error) + hint) from error
    if only_size:
        if "export-size" not in facts:
            raise UsageError(errno.EOVERFLOW, "the export claims more bytes than can be addressed")
        say(str(facts["export-size"]))
    elif as_json:
        say(_document(inquiry.server, [_member(facts)]))
    else:
        say("\n".join([_headline(inquiry.server), *_lines(facts)]))


def _describe_all(inquiry: _Inquiry, *, as_json: bool) -> None:
    """Describe what can be described. An export that cannot be is a line on standard error, and the exit status 1."""
    exports = inquiry.exports()
    members: list[str] = []
    failed = False
    if not as_json:
        say(_headline(inquiry.server) if exports else f"{_headline(inquiry.server)}\nThe server lists no exports.")
    for export in exports:
        inquiry.connection()  # where there is none any more, all the others are lost too
        try:
            facts = inquiry.facts(export.name, export.description)
        except (NegotiationError, Disconnected, ProtocolViolation, DeadlineExceeded, UsageError) as error:
            # A refusal names the export itself.
            warn(described(error) if isinstance(error, NegotiationError) else f"export {export.name!r}: {described(error)}")
            failed = True
            continue
        if as_json:
            members.append(_member(facts))
        else:
            say("\n".join(_lines(facts)))
    if as_json:
        say(_document(inquiry.server, members))
    if failed:
        raise click.exceptions.Exit(1)


# ---------------------------------------------------------------------------------------------- asking


class _Inquiry:
    """Questions to one server, on as few connections as it allows.

    Attributes:
        chosen: the export that the URI names.
        server: what is known of the server, under the JSON's keys; after the first question.
    """

    def __init__(self, disk: Place, access: Access) -> None:
        self._disk = disk
        self._access = access
        self._uri = parse_uri(disk.uri) if disk.uri else None
        self.chosen = self._uri.export if self._uri else ""
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

    def facts(self, name: str, description: str = "") -> Facts:
        """Ask about an export; `description` is what the list said of it. Raises NegotiationError where the server refuses."""
        client = self.connection()
        contexts: list[str] | None = None
        if client.phase is Phase.NEGOTIATING:
            with contextlib.suppress(NegotiationError):  # a server without metadata contexts, or without that export
                contexts = client.opt_list_meta_context(export=name, timeout=self._access.timeout)
            self._ask(client, name)
        return _facts_of(client, description, self._uri_of(client.export_name), contexts)

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

    def _uri_of(self, name: str) -> str | None:
        """Return the URI of an export; None where it has none: a server of our own, or a name that no URI can have."""
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
            self._client = self._access.client(self._disk, opt_mode=True, export=self.chosen)
            self.server = {
                "protocol": self._client.protocol,
                "TLS": self._client.tls,
                "structured": self._client.structured_replies,
                "extended": self._client.extended_headers,
            }
        return self._client


def _is_empty(client: Client) -> bool:
    try:
        return client.size == 0
    except UsageError:  # more than can be addressed
        return False


def _facts_of(client: Client, description: str, uri: str | None, contexts: list[str] | None) -> Facts:
    facts: Facts = {"export-name": client.export_name}
    if client.description or description:
        facts["description"] = client.description or description
    if uri is not None:
        facts["uri"] = uri
    if contexts is not None:
        facts["contexts"] = contexts
    facts.update((key, getattr(client, attribute)) for key, attribute in _FLAGS)
    block_size = client.block_size
    if block_size.advertised:
        sizes = (block_size.minimum, block_size.preferred, block_size.maximum)
        facts.update(zip(_BLOCK_SIZES, sizes, strict=True))
    try:
        facts["export-size"] = client.size
        facts["export-size-str"] = exact(client.size)
    except UsageError:  # more than can be addressed
        facts["export-size-str"] = "unavailable"
    return facts


# ---------------------------------------------------------------------------------------------- JSON and text


def _member(facts: Facts) -> str:
    return textwrap.indent(json.dumps(facts, indent=2), "    ")


def _document(server: Facts, members: list[str]) -> str:
    """Return the JSON for a server and exports that are JSON already: as objects a long list would take five times the memory."""
    listed = ",\n".join(members)
    return json.dumps(server, indent=2).removesuffix("\n}") + f',\n  "exports": [\n{listed}\n  ]\n}}'


def _headline(server: Facts) -> str:
    packets = "extended" if server["extended"] else "structured" if server["structured"] else "simple"
    return f"protocol: {server['protocol']} {'with' if server['TLS'] else 'without'} TLS, using {packets} packets"


def _lines(facts: Facts) -> Iterator[str]:
    name = escaped(facts["export-name"].replace("\\", "\\\\").replace('"', '\\"'))
    yield f'export="{name}":'
    if "description" in facts:
        yield f"\tdescription: {escaped(facts['description'])}"
    yield f"\texport-size: {_with_human(facts['export-size']) if 'export-size' in facts else 'unavailable'}"
    if "uri" in facts:
        yield f"\turi: {facts['uri']}"
    if "contexts" in facts:
        yield "\tcontexts:"
        yield from (f"\t\t{escaped(context)}" for context in facts["contexts"])
    for key, _ in _FLAGS:
        yield f"\t{key}: {str(facts[key]).lower()}"
    for key in _BLOCK_SIZES:
        if key in facts:
            yield f"\t{key}: {_with_human(facts[key])}"


def _with_human(size: int) -> str:
    human = rounded(size)
    return str(size) if human == str(size) else f"{size} ({human})"

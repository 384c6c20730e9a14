"""The map of a disk for the command line: asked for by the names of contexts, and printed as text, JSON or CSV.

Text and JSON of one context are line for line those of nbdinfo, since scripts read them. It has no maps of several contexts:
there, each line tells of all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from nbdcore import Client, NegotiationError, Phase, parse_uri
from nbdcore.cli.access import Access, Place
from nbdcore.cli.facts import quoted
from nbdcore.cli.inquiry import hinted
from nbdcore.cli.options import painted
from nbdcore.cli.output import Failure, escaped
from nbdcore.disk.maps import DiskMap, Types, read_map

__all__ = ["as_csv", "as_json", "as_text", "read", "totals_as_json", "totals_as_text"]


# ---------------------------------------------------------------------------------------------- asking


def read(access: Access, place: Place, wanted: Sequence[str], offset: int, count: int | None, *, option: str) -> DiskMap:
    """Return the map of a disk in these contexts; `option` is where they were named.

    A name that ends in `*` stands for all contexts of the server's that begin so. Raises Failure for one that it does not have.
    """
    with _connected(access, place, wanted, option) as client:
        contexts = client.contexts
        for name in wanted:
            if not name.endswith("*") and name not in contexts:
                raise Failure(f'{option}: server does not support metadata context "{name}"')
        named = [each for name in wanted for each in ([name] if not name.endswith("*") else _matching(name, contexts))]
        return read_map(client, *dict.fromkeys(named), offset=offset, count=count)


@contextlib.contextmanager
def _connected(access: Access, place: Place, wanted: Sequence[str], option: str) -> Iterator[Client]:
    """Give a connection to the disk on which the contexts were selected."""
    patterns = any(name.endswith("*") for name in wanted)
    with hinted():
        client = access.client(place, contexts=tuple(dict.fromkeys(wanted)), opt_mode=patterns)
    with client:
        if patterns and client.phase is Phase.NEGOTIATING:
            export = parse_uri(place.uri).export if place.uri else ""
            with hinted():
                _select(client, export, wanted, option)
                client.opt_go(export)
        yield client


def _select(client: Client, export: str, wanted: Sequence[str], option: str) -> None:
    """Select what the server has of the contexts that are wanted."""
    names = list(wanted)
    with contextlib.suppress(NegotiationError):  # a server without metadata contexts: none of them is there
        listed = client.opt_list_meta_context(export=export) if client.structured_replies else []
        names = [each for name in wanted for each in (_matching(name, listed) if name.endswith("*") else [name])]
    for name in wanted:
        if name.endswith("*") and not _matching(name, names):
            raise Failure(f'{option}: server has no metadata context whose name begins with "{name.removesuffix("*")}"')
    client.opt_set_meta_context(dict.fromkeys(names), export=export)


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(pattern.removesuffix("*")) and not name.endswith("*")]


# ---------------------------------------------------------------------------------------------- printing


def as_text(found: DiskMap) -> Iterator[str]:
    """Yield the lines: offset, length, and type and description in each context."""
    return found.lines(_for_each_kind(found, _text))


def as_json(found: DiskMap) -> Iterator[str]:
    """Yield a list of objects."""
    yield "[\n"
    yield from found.lines(_for_each_kind(found, _json), between=",\n")
    yield "\n]"


def as_csv(found: DiskMap) -> Iterator[str]:
    """Yield a line of names, and one for each part: with a type and a description for each context."""
    names = ["type", "description"] if len(found.contexts) == 1 else [_cell(name) for name in found.contexts]
    yield ",".join(["offset", "length", *names])
    for piece in found.lines(_for_each_kind(found, _csv)):
        yield piece if piece.startswith("\n") else f"\n{piece}"


def _for_each_kind(found: DiskMap, row: Callable[[DiskMap, Types], str]) -> Callable[[Types], str]:
    return lambda types: row(found, types)


def _text(found: DiskMap, types: Types) -> str:
    said = zip(types, found.describe(types), strict=True)
    if len(types) == 1:
        words = "".join(f"  {number:3}" + (f"  {description}" if description else "") for number, description in said)
    else:  # columns that have something in each line, so that they can be told apart
        words = "".join(f"  {number:3}  {description or '-'}" for number, description in said)
    line = f"%10d  %10d{words}"
    return painted(line, bold=True) if not types[0] else line


def _json(found: DiskMap, types: Types) -> str:
    if len(types) == 1:
        return f'{{ "offset": %d, "length": %d, {_members(types[0], found.describe(types)[0])}}}'
    said = zip(found.contexts, types, found.describe(types), strict=True)
    contexts = ", ".join(f"{quoted(name)}: {{ {_members(number, description)} }}" for name, number, description in said)
    return f'{{ "offset": %d, "length": %d, "contexts": {{ {contexts.replace("%", "%%")} }}}}'


def _members(number: int, description: str) -> str:
    return f'"type": {number}' + (f', "description": {quoted(description)}' if description else "")


def _csv(found: DiskMap, types: Types) -> str:
    said = zip(types, found.describe(types), strict=True)
    if len(types) == 1:
        return "%d,%d," + ",".join(f"{number},{_cell(description)}" for number, description in said)
    return "%d,%d," + ",".join(_cell(description or str(number)) for number, description in said)


def _cell(text: str) -> str:
    return '"' + escaped(text).replace('"', '""') + '"' if set(text) & set(',"\n') else escaped(text)


def totals_as_text(found: DiskMap) -> str:
    """Return a line for each kind of part: how many bytes, what share of the whole, type and description."""
    lines = []
    for total in found.totals():
        said = zip(total.types, total.descriptions, strict=True)
        if len(total.types) == 1:
            words = "".join(f" {number:3}" + (f" {description}" if description else "") for number, description in said)
        else:
            words = "".join(f" {number:3} {description or '-'}" for number, description in said)
        line = f"{total.size:10} {100 * total.share:5.1f}%{words}"
        lines.append(painted(line, bold=True) if not total.types[0] else line)
    return "\n".join(lines)


def totals_as_json(found: DiskMap) -> str:
    """Return a list of objects."""
    rows = []
    for total in found.totals():
        if len(total.types) == 1:
            members = _members(total.types[0], total.descriptions[0])
        else:
            said = zip(found.contexts, total.types, total.descriptions, strict=True)
            contexts = ", ".join(f"{quoted(name)}: {{ {_members(number, about)} }}" for name, number, about in said)
            members = f'"contexts": {{ {contexts} }}'
        rows.append(f'{{ "size": {total.size}, "percent": {100 * total.share:g}, {members} }}')
    return "[\n" + ",\n".join(rows) + "\n]" if rows else "[]"

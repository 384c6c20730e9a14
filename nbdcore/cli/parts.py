"""The map of a disk for the command line: asked for by the names of contexts, and printed as text, JSON or CSV.

Text and JSON of one context are line for line those of nbdinfo, since scripts read them. It has no maps of several contexts:
there, each line tells of all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from nbdcore import Client, NegotiationError, Phase, parse_uri
from nbdcore.cli.access import Access, Place
from nbdcore.cli.facts import quoted
from nbdcore.cli.inquiry import hinted
from nbdcore.cli.options import painted
from nbdcore.cli.output import Failure, escaped
from nbdcore.disk.maps import DiskMap, Types, read_map, read_map_pieces, totals

__all__ = ["as_csv", "as_json", "as_text", "read", "read_whole", "totals_as_json", "totals_as_text"]


#: What becomes of a map.
Taken = TypeVar("Taken")

# ---------------------------------------------------------------------------------------------- asking


def read(
    access: Access,
    place: Place,
    wanted: Sequence[str],
    take: Callable[[Iterator[DiskMap]], Taken],
    *,
    option: str,
    offset: int = 0,
    count: int | None = None,
) -> Taken:
    """Read the map of a disk in these contexts, and return what `take` makes of its pieces; `option` is where they were named.

    A name that ends in `*` stands for all contexts of the server's that begin so. Raises Failure for one that it does not have.
    """
    with _connected(access, place, wanted, option, offset) as (client, names):
        return take(read_map_pieces(client, *names, offset=offset, count=count))


def read_whole(
    access: Access, place: Place, wanted: Sequence[str], *, option: str, offset: int = 0, count: int | None = None
) -> DiskMap:
    """Return the map as one; arguments and errors are those of `read`."""
    with _connected(access, place, wanted, option, offset) as (client, names):
        return read_map(client, *names, offset=offset, count=count)


@contextlib.contextmanager
def _connected(
    access: Access, place: Place, wanted: Sequence[str], option: str, offset: int
) -> Iterator[tuple[Client, list[str]]]:
    """Give a connection to the disk, and the names of the contexts, which were selected there."""
    patterns = any(name.endswith("*") for name in wanted)
    with hinted():
        client = access.client(place, contexts=tuple(dict.fromkeys(wanted)), opt_mode=patterns)
    with client:
        if patterns and client.phase is Phase.NEGOTIATING:
            export = parse_uri(place.uri).export if place.uri else ""
            with hinted():
                _select(client, export, wanted, option)
                client.opt_go(export)
        for name in wanted:
            if not name.endswith("*") and name not in client.contexts:
                raise Failure(f'{option}: server does not support metadata context "{name}"')
        if offset > client.size:
            raise Failure(f"offset {offset} is behind the end of the disk, which has {client.size} bytes")
        yield client, _resolved(wanted, client.contexts)


def _select(client: Client, export: str, wanted: Sequence[str], option: str) -> None:
    """Select what the server has of the contexts that are wanted."""
    listed: list[str] = []
    with contextlib.suppress(NegotiationError):  # a server without metadata contexts: none of them is there
        listed = client.opt_list_meta_context(export=export) if client.structured_replies else []
    for name in wanted:
        if name.endswith("*") and not _resolved([name], listed):
            raise Failure(f'{option}: server has no metadata context whose name begins with "{name.removesuffix("*")}"')
    client.opt_set_meta_context(_resolved(wanted, listed), export=export)


def _resolved(wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the names that are wanted, each once, with those of the server's in place of a pattern."""
    names: dict[str, None] = {}
    for name in wanted:
        matching = [each for each in known if each.startswith(name.removesuffix("*"))] if name.endswith("*") else [name]
        names.update(dict.fromkeys(matching))
    return list(names)


# ---------------------------------------------------------------------------------------------- printing


def as_text(pieces: Iterable[DiskMap]) -> Iterator[str]:
    """Yield the lines: offset, length, and type and description in each context."""
    return _lines(pieces, _text, "\n")


def as_json(pieces: Iterable[DiskMap]) -> Iterator[str]:
    """Yield a list of objects."""
    yield "[\n"
    yield from _lines(pieces, _json, ",\n")
    yield "\n]"


def as_csv(pieces: Iterable[DiskMap]) -> Iterator[str]:
    """Yield a line of names, and one for each part: with type and description, or with a word for each of several contexts."""
    named = False
    for piece in pieces:
        if not named:
            names = ["type", "description"] if len(piece.contexts) == 1 else [_cell(name) for name in piece.contexts]
            yield ",".join(["offset", "length", *names])
            named = True
        if len(piece):
            yield "\n"
        yield from piece.lines(partial(_csv, piece))


def _lines(pieces: Iterable[DiskMap], row: Callable[[DiskMap, Types], str], between: str) -> Iterator[str]:
    first = True
    for piece in pieces:
        if len(piece) and not first:
            yield between
        first = first and not len(piece)
        yield from piece.lines(partial(row, piece), between=between)


def _text(found: DiskMap, types: Types) -> str:
    if len(types) == 1:
        words = f"  {types[0]:3}  {found.describe(types)[0]}".rstrip()
    else:  # columns that have something in each line, so that they can be told apart
        words = "".join(f"  {number:3}  {about or '-'}" for number, about in zip(types, found.describe(types), strict=True))
    return _bold_data(f"%10d  %10d{words}", types)


def _bold_data(line: str, types: Types) -> str:
    return line if types[0] else painted(line, bold=True)


def _json(found: DiskMap, types: Types) -> str:
    said = _said(found.contexts, types, found.describe(types)).replace("%", "%%")
    return f'{{ "offset": %d, "length": %d, {said}}}'


def _said(contexts: Sequence[str], types: Types, descriptions: Sequence[str]) -> str:
    """Return what contexts say, as members of an object."""
    objects = [
        f'"type": {number}' + (f', "description": {quoted(about)}' if about else "")
        for number, about in zip(types, descriptions, strict=True)
    ]
    if len(objects) == 1:
        return objects[0]
    named = (f"{quoted(name)}: {{ {members} }}" for name, members in zip(contexts, objects, strict=True))
    return f'"contexts": {{ {", ".join(named)} }}'


def _csv(found: DiskMap, types: Types) -> str:
    descriptions = found.describe(types)
    cells = (
        [str(types[0]), descriptions[0]]
        if len(types) == 1
        else [about or str(n) for n, about in zip(types, descriptions, strict=True)]
    )
    return ",".join(["%d", "%d", *(_cell(cell).replace("%", "%%") for cell in cells)])


def _cell(text: str) -> str:
    shown = escaped(text)
    return '"' + shown.replace('"', '""') + '"' if set(shown) & {",", '"'} else shown


def totals_as_text(pieces: Iterable[DiskMap]) -> str:
    """Return a line for each kind of part: how many bytes, what share of the whole, type and description."""
    lines = []
    for total in totals(pieces):
        said = zip(total.types, total.descriptions, strict=True)
        if len(total.types) == 1:
            words = f" {total.types[0]:3} {total.descriptions[0]}".rstrip()
        else:
            words = "".join(f" {number:3} {about or '-'}" for number, about in said)
        lines.append(_bold_data(f"{total.size:10} {100 * total.share:5.1f}%{words}", total.types))
    return "\n".join(lines)


def totals_as_json(pieces: Iterable[DiskMap]) -> str:
    """Return a list of objects."""
    rows = [
        f'{{ "size": {total.size}, "percent": {100 * total.share:g}, {_said(total.contexts, total.types, total.descriptions)} }}'
        for total in totals(pieces)
    ]
    return "[\n" + ",\n".join(rows) + "\n]" if rows else "[]"

"""What is known of a server and its disks, as text and as JSON: line for line what nbdinfo prints, since scripts read that.

A line whose answer is not known is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from nbdcore.cli.inquiry import BLOCK_SIZES, FLAGS, Facts
from nbdcore.cli.options import painted
from nbdcore.cli.output import escaped
from nbdcore.cli.sizes import exact

__all__ = ["as_json", "as_text", "headline", "member", "quoted"]

# The order of the keys in JSON, but for what every export has: its name before them.
_KEYS = ("description", "content", "uri", "contexts", *FLAGS, *BLOCK_SIZES, "export-size", "export-size-str")


def headline(server: Facts) -> str:
    """Return the line about the server."""
    packets = "extended" if server["extended"] else "structured" if server["structured"] else "simple"
    line = f"protocol: {server['protocol']} {'with' if server['TLS'] else 'without'} TLS, using {packets} packets"
    return painted(line, dim=True)


def as_text(facts: Facts) -> str:
    """Return the lines about an export."""
    return "\n".join(_lines(facts))


def _lines(facts: Facts) -> Iterator[str]:
    yield painted(f"export={quoted(facts['export-name'])}:", bold=True)
    if "description" in facts:
        yield f"\tdescription: {escaped(facts['description'])}"
    yield f"\texport-size: {_with_human(facts['export-size']) if 'export-size' in facts else 'unavailable'}"
    if "content" in facts:
        yield f"\tcontent: {escaped(facts['content'])}"
    if "uri" in facts:
        yield f"\turi: {facts['uri']}"
    if "contexts" in facts:
        yield "\tcontexts:"
        yield from (f"\t\t{escaped(context)}" for context in facts["contexts"])
    for key in FLAGS:
        yield painted(f"\t{key}: true", fg="green") if facts[key] else painted(f"\t{key}: false", dim=True)
    for key in BLOCK_SIZES:
        if key in facts:
            yield f"\t{key}: {_with_human(facts[key])}"


def _with_human(size: int) -> str:
    human = exact(size)
    return str(size) if human == str(size) else f"{size} ({human})"


def as_json(server: Facts, exports: Sequence[str]) -> str:
    """Return the JSON about a server and exports, of which each is JSON already (`member`)."""
    about = "".join(f'"{key}": {_value(value)},\n' for key, value in server.items())
    listed = "\n" + ",\n".join(exports) + " " if exports else ""
    return f'{{\n{about}"exports": [{listed}]\n}}'


def member(facts: Facts) -> str:
    """Return the JSON about one export: of a thousand, text takes a fifth of the memory."""
    lines = [f'\t"{key}": {_value(facts[key])}' for key in ("export-name", *_KEYS) if key in facts]
    return "\t{\n" + ",\n".join(lines) + "\n\t}"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list):
        return "[\n" + "".join(f"\t\t{quoted(each)},\n" for each in value).removesuffix(",\n") + "\n\t]"
    return quoted(str(value))


def quoted(text: str) -> str:
    """Return a text as JSON has it, with what is no printable character, or not in the output's encoding, escaped."""
    plain = sys.stdout.encoding.lower().replace("-", "") != "utf8"
    return f'"{"".join(_escaped(char, ascii_only=plain) for char in text)}"'


def _escaped(char: str, *, ascii_only: bool) -> str:
    if char in '"\\':
        return f"\\{char}"
    if char.isprintable() and (char.isascii() or not ascii_only):
        return char
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{int.from_bytes(units[at : at + 2], 'big'):04x}" for at in range(0, len(units), 2))

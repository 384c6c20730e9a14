"""A disk's map drawn with characters: a cell of the sketch is one, and with or without colours they differ.

There are no more rows than fit on a screen with their legend. Blocks and dots are drawn where the output's encoding has them,
ASCII elsewhere.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from nbdcore.cli.output import escaped
from nbdcore.cli.sizes import exact, rounded
from nbdcore.disk.sketch import Sketch, sketched
from nbdcore.protocol.constants import BASE_ALLOCATION

if TYPE_CHECKING:
    from rich.text import Text

    from nbdcore.disk.maps import DiskMap

__all__ = ["drawn"]

_ROWS = 16
# Columns of the screen that offsets take: 1023.9T and two spaces.
_LABEL = 9

# A cell that is full of what stands out, half or more of it, less than half; then what the rest is, by its number.
_BLOCKS = "█▓░·-0·"
_ASCII = "#+:.-0."
_FULL, _MORE, _LESS, _REST = 0, 1, 2, 3

# What stands out, and the rest: bright enough on light and dark screens.
_STYLES = {BASE_ALLOCATION: ("bold blue", "dim"), "qemu:dirty-bitmap:": ("bold red", "dim")}
_STYLE = ("bold magenta", "dim")


def drawn(found: DiskMap, *, width: int, encoding: str) -> Text:
    """Return the drawing of a map for a screen of this width, each of its contexts below the one before."""
    from rich.text import Text

    marks = _BLOCKS if _has(encoding, _BLOCKS) else _ASCII
    columns = max(8, (width - _LABEL) // 8 * 8)
    text = Text(f"{rounded(found.end - found.begin)}, {len(found)} {'part' if len(found) == 1 else 'parts'}")
    for sketch in sketched(found, columns * _ROWS):
        text.append("\n\n")
        text.append_text(_context(sketch, columns, marks))
    return text


def _has(encoding: str, marks: str) -> bool:
    try:
        marks.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _context(sketch: Sketch, columns: int, marks: str) -> Text:
    from rich.text import Text

    styles = next((styles for name, styles in _STYLES.items() if sketch.context.startswith(name)), _STYLE)
    text = Text(f"{escaped(sketch.context)}, a character is {exact(sketch.step)}")
    partly: set[str] = set()
    for first in range(0, len(sketch.cells), columns):
        text.append(f"\n{_offset(sketch.begin + first * sketch.step):>{_LABEL - 2}}  ", style="dim")
        shares = [sketch.share(number) for number in range(first, min(first + columns, len(sketch.cells)))]
        row = [_mark(sketch, number, share, marks) for number, share in enumerate(shares, first)]
        for _, run in groupby(zip(row, shares, strict=True), key=lambda cell: bool(cell[1])):
            cells = list(run)
            text.append("".join(mark for mark, _ in cells), style=styles[not cells[0][1]])
        partly.update(mark for mark, share in zip(row, shares, strict=True) if 0 < share < 1)
    text.append("\n")
    text.append_text(_legend(sketch, marks, styles, partly))
    return text


def _offset(offset: int) -> str:
    """Return where a row begins, exactly where there is room for that."""
    return exact(offset) if len(exact(offset)) <= _LABEL - 3 else rounded(offset)


def _mark(sketch: Sketch, number: int, share: float, marks: str) -> str:
    """Return a cell's character."""
    if 0 < share < 1:
        return marks[_MORE if share >= 0.5 else _LESS]
    return _mark_of(sketch, sketch.main(number, standing_out=bool(share)), marks)


def _mark_of(sketch: Sketch, kind: int, marks: str) -> str:
    """Return the character for nothing but one kind: a digit for what stands out in several ways, as depths do."""
    if not sketch.stands_out(kind):
        return marks[_REST + min(kind, 3)]
    return str(kind) if 1 < kind < 10 else marks[_FULL]


def _legend(sketch: Sketch, marks: str, styles: tuple[str, str], partly: set[str]) -> Text:
    """Return a line for each kind with its total, and one for each character in `partly`, of cells that stand out in part."""
    from rich.text import Text

    text = Text()
    totals = sketch.totals()
    widest = max(len(sketch.word(kind)) for kind in totals)
    for kind, size in totals.items():
        text.append(f"\n{_mark_of(sketch, kind, marks):>{_LABEL - 2}}  ", style=styles[not sketch.stands_out(kind)])
        text.append(f"{sketch.word(kind):{widest}}  {rounded(size):>7}  {sketch.percent(size):>6}")
    words = " or ".join(sketch.word(kind) for kind in totals if sketch.stands_out(kind))
    for mark, amount in ((marks[_MORE], "half or more"), (marks[_LESS], "less than half")):
        if mark in partly:
            text.append(f"\n{mark:>{_LABEL - 2}}  ", style=styles[0])
            text.append(f"{amount} is {words}")
    return text

"""A disk's map as a picture, in SVG: cells in rows, as text is read, with a legend and totals. Any browser shows it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from xml.sax.saxutils import escape

from nbdcore.disk.maps import DiskMap
from nbdcore.disk.sketch import Sketch, sketched
from nbdcore.protocol.constants import BASE_ALLOCATION

__all__ = ["svg"]

# Of a picture that fits on a page: pixels, and cells that are still told apart.
_WIDTH = 960
_MARGIN = 24
_LABEL = 72
_COLUMNS = 128
_ROWS = 32
_CELL = 6.5
_ROW = 10
_LINE = 22
# Characters of a title that fit.
_TITLE = 90

_COLORS = {
    BASE_ALLOCATION: {0: "#2563eb", 1: "#9ca3af", 2: "#facc15", 3: "#e5e7eb"},
    "qemu:dirty-bitmap:": {0: "#e5e7eb", 1: "#dc2626"},
    "qemu:allocation-depth": {0: "#e5e7eb", 1: "#2563eb", 2: "#7c3aed", 3: "#db2777"},
}
# For contexts and numbers that nobody has told us of.
_OTHERS = ("#e5e7eb", "#0d9488", "#ea580c", "#65a30d", "#a21caf", "#0369a1")
# How strong a cell is drawn that has something in it, however little, and how many strengths are told apart.
_FAINTEST = 0.35
_STRENGTHS = 4


def svg(found: DiskMap, *, title: str) -> str:
    """Return a map as an SVG document, each of its contexts below the one before."""
    body: list[str] = []
    y = float(_MARGIN + 12)
    shown = title if len(title) <= _TITLE else f"{title[: _TITLE - 1]}…"
    body.append(_text(_MARGIN, y, shown, size=16, weight="bold"))
    amount = f"{_human(found.end - found.begin)}, {len(found)} {'part' if len(found) == 1 else 'parts'}"
    body.append(_text(_MARGIN, y + 20, amount, color="#4b5563"))
    y += 40
    for sketch in sketched(found, _COLUMNS * _ROWS):
        drawing, y = _drawn(sketch, y)
        body += drawing
    height = round(y + _MARGIN)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}">',
            '<g font-family="system-ui, sans-serif">',
            f"<title>{_shown(title)}</title>",
            f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
            *body,
            "</g>\n</svg>\n",
        ]
    )


def _drawn(sketch: Sketch, y: float) -> tuple[list[str], float]:
    """Return what a context looks like from `y` on, and where it ends."""
    body = [_text(_MARGIN, y + 14, sketch.context, weight="bold")]
    y += 24
    for first in range(0, len(sketch.cells), _COLUMNS):
        numbers = range(first, min(first + _COLUMNS, len(sketch.cells)))
        if (first // _COLUMNS) % 4 == 0:
            label = _human(sketch.begin + first * sketch.step)
            body.append(_text(_MARGIN + _LABEL - 8, y + _ROW - 1, label, color="#4b5563", anchor="end"))
        body += _row(sketch, numbers, y)
        y += _ROW
    y += 20
    for kind, size in sketch.totals().items():
        line = f"{sketch.word(kind)}: {_human(size)} ({sketch.percent(size)})"
        body.append(_rect(_MARGIN + _LABEL, y - 10, 12, 12, _color(sketch, kind), border=True))
        body.append(_text(_MARGIN + _LABEL + 20, y, line))
        y += _LINE
    note = f"A cell is {_human(sketch.step)}. It is paler the less of it stands out among the rest."
    body.append(_text(_MARGIN + _LABEL, y, note, color="#4b5563"))
    return body, y + _LINE


def _row(sketch: Sketch, numbers: range, y: float) -> Iterator[str]:
    """Yield a rectangle for each run of cells alike, and one over it where something stands out."""
    x = float(_MARGIN + _LABEL)
    for (ground, over, strength), run in groupby(_look(sketch, number) for number in numbers):
        width = _CELL * len(list(run))
        if strength < 1:
            yield _rect(x, y, width, _ROW - 1, _color(sketch, ground))
        if strength:
            yield _rect(x, y, width, _ROW - 1, _color(sketch, over), opacity=strength)
        x += width


def _look(sketch: Sketch, number: int) -> tuple[int, int, float]:
    share = sketch.share(number)
    strength = 0.0 if not share else _FAINTEST + (1 - _FAINTEST) * int(share * _STRENGTHS) / _STRENGTHS
    return sketch.main(number, standing_out=False), sketch.main(number, standing_out=True), strength


def _color(sketch: Sketch, kind: int) -> str:
    for context, colors in _COLORS.items():
        if sketch.context.startswith(context) and kind in colors:
            return colors[kind]
    return _OTHERS[kind % len(_OTHERS)]


def _rect(x: float, y: float, width: float, height: float, fill: str, *, opacity: float = 1, border: bool = False) -> str:
    more = (f' opacity="{opacity:.2f}"' if opacity < 1 else "") + (' stroke="#6b7280" stroke-width="0.5"' if border else "")
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"{more}/>'


def _text(
    x: float, y: float, text: str, *, size: int = 12, color: str = "#111827", weight: str = "normal", anchor: str = "start"
) -> str:
    look = f'font-size="{size}" fill="{color}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" {look}>{_shown(text)}</text>'


def _shown(text: str) -> str:
    """Return a text as XML has it, which has no place for control characters."""
    return escape("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text))


def _human(size: int) -> str:
    """Return a size in the largest unit of which it has one, to a decimal where that loses something."""
    for power, unit in ((60, "EiB"), (50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << power:
            return f"{size / (1 << power):.1f}".removesuffix(".0") + f" {unit}"
    return f"{size} B"

"""Draws a result's comparisons as a chart: a picture in SVG, made of a few rectangles and words.

A bar is how many times better we are than the peer: faster, or with less processor time. The scale is logarithmic, so that
twice as good and half as good are equally far from the line of equals. The thin line is from the worst round to the best, the
mark across is what was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from xml.sax.saxutils import escape

from tests.bench.results import TIMES, Line, Result, Spread, lines

# Pixels.
_WIDTH, _ROW, _TOP, _LEFT, _RIGHT = 1000, 46, 70, 470, 80
_BAR = 18

_COLOURS = {"met": "#2e7d5b", "missed": "#b4552d", "": "#5c6b7a"}
_INK, _PALE, _PAPER = "#1f2933", "#d5dbe1", "#ffffff"


@dataclass(frozen=True, slots=True)
class _Drawn:
    """One comparison as the chart has it: more is better."""

    words: str
    beside: str
    value: Spread
    asked: float | None
    verdict: str


def svg(result: Result) -> str:
    """Return the chart as the text of an SVG file."""
    drawn = [
        _drawn(line) for case in result.cases for line in lines(case) if line.value is not None and line.bar.peer is not None
    ]
    height = _TOP + _ROW * len(drawn) + 40
    body = "\n".join(_elements(drawn, height))
    return (
        # Without a width of its own a picture in a figure, which is as wide as what it holds, has none.
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'width="{_WIDTH}" height="{height}" style="max-width: 100%; height: auto" '
        f'font-family="system-ui, Verdana, DejaVu Sans, sans-serif" font-size="13" fill="{_INK}">\n'
        f"<title>How many times better nbdcore is than its peers, by work</title>\n{body}\n</svg>\n"
    )


def _drawn(line: Line) -> _Drawn:
    """Turn what should be small into how many times smaller it is."""
    found, asked = line.value, line.bar.at_least
    if line.bar.quantity == "CPU time":
        found = Spread(1 / found.median, 1 / found.high, 1 / found.low)
        asked = None if line.bar.at_most is None else 1 / line.bar.at_most
    what = "" if line.bar.quantity == "speed" else " (CPU)"
    ours, theirs = line.case.programs[line.bar.ours].label, line.case.programs[line.bar.peer].label
    return _Drawn(line.case.title, f"{ours} beside {theirs}{what}", found, asked, line.verdict)


def _elements(drawn: list[_Drawn], height: int) -> Iterable[str]:
    ends = [value for one in drawn for value in (one.value.low, one.value.high, one.asked or 1)] or [1]
    scale = _Scale(min(0.5, *ends), max(2, *ends))
    yield f'<rect width="{_WIDTH}" height="{height}" fill="{_PAPER}"/>'
    yield '<text x="20" y="28" font-size="16" font-weight="600">nbdcore beside its peers: how many times better</text>'
    for tick in scale.ticks():
        x = scale.x(tick)
        colour, width = (_INK, 1.5) if tick == 1 else (_PALE, 1)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 8}" y2="{height - 32}" stroke="{colour}" stroke-width="{width}"/>'
        yield f'<text x="{x:.1f}" y="{_TOP - 14}" text-anchor="middle">{tick:g} {TIMES}</text>'
    for number, one in enumerate(drawn):
        yield from _row(one, _TOP + _ROW * number + _ROW // 2, scale)
    yield (
        f'<text x="20" y="{height - 12}" font-size="12">Bar: median of the rounds. Thin line: worst round to best. '
        "Mark across: the bar to meet. "
        "Green: met, red: missed, grey: none set.</text>"
    )


def _row(one: _Drawn, y: int, scale: _Scale) -> Iterable[str]:
    begin, end = sorted((scale.x(1), scale.x(one.value.median)))
    low, high = scale.x(one.value.low), scale.x(one.value.high)
    yield f'<text x="20" y="{y - 3}">{escape(one.words)}</text>'
    yield f'<text x="20" y="{y + 13}" font-size="11.5" fill="{_COLOURS[""]}">{escape(one.beside)}</text>'
    yield (
        f'<rect x="{begin:.1f}" y="{y - _BAR / 2}" width="{max(end - begin, 1):.1f}" height="{_BAR}" '
        f'fill="{_COLOURS[one.verdict]}"/>'
    )
    yield f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="{_INK}" stroke-width="1.5"/>'
    if one.asked is not None:
        x = scale.x(one.asked)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 14}" y2="{y + 14}" stroke="{_INK}" stroke-width="2.5"/>'
    yield f'<text x="{_WIDTH - 12}" y="{y + 4}" text-anchor="end" font-weight="600">{one.value.median:.2f} {TIMES}</text>'


@dataclass(frozen=True, slots=True)
class _Scale:
    """Where a ratio stands, from the lowest on the left to the highest on the right."""

    low: float
    high: float

    def x(self, value: float) -> float:
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return _LEFT + part * (_WIDTH - _RIGHT - _LEFT)

    def ticks(self) -> list[float]:
        """Return the powers of two within the scale."""
        first, last = math.ceil(math.log2(self.low)), math.floor(math.log2(self.high))
        return [2.0**power for power in range(first, last + 1)]

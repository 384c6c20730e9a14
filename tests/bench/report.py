"""Draws a result as text for a terminal, and as tables for the documentation. Both come from the same rows.

The first table is about the bars, a line each; the second says what every program took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

from tests.bench.results import TIMES, Bar, CaseResult, Line, Measured, Result, Spread, lines, spread

_BARS = ("work", "ours", "beside", "compared", "median (lowest to highest)", "bar", "")
_TAKEN = ("work", "program", "speed, median (lowest to highest)", "CPU time", "most memory", "settings")


def text(result: Result) -> str:
    """Return the tables as text."""
    parts = [heading(result), _aligned([_BARS, *bar_rows(result)]), _aligned([_TAKEN, *taken_rows(result)])]
    return "\n\n".join([*parts, "\n".join(unmeasured(result))]).rstrip() + "\n"


def markdown_bars(result: Result) -> str:
    """Return the table of the bars for the documentation."""
    return _markdown([_BARS, *bar_rows(result)])


def markdown_taken(result: Result) -> str:
    """Return the table of what each program took for the documentation."""
    return _markdown([_TAKEN, *taken_rows(result)])


def heading(result: Result) -> str:
    """Return what the figures are from."""
    rounds, seconds = result.options["rounds"], result.options["seconds"]
    facts = "; ".join(f"{name}: {value}" for name, value in result.machine.items())
    return f"Measured {' to '.join(result.days)}, medians of {rounds} rounds, {seconds:g} s a program and round.\n{facts}"


def unmeasured(result: Result) -> list[str]:
    """Return what could not be measured, a line each with its reason."""
    return [
        f"not measured: {case.name}: {program.label}: {program.failed}"
        for case in result.cases
        for program in case.programs.values()
        if program.failed
    ]


def bar_rows(result: Result) -> Iterator[tuple[str, ...]]:
    """Return the rows of the first table."""
    for case in result.cases:
        for line in lines(case):
            yield _bar_row(line)


def _bar_row(line: Line) -> tuple[str, ...]:
    case, bar = line.case, line.bar
    theirs = "" if bar.peer is None else case.programs[bar.peer].label
    as_text = times if bar.peer is not None else _ALONE[bar.quantity]
    value = "" if line.value is None else _spread(line.value, as_text)
    return (case.title, case.programs[bar.ours].label, theirs, bar.quantity, value, _limit(bar, as_text), line.verdict)


def _limit(bar: Bar, as_text: Callable[[float], str]) -> str:
    if bar.at_least is not None:
        return f"≥ {as_text(bar.at_least)}"
    return "" if bar.at_most is None else f"≤ {as_text(bar.at_most)}"


def taken_rows(result: Result) -> Iterator[tuple[str, ...]]:
    """Return the rows of the second table."""
    for case in result.cases:
        for program in case.programs.values():
            yield _taken_row(case, program)


def _taken_row(case: CaseResult, program: Measured) -> tuple[str, ...]:
    if not program.samples:
        return (case.title, program.label, "not measured", "", "", program.settings)
    speed = _spread(spread(program, "speed"), lambda value: f"{value:,.0f}")
    cpu = spread(program, "CPU time").median * 1e6
    memory = median(sample.memory for sample in program.samples)  # the first round's has what comparing every byte took
    return (
        case.title,
        program.label,
        f"{speed} {_plural(case.unit)}/s",
        f"{_three_digits(cpu)} µs per {case.unit}",
        f"{memory / (1 << 20):,.0f} MiB",
        program.settings,
    )


def _plural(unit: str) -> str:
    return unit if unit == "MiB" else f"{unit}s"


def times(ratio: float) -> str:
    """Return a ratio as text."""
    return f"{ratio:.2f} {TIMES}"


def _kibibytes(value: float) -> str:
    return f"{value / 1024:.1f} KiB"


def _mebibytes(value: float) -> str:
    return f"{value / (1 << 20):.0f} MiB"


def _milliseconds(value: float) -> str:
    return f"{value * 1000:.0f} ms"


# How a quantity is shown that is compared with nobody's.
_ALONE: Mapping[str, Callable[[float], str]] = {"memory": _kibibytes, "most memory": _mebibytes, "time": _milliseconds}


def _three_digits(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _spread(found: Spread, as_text: Callable[[float], str]) -> str:
    low, high = (as_text(value).partition(" ")[0] for value in (found.low, found.high))
    return f"{as_text(found.median)} ({low} to {high})"


# ---------------------------------------------------------------------------------------------- tables


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return columns under each other. A first cell that is the same as the one above is left out."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    drawn = []
    for number, row in enumerate(rows):
        cells = ["" if number and row[0] == rows[number - 1][0] else row[0], *row[1:]]
        drawn.append("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    return "\n".join(drawn)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *body])

"""What was measured, as values: samples, the comparisons that a case is about, and what comes out of them. Pure.

A result is kept as it was measured, sample by sample, with its bars: `Result.load` and `Result.dump` are a JSON file, and all
medians and ratios are worked out from that. What a round's programs did is compared within that round only: a machine that gets
busier gets so for both.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one program.

    Attributes:
        work: how much it did, in the case's units.
        seconds: how long that took.
        cpu: processor seconds that the client spent on it.
        memory: the most memory that the process had, in bytes.
        growth: bytes that it has grown by, where the case is about that.
    """

    work: int
    seconds: float
    cpu: float
    memory: int
    growth: int = 0


#: What can be compared, as a value of which more is better, or less.
QUANTITIES = {
    "speed": lambda sample: sample.work / sample.seconds,
    "CPU time": lambda sample: sample.cpu / sample.work,
    "work per CPU second": lambda sample: sample.work / sample.cpu,
    "memory": lambda sample: sample.growth / sample.work,
    "most memory": lambda sample: sample.memory,
    "time": lambda sample: sample.seconds / sample.work,
}


@dataclass(frozen=True, slots=True)
class Bar:
    """A comparison: the quantity of one program, divided by another's where there is one, and the limit that it must keep.

    Without a limit it is there to be looked at.
    """

    ours: str
    peer: str | None
    quantity: str
    at_least: float | None = None
    at_most: float | None = None

    def met(self, value: float) -> bool | None:
        """Whether the limit is kept; None where there is none."""
        if self.at_least is not None:
            return value >= self.at_least
        return None if self.at_most is None else value <= self.at_most


@dataclass(slots=True)
class Measured:
    """What one program of a case did: a sample a round, or why it has none."""

    label: str
    settings: str = ""
    samples: list[Sample] = field(default_factory=list)
    failed: str = ""


@dataclass(slots=True)
class CaseResult:
    """What came of one case; `taken` says when, where that was not with all the others."""

    name: str
    title: str
    unit: str
    bars: list[Bar]
    programs: dict[str, Measured]
    taken: str = ""


@dataclass(slots=True)
class Result:
    """What came of one run of the benchmark."""

    taken: str
    machine: dict[str, str]
    options: dict[str, Any]
    cases: list[CaseResult]

    def dump(self, path: Path) -> None:
        """Write it to a file."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @property
    def days(self) -> list[str]:
        """The first and the last day on which something of it was measured."""
        every = sorted(case.taken or self.taken for case in self.cases) or [self.taken]
        return sorted({every[0][:10], every[-1][:10]})

    def with_others_of(self, older: Result, order: Sequence[str]) -> Result:
        """Return this result, and what an older one has of cases that this one lacks; the cases in this order."""
        cases = {case.name: dataclasses.replace(case, taken=case.taken or older.taken) for case in older.cases}
        cases |= {case.name: case for case in self.cases}
        return dataclasses.replace(self, cases=[cases[name] for name in order if name in cases])

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read it from a file."""
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(found["taken"], found["machine"], found["options"], [_case(case) for case in found["cases"]])


def _case(found: dict[str, Any]) -> CaseResult:
    programs = {
        key: Measured(one["label"], one["settings"], [Sample(**sample) for sample in one["samples"]], one["failed"])
        for key, one in found["programs"].items()
    }
    return CaseResult(
        found["name"], found["title"], found["unit"], [Bar(**bar) for bar in found["bars"]], programs, found.get("taken", "")
    )


# ---------------------------------------------------------------------------------------------- what comes out


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of several rounds, and the lowest and highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of at least one value."""
        known = sorted(values)
        return cls(median(known), known[0], known[-1])


@dataclass(frozen=True, slots=True)
class Line:
    """One comparison, worked out. `value` is the ratio, or the quantity itself where there is no peer; None: not measured."""

    case: CaseResult
    bar: Bar
    value: Spread | None
    why_not: str = ""

    @property
    def verdict(self) -> str:
        """What to say of it: met, missed, nothing, or that it was not measured."""
        if self.value is None:
            return "not measured"
        return {True: "met", False: "missed", None: ""}[self.bar.met(self.value.median)]


def lines(case: CaseResult) -> list[Line]:
    """Return the case's comparisons, worked out."""
    return [_line(case, bar) for bar in case.bars]


def _line(case: CaseResult, bar: Bar) -> Line:
    sides = [case.programs[key] for key in (bar.ours, bar.peer) if key is not None]
    why_not = "; ".join(f"{side.label}: {side.failed or 'no samples'}" for side in sides if side.failed or not side.samples)
    if why_not:
        return Line(case, bar, None, why_not)
    quantity = QUANTITIES[bar.quantity]
    values = [[quantity(sample) for sample in side.samples] for side in sides]
    return Line(case, bar, Spread.of(_ratios(values)))


def _ratios(values: Sequence[Sequence[float]]) -> list[float]:
    if len(values) == 1:
        return list(values[0])
    return [ours / theirs for ours, theirs in zip(*values, strict=True)]


def spread(measured: Measured, quantity: str) -> Spread:
    """Return a quantity of one program's rounds."""
    return Spread.of(QUANTITIES[quantity](sample) for sample in measured.samples)

"""Runs the cases: finds the best settings of each program, then runs the programs by turns, round after round.

A program that fails is left out of the rest of its case, with its reason; the others go on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.bench.case import Case
from tests.bench.cases import JOBS
from tests.bench.programs import Program, Task, Tools
from tests.bench.results import CaseResult, Measured, Sample
from tests.bench.running import Failed
from tests.bench.servers import Running, Sizes

# Of the settings tried once, so many are tried once more: a single trial may have been unlucky.
_SECOND_CHANCES = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """How thorough a run is.

    Attributes:
        rounds: how often each program runs.
        seconds: how long it does, where its work has no end of its own.
        variants: at most how many settings are tried.
        limit: seconds after which a program is killed.
        sizes: how large things are.
        given: the URI of a server to use instead of the benchmark's plain ones.
    """

    rounds: int
    seconds: float
    variants: int
    limit: float
    sizes: Sizes
    given: str | None = None

    def title(self, case: Case) -> str:
        """Return the case's title with its sizes."""
        disk = self.sizes.disk >> 20
        return case.title.format(
            disk="the disk" if self.given else f"{disk >> 10} GiB" if disk % 1024 == 0 else f"{disk} MiB",
            extents=f"{self.sizes.extents:,} extents",
            connections=f"{self.sizes.connections:,}",
            jobs=JOBS,
        )

    def task(self, uri: str, *, verify: bool) -> Task:
        """Return what the programs are told."""
        counts = {
            "extents": self.sizes.extents,
            "connections": self.sizes.connections,
            "mebibytes": self.sizes.disk >> 20,
        }
        return Task(uri, self.seconds, verify and self.given is None, self.limit, counts)


def measure(cases: Iterable[Case], tools: Tools, plan: Plan) -> list[CaseResult]:
    """Measure the cases, in the order of their servers."""
    with Running(plan.sizes, plan.given) as server:
        return [_measure(case, tools, plan, server) for case in cases]


def _measure(case: Case, tools: Tools, plan: Plan, server: Running) -> CaseResult:
    _say(f"{case.name}: {plan.title(case)}")
    try:
        uris = server.uris_of({program.server or case.server for program in case.programs.values()})
    except Exception as exc:  # noqa: BLE001 (whatever keeps one server from running: the other cases have servers of their own)
        _say(f"  no server: {exc!r}")
        lacking = {key: Measured(program.label, failed=f"no server: {exc}") for key, program in case.programs.items()}
        return CaseResult(case.name, plan.title(case), case.unit, list(case.bars), lacking)
    return _Measuring(case, tools, plan, uris).run()


class _Measuring:
    """One case under way."""

    def __init__(self, case: Case, tools: Tools, plan: Plan, uris: Mapping[str, str]) -> None:
        self._case = case
        self._tools = tools
        self._plan = plan
        self._uris = uris
        self._found = {key: Measured(program.label) for key, program in case.programs.items()}
        self._chosen: dict[str, Mapping[str, Any]] = {}

    def run(self) -> CaseResult:
        case = self._case
        for key, program in case.programs.items():
            self._choose(key, program)
        for number in range(self._plan.rounds):
            self._round(number)
        return CaseResult(case.name, self._plan.title(case), case.unit, list(case.bars), self._found)

    def _round(self, number: int) -> None:
        # By turns in another order each time: who comes first finds another machine than who comes last.
        keys = list(self._case.programs)
        turn = number % len(keys)
        speeds = {}
        for key in keys[turn:] + keys[:turn]:
            if not self._found[key].failed:
                sample = self._sample(key, self._chosen[key], verify=number == 0)
                if sample is not None:
                    self._found[key].samples.append(sample)
                    speeds[key] = f"{key} {sample.work / sample.seconds:,.0f}/s"
        _say(f"  round {number + 1}: {', '.join(speeds[key] for key in keys if key in speeds)}")

    def _choose(self, key: str, program: Program) -> None:
        """Find the settings with which the program is fastest."""
        every = len(program.variants) // self._plan.variants | 1  # odd, so that no setting with two values keeps one of them
        variants = program.variants[::every]
        self._chosen[key] = variants[0]
        if len(variants) == 1:
            self._found[key].settings = _words(variants[0])
            return
        _say(f"  {program.label}: trying {len(variants)} settings")
        speeds = {index: self._speed(key, variant) for index, variant in enumerate(variants)}
        best = sorted(speeds, key=lambda index: -speeds[index])[:_SECOND_CHANCES]
        again = {index: speeds[index] + self._speed(key, variants[index]) for index in best}
        self._chosen[key] = variants[max(again, key=lambda index: again[index])]
        if any(speeds.values()):
            self._found[key].failed = ""  # some settings do not work, others do
        self._found[key].settings = _words(self._chosen[key])
        _say(f"  {program.label}: {self._found[key].settings}")

    def _speed(self, key: str, variant: Mapping[str, Any]) -> float:
        sample = self._sample(key, variant, verify=False)
        return 0 if sample is None else sample.work / sample.seconds

    def _sample(self, key: str, variant: Mapping[str, Any], *, verify: bool) -> Sample | None:
        program = self._case.programs[key]
        try:
            uri = self._uris[program.server or self._case.server]
            return program.sample(self._tools, self._plan.task(uri, verify=verify), variant)
        except Failed as exc:
            measured = self._found[key]
            measured.failed = str(exc)
            _say(f"  {measured.label}: {exc}")
            return None


def _words(variant: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_size(value)}" for name, value in variant.items())


def _size(value: int) -> str:
    return f"{value >> 20} MiB" if value >= 1 << 20 else f"{value >> 10} KiB" if value >= 1 << 10 else str(value)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

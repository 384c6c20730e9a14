"""How the benchmark's programs are run: by turns, none for longer than its limit, and one that fails harms no other."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from tests.bench.cases import Case
from tests.bench.programs import Program, Task, Tools
from tests.bench.results import Bar, Sample
from tests.bench.rounds import Plan, measure
from tests.bench.running import Failed, run
from tests.bench.servers import Sizes
from tests.leaks import children, settled

linux_only = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the benchmark looks at processes as Linux has them")


@linux_only
def test_a_program_that_does_not_end_is_killed_with_its_children():
    with pytest.raises(Failed, match="time limit"):
        run(["sh", "-c", "sleep 1000 & sleep 1000"], limit=0.2)
    assert settled(lambda: {number: line for number, line in children().items() if "sleep" in line}) == {}


@linux_only
def test_a_program_that_fails_is_told_by_its_last_words():
    with pytest.raises(Failed, match=r"it ended with 3: oh no$"):
        run([sys.executable, "-c", "import sys; print('first\\noh no', file=sys.stderr); sys.exit(3)"], limit=60)


@linux_only
def test_what_a_program_took_is_its_own():
    program = "import time; data = b'x' * (64 << 20); print('done'); time.sleep(0.5)"
    done = run([sys.executable, "-c", program], limit=60)
    assert done.output == "done\n"
    assert 64 << 20 < done.memory < 128 << 20
    assert 0 < done.cpu < done.seconds


@dataclass(frozen=True, slots=True)
class Scripted(Program):
    """Answers with the variant's speed, and writes down when it ran; from its third run on it may fail."""

    log: list[str]
    fails: bool = False

    def sample(self, _tools: Tools, _task: Task, variant: Mapping[str, Any]) -> Sample:
        self.log.append(self.label)
        if variant.get("broken") or (self.fails and self.log.count(self.label) > 2):
            raise Failed("oh no")
        return Sample(variant.get("speed", 1), 1, 1, 1)


def measured(programs: Mapping[str, Program], rounds: int):
    case = Case("case", "a case", "request", "memory", programs, (Bar("ours", "theirs", "speed"),))
    plan = Plan(rounds=rounds, seconds=1, variants=100, limit=1, sizes=Sizes(1, 1, 1), given="nbd://nowhere")
    (result,) = measure([case], Tools(), plan)
    return result


def test_programs_run_by_turns_and_each_comes_first():
    log = []
    measured({"ours": Scripted("a", log), "theirs": Scripted("b", log)}, rounds=4)
    assert "".join(log) == "abbaabba"


def test_a_program_that_fails_is_left_out_and_the_others_go_on():
    log = []
    result = measured({"ours": Scripted("a", log), "theirs": Scripted("b", log, fails=True)}, rounds=5)
    assert result.programs["theirs"].failed == "oh no"
    assert [len(program.samples) for program in result.programs.values()] == [5, 2]
    assert log.count("b") == 3


def test_the_fastest_settings_are_measured_and_those_that_do_not_work_are_not():
    variants = ({"broken": True}, {"speed": 3}, {"speed": 2})
    result = measured({"ours": Scripted("a", [], variants=variants), "theirs": Scripted("b", [])}, rounds=2)
    assert result.programs["ours"].settings == "speed 3"
    assert not result.programs["ours"].failed
    assert [sample.work for sample in result.programs["ours"].samples] == [3, 3]

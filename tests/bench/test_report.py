"""What the benchmark makes of its figures: ratios within a round, medians over rounds, verdicts, tables and the chart."""

from __future__ import annotations

import dataclasses
from xml.etree import ElementTree as ET

import pytest

from tests.bench import chart, report
from tests.bench.cases import CASES
from tests.bench.results import TIMES, Bar, CaseResult, Measured, Result, Sample, lines

SVG = "{http://www.w3.org/2000/svg}"


def samples(*speeds: float, cpu: float = 0.5) -> list[Sample]:
    """Runs of one second each."""
    return [Sample(work=round(speed), seconds=1, cpu=cpu, memory=10 << 20) for speed in speeds]


def a_case(*bars: Bar, ours: Measured, theirs: Measured) -> CaseResult:
    return CaseResult("case", "small <reads>", "request", list(bars), {"ours": ours, "theirs": theirs})


def a_result(*cases: CaseResult) -> Result:
    return Result("2026-01-02T03:04:05+00:00", {"processor": "one & only"}, {"rounds": 3, "seconds": 2}, list(cases))


FASTER = Bar("ours", "theirs", "speed", at_least=1.5)
CHEAPER = Bar("ours", "theirs", "CPU time", at_most=0.6)


def test_a_ratio_is_of_one_round_and_the_median_is_of_the_ratios():
    # Both were ten times as fast in the third round. The ratio of the two medians is 3.
    case = a_case(
        FASTER, ours=Measured("ours", "", samples(100, 300, 2000)), theirs=Measured("theirs", "", samples(100, 100, 1000))
    )
    (line,) = lines(case)
    assert (line.value.low, line.value.median, line.value.high) == (1, 2, 3)
    assert line.verdict == "met"


@pytest.mark.parametrize(
    ("bar", "cpu", "verdict"),
    [
        (Bar("ours", "theirs", "speed", at_least=1.01), 0.5, "missed"),
        (Bar("ours", "theirs", "speed", at_least=1.0), 0.5, "met"),
        (Bar("ours", "theirs", "speed"), 0.5, ""),
        (CHEAPER, 0.3, "met"),
        (CHEAPER, 0.31, "missed"),
    ],
)
def test_a_bar_is_met_or_missed_by_the_median(bar, cpu, verdict):
    case = a_case(bar, ours=Measured("ours", "", samples(100, cpu=cpu)), theirs=Measured("theirs", "", samples(100)))
    assert [line.verdict for line in lines(case)] == [verdict]


def test_without_a_peer_the_quantity_itself_is_held_against_the_bar():
    idle = Measured("ours", "", [Sample(1000, 1, 1, 1 << 20, growth=growth << 10) for growth in (10_000, 49_000, 60_000)])
    case = CaseResult("idle", "idle", "connection", [Bar("ours", None, "memory", at_most=50 << 10)], {"ours": idle})
    assert [(line.value.median, line.verdict) for line in lines(case)] == [(49 << 10, "met")]
    assert "49.0 KiB (10.0 to 60.0)" in report.text(a_result(case))


def test_what_failed_is_named_with_its_reason_and_the_rest_is_reported():
    broken = a_case(FASTER, ours=Measured("ours", failed="it ended with 1: oh no"), theirs=Measured("theirs", "", samples(1)))
    good = a_case(FASTER, ours=Measured("ours", "", samples(3)), theirs=Measured("theirs", "", samples(1)))
    result = a_result(broken, good)
    assert [line.verdict for case in result.cases for line in lines(case)] == ["not measured", "met"]
    assert report.unmeasured(result) == ["not measured: case: ours: it ended with 1: oh no"]
    assert "oh no" in report.text(result)
    assert "3.00" in report.text(result)


def test_a_result_is_the_same_after_it_was_written_and_read(tmp_path):
    result = a_result(
        a_case(FASTER, CHEAPER, ours=Measured("ours", "depth 8", samples(1, 2)), theirs=Measured("theirs", failed="x"))
    )
    result.dump(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json") == result


def test_both_tables_have_a_row_for_each_thing_in_markdown():
    result = a_result(
        a_case(FASTER, CHEAPER, ours=Measured("ours", "", samples(300)), theirs=Measured("theirs", "", samples(100)))
    )
    bars = report.markdown_bars(result).splitlines()
    assert [row.count("|") for row in bars] == [8] * 4
    assert (
        "| 3.00 \N{MULTIPLICATION SIGN} (3.00 to 3.00) | \N{GREATER-THAN OR EQUAL TO} 1.50 \N{MULTIPLICATION SIGN} | met |"
        in bars[2]
    )
    assert len(report.markdown_taken(result).splitlines()) == 4


def test_the_chart_is_well_formed_and_draws_what_was_compared():
    case = a_case(FASTER, CHEAPER, ours=Measured("ours", "", samples(300)), theirs=Measured("theirs", "", samples(100)))
    alone = CaseResult("idle", "idle", "connection", [Bar("ours", None, "memory")], {"ours": Measured("ours", "", samples(1))})
    picture = ET.fromstring(chart.svg(a_result(case, alone)))
    words = [element.text for element in picture.iter(f"{SVG}text")]
    assert words.count("small <reads>") == 2
    assert "idle" not in words
    # Three times as fast, with a third of the processor time for each request.
    assert words.count(f"3.00 {TIMES}") == 2
    for element in picture.iter(f"{SVG}rect"):
        assert float(element.get("width")) > 0
        assert 0 <= float(element.get("x", 0)) <= 1000


def test_a_chart_of_nothing_is_well_formed():
    assert ET.fromstring(chart.svg(a_result())) is not None


def test_every_bar_is_about_programs_of_its_case():
    for case in CASES:
        assert {key for bar in case.bars for key in (bar.ours, bar.peer) if key is not None} == set(case.programs), case.name
    assert len({case.name for case in CASES}) == len(CASES)


def test_cases_measured_later_take_the_place_of_the_older_ones_and_keep_their_day():
    def result(day: str, *names: str) -> Result:
        case = a_case(FASTER, ours=Measured("ours", "", samples(100)), theirs=Measured("theirs", "", samples(100)))
        return Result(f"{day}T00:00:00+00:00", {}, {}, [dataclasses.replace(case, name=name, title=day) for name in names])

    both = result("2026-02-01", "b").with_others_of(result("2026-01-01", "c", "b", "a"), ["a", "b", "c"])
    assert [(case.name, case.title) for case in both.cases] == [("a", "2026-01-01"), ("b", "2026-02-01"), ("c", "2026-01-01")]
    assert both.days == ["2026-01-01", "2026-02-01"]

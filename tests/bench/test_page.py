"""The documentation's page about speed: drawn from the published result, whatever that is."""

from __future__ import annotations

import importlib.util
import re
from xml.etree import ElementTree as ET

from tests.bench import report
from tests.bench.__main__ import PUBLISHED
from tests.bench.cases import CASES
from tests.bench.results import Result
from tests.interop.programs import REPOSITORY


def the_page() -> str:
    """The page as mkdocs gets it from the hooks."""
    path = REPOSITORY / "docs/hooks.py"
    specification = importlib.util.spec_from_file_location("docs_hooks", path)
    hooks = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(hooks)
    return hooks.on_page_markdown((REPOSITORY / "docs/explanation/speed.md").read_text(encoding="utf-8"))


def test_the_published_result_is_a_full_one():
    cases = [case.name for case in CASES if not case.extra]
    assert [case.name for case in Result.load(PUBLISHED).cases] == cases


def test_the_page_shows_every_line_of_the_published_result():
    page, result = the_page(), Result.load(PUBLISHED)
    for row in [*report.bar_rows(result), *report.taken_rows(result)]:
        assert f"| {' | '.join(row)} |" in page
    assert report.heading(result) in page


def test_the_page_has_the_chart_in_one_block_that_markdown_leaves_alone():
    figure = re.search(r"<figure>\n(.*)</figure>", the_page(), re.DOTALL)[1]
    picture = ET.fromstring(figure)
    # A figure is as wide as what it holds: a picture that does not say how wide it is does not show.
    assert int(picture.get("width")) > 0
    assert picture.get("viewBox") == f"0 0 {picture.get('width')} {picture.get('height')}"
    assert "\n\n" not in figure

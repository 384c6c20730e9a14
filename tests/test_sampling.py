from __future__ import annotations

from dataclasses import dataclass

from tests.sampling import one_of_each


@dataclass(frozen=True)
class Named:
    """As much of a test as choosing looks at."""

    nodeid: str


def test_each_function_has_one_set_of_parameters_and_not_always_the_first():
    many = [Named(f"tests/test_x.py::test_{name}[{number}]") for name in "abcdefgh" for number in range(4)]
    alone = Named("tests/test_x.py::test_alone")
    chosen = one_of_each([*many, alone])
    assert [each.nodeid.partition("[")[0][-1] for each in chosen] == [*"abcdefgh", "e"]
    assert chosen[-1] is alone
    assert len({each.nodeid.partition("[")[2] for each in chosen[:-1]}) > 1


def test_the_choice_is_the_same_whatever_else_is_run():
    items = [Named(f"tests/test_x.py::test_a[{number}]") for number in range(7)]
    others = [Named("tests/test_w.py::test_b[1]")]
    assert one_of_each([*others, *items])[1:] == one_of_each(items)

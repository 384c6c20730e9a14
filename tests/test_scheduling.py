from __future__ import annotations

from tests.scheduling import piece_of


def test_sets_of_parameters_of_one_test_go_together_in_a_few_pieces():
    pieces = {piece_of(f"tests/test_it.py::test_it[{number}]") for number in range(200)}
    assert len(pieces) == 8


def test_two_tests_never_share_a_piece():
    assert piece_of("tests/test_it.py::test_it[1]") != piece_of("tests/test_it.py::test_other[1]")
    assert piece_of("tests/test_it.py::test_it") != piece_of("tests/test_other.py::test_it")

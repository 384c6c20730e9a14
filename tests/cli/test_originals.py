"""libnbd's programs understand an option by the beginning of its name: so do the commands that have their names."""

from __future__ import annotations

import pytest

from nbdcore.cli.dump import dump
from nbdcore.cli.originals import spelled_out
from nbdcore.cli.shell import shell


@pytest.mark.parametrize(
    ("words", "whole"),
    [
        ("--leng 16 URI", "--length 16 URI"),
        ("--leng=16", "--length=16"),
        ("--length=16 -n 3", "--length=16 -n 3"),
        ("--no-colo", "--no-color"),  # further spellings of the same are no other option
        ("--co", "--color"),
        ("--he", "--help"),
        ("--l", "--length"),  # --limit is the same
        ("--t", "--t"),  # --timeout or --tls-psk
        ("--nonsense", "--nonsense"),
        ("-- --leng", "-- --leng"),
        ("[ nbdkit --leng 1M ] --leng 5", "[ nbdkit --leng 1M ] --length 5"),
        ("[ nbdkit --leng", "[ nbdkit --leng"),
    ],
)
def test_beginning_that_only_one_option_has_stands_for_it(words, whole):
    assert spelled_out(dump, words.split()) == whole.split()


def test_words_of_the_shell_are_spelled_out_too():
    assert spelled_out(shell, ["--base", "--comm", "print(1)"]) == ["--base-allocation", "--command", "print(1)"]

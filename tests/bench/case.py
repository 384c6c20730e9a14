"""What a comparison consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.bench.programs import Program
from tests.bench.results import Bar


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison, or several that share their programs.

    Attributes:
        writes: whether it changes what is on the disk.
        own_server: whether it says something only on a server of the benchmark's own.
        extra: measured only when it is asked for by name.
    """

    name: str
    title: str
    unit: str
    server: str
    programs: Mapping[str, Program]
    bars: tuple[Bar, ...]
    writes: bool = False
    own_server: bool = False
    extra: bool = False

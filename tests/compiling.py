"""Share among the workers of a session what pytest does once for each module of tests: compile it with assertions that explain.

That takes some ten seconds of processor time in a fresh clone. Workers begin together, and in the same order: each would find
nothing compiled by the others, and do all of it. So before it collects each worker imports the modules, from another one on. When
it comes to where the next worker began, that one has gone on, and left them compiled.
"""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path

import pytest


def import_from_ones_own_part_on(session: pytest.Session) -> None:
    """Import the modules of tests that the session collects. Does nothing in a session without workers."""
    worker = getattr(session.config, "workerinput", None)
    if worker is None:
        return
    modules = _modules(session.config)
    begin = len(modules) * int(worker["workerid"].removeprefix("gw")) // worker["workercount"]
    for path in modules[begin:] + modules[:begin]:
        with contextlib.suppress(Exception, pytest.skip.Exception):  # collecting imports it once more, and tells
            importlib.import_module(".".join(path.relative_to(session.config.rootpath).with_suffix("").parts))


def _modules(config: pytest.Config) -> list[Path]:
    named = [Path(config.invocation_params.dir, argument.partition("::")[0]) for argument in config.args]
    return sorted({module for path in named for module in (path.rglob("test_*.py") if path.is_dir() else [path])})

"""Build hook: leaves transports out of a per-platform build.

`NBDCORE_BUILD_TRANSPORTS=tcp,unix python -m build --wheel` ships those two only. The entry points of the others stay: at
run time they report that the transport is not in this build, which says more than silence would.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "NBDCORE_BUILD_TRANSPORTS"


class TransportsHook(BuildHookInterface[Any]):
    """Excludes every transport that NBDCORE_BUILD_TRANSPORTS, when set, does not name."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 (the interface's own signature)
        """Prune the wheel's files before they are collected."""
        wanted = os.environ.get(VARIABLE)
        if wanted is None:
            return
        names = {name.strip() for name in wanted.split(",") if name.strip()}
        modules = {path.stem.removeprefix("nbdcore_"): path for path in Path(self.root, "transports").glob("nbdcore_*.py")}
        unknown = names - modules.keys()
        if unknown:
            raise ValueError(f"{VARIABLE} names no transport of this project: {', '.join(sorted(unknown))}")
        left_out = [f"/transports/{path.name}" for name, path in modules.items() if name not in names]
        self.build_config.build_config["exclude"] = [*self.build_config.build_config.get("exclude", ()), *left_out]

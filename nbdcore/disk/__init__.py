"""What people do with a whole disk, over any client."""

from __future__ import annotations

from nbdcore.disk.crew import WorkerLost
from nbdcore.disk.workers import Outcome, map_ranges

__all__ = ["Outcome", "WorkerLost", "map_ranges"]

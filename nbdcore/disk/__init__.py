"""What people do with a whole disk, over any client."""

from __future__ import annotations

from nbdcore.disk.blockhash import BlockHash, combined
from nbdcore.disk.checksums import Checksum, RangeChecksum, checksum, checksum_of_stream
from nbdcore.disk.comparing import Comparison, Difference, compare
from nbdcore.disk.crew import WorkerLost
from nbdcore.disk.workers import Outcome, map_ranges

__all__ = [
    "BlockHash",
    "Checksum",
    "Comparison",
    "Difference",
    "Outcome",
    "RangeChecksum",
    "WorkerLost",
    "checksum",
    "checksum_of_stream",
    "combined",
    "compare",
    "map_ranges",
]

"""What people do with a whole disk, over any client.

Each name is imported from its module when it is first used: a map or a copy needs nothing of worker processes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdcore.disk.blockhash import BlockHash, combined
    from nbdcore.disk.checksums import Checksum, RangeChecksum, checksum, checksum_of_stream
    from nbdcore.disk.comparing import Comparison, compare
    from nbdcore.disk.copying.copy import copy
    from nbdcore.disk.copying.ends import NULL
    from nbdcore.disk.copying.errors import CopyError
    from nbdcore.disk.copying.result import CopyEnd, CopyProgress, CopyResult, CopySettings
    from nbdcore.disk.crew import WorkerLost
    from nbdcore.disk.differences import Difference
    from nbdcore.disk.maps import DiskMap, Part, Total, describe, read_map
    from nbdcore.disk.workers import Outcome, map_ranges

__all__ = [
    "NULL",
    "BlockHash",
    "Checksum",
    "Comparison",
    "CopyEnd",
    "CopyError",
    "CopyProgress",
    "CopyResult",
    "CopySettings",
    "Difference",
    "DiskMap",
    "Outcome",
    "Part",
    "RangeChecksum",
    "Total",
    "WorkerLost",
    "checksum",
    "checksum_of_stream",
    "combined",
    "compare",
    "copy",
    "describe",
    "map_ranges",
    "read_map",
]

_HOMES = {
    "nbdcore.disk.blockhash": "BlockHash combined",
    "nbdcore.disk.checksums": "Checksum RangeChecksum checksum checksum_of_stream",
    "nbdcore.disk.comparing": "Comparison compare",
    "nbdcore.disk.copying.copy": "copy",
    "nbdcore.disk.copying.ends": "NULL",
    "nbdcore.disk.copying.errors": "CopyError",
    "nbdcore.disk.copying.result": "CopyEnd CopyProgress CopyResult CopySettings",
    "nbdcore.disk.crew": "WorkerLost",
    "nbdcore.disk.differences": "Difference",
    "nbdcore.disk.maps": "DiskMap Part Total describe read_map",
    "nbdcore.disk.workers": "Outcome map_ranges",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module 'nbdcore.disk' has no attribute {name!r}")
    value: object = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

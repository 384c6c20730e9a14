"""How a checksum is computed, as a word of the command line: sha256, or with the size of blocks sha256/64k, as for nbdcopy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from nbdcore.cli import sizes
from nbdcore.disk.blockhash import BLOCK_SIZE, BlockHash
from nbdcore.errors import UsageError

__all__ = ["BlockHashType", "parsed"]

# Generic for type checkers only.
if TYPE_CHECKING:
    _BlockHashType = click.ParamType[BlockHash]
else:
    _BlockHashType = click.ParamType


def parsed(word: str) -> BlockHash:
    """Return what ALGORITHM or ALGORITHM/SIZE means. Raises click's BadParameter, which says what there is instead."""
    algorithm, slash, size = word.partition("/")
    try:
        return BlockHash(algorithm, sizes.parsed(size) if slash else BLOCK_SIZE)
    except UsageError as error:
        raise click.BadParameter(error.message) from error


class BlockHashType(_BlockHashType):
    """A block hash, as a click option's type."""

    name = "algorithm"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> BlockHash:  # noqa: ARG002 (click's)
        """Return what a word means."""
        return value if isinstance(value, BlockHash) else parsed(value)

"""The words behind `nbdcore info --is`, `--can` and `--has`: what can be asked of a disk with yes or no, in nbdinfo's words."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from nbdcore import Client
from nbdcore.cli.output import Failure

__all__ = ["Feature", "feature"]


@dataclass(frozen=True, slots=True)
class Feature:
    """Something that a disk is, can or has.

    Attributes:
        attribute: which of a client's says so; "" where nothing has to be asked.
        opposite: whether it is so where the attribute is false.
        of_disk: whether the disk has to answer for it; of the others the connection tells.
    """

    attribute: str = ""
    opposite: bool = False
    of_disk: bool = True

    def holds(self, client: Client) -> bool:
        """Tell whether it is so, of a connection or of what is known of a disk."""
        return not self.attribute or bool(getattr(client, self.attribute)) is not self.opposite


_FEATURES = {
    # The connection stands, or there would be nothing to ask; and there is no disk that cannot be read.
    "connect": Feature(of_disk=False),
    "read": Feature(of_disk=False),
    "tls": Feature("tls", of_disk=False),
    "structured-reply": Feature("structured_replies", of_disk=False),
    "extended-headers": Feature("extended_headers", of_disk=False),
    # Whoever cannot open the disk is told so, as of all below.
    "open": Feature(),
    "write": Feature("read_only", opposite=True),
    "read-only": Feature("read_only"),
    "rotational": Feature("rotational"),
    "block-status-payload": Feature("can_block_status_payload"),
    "cache": Feature("can_cache"),
    "df": Feature("can_df"),
    "fast-zero": Feature("can_fast_zero"),
    "flush": Feature("can_flush"),
    "fua": Feature("can_fua"),
    "multi-conn": Feature("can_multi_conn"),
    "trim": Feature("can_trim"),
    "zero": Feature("can_zero"),
}
_ALIASES = {
    "sr": "structured-reply",
    "structured": "structured-reply",
    "structured-replies": "structured-reply",
    "eh": "extended-headers",
    "extended": "extended-headers",
    "extended-header": "extended-headers",
    "readonly": "read-only",
    "fastzero": "fast-zero",
    "multiconn": "multi-conn",
}


def feature(word: str) -> Feature:
    """Return what a word of the command line asks for. Raises Failure for a word that is none."""
    plain = word.lower().replace("_", "-").replace(" ", "-")
    found = _FEATURES.get(_ALIASES.get(plain, plain))
    if found is None:
        near = difflib.get_close_matches(plain, _FEATURES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(_FEATURES))}"
        raise Failure(f"--is, --can and --has know no feature {word!r}; {hint}")
    return found

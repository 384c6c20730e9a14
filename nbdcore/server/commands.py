"""What a request must be to reach a back end: every check of the specification, each with its error number, in one place.

Checks look at the header alone; framing (is a payload following?) is the transmission loop's business and comes before them.
"""

from __future__ import annotations

from nbdcore.protocol.constants import CommandFlag, CommandType, ErrorNumber, TransmissionFlag
from nbdcore.server.backend import Refusal
from nbdcore.server.shutdown import Shutdown
from nbdcore.server.terms import Terms

__all__ = ["Checks"]

_CHANGING = frozenset({CommandType.WRITE, CommandType.TRIM, CommandType.WRITE_ZEROES})
# What a length can be too large for: these carry their data, the others only name a range.
_CARRYING = frozenset({CommandType.READ, CommandType.WRITE})
# Commands that name a range and may carry no flag: most requests are one of these with no flags at all.
_RANGED = frozenset({*_CARRYING, CommandType.TRIM, CommandType.CACHE, CommandType.WRITE_ZEROES, CommandType.BLOCK_STATUS})
# The specification's number for a range past the end of the export, where it is not EINVAL.
_PAST_END = {CommandType.WRITE: ErrorNumber.ENOSPC, CommandType.WRITE_ZEROES: ErrorNumber.ENOSPC}


class Checks:
    """The checks for one connection, which depend on the export and on what was negotiated."""

    def __init__(self, terms: Terms, shutdown: Shutdown) -> None:
        export = terms.export
        assert export is not None
        self._shutdown = shutdown
        self._size = export.size
        self._read_only = export.read_only
        self._minimum = export.block_sizes.minimum
        self._maximum = export.block_sizes.maximum
        self._allocation = terms.allocation
        self._flags = _flags(terms)
        #: The longest range of each command that is available, for requests without flags.
        self._longest = {
            int(command): self._maximum if command in _CARRYING else self._size for command in _RANGED & self._flags.keys()
        }
        self._within = self._minimum - 1  # what offsets and lengths may not have: minimum block sizes are powers of two

    def check(self, command: int, flags: int, offset: int, length: int) -> None:
        """Raise Refusal unless the request may be carried out. For a status request with a payload see `check_range`.

        Hot: the first lines let through what nearly all requests are, in plain integers; the rest finds what is wrong, if any.
        """
        if (
            not flags
            and length <= self._longest.get(command, -1)
            and offset + length <= self._size
            and not (offset | length) & self._within
            and not self._shutdown.requested
        ):
            return
        allowed = self._flags.get(command)
        if self._shutdown.requested:
            raise Refusal(ErrorNumber.ESHUTDOWN, "the server is being shut down")
        if allowed is None:
            self._refuse_unavailable(command)
        elif flags & ~allowed:
            raise Refusal(ErrorNumber.EINVAL, f"flags {flags & ~allowed:#x} are not valid for {_name(command)} here")
        elif command == CommandType.FLUSH:
            if offset or length:
                raise Refusal(ErrorNumber.EINVAL, "offset and length of a flush must be zero")
        elif not flags & CommandFlag.PAYLOAD_LEN or command == CommandType.WRITE:
            self.check_range(command, offset, length)

    def check_range(self, command: int, offset: int, length: int) -> None:
        """Raise Refusal unless a range fits the export and its block sizes."""
        if offset + length > self._size:
            number = _PAST_END.get(command, ErrorNumber.EINVAL)  # type: ignore[call-overload]  # an IntEnum's keys match plain ints
            raise Refusal(number, f"{length} bytes at offset {offset} go past the end of the export at {self._size}")
        if command in _CARRYING and length > self._maximum:
            raise Refusal(ErrorNumber.EINVAL, f"{length} bytes at once; the maximum block size is {self._maximum}")
        if self._minimum != 1 and (offset % self._minimum or length % self._minimum):
            raise Refusal(ErrorNumber.EINVAL, f"offset {offset} and length {length} are not multiples of {self._minimum}")

    def _refuse_unavailable(self, command: int) -> None:
        if self._read_only and command in _CHANGING:
            raise Refusal(ErrorNumber.EPERM, "the export is read-only")
        if command == CommandType.BLOCK_STATUS and not self._allocation:
            raise Refusal(ErrorNumber.EINVAL, "no metadata context was selected for this export")
        raise Refusal(ErrorNumber.EINVAL, f"{_name(command)} is not available on this export")


def _flags(terms: Terms) -> dict[int, int]:
    """Return the flags that each available command may have."""
    assert terms.export is not None
    offered = terms.export.flags(structured=terms.structured, filters=terms.extended and terms.allocation)
    # FUA is valid for all commands once offered; those that write nothing ignore it.
    common = CommandFlag.FUA if offered & TransmissionFlag.SEND_FUA else 0
    payload = CommandFlag.PAYLOAD_LEN if terms.extended else 0
    valid: dict[int, int] = {CommandType.READ: common | (CommandFlag.DF if offered & TransmissionFlag.SEND_DF else 0)}
    if not terms.export.read_only:
        valid[CommandType.WRITE] = common | payload
        valid[CommandType.WRITE_ZEROES] = common | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO
    if offered & TransmissionFlag.SEND_FLUSH:
        valid[CommandType.FLUSH] = common
    if offered & TransmissionFlag.SEND_TRIM:
        valid[CommandType.TRIM] = common
    if offered & TransmissionFlag.SEND_CACHE:
        valid[CommandType.CACHE] = common
    if terms.allocation:
        valid[CommandType.BLOCK_STATUS] = common | CommandFlag.REQ_ONE | payload
    return {command: int(flags) for command, flags in valid.items()}


def _name(command: int) -> str:
    try:
        return f"NBD_CMD_{CommandType(command).name}"
    except ValueError:
        return f"command {command}"

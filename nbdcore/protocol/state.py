"""The phases of a connection, and the one table of what is legal in which.

    CREATED ──connect──▶ CONNECTING ──▶ CONNECTED ──disconnect or the server's end──▶ CLOSED
                          │      ▲
                 opt mode ▼      │ an option under way
                         NEGOTIATING
    from everywhere: a broken transport, a broken protocol, a failed handshake ──▶ DEAD

There is no way back from CLOSED and DEAD: make a new client. CONNECTING lasts from the connect call until the transmission phase,
or until the pause of opt mode, and while one option is under way. The rows of LEGAL are the calls of the public API; the
documentation and the tests read the same table. A call in a wrong phase is a UsageError (Disconnected, where the
connection it needs was lost), and nothing is sent.
"""

from __future__ import annotations

import enum
import errno

from nbdcore.errors import Disconnected, UsageError


class Phase(enum.Enum):
    """Where a connection stands; the value is how messages name it."""

    CREATED = "newly created"
    CONNECTING = "connecting"
    NEGOTIATING = "negotiating"
    CONNECTED = "connected"
    CLOSED = "closed"
    DEAD = "dead"


_CREATED = frozenset({Phase.CREATED})
_NEGOTIATING = frozenset({Phase.NEGOTIATING})
_CONNECTED = frozenset({Phase.CONNECTED})
_KNOWN = frozenset({Phase.NEGOTIATING, Phase.CONNECTED, Phase.CLOSED})
_ANY = frozenset(Phase)

#: Call name -> the phases in which it is legal.
LEGAL: dict[str, frozenset[Phase]] = {
    "connect": _CREATED,
    "connect_tcp": _CREATED,
    "connect_unix": _CREATED,
    "connect_vsock": _CREATED,
    "connect_transport": _CREATED,
    "connect_ssh": _CREATED,
    "connect_command": _CREATED,
    "connect_socket_activation": _CREATED,
    "connect_socket": _CREATED,
    "connect_stream": _CREATED,
    "opt_list": _NEGOTIATING,
    "opt_info": _NEGOTIATING,
    "opt_go": _NEGOTIATING,
    "opt_abort": _NEGOTIATING,
    "opt_starttls": _NEGOTIATING,
    "opt_structured_reply": _NEGOTIATING,
    "opt_extended_headers": _NEGOTIATING,
    "opt_list_meta_context": _NEGOTIATING,
    "opt_set_meta_context": _NEGOTIATING,
    "size": _KNOWN,
    "flags": _KNOWN,
    "block_size": _KNOWN,
    "export_name": _KNOWN,
    "description": _KNOWN,
    "contexts": _KNOWN,
    "protocol": _KNOWN,
    "pread": _CONNECTED,
    "pread_into": _CONNECTED,
    "pwrite": _CONNECTED,
    "flush": _CONNECTED,
    "trim": _CONNECTED,
    "zero": _CONNECTED,
    "cache": _CONNECTED,
    "block_status": _CONNECTED,
    "extents": _CONNECTED,
    "disconnect": _ANY,
    "close": _ANY,
}


#: Call name -> what of the agreement it needs, as (attribute, value), and what to say where that is not so.
NEEDS: dict[str, tuple[str, bool, str]] = {
    "opt_starttls": ("tls", False, "the connection is encrypted already"),
    "opt_set_meta_context": ("structured", True, "structured replies come first: call opt_structured_reply"),
}


def check_agreed(call: str, agreement: object) -> None:
    """Raise UsageError (EINVAL) where the specification forbids an option after what was agreed on, or was not."""
    if call in NEEDS:
        attribute, needed, otherwise = NEEDS[call]
        if getattr(agreement, attribute) is not needed:
            raise UsageError(errno.EINVAL, f"{call}: {otherwise}")


def check(call: str, phase: Phase, *, why: BaseException | None = None, lost: bool = False) -> None:
    """Raise UsageError unless `call` is legal in `phase`.

    errno is ENOTCONN while newly created, else EINVAL. `why` is the error that ended the connection, if one did: it becomes
    part of the message and the cause. Where the connection was `lost`, a call that needs one raises Disconnected (ENOTCONN)
    instead: the caller did nothing wrong, and a program of several threads learns of the loss in the same way in each.
    """
    legal = LEGAL[call]
    if phase in legal:
        return
    wanted = " or ".join(sorted(state.value for state in legal))
    message = f"{call}: the connection is {phase.value}, and must be {wanted}"
    if why is not None:
        message += f" (it ended with: {why})"
    if lost and phase in (Phase.CLOSED, Phase.DEAD) and Phase.CREATED not in legal:
        raise Disconnected(errno.ENOTCONN, message) from why
    number = errno.ENOTCONN if phase is Phase.CREATED else errno.EINVAL
    raise UsageError(number, message) from why

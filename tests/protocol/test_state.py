"""The table of legal calls: each row in each phase, and what is said about a call in a wrong one."""

from __future__ import annotations

import errno

import pytest

from nbdcore.errors import Disconnected, UsageError
from nbdcore.protocol.state import LEGAL, Phase, check

CREATED, CONNECTING, NEGOTIATING, CONNECTED, CLOSED, DEAD = Phase
CONNECTS = {
    "connect",
    "connect_tcp",
    "connect_unix",
    "connect_vsock",
    "connect_transport",
    "connect_ssh",
    "connect_command",
    "connect_socket_activation",
    "connect_socket",
    "connect_stream",
}
OPTIONS = {
    "opt_list",
    "opt_info",
    "opt_go",
    "opt_abort",
    "opt_starttls",
    "opt_structured_reply",
    "opt_extended_headers",
    "opt_list_meta_context",
    "opt_set_meta_context",
}
QUESTIONS = {"size", "flags", "block_size", "export_name", "description", "contexts", "protocol"}
COMMANDS = {"pread", "pread_into", "pwrite", "flush", "trim", "zero", "cache", "block_status", "extents"}
ENDINGS = {"disconnect", "close"}
# The table once more, written down from its definition and not read from the code.
EXPECTED = (
    dict.fromkeys(CONNECTS, (CREATED,))
    | dict.fromkeys(OPTIONS, (NEGOTIATING,))
    | dict.fromkeys(QUESTIONS, (NEGOTIATING, CONNECTED, CLOSED))
    | dict.fromkeys(COMMANDS, (CONNECTED,))
    | dict.fromkeys(ENDINGS, tuple(Phase))
)


def test_every_call_has_a_row():
    assert set(LEGAL) == set(EXPECTED)


@pytest.mark.parametrize("call", sorted(EXPECTED))
def test_call_is_legal_exactly_in_its_phases(call):
    for phase in EXPECTED[call]:
        check(call, phase)
    for phase in set(Phase) - set(EXPECTED[call]):
        with pytest.raises(UsageError) as refusal:
            check(call, phase)
        assert refusal.value.errno == (errno.ENOTCONN if phase is CREATED else errno.EINVAL)
        assert call in str(refusal.value)
        assert phase.value in str(refusal.value)


def test_reason_why_the_connection_ended_is_in_the_message_and_the_cause():
    why = Disconnected(errno.ENOTCONN, "the server closed the connection")

    with pytest.raises(UsageError, match="the server closed the connection") as refusal:
        check("pread", DEAD, why=why)

    assert refusal.value.__cause__ is why

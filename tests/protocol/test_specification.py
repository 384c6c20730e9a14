"""What the specification demands of a client and no other test shows: the client's core with bytes alone, section by section."""

from __future__ import annotations

from nbdcore.errors import NegotiationError
from nbdcore.protocol.handshake import negotiation
from tests.protocol.harness import greeting, newborn

# ---------------------------------------------------------------------------------------------- handshake


def test_starttls_is_not_sent_to_a_server_without_fixed_newstyle():
    client = newborn(opt_mode=True, structured_replies=False).hear(greeting(flags=2))
    client.said.clear()
    engine = client.engine

    client.follow(engine.option(negotiation.starttls(engine.agreement, engine.settings)))

    assert isinstance(client.exchanges[-1].error, NegotiationError)
    assert bytes(client.said) == b""

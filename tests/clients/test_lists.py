"""Which exports a server has: asked for in opt mode, by a function, and by a client that has one of them open."""

from __future__ import annotations

import pytest

import nbdcore
from nbdcore import Client, Export, NegotiationError, Phase, UsageError
from nbdcore.protocol.constants import Option, OptionReply
from nbdcore.testing.scripted import Negotiation, ScriptedServer, drain, expect_end, goodbye, greeting, option_reply
from tests.clients.talking import OPTION_MODE, PATIENCE, ready_for_options, script

NAMES = {"": "the default one", "disk": "a disk", "ünïcode/100%": ""}
EXPORTS = [Export("", "the default one"), Export("disk", "a disk"), Export("ünïcode/100%", "")]
LISTING = [greeting(), Negotiation(exports=NAMES), drain]


def test_in_opt_mode_on_the_same_connection():
    with ScriptedServer(LISTING) as server:
        client = Client(server.stream(), opt_mode=True, timeout=PATIENCE)
        assert client.list_exports(timeout=PATIENCE) == EXPORTS
        assert client.opt_list(timeout=PATIENCE) == EXPORTS
        assert client.phase is Phase.NEGOTIATING
        client.opt_abort()


def ask_while_connected(server: ScriptedServer, uri: str) -> None:
    with nbdcore.connect(uri, timeout=PATIENCE) as client:
        assert client.list_exports(timeout=PATIENCE) == EXPORTS
        assert client.phase is Phase.CONNECTED
        assert Option.GO not in [option for option, _ in server.connections[1].options]


def test_connected_over_one_more_connection_that_is_closed_again():
    with ScriptedServer(script(goodbye), LISTING) as server:
        ask_while_connected(server, f"nbd://127.0.0.1:{server.listen_tcp()}/disk")


def test_connected_to_a_unix_socket_over_one_more(socket_path):
    with ScriptedServer(script(goodbye), LISTING) as server:
        server.listen_unix(socket_path)
        ask_while_connected(server, f"nbd+unix:///disk?socket={socket_path}")
    socket_path.unlink()


def test_by_a_function():
    with ScriptedServer(LISTING) as server:
        assert nbdcore.list_exports(f"nbd://127.0.0.1:{server.listen_tcp()}/no-such-export", timeout=PATIENCE) == EXPORTS


def test_an_empty_list_is_one():
    with ScriptedServer([greeting(), Negotiation(exports={}), drain]) as server:
        assert nbdcore.list_exports(f"nbd://127.0.0.1:{server.listen_tcp()}", timeout=PATIENCE) == []


def test_a_closed_client_can_still_ask():
    with ScriptedServer(script(goodbye), LISTING) as server:
        client = nbdcore.connect_tcp("127.0.0.1", server.listen_tcp(), timeout=PATIENCE)
        client.disconnect(timeout=PATIENCE)
        assert client.list_exports(timeout=PATIENCE) == EXPORTS


def test_a_server_that_does_not_list_says_why():
    refusal = option_reply(Option.LIST, OptionReply.ERR_POLICY, b"not for you")
    with ScriptedServer([ready_for_options, lambda c: (c.receive_option(), c.send(refusal)), drain]) as server:
        client = Client(server.stream(), timeout=PATIENCE, **OPTION_MODE)
        with pytest.raises(NegotiationError, match="not for you") as caught:
            client.list_exports(timeout=PATIENCE)
        assert caught.value.reply == OptionReply.ERR_POLICY
        assert client.phase is Phase.NEGOTIATING
        client.close()


def test_an_old_server_cannot_list():
    with ScriptedServer([greeting(0), drain]) as server:
        port = server.listen_tcp()
        with pytest.raises(NegotiationError, match="does not speak fixed newstyle"):
            nbdcore.list_exports(f"nbd://127.0.0.1:{port}", timeout=PATIENCE)


def test_a_client_of_an_own_stream_cannot_open_another_and_says_what_to_do():
    with ScriptedServer(script(expect_end)) as server:
        client = Client(server.stream(), timeout=PATIENCE)
        with pytest.raises(UsageError, match="list_exports: the client was connected over a stream"):
            client.list_exports(timeout=PATIENCE)
        client.close()


def test_a_newly_created_client_has_no_server_to_ask():
    client = Client()
    with pytest.raises(UsageError, match="list_exports: the connection is newly created") as caught:
        client.list_exports()
    assert caught.value.errno == 107
    client.close()

"""The table of legal calls, both ways: where a call is not legal it is an error, nothing changes, and nothing is sent."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nbdcore import Client, Disconnected, Phase, TransportError, UsageError
from nbdcore.protocol.constants import CommandType, Option
from nbdcore.protocol.state import LEGAL
from nbdcore.streams.memory import memory_pair
from nbdcore.streams.sockets import connected_pair
from nbdcore.testing.scripted import (
    Negotiation,
    Request,
    ScriptedServer,
    Step,
    answer,
    data,
    expect_end,
    first,
    goodbye,
    greeting,
    serve,
    wait_for,
)
from tests.clients.talking import CALLS, CONTEXTS, OPTION_CALLS, PATIENCE, SHORT, in_background, script


def connect_stream(client: Client) -> Any:
    """Offer a stream, which stays the caller's where the call is refused."""
    near, far = memory_pair()
    try:
        return client.connect_stream(near, timeout=0.01)
    finally:
        near.close()
        far.close()


def connect_socket(client: Client) -> Any:
    """Offer a socket, which stays the caller's where the call is refused."""
    near, far = connected_pair()
    try:
        return client.connect_socket(near, timeout=0.01)
    finally:
        near.close()
        far.close()


#: One way to make each call of the table; the addresses are those of nobody.
MAKE: dict[str, Callable[[Client], Any]] = {
    "connect": lambda c: c.connect("nbd+unix:///?socket=/nonexistent"),
    "connect_tcp": lambda c: c.connect_tcp("127.0.0.1", 1, timeout=PATIENCE),
    "connect_unix": lambda c: c.connect_unix("/nonexistent"),
    "connect_vsock": lambda c: c.connect_vsock(1, 1, timeout=SHORT),  # CID 1 is this machine itself
    "connect_transport": lambda c: c.connect_transport("unix", path="/nonexistent"),
    "connect_ssh": lambda c: c.connect_ssh("host.invalid", timeout=0),
    "connect_command": lambda c: c.connect_command(["/nonexistent"]),
    "connect_socket_activation": lambda c: c.connect_socket_activation(["/nonexistent"], timeout=PATIENCE),
    "connect_socket": connect_socket,
    "connect_stream": connect_stream,
    "opt_abort": lambda c: c.opt_abort(),
    "size": lambda c: c.size,
    "flags": lambda c: c.flags,
    "block_size": lambda c: c.block_size,
    "export_name": lambda c: c.export_name,
    "description": lambda c: c.description,
    "contexts": lambda c: c.contexts,
    "protocol": lambda c: c.protocol,
    "disconnect": lambda c: c.disconnect(timeout=PATIENCE),
    "close": lambda c: c.close(),
    **{name: call.make for name, call in CALLS.items()},
    **{name: make for name, (make, _) in OPTION_CALLS.items()},
}
CONNECTING = [name for name, legal in LEGAL.items() if legal == {Phase.CREATED}]


def answered(request: Request) -> bytes:
    """Answer a call of the table as it wants to be."""
    return next(call for call in CALLS.values() if call.kind == request.kind).chunks(request)


@contextlib.contextmanager
def client_in(phase: Phase, *steps: Step) -> Iterator[Client]:
    """Make a client in this phase; `steps` is what its server expects after that."""
    options = {"opt_mode": phase is Phase.NEGOTIATING, "start_tls": lambda stream: stream}
    negotiation = Negotiation(contexts=CONTEXTS)
    if phase is Phase.CREATED:
        client = Client(**options)
        yield client
        client.close()
        return
    silence = threading.Event()
    scripts: dict[Phase, list[Step]] = {
        Phase.CONNECTING: [wait_for(silence), greeting(), negotiation, *steps],
        Phase.NEGOTIATING: [greeting(), negotiation, *steps],
        Phase.CONNECTED: [greeting(), negotiation, *steps],
        Phase.CLOSED: [greeting(), negotiation, goodbye],
        Phase.DEAD: [greeting(), negotiation, answer(first(5, data(b"x")), kind=CommandType.READ)],
    }
    with ScriptedServer(scripts[phase], patience=PATIENCE) as server, contextlib.ExitStack() as stack:
        client = Client(**options)
        stack.callback(client.close)
        if phase is Phase.CONNECTING:
            stack.enter_context(in_background(lambda: client.connect_stream(server.stream(), timeout=PATIENCE)))
            stack.callback(silence.set)
            while client.phase is Phase.CREATED:
                threading.Event().wait(0.001)
        else:
            client.connect_stream(server.stream(), timeout=PATIENCE)
        if phase is Phase.CLOSED:
            client.disconnect(timeout=PATIENCE)
        elif phase is Phase.DEAD:
            with pytest.raises(OSError, match="middle of a reply"):
                client.pread(1, 0, timeout=PATIENCE)
        assert client.phase is phase
        yield client
        if phase is Phase.CONNECTING:
            silence.set()
            while client.phase is Phase.CONNECTING:
                threading.Event().wait(0.001)
            client.close()


def abort_and_end(connection: Any) -> None:
    """A client in opt mode says nothing but goodbye."""
    assert connection.options[-1] == (Option.ABORT, b"")
    connection.expect_end()


def test_the_table_of_calls_is_complete():
    assert MAKE.keys() == LEGAL.keys()


@pytest.mark.parametrize("phase", Phase)
def test_a_call_that_is_not_legal_is_an_error_and_sends_nothing(phase):
    after = {Phase.NEGOTIATING: abort_and_end}.get(phase, expect_end)
    with client_in(phase, after) as client:
        for name, legal in LEGAL.items():
            if phase in legal:
                continue
            lost = phase is Phase.DEAD and name not in CONNECTING
            kind = Disconnected if lost else UsageError
            with pytest.raises(kind, match=f"^{name}: the connection is {phase.value}, and must be ") as caught:
                MAKE[name](client)
            assert client.phase is phase, name
            if phase is Phase.DEAD:
                assert "(it ended with: the server closed the connection in the middle of a reply" in str(caught.value)


def test_connecting_is_legal_in_a_newly_created_client_only():
    assert [name for name in LEGAL if name.startswith("connect")] == CONNECTING


@pytest.mark.parametrize("name", CONNECTING)
def test_connecting_is_legal_once(name):
    client = Client()
    with pytest.raises((TransportError, OSError)) as caught:
        MAKE[name](client)
    assert not isinstance(caught.value, UsageError)
    assert client.phase in (Phase.DEAD, Phase.CREATED)  # the latter where no transport of that name is loaded
    if client.phase is Phase.DEAD:
        with pytest.raises(UsageError, match=f"^{name}: the connection is dead"):
            MAKE[name](client)
    client.close()


@pytest.mark.parametrize("name", [name for name, legal in LEGAL.items() if Phase.CONNECTED in legal])
def test_what_is_legal_when_connected_works(name):
    with client_in(Phase.CONNECTED, serve(answered)) as client:
        MAKE[name](client)


@pytest.mark.parametrize("name", [name for name, legal in LEGAL.items() if Phase.NEGOTIATING in legal])
def test_what_is_legal_while_negotiating_works(name):
    with client_in(Phase.NEGOTIATING) as client:
        if name in ("size", "flags", "block_size", "export_name", "description"):
            with pytest.raises(UsageError, match="opt_info or opt_go asks the server"):
                MAKE[name](client)
            client.opt_info()
        MAKE[name](client)


@pytest.mark.parametrize("name", [name for name, legal in LEGAL.items() if Phase.CLOSED in legal])
def test_what_is_legal_on_a_closed_connection_works(name):
    with client_in(Phase.CLOSED) as client:
        MAKE[name](client)
        assert client.phase is Phase.CLOSED


@pytest.mark.parametrize("phase", Phase)
def test_close_and_disconnect_are_legal_everywhere(phase):
    for name in ("disconnect", "close"):
        with client_in(phase, *([serve(answered)] if phase is Phase.CONNECTED else [])) as client:
            if phase is not Phase.CONNECTING:  # what closing does there is a test of its own
                MAKE[name](client)
                assert client.phase in (Phase.CLOSED, Phase.DEAD)


def test_while_one_thread_connects_another_cannot_and_the_server_hears_of_one_only(socket_path):
    """Both begin at once, so that the check and what follows from it must be one step."""
    for _ in range(20):
        with ScriptedServer(script(goodbye), patience=PATIENCE) as server:
            server.listen_unix(socket_path)
            client, start = Client(), threading.Barrier(3)

            def connect(client: Client = client, start: threading.Barrier = start) -> Client:
                start.wait(PATIENCE)
                return client.connect_unix(socket_path, timeout=PATIENCE)

            with in_background(connect) as one, in_background(connect) as two:
                start.wait(PATIENCE)
            outcomes = sorted([*one, *two], key=lambda outcome: isinstance(outcome, Exception))
            assert outcomes[0] is client
            assert isinstance(outcomes[1], UsageError)
            client.disconnect(timeout=PATIENCE)
        socket_path.unlink()


def test_two_threads_in_opt_mode_ask_one_after_the_other_or_are_told_so():
    with ScriptedServer([greeting(), Negotiation(exports={"a": "A"})]) as server:
        client = Client(server.stream(), opt_mode=True, timeout=PATIENCE)
        refused: list[UsageError] = []

        def ask() -> None:
            for _ in range(100):
                try:
                    assert [export.name for export in client.opt_list(timeout=PATIENCE)] == ["a"]
                except UsageError as exc:
                    refused.append(exc)

        with in_background(ask) as one, in_background(ask) as two:
            pass
        assert [*one, *two] == [None, None]
        assert all(str(exc).startswith("opt_list: the connection is connecting") for exc in refused)
        client.opt_abort()

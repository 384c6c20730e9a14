"""A server that plays a script: it says, byte for byte, what a test wants a client to hear, and hangs up where the test says.

    script = [greeting(), Negotiation(size=1 << 20), answer(data(bytes(512)), kind=CommandType.READ), goodbye]
    with ScriptedServer(script) as server, Client(server.stream()) as disk:
        disk.pread(512, 0)

A script is a list of steps, played in order in a thread of its own; there is one script for each connection. A step is bytes
(sent as they are) or something to call with the Connection: one of the functions here, or any function of the test's. When the
steps are over the server hangs up. Every wait has a deadline. Whatever goes wrong in a script is raised where the context of the
server ends, as ScriptFailed; if the test itself failed, it is a note on that failure.

It shares with nbdcore's client the layouts of the messages, and nothing else. It needs no test framework.
"""

from nbdcore.testing.scripted.connection import ClientGone, Connection, Reply, Request, ScriptFailed, Step
from nbdcore.testing.scripted.messages import (
    EVERYTHING,
    chunk,
    data,
    error,
    first,
    greeting,
    hole,
    info_replies,
    oldstyle_greeting,
    option_reply,
    simple,
    status,
)
from nbdcore.testing.scripted.negotiation import Negotiation
from nbdcore.testing.scripted.server import ScriptedServer
from nbdcore.testing.scripted.steps import (
    answer,
    drain,
    expect,
    expect_end,
    expect_option,
    goodbye,
    half_close,
    hang_up,
    receive,
    reset,
    serve,
    unless_gone,
    wait_for,
)

__all__ = [
    "EVERYTHING",
    "ClientGone",
    "Connection",
    "Negotiation",
    "Reply",
    "Request",
    "ScriptFailed",
    "ScriptedServer",
    "Step",
    "answer",
    "chunk",
    "data",
    "drain",
    "error",
    "expect",
    "expect_end",
    "expect_option",
    "first",
    "goodbye",
    "greeting",
    "half_close",
    "hang_up",
    "hole",
    "info_replies",
    "oldstyle_greeting",
    "option_reply",
    "receive",
    "reset",
    "serve",
    "simple",
    "status",
    "unless_gone",
    "wait_for",
]

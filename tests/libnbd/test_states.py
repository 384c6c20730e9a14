"""Every call in every state, against the manual's table, in both directions."""

from __future__ import annotations

import errno
import inspect
from collections.abc import Callable
from typing import Any

import pytest

import nbdcore.libnbd as nbd
from nbdcore.libnbd.calls import CALLS, ELSEWHERE
from nbdcore.protocol.state import Phase
from tests.libnbd.manual import CALLS as MANUAL

LETTERS = {
    "c": Phase.CREATED,
    "o": Phase.CONNECTING,
    "n": Phase.NEGOTIATING,
    "r": Phase.CONNECTED,
    "s": Phase.CLOSED,
    "d": Phase.DEAD,
}
PREDICATES = {
    "c": "aio_is_created",
    "o": "aio_is_connecting",
    "n": "aio_is_negotiating",
    "s": "aio_is_closed",
    "d": "aio_is_dead",
}
#: A value for each argument, by its name: one that is of the right type.
VALUES: dict[str, Any] = {
    "addr": "/nonexistent",
    "argv": ["false"],
    "buf": bytearray(512),
    "cid": 1,
    "contexts": ["base:allocation"],
    "cookie": 1,
    "count": 512,
    "dir": "/nonexistent",
    "export_name": "disk",
    "fd": -1,
    "filename": "/nonexistent",
    "flags": 0,
    "handle_name": "handle",
    "hostname": "127.0.0.1",
    "i": 0,
    "mask": 1,
    "metacontext": "base:allocation",
    "name": "base:allocation",
    "offset": 0,
    "option": 4,
    "port": "1",
    "priority": "NORMAL",
    "private_data": 1,
    "queries": ["base:"],
    "signum": 0,
    "size_type": 0,
    "sock": -1,
    "socket_name": "name",
    "timeout": 0,
    "tls": 0,
    "unixsocket": "/nonexistent",
    "uri": "nbd+unix:///?socket=/nonexistent",
    "username": "user",
    "v": 1,
}
CALLBACKS = ("chunk", "close", "completion", "context", "debug", "extent", "extent64", "list")


def name_of(signature: str) -> str:
    return signature.partition("(")[0]


def arguments(signature: str) -> dict[str, Any]:
    """Return a value for each argument that has no default."""
    inside = signature.partition("(")[2].removesuffix(")")
    names = [part for part in inside.split(", ") if part and "=" not in part]
    values: dict[str, Any] = {}
    for name in names:
        values[name] = (lambda *_: 0) if name in CALLBACKS else VALUES.get(name, True)
    if "connect_vsock" in signature:
        values["port"] = 1
    return values


def error_of(call: Callable[[], Any]) -> nbd.Error | None:
    try:
        call()
    except nbd.Error as exc:
        return exc
    return None


@pytest.mark.parametrize("signature", MANUAL)
def test_call_has_the_manuals_arguments_and_release(signature):
    name = name_of(signature)
    method = inspect.signature(getattr(nbd.NBD, name))
    shown = ", ".join(
        parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default}"
        for parameter in list(method.parameters.values())[1:]
    )
    assert f"{name}({shown})" == signature
    assert CALLS[name].first_version == MANUAL[signature][0]


def test_no_call_is_missing_and_none_is_invented():
    assert {name_of(signature) for signature in MANUAL} == set(CALLS)
    assert not set(ELSEWHERE) & set(CALLS)


@pytest.mark.parametrize("signature", MANUAL)
def test_call_is_permitted_exactly_where_the_manual_permits_it(signature, in_state):
    name = name_of(signature)
    for letter, phase in LETTERS.items():
        handle = in_state(letter)
        sent = handle.stats_bytes_sent()
        error = error_of(lambda handle=handle: getattr(handle, name)(**arguments(signature)))
        permitted = letter in MANUAL[signature][1]
        assert (error is not None and "invalid state" in error.string) is not permitted, letter
        if not permitted:
            assert error.errnum == (errno.ENOTCONN if letter == "c" else errno.EINVAL), letter
            assert error.string.startswith(f"nbd_{name}: invalid state: ")
            assert handle._phase is phase
            assert handle.stats_bytes_sent() == sent, letter


@pytest.mark.parametrize("letter", LETTERS)
def test_exactly_one_predicate_holds(letter, in_state):
    handle = in_state(letter)
    holding = [name for name in (*PREDICATES.values(), "aio_is_ready", "aio_is_processing") if getattr(handle, name)()]
    assert holding == [PREDICATES.get(letter, "aio_is_ready")]


@pytest.mark.parametrize("letter", "cns")
def test_nothing_to_wait_for_is_an_error(letter, in_state):
    handle = in_state(letter)
    assert handle.aio_get_direction() == 0
    with pytest.raises(nbd.Error, match="nothing to poll for in state") as caught:
        handle.poll(0)
    assert caught.value.errno == "EINVAL"
    with pytest.raises(nbd.Error, match="external event 0 is invalid in state"):
        handle.aio_notify_read()
    with pytest.raises(nbd.Error, match="external event 1 is invalid in state"):
        handle.aio_notify_write()


def test_tcp_server_that_does_not_answer_leaves_the_handle_newly_created(handles, server):
    handle = handles()
    with pytest.raises(nbd.Error) as caught:
        handle.connect_tcp("127.0.0.1", "1")
    assert caught.value.errno == "ECONNREFUSED"
    assert handle.aio_is_created()
    handle.connect_tcp("127.0.0.1", server)
    assert handle.get_size() == 1 << 20


def test_service_that_nobody_knows_has_no_errno_and_leaves_the_handle_newly_created(handles):
    handle = handles()
    with pytest.raises(nbd.Error) as caught:
        handle.connect_tcp("127.0.0.1", "no-such-service")
    assert (caught.value.errnum, caught.value.errno) == (0, None)
    assert handle.aio_is_created()


def test_asynchronous_tcp_connect_that_fails_leaves_the_handle_newly_created(handles):
    handle = handles()

    def connect() -> None:
        handle.aio_connect_tcp("127.0.0.1", "1")
        while handle.aio_is_connecting():
            handle.poll(10_000)

    assert error_of(connect).errno == "ECONNREFUSED"
    assert handle.aio_is_created()


def test_unix_socket_that_is_not_there_kills_the_handle(handles):
    handle = handles()
    with pytest.raises(nbd.Error) as caught:
        handle.connect_unix("/nonexistent")
    assert caught.value.errno == "ENOENT"
    assert handle.aio_is_dead()
    assert handle.connection_state().startswith("DEAD: ")


@pytest.mark.parametrize(
    ("connect", "number"),
    [
        (lambda h: h.connect_unix("/" + "x" * 200), "ENAMETOOLONG"),
        (lambda h: h.connect_command([]), "EINVAL"),
        (lambda h: h.connect_systemd_socket_activation([]), "EINVAL"),
        (lambda h: h.connect_uri("nbd://host/?tls-certificates=/etc"), "EPERM"),
    ],
)
def test_arguments_that_are_refused_leave_the_handle_newly_created(connect: Callable[[Any], None], number, handles):
    handle = handles()
    with pytest.raises(nbd.Error) as caught:
        connect(handle)
    assert caught.value.errno == number
    assert handle.aio_is_created()


def test_closed_handle_refuses_everything(handles):
    handle = handles()
    handle.close()
    for call in (handle.close, handle.get_debug, handle.aio_is_created, lambda: handle.pread(1, 0)):
        with pytest.raises(nbd.ClosedHandle, match="libnbd: method called on closed handle"):
            call()
    assert issubclass(nbd.ClosedHandle, ValueError)

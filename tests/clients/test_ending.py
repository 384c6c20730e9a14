"""How a connection ends, and what is left of it: goodbye, context manager, close, repr, and errors and values as pickles."""

from __future__ import annotations

import copy
import errno
import gc
import pickle
import threading
import traceback

import pytest

import nbdcore
from nbdcore import (
    BlockSize,
    Client,
    CombinedExtent,
    CommandError,
    DeadlineExceeded,
    Disconnected,
    Export,
    ExportInfo,
    Extent,
    NegotiationError,
    Phase,
    ProtocolViolation,
    TLSError,
    TransmissionFlag,
    TransportError,
    TransportUnavailable,
    UsageError,
)
from nbdcore.protocol.constants import CommandType
from nbdcore.streams.memory import memory_pair
from nbdcore.testing.scripted import (
    Negotiation,
    ScriptedServer,
    answer,
    data,
    drain,
    error,
    expect_end,
    goodbye,
    greeting,
    hang_up,
    serve,
    wait_for,
)
from tests.clients.talking import CONTEXTS, DISK, DONE, PATIENCE, SHORT, script, talk

# ---------------------------------------------------------------------------------------------- leaving


def test_leaving_the_context_says_goodbye_and_then_hangs_up():
    with ScriptedServer(script(answer(data(b"x")), goodbye)) as server:
        with Client(server.stream(), timeout=PATIENCE) as client:
            client.pread(1, 0, timeout=PATIENCE)
        assert client.phase is Phase.CLOSED


def test_an_exception_in_the_body_passes_and_the_connection_is_closed_without_a_goodbye():
    with ScriptedServer(script(expect_end)) as server:
        with pytest.raises(KeyError), Client(server.stream(), timeout=PATIENCE) as client:
            raise KeyError("the program's own")
        assert client.phase is Phase.CLOSED


def test_a_server_that_died_does_not_spoil_leaving():
    died = threading.Event()
    with ScriptedServer(script(wait_for(died), hang_up)) as server:
        client = Client(server.stream(), timeout=PATIENCE)
        died.set()
    with client:
        pass
    assert client.phase in (Phase.CLOSED, Phase.DEAD)


def test_a_server_that_never_hangs_up_delays_leaving_by_no_more_than_the_goodbye(monkeypatch):
    from nbdcore.clients.blocking import calls

    monkeypatch.setattr(calls, "_GOODBYE", SHORT)
    left = threading.Event()
    with ScriptedServer(script(goodbye, wait_for(left))) as server:
        with Client(server.stream(), timeout=PATIENCE) as client:
            pass
        assert client.phase is Phase.CLOSED
        left.set()


def test_leaving_twice_and_closing_twice_do_nothing_more():
    with talk(goodbye) as (client, _):
        client.disconnect(timeout=PATIENCE)
        for leave in (client.disconnect, client.close, client.close, lambda: client.__exit__(None, None, None)):
            leave()
            assert client.phase is Phase.CLOSED


def test_nothing_can_be_asked_after_the_goodbye():
    with talk(goodbye) as (client, _):
        client.disconnect(timeout=PATIENCE)
        with pytest.raises(UsageError, match=r"pread: the connection is closed.*this program took leave of the server"):
            client.pread(1, 0)


def test_what_was_written_before_the_goodbye_is_received():
    with talk(answer(DONE, kind=CommandType.WRITE, payload=b"x" * 100_000), goodbye) as (client, _):
        client.pwrite(b"x" * 100_000, 0, timeout=PATIENCE)
        client.disconnect(timeout=PATIENCE)


def test_a_newly_created_client_can_be_closed_and_then_not_connected():
    with Client() as client:
        pass
    assert client.phase is Phase.CLOSED
    with pytest.raises(UsageError, match="connect_unix: the connection is closed, and must be newly created"):
        client.connect_unix("/nonexistent")


def test_a_forgotten_client_closes_its_connection():
    with ScriptedServer(script(expect_end)) as server:
        client = Client(server.stream(), timeout=PATIENCE)
        del client
        gc.collect()


def test_a_client_that_was_never_finished_can_be_forgotten():
    client = Client.__new__(Client)
    client.__del__()
    with pytest.raises(UsageError):
        Client(export=5)


# ---------------------------------------------------------------------------------------------- what is left


def test_the_representation_tells_phase_and_address(socket_path):
    with ScriptedServer(script(goodbye)) as server:
        server.listen_unix(socket_path)
        client = Client()
        assert repr(client) == "<nbdcore.Client newly created>"
        client.connect_unix(socket_path, timeout=PATIENCE)
        assert repr(client) == f"<nbdcore.Client connected, unix socket {socket_path}, export '', {DISK} bytes>"
        client.disconnect(timeout=PATIENCE)
        assert repr(client) == f"<nbdcore.Client closed, unix socket {socket_path}>"
    socket_path.unlink()


def test_the_representation_of_an_own_stream_names_its_other_end():
    with talk(goodbye) as (client, _):
        assert repr(client) == f"<nbdcore.Client connected, a scripted server, export '', {DISK} bytes>"
        client.disconnect(timeout=PATIENCE)


def test_answers_about_the_export_stay_after_closing_but_not_after_death():
    with talk(goodbye, block_size=(1, 512, 1 << 16), name="n", description="d") as (client, _):
        client.disconnect(timeout=PATIENCE)
        assert (client.size, client.export_name, client.description, client.contexts) == (DISK, "n", "d", ("base:allocation",))
        assert client.block_size == BlockSize(1, 512, 1 << 16, advertised=True)
        assert client.protocol == "newstyle-fixed"
    with talk(answer(b"nonsense" * 4)) as (client, _):
        with pytest.raises(ProtocolViolation):
            client.flush(timeout=PATIENCE)
        with pytest.raises(Disconnected, match="size: the connection is dead"):
            _ = client.size


def test_a_size_that_no_file_can_have_is_an_error_of_its_own():
    with talk(goodbye, size=1 << 63) as (client, _):
        with pytest.raises(UsageError) as caught:
            _ = client.size
        assert caught.value.errno == errno.EOVERFLOW
        client.disconnect(timeout=PATIENCE)


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        (TransmissionFlag.READ_ONLY, "read_only"),
        (TransmissionFlag.ROTATIONAL, "rotational"),
        (TransmissionFlag.SEND_FLUSH, "can_flush"),
        (TransmissionFlag.SEND_FUA, "can_fua"),
        (TransmissionFlag.SEND_TRIM, "can_trim"),
        (TransmissionFlag.SEND_WRITE_ZEROES, "can_zero"),
        (TransmissionFlag.SEND_CACHE, "can_cache"),
        (TransmissionFlag.SEND_DF, "can_df"),
        (TransmissionFlag.CAN_MULTI_CONN, "can_multi_conn"),
    ],
)
def test_each_flag_is_a_question(flag, name):
    for flags in (1, int(flag | 1)):
        with talk(goodbye, flags=flags) as (client, _):
            assert getattr(client, name) is (flags != 1)
            assert client.flags == flags
            client.disconnect(timeout=PATIENCE)


ERRORS = [
    UsageError(22, "wrong"),
    CommandError(5, "read failed", server_text="disk on fire", offset=512),
    NegotiationError(2, "refused", server_text="no", reply=1 << 31 | 6),
    TransportError(111, "nobody listens"),
    TransportUnavailable("not here"),
    TLSError(0, "refused"),
    ProtocolViolation(71, "nonsense"),
    Disconnected(107, "gone"),
    DeadlineExceeded(errno.ETIMEDOUT, "too late"),
]


@pytest.mark.parametrize("exc", ERRORS, ids=lambda exc: type(exc).__name__)
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda exc: pickle.loads(pickle.dumps(exc))])
def test_errors_survive_copying_and_pickling(exc, duplicate):
    other = duplicate(exc)
    assert type(other) is type(exc)
    assert str(other) == str(exc)
    assert vars(other) == vars(exc)
    assert (other.errno, other.args) == (exc.errno, exc.args)


@pytest.mark.parametrize(
    "value",
    [
        Extent(0, 512, 3),
        CombinedExtent(0, 512, (0, 1)),
        Export("name", "description"),
        ExportInfo("name", 512, TransmissionFlag(3), BlockSize(1, 512, 4096, advertised=True), "n", None),
        BlockSize(),
        Phase.DEAD,
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_survive_pickling(value):
    assert pickle.loads(pickle.dumps(value)) == value
    assert hash(value) is not None


def test_an_error_of_the_server_keeps_what_it_said_and_where():
    with talk(answer(error(28, "no\nroom", offset=4)), serve(DONE)) as (client, _):
        with pytest.raises(CommandError) as caught:
            client.pwrite(b"12345678", 0, timeout=PATIENCE)
        exc = caught.value
        assert (exc.errno, exc.server_text, exc.offset) == (errno.ENOSPC, "no\nroom", 4)
        assert str(exc) == r"write of 8 bytes at offset 0 failed: No space left on device: no\x0aroom (ENOSPC)"
        assert client.phase is Phase.CONNECTED
        assert isinstance(exc, OSError)
        assert isinstance(exc, nbdcore.Error)


def test_the_same_end_raised_twice_does_not_pile_up_tracebacks():
    with talk(answer(b"nonsense" * 4)) as (client, _):
        lengths = set()
        for _ in range(3):
            with pytest.raises(nbdcore.Error) as caught:
                client.pread(1, 0, timeout=PATIENCE)
            lengths.add(len(traceback.extract_tb(caught.value.__traceback__)))
            assert len(traceback.format_exception(caught.value)) < 40
        assert len(lengths) <= 2
        assert client._engine.error.__traceback__ is None or len(traceback.extract_tb(client._engine.error.__traceback__)) < 10


def test_a_failed_handshake_leaves_a_client_that_says_why():
    with ScriptedServer([b"HTTP/1.1 400 Bad Request\r\n\r\n", drain]) as server:
        client = Client()
        with pytest.raises(ProtocolViolation, match="this is no NBD server"):
            client.connect_stream(server.stream(), timeout=PATIENCE)
        for call in (client.close, client.disconnect):
            call()
        with pytest.raises(Disconnected, match="it ended with: this is no NBD server"):
            client.flush()


def test_a_server_that_claims_no_flags_or_no_export_is_refused():
    for negotiation in (Negotiation(flags=0, contexts=CONTEXTS), lambda c: (c.receive(4), c.receive_option())):
        with ScriptedServer([greeting(), negotiation]) as server, pytest.raises((ProtocolViolation, Disconnected)):
            Client(server.stream(), timeout=PATIENCE)


def test_a_stream_whose_other_end_is_gone():
    near, far = memory_pair()
    far.close()
    with pytest.raises(Disconnected, match="before its greeting"):
        Client(near, timeout=PATIENCE)
    assert near.fileno() == -1

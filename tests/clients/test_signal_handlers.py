"""A signal handler interrupts a call: what it raises comes out as it is, and it may close the client, whose call then ends."""

from __future__ import annotations

import errno
import signal
import threading
import time

import pytest

import nbdcore
from nbdcore import libnbd
from nbdcore.protocol.transmission import commands
from nbdcore.server import MemoryDisk, Server, ServerTLS
from nbdcore.streams.base import from_signal_handler
from nbdcore.testing.scripted import answer, drain, unless_gone, wait_for
from tests.alarms import alarm_after, needs_alarms, watchdog
from tests.certificates import CertificateAuthority
from tests.clients.talking import PATIENCE, expected, good, in_background, late, talk

pytestmark = needs_alarms

RANGES = [(index * 4096 % (1 << 20), 4096) for index in range(20_000)]
ROUNDS = 40
lost_now_and_then = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def uri():
    with Server(MemoryDisk(1 << 20)) as server:
        yield server.listen("tcp", host="127.0.0.1", port=0).address.uri()


@pytest.fixture(autouse=True)
def _a_deadlock_ends_the_test_run():
    with watchdog():
        yield


def read_many(client):
    for _ in client.pread_many(RANGES, depth=64):
        pass


def read_one_by_one(client):
    for offset, count in RANGES:
        client.pread(count, offset)


@pytest.mark.parametrize("connect", [nbdcore.connect, nbdcore.create_pool])
@pytest.mark.parametrize("work", [read_many, read_one_by_one])
def test_close_in_a_handler_ends_the_interrupted_call(uri, work, connect):
    for number in range(ROUNDS):
        client = connect(uri, timeout=PATIENCE)
        with alarm_after(0.001 + number / 10_000, lambda *_, client=client: client.close()), pytest.raises(nbdcore.Error):
            work(client)
        assert client.phase in (nbdcore.Phase.CLOSED, nbdcore.Phase.DEAD)
        with pytest.raises(nbdcore.Error):
            client.pread(512, 0, timeout=PATIENCE)
        client.close()


def test_close_in_a_handler_ends_the_calls_of_other_threads_too(uri):
    for number in range(ROUNDS // 4):
        client = nbdcore.connect(uri, timeout=PATIENCE)
        ended = threading.Event()

        def work(client=client, ended=ended):
            try:
                read_many(client)
            finally:
                ended.set()

        with in_background(work) as outcome:
            with alarm_after(0.002 + number / 5000, lambda *_, client=client: client.close()), pytest.raises(nbdcore.Error):
                read_many(client)
            assert ended.wait(PATIENCE)
        assert isinstance(outcome[0], nbdcore.Error)


@pytest.mark.parametrize("connect", [nbdcore.connect, nbdcore.create_pool])
@pytest.mark.parametrize("work", [read_many, read_one_by_one])
def test_other_calls_in_a_handler_fail_or_are_done_and_the_interrupted_one_goes_on(uri, work, connect):
    outcomes = []

    def handler(*_):
        try:
            outcomes.append(client.pread(512, 0))  # without a deadline: it must not hang
        except nbdcore.UsageError as exc:
            outcomes.append(exc.errno)
        signal.setitimer(signal.ITIMER_REAL, 0.001)  # once more: a timer that repeats could interrupt this handler for ever

    with connect(uri, timeout=PATIENCE) as client, alarm_after(0.001, handler):
        work(client)
    assert errno.EDEADLK in outcomes
    assert set(outcomes) <= {errno.EDEADLK, bytes(512)}


def test_call_in_a_handler_that_interrupted_a_call_that_waits_is_refused_at_once():
    refused, go_on = [], threading.Event()

    def handler(*_):
        with pytest.raises(nbdcore.UsageError) as caught:
            client.flush()
        refused.append(caught.value.errno)
        go_on.set()

    with talk(late(go_on, good)) as (client, _), alarm_after(0.1, handler):
        assert client.pread(8, 5, timeout=PATIENCE) == expected(5, 8)
    assert refused == [errno.EDEADLK]


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.pread(512, 0),
        lambda client: client.flush(),
        lambda client: list(client.pread_many([(0, 512)])),
        lambda client: list(client.extents(count=512)),
    ],
)
def test_refused_call_in_a_handler_touches_nothing_of_the_interrupted_one(uri, call):
    """Whoever holds the lock may be in the middle of a step: what others left to be submitted stays where it is."""
    with nbdcore.connect(uri, timeout=PATIENCE) as client:
        shared = client._shared
        left = commands.flush(client._engine.limits)
        with shared._lock:  # the interrupted call, of this thread
            shared._mover.waiters.inbox.append(left)
            with pytest.raises(nbdcore.UsageError) as refused:
                call(client)
            assert [*shared._mover.waiters.inbox] == [left]
            shared._mover.waiters.inbox.clear()
        assert refused.value.errno == errno.EDEADLK
        assert client.pread(512, 0, timeout=PATIENCE) == bytes(512)


def test_loop_that_goes_on_in_a_handler_and_is_refused_ends_the_connection():
    """What it has under way cannot be given up just then, and must not be written to later."""
    with talk(answer(good), unless_gone(drain)) as (client, _):
        loop = client.pread_into_many([(offset, bytearray(8)) for offset in (0, 8, 16)], depth=2)
        assert next(loop) == 0
        with client._shared._lock, pytest.raises(nbdcore.UsageError):  # the interrupted call, of this thread
            next(loop)
        with pytest.raises(nbdcore.Disconnected):
            client.pread(8, 0, timeout=PATIENCE)


def test_call_in_a_handler_is_refused_though_the_interrupted_one_was_just_woken():
    """Another caller has received both answers and is gone. Nobody waits for the connection, and the woken one lies beneath."""
    refused, go_on = [], threading.Event()

    def both(connection):
        first, second = connection.receive_request(), connection.receive_request()
        wait_for(go_on)(connection)
        connection.send(good(first) + good(second))

    def handler(*_):
        go_on.set()
        while not other:
            time.sleep(0.001)
        with pytest.raises(nbdcore.UsageError) as caught:
            client.flush()
        refused.append(caught.value.errno)

    with talk(both) as (client, connection), in_background(lambda: client.pread(8, 3, timeout=PATIENCE)) as other:
        while not connection.requests:
            time.sleep(0.001)
        with alarm_after(0.1, handler):
            assert client.pread(8, 5, timeout=PATIENCE) == expected(5, 8)
    assert other == [expected(3, 8)]
    assert refused == [errno.EDEADLK]


class AlarmError(TimeoutError):
    """What many programs raise in a handler of SIGALRM: an OSError, like those of streams."""


def alarmed(*_):
    raise AlarmError("the program's own")


def by_blocking(connect):
    def work(uri, **options):
        with connect(uri, timeout=PATIENCE, **options) as client:
            read_many(client)

    return work


def by_drop_in(uri):
    handle = libnbd.NBD()
    handle.connect_uri(uri)
    for offset, count in RANGES:
        handle.pread(count, offset)


# Not asyncio's: a handler that raises breaks whatever callback of the loop it hits, which no client can mend.
WORKS = {
    "Client": by_blocking(nbdcore.connect),
    "Pool": by_blocking(nbdcore.create_pool),
    "nbdcore.libnbd": by_drop_in,
}


def alarmed_rounds(front_end, uri, **options):
    """Return in how many rounds the handler's exception came out; raises any other exception.

    Python keeps to itself what is raised while it destroys an object.
    """
    WORKS[front_end](uri, **options)  # imports what it needs: Python does not survive everywhere that an import is broken off
    count = 0
    for number in range(ROUNDS):
        try:
            with alarm_after(0.001 + number / 1000, alarmed):
                WORKS[front_end](uri, **options)
        except AlarmError:
            count += 1
    return count


@lost_now_and_then
@pytest.mark.parametrize("front_end", WORKS)
def test_what_a_handler_raises_comes_out_as_it_is(uri, front_end):
    """Wherever it hits: in a receive, in sending, in waiting, in decoding, in connecting."""
    assert alarmed_rounds(front_end, uri) > ROUNDS // 2


@lost_now_and_then
@pytest.mark.parametrize("front_end", ["Client", "Pool"])
def test_what_a_handler_raises_over_tls_comes_out_as_it_is(front_end, tmp_path):
    ca = CertificateAuthority()
    pki = ca.write(tmp_path / "pki", server=ca.issue("server", "127.0.0.1"))
    with Server(MemoryDisk(1 << 20), tls=ServerTLS(certificates=pki)) as server:
        uri = server.listen("tcp", host="127.0.0.1", port=0).address.uri()
        assert alarmed_rounds(front_end, uri, tls=nbdcore.TLS(ca=pki / "ca-cert.pem")) > ROUNDS // 2


def test_what_a_handler_raises_is_told_from_what_it_interrupted():
    def raise_here():
        raise TimeoutError("not a handler's")

    def by_lambda(*arguments):
        raise AlarmError(len(arguments))

    with pytest.raises(TimeoutError) as caught:
        raise_here()
    assert not from_signal_handler(caught.value)
    for handler in (alarmed, by_lambda):
        with pytest.raises(AlarmError) as caught, alarm_after(0.001, handler):
            time.sleep(PATIENCE)
        assert from_signal_handler(caught.value)

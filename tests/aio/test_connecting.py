"""Connecting never keeps the loop from running; it can be cancelled, closed and waited for; TLS is as elsewhere."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading

import pytest

import nbdcore
from nbdcore import TLS, DeadlineExceeded, Disconnected, NegotiationError, Phase, TLSError, TransportError, UsageError, aio
from nbdcore.aio import AsyncClient
from nbdcore.protocol.constants import Option
from nbdcore.server import MemoryDisk, Server, ServerTLS
from nbdcore.testing.scripted import ScriptedServer, drain, greeting, option_reply, receive
from tests.aio.talking import PATIENCE, SHORT, until
from tests.certificates import CertificateAuthority
from tests.clients.talking import script

SIZE = 1 << 20


@pytest.fixture
def slow_names(monkeypatch):
    """Looking a name up takes until the event is set: a name server that does not answer."""
    event, asked = threading.Event(), threading.Event()
    real = socket.getaddrinfo

    def look_up(host, *arguments, flags=0, **keywords):
        if host == b"localhost" and not flags & socket.AI_NUMERICHOST:
            asked.set()
            assert event.wait(PATIENCE)
        return real(host, *arguments, flags=flags, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    yield event, asked
    event.set()


def test_the_loop_goes_on_while_a_name_is_looked_up(run, slow_names):
    event, asked = slow_names

    async def main():
        with Server(MemoryDisk(SIZE)) as server:
            port = server.listen("tcp", host="127.0.0.1", port=0).address.port
            task = asyncio.create_task(AsyncClient().connect_tcp("localhost", port, timeout=PATIENCE))
            await until(asked.is_set, "the name is being looked up")
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert not task.done()
            event.set()
            await (await task).close()

    run(main())


def test_a_connect_that_waits_for_a_name_is_cancelled_at_once(run, slow_names):
    event, asked = slow_names

    async def main():
        client = AsyncClient()
        task = asyncio.create_task(client.connect_tcp("localhost", 1))
        await until(asked.is_set, "the name is being looked up")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client.phase is Phase.DEAD
        event.set()
        await until(lambda: all("connecting" not in thread.name for thread in threading.enumerate()), "its thread has ended")

    run(main())


def test_a_connect_that_waits_for_a_name_ends_with_its_deadline(run, slow_names):
    event, _ = slow_names

    async def main():
        with pytest.raises(DeadlineExceeded, match="took too long"):
            await aio.connect("nbd://localhost:1", timeout=SHORT)
        event.set()
        await until(lambda: all("connecting" not in thread.name for thread in threading.enumerate()), "its thread has ended")

    run(main())


def test_closing_a_client_that_connects_ends_the_connect(run, slow_names):
    event, asked = slow_names

    async def main():
        client = AsyncClient()
        task = asyncio.create_task(client.connect_tcp("localhost", 1, timeout=PATIENCE))
        await until(asked.is_set, "the name is being looked up")
        await client.close()
        with pytest.raises(Disconnected, match="closed by this program while connecting"):
            await task
        assert client.phase is Phase.CLOSED
        event.set()
        await until(lambda: all("connecting" not in thread.name for thread in threading.enumerate()), "its thread has ended")

    run(main())


@pytest.mark.parametrize("turns", range(12))
def test_closing_a_client_after_any_number_of_turns_leaves_nothing_open(run, turns):
    async def main():
        with Server(MemoryDisk(SIZE)) as server:
            port = server.listen("tcp", host="127.0.0.1", port=0).address.port
            client = AsyncClient()
            task = asyncio.create_task(client.connect_tcp("127.0.0.1", port, timeout=PATIENCE))
            for _ in range(turns):
                await asyncio.sleep(0)
            await client.close()
            await asyncio.wait([task])
            assert client.phase is Phase.CLOSED
            assert isinstance(task.exception(), Disconnected | UsageError | None)

    run(main())


def test_closing_a_client_during_the_handshake_ends_the_connect(run):
    async def main():
        with ScriptedServer([drain]) as server:
            client = AsyncClient()
            task = asyncio.create_task(client.connect_stream(server.stream()))
            await asyncio.sleep(SHORT)
            await client.close()
            with pytest.raises(Disconnected, match="closed by this program"):
                await task

    run(main())


def test_an_unknown_export_is_a_refusal(run, socket_path):
    async def main():
        with Server(MemoryDisk(SIZE)) as server:
            uri = server.listen("unix", path=str(socket_path)).address.uri("nobody's")
            with pytest.raises(NegotiationError):
                await aio.connect(uri, timeout=PATIENCE)

    run(main())


# ---------------------------------------------------------------------------------------------- waiting for a server


def test_a_server_that_comes_up_later_is_waited_for(run, socket_path):
    async def main():
        with Server(MemoryDisk(SIZE)) as server:
            task = asyncio.create_task(AsyncClient().connect_unix(socket_path, wait=PATIENCE))
            await asyncio.sleep(SHORT)
            assert not task.done()
            server.listen("unix", path=str(socket_path))
            client = await task
            assert client.size == SIZE
            await client.disconnect(timeout=PATIENCE)

    run(main())


def test_a_server_that_hangs_up_without_a_word_is_asked_again(run, socket_path):
    async def main():
        with ScriptedServer([], [], script(drain)) as server:
            server.listen_unix(socket_path)
            client = await aio.connect_unix(socket_path, wait=PATIENCE)
            assert len(server.connections) == 3
            await client.close()

    run(main())
    socket_path.unlink()


def test_the_wait_for_a_server_ends_when_its_time_is_up_and_says_why(run, socket_path):
    async def main():
        client = AsyncClient()
        with pytest.raises(DeadlineExceeded, match=r"no server at .* within 0\.05 s") as caught:
            await client.connect_unix(socket_path, wait=SHORT)
        assert isinstance(caught.value.__cause__, TransportError)
        assert client.phase is Phase.DEAD

    run(main())


@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_a_wait_for_a_server_can_be_given_up(run, socket_path, how):
    async def main():
        client = AsyncClient()
        task = asyncio.create_task(client.connect_unix(socket_path, wait=100 * PATIENCE))
        await asyncio.sleep(SHORT)
        if how == "closed":
            await client.close()
            with pytest.raises(Disconnected, match="closed by this program"):
                await task
        else:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert client.phase in (Phase.CLOSED, Phase.DEAD)

    run(main())


# ---------------------------------------------------------------------------------------------- programs and sockets


def test_a_program_that_talks_on_its_standard_input_and_output_is_a_server(run, tmp_path):
    program = tmp_path / "server.py"
    program.write_text("import sys; sys.exit('no disk today')", encoding="utf-8")

    async def main():
        with pytest.raises(nbdcore.Error, match="no disk today"):
            await aio.connect_command([sys.executable, str(program)], timeout=PATIENCE)

    run(main())


def test_a_socket_is_taken_over(run):
    async def main():
        with ScriptedServer(script(drain)) as server:
            async with aio.connect_socket(server.socket(), timeout=PATIENCE) as client:
                assert client.size == SIZE
                await client.close()

    run(main())


# ---------------------------------------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    ca = CertificateAuthority()
    folder = tmp_path_factory.mktemp("certificates")
    ca.write(folder, server=ca.issue("server", "localhost", "127.0.0.1"), client=ca.issue("client", "alice"))
    return folder


@pytest.fixture
def encrypted(certificates):
    """The port of a server that demands TLS."""
    with Server(MemoryDisk(64 << 20), tls=ServerTLS(certificates=certificates)) as server:
        yield server.listen("tcp", host="127.0.0.1", port=0).address.port


def test_tls_carries_large_and_small_requests_of_many_tasks(run, encrypted, certificates):
    async def main():
        uri = f"nbds://127.0.0.1:{encrypted}"
        async with aio.connect(uri, tls=TLS(certificates=certificates), timeout=PATIENCE) as disk:
            assert disk.tls
            data = bytes(range(256)) * (1 << 15)
            await disk.pwrite(data, 5, timeout=PATIENCE)
            small = await asyncio.gather(*(disk.pread(4096, 5 + 4096 * n) for n in range(64)))
            assert b"".join(small) == data[: 64 * 4096]
            assert await disk.pread(len(data), 5, timeout=PATIENCE) == data
            doomed = asyncio.create_task(disk.pread_into(bytearray(32 << 20), 0))
            await asyncio.sleep(0.005)
            doomed.cancel()
            assert await disk.pread(256, 5, timeout=PATIENCE) == data[:256]

    run(main())


def test_a_certificate_that_leads_nowhere_is_refused(run, encrypted):
    async def main():
        client = AsyncClient(tls=True)
        with pytest.raises(TLSError, match="certificate"):
            await client.connect_tcp("127.0.0.1", encrypted, timeout=PATIENCE)
        assert client.phase is Phase.DEAD

    run(main())


def test_a_server_that_demands_tls_says_so(run, encrypted):
    async def main():
        with pytest.raises(nbdcore.Error, match="TLS"):
            await aio.connect_tcp("127.0.0.1", encrypted, timeout=PATIENCE)

    run(main())


def test_tls_by_hand_in_opt_mode(run, encrypted, certificates):
    async def main():
        options = {"opt_mode": True, "tls": TLS(certificates=certificates), "tls_policy": nbdcore.TLSPolicy.DISABLE}
        async with aio.connect_tcp("127.0.0.1", encrypted, timeout=PATIENCE, **options) as client:
            assert await client.opt_starttls(timeout=PATIENCE) is True
            await client.opt_go(timeout=PATIENCE)
            assert len(await client.pread(512, 0)) == 512

    run(main())


def test_a_tls_handshake_that_is_never_answered_ends_with_the_deadline(run, certificates):
    async def main():
        steps = [greeting(), receive(4), lambda c: c.receive_option(), option_reply(Option.STARTTLS), drain]
        with ScriptedServer(steps) as server:
            port = server.listen_tcp()
            with pytest.raises(DeadlineExceeded):
                await aio.connect_tcp("127.0.0.1", port, tls=TLS(certificates=certificates), timeout=10 * SHORT)

    run(main())


def test_socket_stays_the_callers_when_the_client_is_closed_while_certificates_are_read(run):
    near, far = socket.socketpair()

    async def main():
        client = AsyncClient(tls=TLS(verify=False))
        connecting = asyncio.ensure_future(client.connect_socket(near.fileno()))
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(UsageError):
            await connecting

    with near, far:
        run(main())
        near.send(b"open")
        assert far.recv(4) == b"open"

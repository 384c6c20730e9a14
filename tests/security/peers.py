"""All public clients behind one face, so that one rule is held against each; and scripted servers that speak TLS.

`Own` is nbdcore.Client, `Asynchronous` is nbdcore.aio's, `DropIn` is nbdcore.libnbd's NBD, which is a polled one. Errors stay
each one's own; `number` reads any.
"""

from __future__ import annotations

import asyncio
import inspect
import socket
import ssl
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import nbdcore
import nbdcore.libnbd as nbd
from nbdcore.aio import AsyncClient
from nbdcore.protocol.constants import Option
from nbdcore.streams.sockets import SocketStream
from nbdcore.testing.scripted import Connection, Negotiation, Step, expect_option, greeting, option_reply
from tests.certificates import PSK_USER

#: Seconds that any one wait may take. No test takes so long unless it fails.
PATIENCE = 30.0
DISK = 1 << 20
CONTEXT = "base:allocation"
#: What either client raises.
ERRORS = (nbdcore.Error, nbd.Error)

#: A client that asks for TLS, up to the server's answer.
TLS_ASKED: tuple[Step, ...] = (greeting(), lambda connection: connection.receive(4), expect_option(Option.STARTTLS, b""))
TLS_GRANTED = option_reply(Option.STARTTLS)

_POLICIES = {"require": nbdcore.TLSPolicy.REQUIRE, "allow": nbdcore.TLSPolicy.ALLOW, "by hand": nbdcore.TLSPolicy.DISABLE}
_LEVELS = {"require": nbd.TLS_REQUIRE, "allow": nbd.TLS_ALLOW, "by hand": nbd.TLS_DISABLE}


class Own:
    """nbdcore's own client.

    Args:
        opt_mode: stop while negotiating, and have asked for nothing.
        tls: "require", "allow", or "by hand"; None asks for no TLS.
        certificates: folder with the CA to trust.
        hostname: of the server's certificate.
        verify: False: any certificate will do.
        psk_file: file of the pre-shared key of PSK_USER.
    """

    make: Callable[..., Any] = nbdcore.Client

    def __init__(
        self,
        *,
        opt_mode: bool = False,
        tls: str | None = None,
        certificates: Path | None = None,
        hostname: str | None = None,
        verify: bool = True,
        psk_file: Path | None = None,
    ) -> None:
        options: dict[str, Any] = {"opt_mode": opt_mode}
        if opt_mode:
            options |= {"structured_replies": False, "contexts": ()}
        if tls is not None:
            username = None if psk_file is None else PSK_USER
            how = nbdcore.TLS(certificates=certificates, hostname=hostname, verify=verify, psk_file=psk_file, username=username)
            options |= {"tls": how, "tls_policy": _POLICIES[tls]}
        self.client = self.make(**options)

    def connect(self, sock: socket.socket) -> None:
        self.client.connect_stream(SocketStream(sock), timeout=PATIENCE)

    def connect_tcp(self, port: int) -> None:
        self.client.connect_tcp("localhost", port, timeout=PATIENCE)

    def connect_unix(self, path: Path) -> None:
        self.client.connect_unix(path, timeout=PATIENCE)

    def read(self, count: int, offset: int = 0) -> bytes:
        return self.client.pread(count, offset, timeout=PATIENCE)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self.client.pread_into(buffer, offset, timeout=PATIENCE)

    def status(self, count: int, offset: int = 0) -> list[tuple[int, int]]:
        """Return (length, flags) of each extent."""
        return [(extent.length, extent.flags) for extent in self.client.block_status(count, offset, timeout=PATIENCE)[CONTEXT]]

    def exports(self) -> list[str]:
        return [export.name for export in self.client.opt_list(timeout=PATIENCE)]

    def select(self) -> None:
        self.client.opt_set_meta_context([CONTEXT], timeout=PATIENCE)

    def info(self) -> None:
        self.client.opt_info(timeout=PATIENCE)

    def start_tls(self) -> bool:
        return self.client.opt_starttls(timeout=PATIENCE)

    @property
    def size(self) -> int:
        return self.client.size

    @property
    def dead(self) -> bool:
        return self.client.phase is nbdcore.Phase.DEAD

    def close(self) -> None:
        self.client.close()


class _Waited:
    """An asyncio client whose calls are waited for: each runs the loop until it is done."""

    def __init__(self, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = AsyncClient(**options)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._client, name)
        if not inspect.iscoroutinefunction(value):
            return value
        return lambda *arguments, **named: self._loop.run_until_complete(value(*arguments, **named))

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


class Asynchronous(Own):
    """nbdcore's asyncio client."""

    make = _Waited


class DropIn:
    """nbdcore.libnbd; the arguments are Own's."""

    def __init__(
        self,
        *,
        opt_mode: bool = False,
        tls: str | None = None,
        certificates: Path | None = None,
        hostname: str | None = None,
        verify: bool = True,
        psk_file: Path | None = None,
    ) -> None:
        self.handle = nbd.NBD()
        if opt_mode:
            self.handle.set_opt_mode(True)
            self.handle.set_request_structured_replies(False)
        else:
            self.handle.add_meta_context(CONTEXT)
        if tls is not None:
            self.handle.set_tls(_LEVELS[tls])
            if certificates is not None:
                self.handle.set_tls_certificates(certificates)
            if hostname is not None:
                self.handle.set_tls_hostname(hostname)
            self.handle.set_tls_verify_peer(verify)
            if psk_file is not None:
                self.handle.set_tls_psk_file(psk_file)
                self.handle.set_tls_username(PSK_USER)

    def connect(self, sock: socket.socket) -> None:
        self.handle.connect_socket(sock.detach())

    def connect_tcp(self, port: int) -> None:
        self.handle.connect_tcp("localhost", str(port))

    def connect_unix(self, path: Path) -> None:
        self.handle.connect_unix(path)

    def read(self, count: int, offset: int = 0) -> bytes:
        return bytes(self.handle.pread(count, offset))

    def read_into(self, buffer: memoryview, offset: int) -> None:
        cookie = self.handle.aio_pread(buffer, offset)
        while not self.handle.aio_command_completed(cookie):
            self.handle.poll(-1)

    def status(self, count: int, offset: int = 0) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        self.handle.block_status_64(count, offset, lambda _context, _offset, entries, _error: found.extend(entries))
        return found

    def exports(self) -> list[str]:
        found: list[str] = []
        self.handle.opt_list(lambda name, _description: found.append(name))
        return found

    def select(self) -> None:
        self.handle.opt_set_meta_context_queries([CONTEXT], lambda _name: None)

    def info(self) -> None:
        self.handle.opt_info()

    def start_tls(self) -> bool:
        return self.handle.opt_starttls()

    @property
    def size(self) -> int:
        return self.handle.get_size()

    @property
    def dead(self) -> bool:
        return self.handle.aio_is_dead()

    def close(self) -> None:
        self.handle.close()


Api = type[Own] | type[DropIn]
each_api = pytest.mark.parametrize("api", [Own, Asynchronous, DropIn])


def refused(call: Callable[[], object]) -> Exception:
    """Return what either client raises."""
    with pytest.raises(ERRORS) as caught:
        call()
    assert not isinstance(caught.value, nbdcore.DeadlineExceeded), "it was refused, and not merely given up"
    return caught.value


def number(error: Exception) -> int:
    """Return an error's errno, 0 where it has none."""
    return error.errnum if isinstance(error, nbd.Error) else getattr(error, "errno", 0) or 0


def opened(*steps: Step, **offer: Any) -> list[Step]:
    """Return a script that opens an export with a context of number 1, then goes on."""
    return [greeting(), Negotiation(**{"size": DISK, "contexts": {1: CONTEXT}, **offer}), *steps]


def paused(*steps: Step) -> list[Step]:
    """Return a script for a client in opt mode, which asks for nothing by itself."""
    return [greeting(), lambda connection: connection.receive(4), *steps]


def encrypted(
    folder: Path,
    *steps: Step,
    ciphers: str | None = None,
    newest: ssl.TLSVersion | None = None,
    names: list[str | None] | None = None,
) -> Step:
    """Speak TLS as a server with this folder's certificate, by Python's own ssl, then play steps inside of it.

    `names` gets the name that the client says the server has.
    """

    def play(connection: Connection) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if newest is not None:
            context.maximum_version = newest
            context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        if ciphers is not None:
            context.set_ciphers(ciphers)
        context.load_cert_chain(folder / "server-cert.pem", folder / "server-key.pem")
        if names is not None:
            context.sni_callback = lambda _sock, name, _context: names.append(name)
        connection._sock.settimeout(PATIENCE)
        connection._sock = context.wrap_socket(connection._sock, server_side=True)
        for step in steps:
            connection.send(step) if isinstance(step, bytes) else step(connection)

    return play


def options_said(connections: Iterable[Connection]) -> list[int]:
    """Return the options that were asked of all connections, in order."""
    return [option for connection in connections for option, _ in connection.options]

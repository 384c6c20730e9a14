"""Servers and raw clients for the tests of the server; each test ends with every thread and descriptor of theirs gone."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdcore.server import Server, ServerTLS
from nbdcore.streams.sockets import SocketStream, connected_pair
from tests.certificates import CertificateAuthority
from tests.server.raw import RawClient


def server_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    # A client of an earlier test may still have its connecting thread, which a slow resolver keeps for longer than the test took.
    return [name for name in names if name.startswith("nbdcore-") and name != "nbdcore-connecting"]


def connect(server: Server) -> RawClient:
    """Return a raw client connected to a server through a pair of sockets."""
    near, far = connected_pair()
    server.serve_stream(SocketStream(far))
    return RawClient(near)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Start servers that stop with the test: `serve(backend, ...)`."""
    before = server_threads()
    with contextlib.ExitStack() as stack:
        yield lambda exports, **options: stack.enter_context(Server(exports, **options))
    assert server_threads() == before


@pytest.fixture
def client_of() -> Iterator[Callable[..., RawClient]]:
    """Connect raw clients that are closed with the test: `client_of(server)`."""
    with contextlib.ExitStack() as stack:
        yield lambda server: stack.enter_context(contextlib.closing(connect(server)))


@pytest.fixture
def ready(serve: Callable[..., Server], client_of: Callable[..., RawClient]) -> Callable[..., RawClient]:
    """Return a client of a server over `backend`, in transmission: `ready(backend, structured=..., extended=...)`."""

    def start(backend: object, *, structured: bool = True, extended: bool = False, **options: object) -> RawClient:
        client = client_of(serve(backend, **options))
        client.greet()
        client.agree(structured=structured, extended=extended)
        client.go()
        return client

    return start


@pytest.fixture(params=["simple", "structured", "extended"])
def ready_any(request: pytest.FixtureRequest, ready: Callable[..., RawClient]) -> Callable[..., RawClient]:
    """Like `ready`, once for each kind of reply."""
    structured, extended = request.param != "simple", request.param == "extended"
    return lambda backend, **options: ready(backend, structured=structured, extended=extended, **options)


# ---------------------------------------------------------------------------------------------- TLS


@pytest.fixture(scope="session")
def ca() -> CertificateAuthority:
    return CertificateAuthority()


@pytest.fixture(scope="session")
def pki(ca: CertificateAuthority, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a server's certificate for this machine, a client's, and the CA of both."""
    server, client = ca.issue("server", "localhost", "127.0.0.1"), ca.issue("client")
    return ca.write(tmp_path_factory.mktemp("pki"), server=server, client=client)


@pytest.fixture
def tls(pki: Path) -> ServerTLS:
    return ServerTLS(certificates=pki)


@pytest.fixture
def context(pki: Path) -> ssl.SSLContext:
    """What a client without a certificate does TLS with."""
    return ssl.create_default_context(cafile=pki / "ca-cert.pem")

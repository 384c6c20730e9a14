"""A throw-away virtual machine in which AF_VSOCK is real.

The guest has no disk image. Its root file system is this machine's own, read-only over virtiofs, so it has the same Python,
virtual environment, source tree and programs; only /tmp and /run are its own, empty ones. The kernel comes from .cache/vm,
where the script `fetch` put it. The vsock device is a program of the host (vhost-device-vsock), which makes the vsock a matter
of unix sockets: what the guest sends to CID 2 (the host), port P, reaches whoever listens on `Guest.host_socket(P)`, and
`Guest.connect(P)` reaches who listens in the guest. No vsock of this machine's own kernel is touched.

Everything is in one private folder, so that any number of guests can run at once, and all of it ends with the process that
started it, however that one ends.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.interop.programs import DIES_WITH_US
from tests.vm import machine, modules

# Emulated, on one core shared with all else, a boot takes 4 to 6 s; a loaded machine has been seen to need several times that.
_BOOT_DEADLINE = 45.0
# An emulated processor that shares its core has been seen to stop in the kernel's first moments, before a word on the console.
_BOOTS = 2


class GuestError(Exception):
    """The virtual machine itself failed: it did not boot, or it died."""


class GuestStuck(GuestError):
    """The virtual machine says nothing."""


class GuestFailure(AssertionError):
    """A function called in the guest raised; the message is its traceback there, and what it wrote."""


class Guest:
    """A running virtual machine, as a context manager.

    One call at a time runs in it. `folder` is private to this guest, and gone with it; it is a good place for a test's files.
    """

    def __init__(self) -> None:
        self._ending = contextlib.ExitStack()
        self.folder = Path()
        self._processes: list[subprocess.Popen[bytes]]
        self._control: socket.socket
        self._shown = {"output": 0, "errors": 0}

    def __enter__(self) -> Self:
        for boots_left in reversed(range(_BOOTS)):
            try:
                self._enter()
            except GuestStuck:
                if not boots_left:
                    raise
            else:
                break
        return self

    def _enter(self) -> None:
        with contextlib.ExitStack() as ending:
            self.folder = _private_folder(ending)
            self._ending = ending
            self._processes = []
            self._start()
            self._ending = ending.pop_all()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._ending.close()

    # Calling functions in the guest

    def call(self, function: Callable[..., Any], *, deadline: float = 120.0, **arguments: Any) -> Any:
        """Call a module's function in the guest and return its value; arguments and value are what JSON can carry.

        Raises GuestFailure with the traceback where the function raised, or took longer than `deadline` seconds.
        """
        with self._calling(function, deadline, arguments) as answer:
            pass
        return answer["value"]

    @contextlib.contextmanager
    def calling(self, function: Callable[..., Any], *, deadline: float = 120.0, **arguments: Any) -> Iterator[None]:
        """Call a function in the guest while the block runs here; leaving the block waits for the function's end.

        Where both fail, the guest's failure is a note to the block's exception.
        """
        with self._calling(function, deadline, arguments):
            yield

    @contextlib.contextmanager
    def _calling(self, function: Callable[..., Any], deadline: float, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        name = f"{function.__module__}:{function.__qualname__}"
        request = {"function": name, "arguments": arguments, "deadline": deadline}
        self._control.sendall(json.dumps(request).encode() + b"\n")
        answer: dict[str, Any] = {}
        try:
            yield answer
        except KeyboardInterrupt:  # nobody will call again
            raise
        except BaseException as error:
            error.add_note(self._finish(name, deadline, answer))
            raise
        if failure := self._finish(name, deadline, answer):
            raise GuestFailure(failure)

    def _finish(self, name: str, deadline: float, answer: dict[str, Any]) -> str:
        """Wait for the answer to a call, and return in what way it failed, or an empty text."""
        # What the guest allows itself, and 15 s: past that it is not the call that hangs, but the machine.
        answer |= self._receive(deadline + 15)
        written = self._written()
        return f"{name}, in the guest: {answer['failure']}{written}" if "failure" in answer else ""

    def load_modules(self, *names: str) -> None:
        """Load these kernel modules, and what they depend on, into the guest's kernel."""
        self.call(modules.load, paths=[str(path) for path in modules.load_order(machine.MODULES, names)])

    def _receive(self, timeout: float) -> dict[str, Any]:
        line = b""
        until = time.monotonic() + timeout
        while not line.endswith(b"\n"):
            self._control.settimeout(max(0.01, until - time.monotonic()))
            try:
                part = self._control.recv(65536)
            except TimeoutError as error:
                raise GuestStuck(f"the guest said nothing for {timeout:.0f} s{self._diagnosis()}") from error
            if not part:
                raise GuestError(f"the guest is gone{self._diagnosis()}")
            line += part
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _written(self) -> str:
        """Return what was written to the guest's standard output and error since the last time."""
        text = ""
        for name, seen in self._shown.items():
            content = (self.folder / name).read_bytes()
            self._shown[name] = len(content)
            if len(content) > seen:
                text += f"\nits {name}:\n{content[seen:].decode(errors='replace')}"
        return text

    def _diagnosis(self) -> str:
        names = ("console", "virtiofsd", "device", "qemu")
        files = [self.folder / name for name in names]
        tails = [f"\n{path.name}:\n{path.read_bytes()[-6000:].decode(errors='replace')}" for path in files if path.exists()]
        return "".join(tails) + self._written()

    # The vsock, seen from the host

    def host_socket(self, port: int) -> Path:
        """Return the path of the unix socket on which a server of the host is CID 2, port `port` to the guest."""
        return self.folder / f"vsock_{port}"

    @contextlib.contextmanager
    def offer(self, path: Path, *, port: int) -> Iterator[None]:
        """Make a server that listens on a unix socket of its own choice, `path`, CID 2, port `port` to the guest."""
        self.host_socket(port).symlink_to(path)
        try:
            yield
        finally:
            self.host_socket(port).unlink()

    def connect(self, port: int, *, deadline: float = 20.0) -> socket.socket:
        """Connect to vsock port `port` of the guest, trying again until somebody listens there.

        Raises GuestError where nobody did within `deadline` seconds.
        """
        until = time.monotonic() + deadline
        while time.monotonic() < until:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.settimeout(deadline)
                connection.connect(str(self.folder / "vsock"))
                connection.sendall(b"CONNECT %d\n" % port)
                answer = _line(connection)
            except ConnectionError:  # the guest's driver is not up yet
                answer = b""
            if answer.startswith(b"OK "):
                return connection
            connection.close()
            time.sleep(0.05)
        raise GuestError(f"nobody in the guest listens on vsock port {port}")

    # Starting

    def _start(self) -> None:
        if missing := machine.missing():
            raise GuestError(f"this machine has no {', '.join(missing)}: tests/setup/servers and tests/vm/fetch bring them")
        (self.folder / "initramfs").write_bytes(machine.initramfs())
        for name in self._shown:
            (self.folder / name).touch()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.folder / "files"))
            listener.listen(1)
            self._spawn("virtiofsd", *machine.virtiofsd(listener.fileno()), descriptors=(listener.fileno(),))
        self._spawn("device", *machine.vsock_device(self.folder / "device-control", self.folder / "vsock"))
        self._await_socket("device-control")
        self._control, theirs = socket.socketpair()
        self._ending.callback(self._control.close)
        with theirs:
            self._spawn("qemu", *machine.qemu(self.folder, theirs.fileno()), descriptors=(theirs.fileno(),))
        self._receive(_BOOT_DEADLINE)

    def _spawn(self, name: str, *command: str | Path, descriptors: tuple[int, ...] = ()) -> None:
        """Start a helper that is killed when this ends, and also when this process is killed."""
        with (self.folder / name).open("wb") as log:
            process = subprocess.Popen(
                [*DIES_WITH_US, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=descriptors,
            )
        self._processes.append(process)
        self._ending.callback(_end, process)

    def _await_socket(self, name: str) -> None:
        until = time.monotonic() + 20
        while not (self.folder / name).exists():
            if time.monotonic() > until or any(process.poll() is not None for process in self._processes):
                raise GuestError(f"a helper of the virtual machine did not start{self._diagnosis()}")
            time.sleep(0.01)


def _private_folder(ending: contextlib.ExitStack) -> Path:
    """Make a folder that is removed with everything in it when this ends, and also when this process is killed."""
    folder = Path(tempfile.mkdtemp(prefix="nbdcore-vm-"))
    # It waits for the end of its standard input, which only this process holds open, and which the system closes in any case.
    remover = subprocess.Popen(
        ["sh", "-c", 'cat; rm -rf -- "$0"', folder],
        stdin=subprocess.PIPE,
        start_new_session=True,  # an interrupt from the keyboard is not for it
    )
    ending.callback(remover.communicate)
    return folder


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _line(connection: socket.socket) -> bytes:
    """Read one line, and not one byte more: what follows it belongs to the stream."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            return b""
        line += byte
    return line

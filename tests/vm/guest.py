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
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.vm import agent, cpio, modules

REPOSITORY = Path(__file__).resolve().parents[2]
_CACHE = REPOSITORY / ".cache" / "vm"
_DEVICE = _CACHE / "device"
_MODULES = _CACHE / "kernel" / "modules"
_BUSYBOX = Path("/bin/busybox")
# Debian 12 has it in qemu-system-common; later releases in a package virtiofsd.
_VIRTIOFSD = (Path("/usr/lib/qemu/virtiofsd"), Path("/usr/libexec/virtiofsd"))
# What the init needs to reach the root file system, and the agent the host.
_BOOT_MODULES = ("virtio_pci", "virtiofs", "virtio_console")
_MEMORY = "768M"
# Emulated, on one core shared with all else, a boot takes 4 to 6 s; a loaded machine has been seen to need several times that.
_BOOT_DEADLINE = 60.0

_INIT = """\
#!/bin/busybox sh
# If anything fails, this ends, the kernel panics for want of a first process, and with it the machine stops.
set -e
export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs devices /dev
for module in /modules/*; do insmod $module; done
mkdir -p /repository /root
mount -t virtiofs -o ro root /root
# What must be writable hides nothing of the repository, which may well be in /tmp itself.
mount --bind /root{repository} /repository
mount -t tmpfs -o mode=1777 tmp /root/tmp
mount -t tmpfs -o mode=755 run /root/run
mkdir -p /root{repository}
mount --bind /repository /root{repository}
mount --move /dev /root/dev
mount -t proc proc /root/proc
mount -t sysfs sysfs /root/sys
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LC_ALL=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
exec switch_root /root {command}
"""


class GuestError(Exception):
    """The virtual machine itself failed: it did not boot, or it died."""


class GuestFailure(AssertionError):
    """A function called in the guest raised; the message is its traceback there, and what it wrote."""


class Guest:
    """A running virtual machine, as a context manager.

    One call at a time runs in it. `folder` is private to this guest, and gone with it; it is a good place for a test's files.
    """

    def __init__(self) -> None:
        self._ending = contextlib.ExitStack()
        self.folder = Path()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._control: socket.socket
        self._shown = {"output": 0, "errors": 0}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as ending:
            self.folder = _private_folder(ending)
            self._ending = ending
            self._start()
            self._ending = ending.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._ending.close()

    # Calling functions in the guest

    def call(self, function: Callable[..., Any], *, deadline: float = 20.0, **arguments: Any) -> Any:
        """Call a module's function in the guest and return its value; arguments and value are what JSON can carry.

        Raises GuestFailure with the traceback where the function raised, or took longer than `deadline` seconds.
        """
        with self._calling(function, deadline, arguments) as answer:
            pass
        return answer["value"]

    @contextlib.contextmanager
    def calling(self, function: Callable[..., Any], *, deadline: float = 20.0, **arguments: Any) -> Iterator[None]:
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
        self.call(modules.load, paths=[str(path) for path in modules.load_order(_MODULES, names)])

    def _receive(self, timeout: float) -> dict[str, Any]:
        line = b""
        until = time.monotonic() + timeout
        while not line.endswith(b"\n"):
            self._control.settimeout(max(0.01, until - time.monotonic()))
            try:
                part = self._control.recv(65536)
            except TimeoutError as error:
                raise GuestError(f"the guest said nothing for {timeout:.0f} s{self._diagnosis()}") from error
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
        missing = [str(path) for path in (_CACHE / "kernel", _DEVICE, _BUSYBOX) if not path.exists()]
        if missing:
            raise GuestError(f"no {', '.join(missing)}: run tests/vm/fetch (and apt-get install busybox-static qemu-system-x86)")
        (self.folder / "initramfs").write_bytes(_initramfs())
        for name in self._shown:
            (self.folder / name).touch()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.folder / "files"))
            listener.listen(1)
            self._spawn("virtiofsd", *_virtiofsd(listener.fileno()), descriptors=(listener.fileno(),))
        self._spawn("device", *_vsock_device(self.folder / "device-control", self.folder / "vsock"))
        self._await_socket("device-control")
        self._control, theirs = socket.socketpair()
        self._ending.callback(self._control.close)
        with theirs:
            self._spawn("qemu", *_qemu(self.folder, theirs.fileno()), descriptors=(theirs.fileno(),))
        self._receive(_BOOT_DEADLINE)

    def _spawn(self, name: str, *command: str | Path, descriptors: tuple[int, ...] = ()) -> None:
        """Start a helper that is killed when this ends, and also when this process is killed."""
        with (self.folder / name).open("wb") as log:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
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


def _initramfs() -> bytes:
    repository = shlex.quote(str(REPOSITORY))
    init = _INIT.format(repository=repository, command=shlex.join([sys.executable, "-B", agent.__file__, str(REPOSITORY)]))
    entries = [cpio.Entry.folder(name) for name in ("bin", "dev", "modules", "proc", "sys")]
    entries.append(cpio.Entry.file("init", init.encode(), executable=True))
    entries.append(cpio.Entry.file("bin/busybox", _BUSYBOX.read_bytes(), executable=True))
    for number, module in enumerate(modules.load_order(_MODULES, _BOOT_MODULES)):
        entries.append(cpio.Entry.file(f"modules/{number:02}-{module.name}", module.read_bytes()))
    return cpio.archive(entries)


def _virtiofsd(listener: int) -> list[str | Path]:
    program = next((program for program in _VIRTIOFSD if program.exists()), _VIRTIOFSD[0])
    # Only root may chroot, or who is root in a user namespace of his own; then the guest sees what that user sees.
    as_root = [] if os.geteuid() == 0 else ["unshare", "--map-root-user"]
    # A listening socket of ours, not a path: for a path it leaves a file in /run. A chroot works inside containers too, where
    # mounting may be forbidden. Nothing writes: the guest mounts it read-only.
    return [*as_root, program, "-f", f"--fd={listener}", "-o", "source=/", "-o", "sandbox=chroot", "-o", "cache=always"]


def _vsock_device(control: Path, path: Path) -> list[str | Path]:
    # Started by the loader of the C library that it was built for, which is newer than this machine's.
    loader = [_DEVICE / "ld-linux-x86-64.so.2", "--library-path", _DEVICE]
    return [*loader, _DEVICE / "vhost-device-vsock", "--guest-cid=3", f"--socket={control}", f"--uds-path={path}"]


def _qemu(folder: Path, control: int) -> list[str | Path]:
    command: list[str | Path] = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    command += ["-machine", "q35,memory-backend=memory", "-accel", _accelerator(), "-cpu", "max", "-smp", "2", "-m", _MEMORY]
    # Shared memory: the vhost-user helpers work in it.
    command += ["-object", f"memory-backend-memfd,id=memory,size={_MEMORY},share=on"]
    command += ["-kernel", _CACHE / "kernel" / "vmlinuz", "-initrd", folder / "initramfs"]
    command += ["-append", "console=ttyS0 quiet panic=-1"]
    command += ["-chardev", f"file,id=console,path={folder / 'console'}", "-serial", "chardev:console"]
    command += ["-chardev", f"socket,id=files,path={folder / 'files'}", "-device", "vhost-user-fs-pci,chardev=files,tag=root"]
    command += ["-chardev", f"socket,id=vsock,path={folder / 'device-control'}", "-device", "vhost-user-vsock-pci,chardev=vsock"]
    command += ["-device", "virtio-serial-pci"]
    ports = {agent.OUTPUT_PORT: f"file,path={folder / 'output'}", agent.ERROR_PORT: f"file,path={folder / 'errors'}"}
    ports[agent.CONTROL_PORT] = f"socket,fd={control}"
    for name, backend in ports.items():
        command += ["-chardev", f"{backend},id={name}", "-device", f"virtserialport,chardev={name},name={name}"]
    return command


def _accelerator() -> str:
    """Return "kvm" where the processor really has it: /dev/kvm alone may be a far slower emulation than QEMU's own."""
    flags = Path("/proc/cpuinfo").read_text()
    virtualization = any(flag in flags.split() for flag in ("svm", "vmx"))
    try:
        usable = virtualization and Path("/dev/kvm").open("r+b").close() is None
    except OSError:
        usable = False
    return "kvm" if usable else "tcg,thread=multi"


def _line(connection: socket.socket) -> bytes:
    """Read one line, and not one byte more: what follows it belongs to the stream."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            return b""
        line += byte
    return line

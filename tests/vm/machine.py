"""What a guest is made of: the files that it boots from, and the command lines of the three programs that it consists of.

QEMU runs the machine. virtiofsd gives it this machine's files, vhost-device-vsock its vsock; both work in the guest's memory, and
meet QEMU at unix sockets in the guest's private folder. This module starts nothing: `guest` does.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from tests.vm import agent, cpio, modules

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / ".cache" / "vm"
MODULES = CACHE / "kernel" / "modules"
_KERNEL = CACHE / "kernel" / "vmlinuz"
_DEVICE = CACHE / "device"
_BUSYBOX = Path("/bin/busybox")
# In Debian 12 a part of QEMU, later a package of its own.
_VIRTIOFSD_PLACES = (Path("/usr/libexec/virtiofsd"), Path("/usr/lib/qemu/virtiofsd"))
_VIRTIOFSD = next(filter(Path.exists, _VIRTIOFSD_PLACES), _VIRTIOFSD_PLACES[0])
# What the init needs to reach the root file system, and the agent the host.
_BOOT_MODULES = ("virtio_pci", "virtiofs", "virtio_console")
_MEMORY = "768M"

_INIT = """\
#!/bin/busybox sh
# If anything fails, this ends, the kernel panics for want of a first process, and with it the machine stops.
set -e
export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs devices /dev
for module in /modules/*; do [ ! -e $module ] || insmod $module; done  # none where the kernel has all of them built in
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


def missing() -> list[str]:
    """Return what this machine lacks of what a guest is made of."""
    return [str(path) for path in (_KERNEL, _DEVICE, _BUSYBOX, _VIRTIOFSD) if not path.exists()]


def initramfs() -> bytes:
    """Return the archive that the kernel starts from: an init, its shell, and the modules on the way to the real root."""
    repository = shlex.quote(str(REPOSITORY))
    init = _INIT.format(repository=repository, command=shlex.join([sys.executable, "-B", agent.__file__, str(REPOSITORY)]))
    entries = [cpio.Entry.folder(name) for name in ("bin", "dev", "modules", "proc", "sys")]
    entries.append(cpio.Entry.file("init", init.encode(), executable=True))
    entries.append(cpio.Entry.file("bin/busybox", _BUSYBOX.read_bytes(), executable=True))
    for number, module in enumerate(modules.load_order(MODULES, _BOOT_MODULES)):
        entries.append(cpio.Entry.file(f"modules/{number:02}-{module.name}", module.read_bytes()))
    return cpio.archive(entries)


def virtiofsd(listener: int) -> list[str | Path]:
    """Return the command that serves this machine's files to who connects to a listening socket, inherited as `listener`."""
    # Only root may chroot, or who is root in a user namespace of his own; then the guest sees what that user sees.
    as_root = [] if os.geteuid() == 0 else ["unshare", "--map-root-user"]
    # A listening socket of ours, not a path: for a path it leaves a file in /run. A chroot works inside containers too, where
    # mounting may be forbidden. Nothing writes: the guest mounts it read-only.
    return [*as_root, _VIRTIOFSD, "-f", f"--fd={listener}", "-o", "source=/", "-o", "sandbox=chroot", "-o", "cache=always"]


def vsock_device(control: Path, path: Path) -> list[str | Path]:
    """Return the command for the vsock: QEMU connects to `control`, hosts to `path`, and guests to `path` with _PORT added."""
    # Started by the loader of the C library that it was built for, which is newer than this machine's.
    loader = [_DEVICE / "ld-linux-x86-64.so.2", "--library-path", _DEVICE]
    return [*loader, _DEVICE / "vhost-device-vsock", "--guest-cid=3", f"--socket={control}", f"--uds-path={path}"]


def qemu(folder: Path, control: int) -> list[str | Path]:
    """Return the command for the machine; `folder` is the guest's, `control` the agent's connected socket, inherited."""
    command: list[str | Path] = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    command += ["-machine", "q35,memory-backend=memory", "-accel", _accelerator(), "-cpu", "max", "-smp", "1", "-m", _MEMORY]
    # Shared memory: the vhost-user helpers work in it.
    command += ["-object", f"memory-backend-memfd,id=memory,size={_MEMORY},share=on"]
    command += ["-kernel", _KERNEL, "-initrd", folder / "initramfs"]
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

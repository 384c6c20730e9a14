"""The same little programs on libnbd's own Python module and on this one, against the same server: what they print must agree.

Debian's python3-libnbd (1.14, with nbdsh) is the other side, under the system's Python. Compared are results, errno numbers,
the shape of exceptions' texts (the call they name, the system's words at their end), the order and arguments of callbacks, and
the bytes that went over the wire.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.servers import nbdkit, qemu_nbd

pytestmark = pytest.mark.interop("nbdkit", "qemu-nbd", "nbdsh")

PRELUDE = """
import errno, json, os, sys
import nbd

events = []
def note(*event):
    events.append([len(part) if isinstance(part, (bytearray, memoryview)) and len(part) > 64 else
                   list(bytes(part)) if isinstance(part, (bytearray, bytes, memoryview)) else part for part in event])

def attempt(name, call, *arguments):
    try:
        note(name, "is", call(*arguments))
    except nbd.Error as exc:
        words = os.strerror(exc.errnum) if exc.errnum else ""
        note(name, "fails", exc.string.partition(":")[0], exc.errnum, exc.errno, exc.string.endswith(words))
    except Exception as exc:
        note(name, "raises", type(exc).__name__)

def new(*contexts):
    h = nbd.NBD()
    getattr(h, "set_request_extended_headers", bool)(False)  # which the other side may not know
    for context in contexts:
        h.add_meta_context(context)
    return h

def connected(*contexts):
    h = new(*contexts)
    h.connect_uri(sys.argv[1])
    return h

def finish(h):
    while h.aio_in_flight():
        h.poll(-1)
"""
EPILOGUE = "\nprint(json.dumps(events))\n"

#: Name -> what a program does with a server of a writable disk of 1 MiB.
DISK_PROGRAMS = {
    "queries": """
h = connected("base:allocation")
for name in ("get_size", "is_read_only", "can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_df", "can_cache",
             "can_multi_conn", "is_rotational", "get_protocol", "get_structured_replies_negotiated", "get_tls_negotiated",
             "get_canonical_export_name", "get_export_name", "get_nr_meta_contexts", "get_handshake_flags",
             "aio_is_ready", "aio_is_connecting", "aio_get_direction", "aio_in_flight", "aio_peek_command_completed",
             "get_opt_mode", "get_full_info", "get_tls_verify_peer", "get_request_block_size", "get_pread_initialize"):
    attempt(name, getattr(h, name))
for kind in (0, 1, 2, 9):
    attempt("get_block_size", h.get_block_size, kind)
attempt("can_meta_context", h.can_meta_context, "base:allocation")
attempt("can_meta_context", h.can_meta_context, "no:such")
attempt("uri", lambda: h.get_uri() == sys.argv[1])
""",
    "reads and writes": """
h = connected()
attempt("pwrite", h.pwrite, b"abcdefgh", 512)
attempt("pread", h.pread, 16, 508)
attempt("zero", h.zero, 4, 512)
attempt("pread", h.pread, 16, 508)
attempt("flush", h.flush)
attempt("trim", h.trim, 512, 512)
attempt("cache", h.cache, 512, 0)
attempt("fua", h.pwrite, bytearray(3), 0, nbd.CMD_FLAG_FUA)
attempt("no_hole", h.zero, 512, 0, nbd.CMD_FLAG_NO_HOLE)
""",
    "refusals": """
h = connected("base:allocation")
report = lambda *a: 0
for call, *arguments in (
    (h.pread, 512, 1 << 20), (h.pread, 0, 0), (h.pread, 512, 0, 1), (h.pread, 512, 0, 1 << 20), (h.pread, 65 << 20, 0),
    (h.pwrite, b"x", 1 << 20), (h.pwrite, b"", 0), (h.pwrite, b"x", 0, 4), (h.trim, 0, 0), (h.trim, 1, 1 << 20),
    (h.zero, 1, 1 << 20), (h.zero, 512, 0, 8), (h.cache, 1, 1 << 21), (h.flush, 1), (h.shutdown, 1),
    (h.block_status, 0, 0, report), (h.block_status, 1, 1 << 20, report), (h.block_status, 512, 0, report, 1),
    (h.set_export_name, "x"), (h.opt_go,), (h.connect_unix, "/x"), (h.set_opt_mode, True), (h.aio_notify_write,),
    (h.aio_command_completed, 0), (h.aio_command_completed, 7), (h.pread_structured, 512, 0, report, 1),
    (h.pwrite, "text", 0), (h.aio_pread, b"xx", 0), (h.aio_pread, 3, 0), (h.block_status, 512, 0, None), (h.aio_flush, 3),
):
    attempt(call.__name__, call, *arguments)
h.set_strict_mode(0)
attempt("lax", h.pread, 512, 1 << 20)
attempt("lax", h.pread, 512, 0, 1 << 16)
attempt("lax", h.pwrite, b"x", 1 << 20)
attempt("still there", h.pread, 1, 0)
""",
    "settings": """
h = new()
for name, *arguments in (
    ("set_tls", 9), ("set_strict_mode", 1 << 20), ("set_handshake_flags", 77), ("set_export_name", "x" * 5000),
    ("add_meta_context", "x" * 5000), ("get_meta_context", 3), ("kill_subprocess", 0), ("connect_command", []),
    ("set_uri_allow_transports", 1 << 10), ("set_uri_allow_tls", 5), ("set_private_data", -1), ("get_private_data",),
    ("connect_uri", "foo"), ("connect_uri", "nbd+foo://"), ("connect_uri", "nbd://h?socket=/x"), ("connect_uri", "nbd+unix:///"),
    ("connect_uri", "nbd://h?tls-certificates=/x"), ("connect_unix", 3), ("connect_unix", b"a\\0b"), ("connect_tcp", "h", 3),
    ("set_export_name", b"x"), ("set_export_name", "a\\0b"), ("connect_command", ("a",)), ("aio_connect", 3), ("poll", 1 << 40),
    ("poll", 0), ("aio_get_fd",), ("aio_get_direction",), ("aio_notify_read",), ("pread", 1, 0), ("get_size",),
    ("aio_in_flight",), ("opt_info",), ("get_uri",), ("set_debug_callback", None), ("connect_unix", "/" + "x" * 200),
    ("connect_tcp", "127.0.0.1", "1"), ("aio_is_created",), ("connect_unix", "/nonexistent"), ("aio_is_dead",), ("pread", 1, 0),
    ("get_export_name",), ("connect_unix", "/nonexistent"), ("poll", 0), ("aio_get_direction",), ("aio_in_flight",),
):
    attempt(name, getattr(h, name), *arguments)
note(h.connection_state().partition(":")[0])
""",
    "callbacks": """
h = connected("base:allocation")
chunk = lambda subbuf, offset, status, error: note("chunk", subbuf, offset, status, error.value, subbuf.readonly)
extent = lambda *a: note("extent", *a[:3], a[3].value)
attempt("structured", h.pread_structured, 512, 0, chunk)
attempt("structured df", h.pread_structured, 512, 0, chunk, nbd.CMD_FLAG_DF)
attempt("status", h.block_status, 1 << 20, 0, extent)
attempt("status one", h.block_status, 1 << 20, 0, extent, nbd.CMD_FLAG_REQ_ONE)
def spoil(value, result):
    def callback(*a):
        if value is not None:
            a[-1].value = value
        if result == "raise":
            raise RuntimeError("on purpose")
        return result
    return callback
for value in (None, 0, errno.EBUSY):
    for result in (-1, 0, 1, None, "text", True, "raise"):
        attempt((value, result), h.block_status, 512, 0, spoil(value, result))
        attempt((value, result), h.pread_structured, 512, 0, spoil(value, result))
        cookie = h.aio_flush(spoil(value, result))
        finish(h)
        attempt((value, result, cookie), h.aio_command_completed, cookie)
        attempt("again", h.aio_command_completed, cookie)
""",
    "asynchronous": """
h = connected()
buffers = [nbd.Buffer(512) for _ in range(8)]
cookies = [h.aio_pwrite(bytes([n]) * 512, n * 512) for n in range(8)]
finish(h)
note(cookies, h.aio_peek_command_completed() in cookies)
for cookie in cookies:
    attempt("written", h.aio_command_completed, cookie)
cookies = [h.aio_pread(buffer, n * 512, lambda error, n=n: n % 2) for n, buffer in enumerate(buffers)]
finish(h)
for cookie in cookies:
    attempt("read", h.aio_command_completed, cookie)
for buffer in buffers:
    note(buffer.to_bytearray(), buffer.is_zero(), len(buffer), buffer.size())
memory = bytearray(1024)
h.aio_pread_structured(memoryview(memory)[256:768], 512, lambda *a: note(a[0], a[1], a[2]), lambda error: note(error.value) or 1)
finish(h)
note(memory)
attempt("poll", h.poll, 0)
attempt("disconnect", h.aio_disconnect)
for call, *arguments in ((h.aio_in_flight,), (h.pread, 512, 0), (h.aio_disconnect,), (h.aio_flush,)):
    attempt("leaving", call, *arguments)
attempt("shutdown", h.shutdown)
for call, *arguments in ((h.shutdown,), (h.get_size,), (h.aio_is_closed,), (h.aio_in_flight,), (h.pread, 1, 0), (h.aio_get_fd,)):
    attempt("left", call, *arguments)
""",
    "buffers": """
b = nbd.Buffer.from_bytearray(bytearray(b"\\0\\0ab"))
for arguments in ((), (0, 2), (0, 3), (2,), (9, 0), (-1,), (5,), (0, 5), (0, -2), (4,), (4, 1)):
    attempt(("is_zero", arguments), b.is_zero, *arguments)
note(len(b), b.size(), b.to_bytearray(), type(b.to_buffer()).__name__)
memory = bytearray(b"abcd")
shared = nbd.Buffer.from_buffer(memory)
memory[0] = 0
note(shared.to_bytearray(), shared.to_buffer() is memory)
attempt("from_buffer", nbd.Buffer.from_buffer, 3)
note(nbd.Buffer.from_bytearray(3).to_bytearray(), nbd.Buffer(3).to_bytearray(), nbd.Buffer(3).is_zero())
""",
    "memory of all kinds": """
import array, ctypes, mmap
h = connected()
kinds = [
    bytearray(64), array.array("I", range(16)), mmap.mmap(-1, 64), ctypes.create_string_buffer(64), (ctypes.c_uint32 * 16)(),
    memoryview(bytearray(64)).cast("B", (8, 8)), memoryview(bytearray(96))[16:80], nbd.Buffer(64),
    nbd.Buffer.from_buffer(bytearray(64)), nbd.Buffer.from_bytearray(64), nbd.Buffer.from_bytearray(ba=b"x" * 64),
    nbd.Buffer.from_buffer(buf=memoryview(bytearray(64))), nbd.Buffer(len=64),
    # and those that cannot be read into, or written from
    bytes(64), memoryview(bytes(64)), memoryview(bytearray(128))[::2], nbd.Buffer.from_buffer(b"y" * 64),
    "text", 64, None, [0] * 64,
]
for number, memory in enumerate(kinds):
    for call, *more in ((h.pwrite, 0), (h.aio_pwrite, 64, lambda error: 1), (h.aio_pread, 4096, lambda error: 1)):
        try:
            result = call(memory, *more)
            note(number, call.__name__, type(result).__name__)
        except (TypeError, BufferError, ValueError) as exc:
            note(number, call.__name__, type(exc).__name__)
        finish(h)
    note(h.pread(128, 0))
# memory is the command's until the command is retired, and then the program's again
memory = bytearray(512)
grow = lambda: memory.extend(b"x")
cookie = h.aio_pread(memory, 0)
attempt("in flight", grow)
finish(h)
attempt("done", grow)
attempt("completed", h.aio_command_completed, cookie)
attempt("retired", grow)
h.pwrite(memory, 0)
attempt("written", grow)
shared = nbd.Buffer.from_buffer(memory)
attempt("shared", grow)
note(len(shared), shared.size(), len(shared.to_bytearray()))
kept = []
result = h.pread_structured(64, 0, lambda subbuf, *more: kept.append(subbuf))
note(bytes(kept[0]) == result, kept[0].readonly, kept[0].format, kept[0].ndim)
attempt("weak", lambda: __import__("weakref").ref(shared)() is shared)
for value in (0.0, "0", b"0", [], 1.5):
    for call, *arguments in ((h.pread, 512, value), (h.pread, value, 0), (h.pread, 512, 0, value), (h.pwrite, b"x", 0, value),
                             (h.zero, 512, value), (h.flush, value), (h.poll, value), (h.aio_command_completed, value),
                             (h.aio_pread, nbd.Buffer(1), 0, value), (h.aio_pread, nbd.Buffer(1), 0, None, value),
                             (h.set_strict_mode, value), (h.get_block_size, value), (h.set_private_data, value)):
        attempt((call.__name__, str(value)), call, *arguments)
""",
    "event loop": """
import selectors
h = new()
predicates = ("created", "connecting", "negotiating", "ready", "processing", "dead", "closed")
state = lambda: note([name for name in predicates if getattr(h, "aio_is_" + name)()])
state()
h.aio_connect_uri(sys.argv[1])
selector = selectors.DefaultSelector()
def step():
    direction, fd = h.aio_get_direction(), h.aio_get_fd()
    events = (selectors.EVENT_READ if direction & nbd.AIO_DIRECTION_READ else 0) | (
        selectors.EVENT_WRITE if direction & nbd.AIO_DIRECTION_WRITE else 0)
    selector.register(fd, events)
    for _, ready in selector.select(10):
        if ready & selectors.EVENT_READ:
            h.aio_notify_read()
        else:
            h.aio_notify_write()
    selector.unregister(fd)
while h.aio_is_connecting():
    step()
state()
note(h.aio_get_direction())
attempt("write", h.aio_notify_write)
heard = []
piece, end = lambda *a: heard.append((len(a[0]), *a[1:3])), lambda error: heard.append(error.value)
cookie = h.aio_pread_structured(nbd.Buffer(512), 0, piece, end)
while not h.aio_command_completed(cookie):
    step()
note(heard)
h.aio_disconnect()
while not h.aio_is_closed():
    step()
state()
for name in ("get_fd", "get_direction", "notify_read", "notify_write", "peek_command_completed", "in_flight"):
    attempt(name, getattr(h, "aio_" + name))
""",
    "opt mode": """
h = new("base:allocation")
h.set_opt_mode(True)
h.connect_uri(sys.argv[1])
state = lambda: note(h.connection_state().partition(":")[0])
state()
for call, *arguments in (
    (h.get_size,), (h.can_flush,), (h.get_protocol,), (h.get_structured_replies_negotiated,), (h.poll, 0), (h.aio_get_direction,),
    (h.pread, 1, 0), (h.aio_in_flight,),
    (h.opt_list_meta_context, lambda *a: note("context", *a)), (h.opt_info,), (h.get_size,),
    (h.can_meta_context, "base:allocation"), (h.set_export_name, h.get_export_name()), (h.get_size,),
    (h.set_export_name, "other"),
    (h.set_export_name, ""), (h.clear_meta_contexts,), (h.get_nr_meta_contexts,), (h.opt_info,),
    (h.can_meta_context, "base:allocation"), (h.opt_go,), (h.opt_go,), (h.get_size,), (h.opt_abort,),
):
    attempt(call.__name__, call, *arguments)
state()
""",
    "handshakes": """
state = lambda h: note(h.connection_state().partition(":")[0])
for setting, value in (
    ("set_handshake_flags", 0), ("set_handshake_flags", 1), ("set_request_structured_replies", False),
    ("set_request_block_size", False), ("set_full_info", True), ("set_tls", nbd.TLS_ALLOW), ("set_tls", nbd.TLS_REQUIRE),
):
    h = new("base:allocation")
    getattr(h, setting)(value)
    attempt((setting, value), h.connect_uri, sys.argv[1])
    state(h)
    for name in ("get_protocol", "get_handshake_flags", "get_structured_replies_negotiated", "can_df", "get_tls_negotiated"):
        attempt(name, getattr(h, name))
    attempt("size", h.get_block_size, nbd.SIZE_MINIMUM)
    attempt("context", h.can_meta_context, "base:allocation")
    attempt("status", h.block_status, 512, 0, lambda *a: note(*a[:3]))
    attempt("structured", h.pread_structured, 512, 0, lambda *a: note(len(a[0]), *a[1:3]))
    attempt("shutdown", h.shutdown)
h = new()
h.set_handshake_flags(0)
h.set_opt_mode(True)
h.connect_uri(sys.argv[1])
report = lambda *a: 0
for call, *arguments in ((h.opt_list, report), (h.opt_list_meta_context, report), (h.opt_info,), (h.opt_go,), (h.get_size,)):
    attempt(call.__name__, call, *arguments)
h = new()
attempt("nbds", h.connect_uri, sys.argv[1].replace("nbd", "nbds", 1))
note(h.get_tls())
""",
    "left in opt mode": """
h = new()
h.set_opt_mode(True)
h.connect_uri(sys.argv[1])
heard = []
h.aio_opt_info(lambda error: note("completion", error.value))
while h.aio_is_connecting():
    h.poll(-1)
note(h.aio_is_negotiating())
attempt("abort", h.opt_abort)
note(h.aio_is_closed(), h.aio_get_direction())
attempt("abort", h.opt_abort)
""",
}

#: Those whose bytes must agree too: nothing in them is done differently on purpose.
SAME_BYTES = ["queries", "reads and writes", "asynchronous", "opt mode"]


@contextlib.contextmanager
def recorded(path: Path) -> Iterator[tuple[Path, bytearray]]:
    """Stand between clients and the server at `path`: yields where to connect to, and what clients said."""
    said = bytearray()
    with tempfile.TemporaryDirectory(prefix="nbd-") as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen()
        threads = [threading.Thread(target=_accept, args=(listener, path, said))]
        threads[0].start()
        try:
            yield Path(folder, "socket"), said
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            threads[0].join(20)
            assert not threads[0].is_alive()


def _accept(listener: socket.socket, path: Path, said: bytearray) -> None:
    with contextlib.suppress(OSError):
        while True:
            client, _ = listener.accept()
            with client, socket.socket(socket.AF_UNIX) as server:
                server.connect(str(path))
                back = threading.Thread(target=_carry, args=(server, client, bytearray()))
                back.start()
                _carry(client, server, said)
                back.join(20)


def _carry(source: socket.socket, target: socket.socket, record: bytearray) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(1 << 16):
            record += piece
            target.sendall(piece)
    for sock in (source, target):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RD if sock is source else socket.SHUT_WR)


def run(program: str, uri: str, *, ours: bool) -> list:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.py")
        path.write_text(PRELUDE + program + EPILOGUE)
        interpreter = [sys.executable, "-m", "nbdcore.libnbd"] if ours else ["/usr/bin/python3"]
        done = subprocess.run([*interpreter, path, uri], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.mark.parametrize("name", DISK_PROGRAMS)
def test_program_does_the_same_on_both_modules_against_nbdkit(name):
    program = DISK_PROGRAMS[name]
    with nbdkit("memory", "1M") as server:
        theirs = run(program, server.uri, ours=False)
    with nbdkit("memory", "1M") as server:
        ours = run(program, server.uri, ours=True)
    assert ours == theirs


@pytest.mark.parametrize("name", ["queries", "reads and writes", "refusals", "callbacks", "asynchronous"])
def test_program_does_the_same_on_both_modules_against_qemu_nbd(name, tmp_path):
    seen = []
    for ours in (False, True):
        image = tmp_path / f"image-{ours}"
        image.write_bytes(bytes(1 << 20))
        with qemu_nbd(image) as server:
            seen.append(run(DISK_PROGRAMS[name], server.uri, ours=ours))
    assert seen[1] == seen[0]


@pytest.mark.parametrize("name", SAME_BYTES)
def test_program_says_the_same_bytes_on_both_modules(name):
    said = []
    for ours in (False, True):
        with nbdkit("memory", "1M") as server, recorded(server.path) as (path, record):
            run(DISK_PROGRAMS[name], f"nbd+unix:///?socket={path}", ours=ours)
        said.append(bytes(record))
    assert said[1].hex() == said[0].hex()


def test_contexts_and_bitmaps_of_qemu_are_the_same_on_both_modules(tmp_path):
    program = """
h = new("base:allocation", "qemu:dirty-bitmap:changed", "base:allocation", "qemu:allocation-depth")
h.set_debug_callback(lambda function, message: None)
h.set_export_name("disk")
h.connect_uri(sys.argv[1])
note([h.get_meta_context(i) for i in range(h.get_nr_meta_contexts())], [h.get_block_size(i) for i in range(3)])
offset, size, most = 0, h.get_size(), 2 ** 32 - 65536
def extent(context, at, entries, error):
    global offset
    note(context, at, entries, error.value)
    if context == nbd.CONTEXT_BASE_ALLOCATION:
        offset += sum(entries[::2])
while offset < size:
    h.block_status(min(most, size - offset), offset, extent)
note(offset == size)
for count in (2 ** 32 - 1, 2 ** 32, 0):
    attempt(count, h.block_status, count, 0, lambda *a: note(*a[:3]))
attempt("past the end", h.block_status, most, 7 << 30, lambda *a: None)
attempt("one", h.block_status, 1 << 31, 0, lambda *a: note(*a[:3]), nbd.CMD_FLAG_REQ_ONE)
attempt("data, hole, data", h.pread_structured, 3 << 16, (1 << 30) - 65536, lambda *a: note(len(a[0]), *a[1:3]))
for count in (32 << 20, 64 << 20, (64 << 20) + 1):
    attempt(count, lambda: len(h.pread(count, 0)))
h.shutdown()

h = new()
h.set_opt_mode(True)
h.set_full_info(True)
h.connect_uri(sys.argv[1])
report = lambda *a: note("told", *a)
attempt("list", h.opt_list, report)
attempt("all", h.opt_list_meta_context, report)
for query in ("qemu:", "qemu:dirty-bitmap:", "base:", "no:such"):
    h.clear_meta_contexts()
    h.add_meta_context(query)
    attempt(query, h.opt_list_meta_context, report)
for name in ("disk", "nope"):
    h.set_export_name(name)
    for call in (h.opt_info, h.get_size, h.get_canonical_export_name, h.get_export_description):
        attempt(call.__name__, call)
    attempt("can_meta_context", h.can_meta_context, "no:such")
attempt("opt_go", h.opt_go)
h.set_export_name("disk")
h.clear_meta_contexts()
h.add_meta_context("qemu:dirty-bitmap:changed")
attempt("opt_go", h.opt_go)
for name in ("base:allocation", "qemu:dirty-bitmap:changed", "qemu:dirty-bitmap:nope"):
    attempt(name, h.can_meta_context, name)
attempt("changed", h.block_status, 2 << 30, 0, lambda *a: note(*a[:3]))
"""
    image = tmp_path / "image"
    for line in (
        ["qemu-img", "create", "-q", "-f", "qcow2", image, "8G"],
        ["qemu-io", "-c", "write -P 1 0 1M", "-c", "write -P 2 5G 64k", image],
        ["qemu-img", "bitmap", "--add", image, "changed"],
        ["qemu-io", "-c", "write -P 3 1G 128k", "-c", "write -P 4 7G 64k", image],
    ):
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL, timeout=60)
    seen = []
    for ours in (False, True):
        with qemu_nbd(image, "-D", "a disk", "-A", format="qcow2", export="disk", bitmap="changed") as server:
            seen.append(run(program, server.uri, ours=ours))
    assert seen[1] == seen[0]


@pytest.mark.parametrize("error", ["EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC"])
def test_error_of_the_server_is_the_same_on_both_modules(error):
    program = """
h = connected("base:allocation")
attempt("pread", h.pread, 512, 0)
attempt("structured", h.pread_structured, 512, 0, lambda *a: note("chunk", *a[1:3], a[3].value))
cookie = h.aio_pread(nbd.Buffer(512), 0, lambda error: note("completion", error.value))
finish(h)
attempt("completed", h.aio_command_completed, cookie)
attempt("still there", h.flush)
"""
    with nbdkit("memory", "1M", f"error-pread={error}", "error-pread-rate=1", filters=["error"]) as server:
        assert run(program, server.uri, ours=True) == run(program, server.uri, ours=False)


def test_extents_of_a_sparse_disk_are_the_same_on_both_modules():
    program = """
h = connected("base:allocation", "base:allocation")
offset = 0
def extent(context, at, entries, error):
    global offset
    note(context, at, entries, error.value)
    offset += sum(entries[::2])
while offset < h.get_size():
    h.block_status(h.get_size() - offset, offset, extent)
"""
    with nbdkit("sparse-random", "16M", "seed=7") as server:
        assert run(program, server.uri, ours=True) == run(program, server.uri, ours=False)


def test_unknown_export_is_the_same_on_both_modules(tmp_path):
    program = """
h = new()
h.set_export_name("nope")
attempt("connect", h.connect_unix, sys.argv[1].partition("socket=")[2])
note(h.connection_state().partition(":")[0])
h = new()
h.set_opt_mode(True)
h.connect_uri(sys.argv[1])
attempt("list", h.opt_list, lambda *a: note("export", *a))
h.set_export_name("nope")
for call in (h.opt_info, h.get_size, h.opt_go):
    attempt(call.__name__, call)
note(h.connection_state().partition(":")[0])
"""
    (tmp_path / "one").write_bytes(bytes(512))
    with nbdkit("file", f"dir={tmp_path}") as server:
        assert run(program, server.uri, ours=True) == run(program, server.uri, ours=False)


def test_server_that_is_killed_is_the_same_on_both_modules():
    program = """
h = new()
h.connect_command(["nbdkit", "--exit-with-parent", "-s", "--filter=delay", "memory", "1M", "rdelay=60"])
cookies = [h.aio_pread(nbd.Buffer(512), 0, lambda error: note("completion", error.value)) for _ in range(3)]
h.pwrite(bytes(512), 0)  # answered when the server has taken in everything before it: what it has not would be a reset
h.kill_subprocess(9)
attempt("poll", lambda: [h.poll(20_000) for _ in iter(h.aio_in_flight, 0)])
note(h.aio_is_dead(), h.aio_is_closed(), h.aio_in_flight())
for cookie in cookies:
    attempt("completed", h.aio_command_completed, cookie)
for call, *arguments in ((h.pread, 512, 0), (h.get_size,), (h.shutdown,), (h.poll, 0), (h.aio_peek_command_completed,)):
    attempt(call.__name__, call, *arguments)
"""
    assert run(program, "", ours=True) == run(program, "", ours=False)


@pytest.mark.parametrize("connect", ["connect_command", "connect_systemd_socket_activation"])
def test_program_as_a_server_is_the_same_on_both_modules(connect):
    program = f"""
h = new()
stdio = ["-s"] if {connect!r} == "connect_command" else ["-f"]
attempt("connect", h.{connect}, ["nbdkit", "--exit-with-parent", *stdio, "pattern", "1M"])
attempt("pread", h.pread, 16, 0)
attempt("get_uri", lambda: h.get_uri().partition("?")[0])
attempt("shutdown", h.shutdown)
h = new()
attempt("connect", h.{connect}, ["false"])
note(h.connection_state().partition(":")[0])
"""
    assert run(program, "", ours=True)[:4] == run(program, "", ours=False)[:4]

"""How fast `nbdcore.libnbd` is beside libnbd's own Python module, where a program keeps many small commands under way.

Run by hand: `python tests/bench/libnbd_aio.py`, with nbdkit installed, and libnbd's module for the Python that `--peer` names.
Both modules run the same program against the same nbdkit (memory plugin, unix socket), by turns, several rounds; printed are
the medians of each, and the median of the rounds' ratios with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbdcore

DISK = 64 << 20

#: Arguments: module, work, socket, commands, bytes a command, commands in flight.
PROGRAM = r"""
import importlib, json, random, resource, sys, time
nbd = importlib.import_module(sys.argv[1])
work, path = sys.argv[2:4]
total, size, depth = map(int, sys.argv[4:])
blocks = ((64 << 20) // size) - 1
randrange = random.Random(7).randrange
offsets = [randrange(blocks) * size for _ in range(total)]
handle = nbd.NBD()
handle.connect_unix(path)
finished = 0

def with_completions(start):
    # The program's loop keeps the pipeline full: a new buffer and a lambda a command, as migration tools have it.
    def completed(buffer, error):
        global finished
        assert not error.value
        finished += 1
        return 1

    left = iter(offsets)
    submitted = 0
    while finished < total:
        while submitted < total and handle.aio_in_flight() < depth:
            start(next(left), completed)
            submitted += 1
        handle.poll(-1)

def by_cookies(start):
    # No completions: the loop asks which commands are done, and retires them.
    left = iter(offsets)
    submitted = retired = 0
    while retired < total:
        while submitted < total and submitted - retired < depth:
            start(next(left), None)
            submitted += 1
        handle.poll(-1)
        while retired < submitted and (cookie := handle.aio_peek_command_completed()):
            assert handle.aio_command_completed(cookie)
            retired += 1

def read(offset, completed):
    buffer = nbd.Buffer(size)
    handle.aio_pread(buffer, offset, completed and (lambda error: completed(buffer, error)))

data = nbd.Buffer.from_bytearray(bytearray(random.Random(7).randbytes(size)))

def write(offset, completed):
    handle.aio_pwrite(data, offset, lambda error: completed(data, error))

runs = {
    "reads": lambda: with_completions(read),
    "writes": lambda: with_completions(write),
    "reads, retired by cookie": lambda: by_cookies(read),
}
used = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
cpu, began = used(), time.perf_counter()
runs[work]()
took, cpu = time.perf_counter() - began, used() - cpu
handle.shutdown()
print(json.dumps([total / took, cpu / total * 1e6]))
"""
WORKS = ("reads", "writes", "reads, retired by cookie")


def measure(python: str, module: str, work: str, path: Path, options: argparse.Namespace) -> tuple[float, float]:
    """Return commands a second, and the program's CPU time in microseconds a command."""
    numbers = [str(number) for number in (options.commands, options.size, options.depth)]
    line = [python, "-c", PROGRAM, module, work, str(path), *numbers]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=True)
    rate, cpu = json.loads(done.stdout)
    return rate, cpu


def compare(work: str, path: Path, options: argparse.Namespace) -> str:
    """Return the table's row for a kind of work."""
    sides = [(options.peer, "nbd"), (sys.executable, "nbdcore.libnbd")]
    rounds: list[list[tuple[float, float]]] = []
    for number in range(options.rounds):
        order = sides if number % 2 else sides[::-1]
        found = {module: measure(python, module, work, path, options) for python, module in order}
        rounds.append([found["nbd"], found["nbdcore.libnbd"]])
    ratios = sorted(ours[0] / theirs[0] for theirs, ours in rounds)
    theirs, ours = ([statistics.median(one[side][kind] for one in rounds) for kind in (0, 1)] for side in (0, 1))
    return (
        f"{work:26} {theirs[0]:10,.0f} {ours[0]:10,.0f} {statistics.median(ratios):7.2f}  "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}) {theirs[1]:8.1f} {ours[1]:8.1f}"
    )


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="/usr/bin/python3", help="a Python that has libnbd's module (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commands", type=int, default=50_000)
    parser.add_argument("--size", type=int, default=4096, help="bytes a command (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=64, help="commands in flight (default: %(default)s)")
    parser.add_argument("--work", choices=WORKS, action="append", help="only this; may be given more than once")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nbd-") as folder:
        path = Path(folder, "socket")
        server = subprocess.Popen(["nbdkit", "--exit-with-parent", "-f", "-U", path, "memory", str(DISK)])
        try:
            while not path.exists():
                time.sleep(0.01)
            with nbdcore.connect_unix(str(path)) as disk:  # with data: the plugin answers a read of nothing in another way
                for offset in range(0, DISK, 1 << 20):
                    disk.pwrite(b"x" * (1 << 20), offset)
            print(f"{options.size} bytes, {options.depth} in flight; medians of {options.rounds} rounds of {options.commands}")
            print(f"{'':26} {'libnbd/s':>10} {'nbdcore/s':>10} {'ratio':>7} {'':16} {'µs CPU':>8} {'µs CPU':>8}")
            for work in options.work or WORKS:
                print(compare(work, path, options), flush=True)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()

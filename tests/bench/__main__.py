"""Measures nbdcore beside its peers, by turns, on the same servers: `make bench`, or `python -m tests.bench --help`.

Leaves result.json, table.txt and chart.svg in the folder that --output names.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import sys
from pathlib import Path
from urllib.parse import quote

import nbdcore
from tests.bench import chart, machine, report
from tests.bench.case import Case
from tests.bench.cases import CASES
from tests.bench.measured import measuring
from tests.bench.programs import Tools
from tests.bench.results import Result
from tests.bench.rounds import Plan, measure
from tests.bench.servers import Sizes
from tests.interop.programs import REPOSITORY

FULL = Plan(rounds=7, seconds=1, variants=100, limit=90, sizes=Sizes(disk=1 << 30, extents=1_000_000, connections=1000))
QUICK = Plan(rounds=2, seconds=0.3, variants=4, limit=20, sizes=Sizes(disk=256 << 20, extents=200_000, connections=200))
#: What the documentation's page about speed is drawn from.
PUBLISHED = REPOSITORY / "docs/assets/speed.json"
NAMES = [case.name for case in CASES]


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="some minutes: fewer rounds, shorter ones, smaller disks")
    parser.add_argument("--only", metavar="CASE", choices=NAMES, action="append", help=f"only this one of {', '.join(NAMES)}")
    parser.add_argument("--cores", action="store_true", help="the rows of 1, 2, 4 and 8 connections")
    parser.add_argument("--rounds", type=int, help=f"how often each program runs (default: {FULL.rounds})")
    parser.add_argument("--seconds", type=float, help=f"how long a program runs (default: {FULL.seconds})")
    server = parser.add_mutually_exclusive_group()
    server.add_argument("--uri", help="use this server, with its data, for the cases that need no special one")
    server.add_argument("--socket", metavar="PATH", help="the same, of a server on a unix socket")
    parser.add_argument("--allow-writes", action="store_true", help="measure writes to that server too: its data are lost")
    for tool in dataclasses.fields(Tools):
        option = f"--{tool.name.replace('_', '-')}"
        parser.add_argument(option, metavar="PROGRAM", default=tool.default, help="which to run (default: %(default)s)")
    output = REPOSITORY / ".cache/bench"
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=output, help="where to leave it (default: .cache/bench)")
    parser.add_argument("--report", metavar="FILE", type=Path, help="measure nothing: draw this result.json again")
    parser.add_argument("--publish", action="store_true", help="have the documentation show it: cases in all their rounds")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[Case]:
    """Return the cases to measure; a given server has what it has, so only cases that need nothing special make sense there."""
    named = set(options.only or ()) | {name for name in NAMES if options.cores and name.startswith("cores-")}
    default = not options.only
    cases = [case for case in CASES if case.name in named or (default and not case.extra)]
    if options.uri or options.socket:
        cases = [case for case in cases if not case.own_server and (options.allow_writes or not case.writes)]
    return cases


def plan(options: argparse.Namespace) -> Plan:
    """Return how thorough the run is to be."""
    base = QUICK if options.quick else FULL
    given = f"nbd+unix:///?socket={quote(options.socket)}" if options.socket else options.uri
    sizes = base.sizes if given is None else dataclasses.replace(base.sizes, disk=size_of(given))
    rounds, seconds = options.rounds or base.rounds, options.seconds or base.seconds
    return dataclasses.replace(base, rounds=rounds, seconds=seconds, sizes=sizes, given=given)


def size_of(uri: str) -> int:
    """Return the size of a given server's disk, in bytes."""
    with nbdcore.connect(uri, allow_local_files=True, timeout=30) as disk:
        if disk.size < measuring.AREA:
            raise SystemExit(f"{uri}: a disk of {disk.size} bytes is too small: {measuring.AREA} are read")
        return disk.size


def publish(result: Result) -> None:
    """Have the documentation show this result, and of the one before the cases that this one lacks. Both are of one machine."""
    older = Result.load(PUBLISHED)
    if _known_by(result) == _known_by(older):
        result = result.with_others_of(older, NAMES)
    lacking = {case.name for case in CASES if not case.extra} - {case.name for case in result.cases}
    if lacking or result.options["rounds"] < FULL.rounds or result.options["given"] is not None:
        raise SystemExit(
            f"not published: the documentation shows full runs only (left out: {', '.join(sorted(lacking)) or 'rounds'})"
        )
    result.dump(PUBLISHED)
    print(f"written to {PUBLISHED.relative_to(REPOSITORY)}: the next build of the documentation shows it")


def _known_by(result: Result) -> dict[str, str]:
    return {name: value for name, value in result.machine.items() if name != "load before"}


def main() -> int:
    options = arguments()
    if options.report:
        result = Result.load(options.report)
    else:
        how = plan(options)
        tools = Tools(**{tool.name: getattr(options, tool.name) for tool in dataclasses.fields(Tools)})
        taken = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        result = Result(taken, machine.describe(tools), dataclasses.asdict(how), measure(chosen(options), tools, how))
    options.output.mkdir(parents=True, exist_ok=True)
    text = report.text(result)
    result.dump(options.output / "result.json")
    (options.output / "table.txt").write_text(text, encoding="utf-8")
    (options.output / "chart.svg").write_text(chart.svg(result), encoding="utf-8")
    print(text)
    if options.publish:
        publish(result)
    return 1 if report.unmeasured(result) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing is kept")

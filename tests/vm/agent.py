"""The guest's first process after its init: it calls the functions that the host names, and says how each one ended.

    python agent.py REPOSITORY

Three virtio serial ports lead to the host: output, errors, and control. On control the host sends one JSON object a line,
`{"function": "package.module:name", "arguments": {...}, "deadline": seconds}`, and gets one back, `{"value": ...}` or
`{"failure": "traceback"}`. Each call runs in a process of its own, and everything that it started is ended after it: one call
that hangs or breaks does not touch the next. Only importing the function's module happens here, and calling the module's
`prepare`, where it has one: they are what takes longest in an emulated processor, and so they are done once for all calls.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

# The ports' names, which the host gives them; their device nodes are numbered by the order in which the kernel found them.
OUTPUT_PORT, ERROR_PORT, CONTROL_PORT = "output", "errors", "control"
# How much longer than its deadline a call may take to say where it hung, in seconds.
_LAST_WORDS = 5.0


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    os.dup2(_open_port(OUTPUT_PORT), 1)
    os.dup2(_open_port(ERROR_PORT), 2)
    control = _open_port(CONTROL_PORT)
    _send(control, {"value": "ready"})
    while True:
        _send(control, _answer(json.loads(_next_line(control))))


def _open_port(name: str) -> int:
    while not (node := _node(name)):
        time.sleep(0.01)
    return os.open(f"/dev/{node}", os.O_RDWR)


def _node(name: str) -> str | None:
    folder = "/sys/class/virtio-ports"
    for node in os.listdir(folder):  # noqa: PTH208 - pathlib is slow to import in an emulated processor, and nothing else needs it
        with open(f"{folder}/{node}/name") as label:  # noqa: PTH123
            if label.read().strip() == name:
                return node
    return None


def _next_line(control: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):  # the host never sends a request before the last one's answer
        part = os.read(control, 65536)
        if not part:  # the host's end is not open yet
            time.sleep(0.01)
        line += part
    return line


def _send(control: int, answer: dict[str, Any]) -> None:
    line = memoryview(json.dumps(answer).encode() + b"\n")
    while line:
        line = line[os.write(control, line) :]


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    module, name = request["function"].split(":")
    try:
        function = getattr(_prepared(module), name)
    except Exception:  # noqa: BLE001 - whatever it is, the host's test is to show it
        return {"failure": traceback.format_exc()}
    return _call_apart(function, request["arguments"], request["deadline"])


def _prepared(name: str) -> ModuleType:
    new = name not in sys.modules
    module = importlib.import_module(name)
    if new and hasattr(module, "prepare"):
        module.prepare()
    return module


def _call_apart(function: Callable[..., Any], arguments: dict[str, Any], deadline: float) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        faulthandler.dump_traceback_later(deadline, exit=True)
        answer = json.dumps(_call(function, arguments)).encode()
        sys.stdout.flush()
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(answer)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = _read_until(pipe.fileno(), time.monotonic() + deadline + _LAST_WORDS)
    _end_everything_else()
    return json.loads(answer) if answer else {"failure": f"it gave no answer within {deadline} s, or died"}


def _call(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"value": function(**arguments)}
    except BaseException:  # noqa: BLE001 - whatever it is, the host's test is to show it
        return {"failure": traceback.format_exc()}


def _read_until(pipe: int, deadline: float) -> bytes:
    answer = b""
    while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(pipe, 65536)
        if not part:
            break
        answer += part
    return answer


def _end_everything_else() -> None:
    """Kill and reap every other process: this is process 1, so -1 means all but itself."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


if __name__ == "__main__":
    main()

"""The documentation, run as printed: the README and every page, each from top to bottom in a folder of its own.

What is in a page's fenced blocks happens, in the page's order:

- ```python: run in one interpreter for the whole page, warnings as errors. With `title="name.py"`: written to that file.
- ```console: what follows `$ ` is run by a shell, in the foreground. Other lines are what it prints; `...` stands for anything.
- ```toml with a title: written to that file.
- ```text right behind a block that ran: what that printed.

Comments, which no reader sees, say what is different; each is the line before its block:

- `<!-- test: stays -->`: a server. It runs until the page ends.
- `<!-- test: ctrl-c -->`: the reader presses Ctrl-C where the last server runs. It needs no block.
- `<!-- test: not run: REASON -->`: cannot be done here. Python must compile, and the options of our own commands must exist.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import nbdcore
from nbdcore import server
from nbdcore.protocol.state import LEGAL, Phase
from tests.interop.programs import DIES_WITH_US, PROGRAMS

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]

#: Seconds that one block may take on a busy machine.
DEADLINE = 30
LANGUAGES = {"python", "console", "text", "toml", "xml"}

_PART = re.compile(
    r"""^<!--\ test:\ (?P<comment>.+?)\ -->$
      | ^(?P<fence>```)(?P<language>\w*)(?:\ title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$""",
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)
_LINK = re.compile(r"\]\(([^)\s]+)\)")

# Reads blocks as JSON lines (page, source with the line numbers of its page, mark), runs each, and prints the mark at its end.
_INTERPRETER = """
import json, sys, traceback
names = {"__name__": "__main__"}
for line in sys.stdin:
    page, source, mark = json.loads(line)
    try:
        exec(compile(source, page, "exec"), names)
    except BaseException:
        print(traceback.format_exc())
        mark = "failed " + mark
    print(mark, flush=True)
"""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page, or a comment that stands for itself (language "")."""

    language: str
    title: str
    text: str
    comment: str
    line: int
    expected: str = ""

    @property
    def commands(self) -> list[tuple[str, str]]:
        """What a console block runs, each with what it prints."""
        pieces = re.split(r"^\$ ", self.text, flags=re.MULTILINE)
        assert not pieces[0], f"line {self.line}: a console block begins with '$ '"
        return [(command, printed) for command, _, printed in (piece.partition("\n") for piece in pieces[1:])]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    comment, end = "", 0
    for part in _PART.finditer(text):
        line = text.count("\n", 0, part.start()) + 1
        alone = not text[end : part.start()].strip()
        if part["comment"] is not None:
            assert part["comment"] in ("stays", "ctrl-c") or part["comment"].startswith("not run: "), (page, line)
            if part["comment"] == "ctrl-c":
                found.append(Block("", "", "", "ctrl-c", line))
            else:
                comment = part["comment"]
        elif part["language"] == "text" and alone and found and found[-1].language == "python":
            found[-1] = Block(**{**vars(found[-1]), "expected": part["text"]})
        else:
            assert not comment or alone, f"{page}:{line}: the comment before it is for the block right behind it"
            found.append(Block(part["language"], part["title"] or "", part["text"], comment, line))
            comment = ""
        end = part.end()
    return found


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def needs(page: Path) -> list[str]:
    """Return the programs of others that a page runs."""
    started = re.compile(r"(?:^|\[ )(\S+)")  # by the page, or by one of our commands
    words = {word for block in blocks(page) if runs(block) for command, _ in block.commands for word in started.findall(command)}
    return sorted(words & PROGRAMS.keys())


def runs(block: Block) -> bool:
    return block.language == "console" and not block.comment.startswith("not run")


class Reader:
    """Somebody who does what a page says, in an empty folder."""

    def __init__(self, page: Path, folder: Path, stack: contextlib.ExitStack) -> None:
        self._page = page
        self._folder = folder
        self._stack = stack
        self._servers: list[subprocess.Popen[str]] = []
        self._python: subprocess.Popen[str] | None = None
        self._complaints = stack.enter_context((folder / "complaints").open("w+"))
        search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath), "/usr/sbin"])
        self._environment = {
            **os.environ,
            "PATH": search,
            "PYTHONPATH": str(folder / "installed"),
            "PYTHONWARNINGS": "error",
            "PYTHONDONTWRITEBYTECODE": "1",
            # `pip install` as printed, but with what is here already, and into this folder.
            "PIP_NO_INDEX": "1",
            "PIP_NO_DEPS": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it the other way round: this turns isolation off
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_ROOT_USER_ACTION": "ignore",
            "PIP_TARGET": str(folder / "installed"),
        }

    def do(self, block: Block) -> None:
        if block.comment.startswith("not run"):
            check_unrun(block)
        elif block.comment == "ctrl-c":
            self._press_ctrl_c()
        elif block.title:
            self._write(block)
        elif block.language == "python":
            self._run_python(block)
        elif block.language == "console":
            for command, printed in block.commands:
                if block.comment == "stays":
                    self._start(command, printed)
                else:
                    self._run(command, printed)

    def _write(self, block: Block) -> None:
        if block.language == "toml":
            tomllib.loads(block.text)
        if block.language == "python":
            compile(block.text, block.title, "exec")
        path = self._folder / block.title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")

    def _run_python(self, block: Block) -> None:
        if self._python is None:
            self._python = self._popen([sys.executable, "-W", "error", "-c", _INTERPRETER], name="python")
        python, mark = self._python, f"-- done with line {block.line} --"
        source = "\n" * block.line + block.text
        assert python.stdin is not None
        assert python.stdout is not None
        with killed_after(DEADLINE, python):
            python.stdin.write(json.dumps([str(self._page), source, mark]) + "\n")
            python.stdin.flush()
            printed = ""
            for line in python.stdout:
                if line.rstrip().endswith(mark):
                    assert line.rstrip() == mark, f"{self._page}:{block.line}: {printed}"
                    break
                printed += line
            else:
                pytest.fail(f"{self._page}:{block.line}: no end within {DEADLINE} s, or the interpreter ended\n{printed}")
        if block.expected:
            assert printed == block.expected

    def _run(self, command: str, expected: str) -> None:
        done = subprocess.run(
            [*DIES_WITH_US, "sh", "-c", command],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}"
        if expected:
            assert is_printed(expected, done.stdout), f"$ {command}\n{done.stdout}"

    def _start(self, command: str, expected: str) -> None:
        log = self._folder / f"log-{len(self._servers)}"
        with log.open("w") as output:
            process = self._popen(["sh", "-c", f"exec {command}"], name=command, output=output)
        self._servers.append(process)
        path = self._folder / socket_of(command)
        for _ in range(DEADLINE * 20):
            if process.poll() is not None:
                pytest.fail(f"$ {command}\n{log.read_text()}")
            if answers(path) and is_printed(expected, log.read_text()):
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        pytest.fail(f"not ready, or does not print what the page says: $ {command}\n{log.read_text()}")

    def _press_ctrl_c(self) -> None:
        process = self._servers[-1]
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 0

    def _popen(self, command: list[str], *, name: str, output: object = subprocess.PIPE) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*DIES_WITH_US, *command],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=self._complaints if output is subprocess.PIPE else subprocess.STDOUT,
            text=True,
        )
        self._stack.callback(self._end, process, name)
        return process

    def _end(self, process: subprocess.Popen[str], name: str) -> None:
        """End what is still running. An interpreter ends by itself, with no complaint, once it has no more to read."""
        assert process.stdin is not None
        process.stdin.close()
        if process.stdout is None:
            process.terminate()
        with killed_after(DEADLINE, process):
            process.wait()
        if process.stdout:
            process.stdout.close()
            self._complaints.seek(0)
            complaints = self._complaints.read()
            # What a server in the page's program logs is no complaint; what Python prints when it cannot raise is.
            assert (process.returncode, "ignored" in complaints) == (0, False), f"{name}: {complaints}"


@contextlib.contextmanager
def killed_after(seconds: float, process: subprocess.Popen[str]) -> Iterator[None]:
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def socket_of(command: str) -> str:
    """Return the path of the unix socket that a server's command line names."""
    found = re.search(r"--(?:unix |socket=)(\S+)", command)
    assert found, f"a server that a test can start listens on a unix socket: $ {command}"
    return found[1].replace('"', "").removeprefix("$PWD/")


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(DEADLINE)
        return probe.connect_ex(str(path)) == 0


def is_printed(expected: str, printed: str) -> bool:
    pattern = ".*".join(map(re.escape, evenly_spaced(expected).split("...")))
    return not expected or re.fullmatch(pattern, evenly_spaced(printed), re.DOTALL) is not None


def evenly_spaced(text: str) -> str:
    """Return what of the text is not a matter of layout: how wide a table's columns are is no page's business."""
    return re.sub(r"[ \t]+", " ", text)


def check_unrun(block: Block) -> None:
    """Check what can be checked of a block that is not run."""
    if block.language == "python":
        compile(block.text, f"line {block.line}", "exec")
    for command, _ in block.commands if block.language == "console" else ():
        words = shlex.split(command, comments=True)
        if words[0] == "nbdcore":
            # Options are parsed before help is printed.
            subprocess.run([sys.executable, "-m", *words, "--help"], check=True, timeout=DEADLINE, stdout=subprocess.DEVNULL)
        if words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
            assert set(words[1:]) <= {*targets}, f"the Makefile lacks a target: {command}"


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name_of(page), marks=pytest.mark.interop(*needs(page)) if needs(page) else ())
        for page in PAGES
        # Without unix sockets, readers are told to use TCP's fixed port, which a test must not count on.
        if hasattr(socket, "AF_UNIX") or "unix" not in page.read_text(encoding="utf-8")
    ],
)
def test_a_page_does_what_it_says(page, short_folder):
    with contextlib.ExitStack() as stack:
        reader = Reader(page, short_folder, stack)
        for block in blocks(page):
            reader.do(block)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_says_what_each_block_is(page):
    text = page.read_text(encoding="utf-8")
    found = [block for block in blocks(page) if block.language or block.comment != "ctrl-c"]
    assert {block.language for block in found} <= LANGUAGES
    # Each fence was seen: two for a block, and those of output which went into the block before.
    assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * sum(1 + bool(block.expected) for block in found)


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_of_the_front_pages_lead_to_files(name):
    links = _LINK.findall((REPOSITORY / name).read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (REPOSITORY / link.partition("#")[0]).is_file()] == []


def test_every_public_name_has_its_place_in_the_reference():
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    described = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    public = {f"nbdcore.{name}" for name in nbdcore.__all__} | {f"nbdcore.server.{name}" for name in server.__all__}
    assert public - described == set()


def hooks():
    specification = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_page_of_states_is_drawn_from_the_one_table():
    page = hooks().on_page_markdown((DOCS / "reference/states.md").read_text(encoding="utf-8"))
    for call, legal in LEGAL.items():
        cells = " | ".join("yes" if phase in legal else "-" for phase in Phase)
        assert f"| `{call}` | {cells} |" in page


def test_the_page_of_commands_has_every_command():
    page = hooks().on_page_markdown((DOCS / "reference/command-line.md").read_text(encoding="utf-8"))
    assert [f"## nbdcore {name}\n" in page for name in ("demo", "info", "map", "serve", "transports")] == [True] * 5


def test_a_place_that_nothing_is_drawn_for_fails():
    with pytest.raises(KeyError):
        hooks().on_page_markdown("<!-- drawn: a unicorn -->")

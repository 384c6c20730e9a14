"""What every test has: short folders for sockets, waiting with a deadline, and a check that a session leaves nothing behind.

Also leaves out the tests whose real servers this machine lacks, with one line that says so; in CI they run, and fail.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import compiling, leaks, sampling, scheduling
from tests.interop import programs

#: Left by tests/vm/fetch when it has brought all that the virtual machine needs.
VM_PARTS = programs.REPOSITORY / ".cache/vm"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-of-each",
        action="store_true",
        help="of a test with many sets of parameters run one: for another Python or platform, after all were run on this one",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    compiling.import_from_ones_own_part_on(session)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    return scheduling.scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("one_of_each"):
        _keep(config, items, sampling.one_of_each(items))
    scheduling.longest_first(items)
    if os.environ.get("CI") == "true":
        return
    _keep(config, items, [item for item in items if not _lacking(item)])


def _keep(config: pytest.Config, items: list[pytest.Item], kept: list[pytest.Item]) -> None:
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept


def _lacking(item: pytest.Item) -> list[str]:
    """Return what this machine lacks for the test."""
    names = [name for marker in item.iter_markers("interop") for name in programs.missing(marker.args)]
    return names + (_vm_lacking() if item.get_closest_marker("vm") else [])


def _vm_lacking() -> list[str]:
    return [] if any(VM_PARTS.glob("complete-*")) else ["the virtual machine's parts"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lacking = programs.missing(()) + _vm_lacking()
    if lacking and os.environ.get("CI") != "true":
        terminalreporter.line(
            f"Not on this machine, and the tests that need it left out: {', '.join(lacking)}. Root's `make test` installs it."
        )


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the session's last test when a process, a socket, a descriptor or a temporary file outlives all of them."""
    kept_by_pytest = tmp_path_factory.getbasetemp()  # asked for first: it stays outside of our folder
    leaks.adopt_orphans()
    with pytest.MonkeyPatch.context() as patch:
        folder = Path(tempfile.mkdtemp(prefix="nbdcore-"))
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setenv("TMPDIR", str(folder))
        before = leaks.open_descriptors()
        yield
        gc.collect()
        after = leaks.open_descriptors()
        left = {
            "child processes": leaks.settled(leaks.children),
            "listening sockets": leaks.settled(lambda: leaks.listening_sockets([folder, kept_by_pytest])),
            "temporary files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
            "open descriptors": sorted(set(after.items()) - set(before.items())),
        }
        shutil.rmtree(folder)
        offenders = {kind: found for kind, found in left.items() if found}
        assert not offenders, f"the tests of this session left behind: {offenders}"


@pytest.fixture(scope="module", autouse=True)
def _what_others_left_is_not_looked_at() -> None:
    """Many tests ask the collector what they left: it need not go through all that was there before their module."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """An empty folder with a path so short that a unix socket in it fits into its 108 bytes (pytest's own may not)."""
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def socket_path(short_folder: Path) -> Path:
    """A path for a unix socket; nothing is there yet."""
    return short_folder / "socket"


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Waits, with a deadline, until a condition holds: `eventually(lambda: process.poll() is not None, "the server ended")`."""

    def wait(condition: Callable[[], object], what: str, *, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not within {seconds} s: {what}"
            time.sleep(0.005)

    return wait

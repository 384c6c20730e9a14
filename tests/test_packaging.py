"""What is shipped: the wheel's contents, and what it does in environments that have nothing else.

Third parties' transports are real distributions, under tests/packaging.
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
import zipfile
from email.parser import HeaderParser

import pytest

from tests.packaging.environments import HERE, PROJECT, Environment, build, copy_sources, run

# One worker builds the wheel and the environments once for all of these tests.
pytestmark = [pytest.mark.packaging, pytest.mark.xdist_group("packaging")]

CONVERSE = HERE / "converse.py"
TRANSPORTS = ("command", "ssh", "tcp", "unix", "vsock")
CONNECT_WITHOUT_VSOCK = HERE / "connect_without_vsock.py"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    return build(PROJECT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def plain(wheel, tmp_path_factory):
    """An environment with nbdcore and what it needs to run, no more."""
    environment = Environment(tmp_path_factory.mktemp("plain"))
    environment.install(wheel)
    return environment


@pytest.fixture(scope="session")
def complete(wheel, tmp_path_factory):
    """An environment with nbdcore and its command."""
    environment = Environment(tmp_path_factory.mktemp("complete"))
    environment.install(f"{wheel}[cli]")
    return environment


def contents(archive):
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def top_level(archive):
    names = {name.partition("/")[0] for name in contents(archive)}
    return {name for name in names if not name.endswith((".dist-info", ".data"))}


def metadata(archive):
    [text] = [data for name, data in contents(archive).items() if name.endswith(".dist-info/METADATA")]
    return HeaderParser().parsestr(text.decode())


# What is in it


def test_wheel_has_the_package_and_the_transports_modules_only(wheel):
    assert top_level(wheel) == {"nbdcore", *(f"nbdcore_{name}.py" for name in TRANSPORTS)}


def test_wheel_has_every_module_and_the_typing_marker_and_no_tests(wheel):
    names = {name for name in contents(wheel) if name.startswith("nbdcore/")}
    assert names == {path.relative_to(PROJECT).as_posix() for path in (PROJECT / "nbdcore").rglob("*") if is_shipped(path)}
    assert "nbdcore/py.typed" in names
    assert not [name for name in names if "test_" in name or "conftest" in name]


def test_wheel_has_the_manual_pages_and_nothing_else_for_the_system(wheel):
    found = {name: data for name, data in contents(wheel).items() if ".data/" in name}
    pages = {f"share/man/man1/{path.name}": path.read_bytes() for path in (PROJECT / "man").iterdir()}
    assert {name.partition(".data/data/")[2]: data for name, data in found.items()} == pages


def is_shipped(path):
    return path.is_file() and path.suffix in (".py", ".typed")


def test_wheel_announces_its_transports_and_its_command(wheel):
    [entry_points] = [data.decode() for name, data in contents(wheel).items() if name.endswith("entry_points.txt")]
    assert entry_points.split() == [
        *("[console_scripts]", "nbdcore", "=", "nbdcore.cli:main"),
        *("[nbdcore.transports]", *(word for name in TRANSPORTS for word in (name, "=", f"nbdcore_{name}"))),
    ]


def test_wheel_needs_two_packages_to_run_two_more_for_its_command_and_numpy_for_columns(wheel):
    described = metadata(wheel)
    needs = sorted(requirement.replace('"', "'") for requirement in described.get_all("Requires-Dist"))
    assert [need.partition(">=")[0] for need in needs] == ["click", "importlib-metadata", "numpy", "pluggy", "rich"]
    assert ["extra == 'cli'" in need for need in needs] == [True, False, False, False, True]
    assert ["extra == 'numpy'" in need for need in needs] == [False, False, True, False, False]
    assert described["Requires-Python"] == ">=3.11"
    assert described["License-Expression"] == "MIT"
    assert [name for name in contents(wheel) if name.endswith("/LICENSE")]


def test_wheel_built_from_the_sdist_is_the_same_wheel(wheel, tmp_path):
    sdist = build(PROJECT, tmp_path / "sdist", "sdist")
    with tarfile.open(sdist) as opened:
        # An attribute and no argument: Debian 12's Python (3.11.2) knows no filters yet.
        opened.extraction_filter = getattr(tarfile, "data_filter", None)
        opened.extractall(tmp_path / "unpacked")
    [source] = (tmp_path / "unpacked").iterdir()
    assert contents(build(source, tmp_path / "wheel")) == contents(wheel)
    assert (source / "tests" / "test_packaging.py").is_file()


# What it does where nothing else is installed


def test_library_works_without_the_extra(plain):
    assert json.loads(plain.python(CONVERSE))["tcp"] is True


@pytest.mark.parametrize("arguments", [(), ("demo",), ("info", "nbd://localhost"), ("--help",)])
def test_command_without_its_extra_says_in_one_line_what_to_install(plain, arguments):
    done = plain.nbdcore(*arguments, fails=True)
    [line] = done.stderr.splitlines()
    assert "pip install 'nbdcore[cli]'" in line
    assert done.stdout == ""
    assert done.returncode == 1


def test_demo_runs_from_the_installed_wheel(complete):
    shown = complete.nbdcore("demo").stdout
    assert "tcp" in shown
    assert "vsock" in shown


# Third parties' transports


@pytest.fixture(scope="session")
def proxy(tmp_path_factory):
    return build(HERE / "nbdcore-proxy", tmp_path_factory.mktemp("nbdcore-proxy"))


@pytest.fixture(scope="session")
def with_proxy(wheel, proxy, tmp_path_factory):
    """An environment with nbdcore, and a third party's transport installed after it."""
    environment = Environment(tmp_path_factory.mktemp("with-proxy"))
    environment.install(f"{wheel}[cli]")
    before = installed_files(environment)
    environment.install("--no-deps", proxy)
    assert installed_files(environment).items() >= before.items()
    return environment


@pytest.fixture(scope="session")
def with_broken(wheel, proxy, tmp_path_factory):
    """An environment with nbdcore and two third parties' transports, one of which raises on import."""
    environment = Environment(tmp_path_factory.mktemp("with-broken"))
    broken = build(HERE / "nbdcore-broken", tmp_path_factory.mktemp("nbdcore-broken"))
    environment.install(f"{wheel}[cli]")
    environment.install("--no-deps", proxy, broken)
    return environment


def installed_files(environment):
    [package] = environment.programs.parent.rglob("site-packages/nbdcore")
    files = [*package.rglob("*.py"), *package.parent.glob("nbdcore_*.py"), *package.parent.glob("nbdcore-*.dist-info/*")]
    return {path: path.read_bytes() for path in files if path.is_file()}


def test_third_party_transport_is_discovered_with_no_change_to_nbdcore(with_proxy):
    states = json.loads(with_proxy.python(CONVERSE, "proxy"))["states"]
    assert states["proxy"] == ["loaded", "", "nbdcore-proxy"]
    assert states["tcp"] == ["loaded", "", "nbdcore"]


def test_third_party_transport_that_raises_on_import_harms_nothing(with_proxy, with_broken):
    unharmed = json.loads(with_proxy.python(CONVERSE, "proxy"))
    said = json.loads(with_broken.python("-W", "default", CONVERSE, "proxy"))
    state, reason, distribution = said["states"].pop("broken")
    assert (state, distribution) == ("failed", "nbdcore-broken")
    assert "the flux capacitor is missing" in reason
    assert said == unharmed


def test_command_lists_third_party_transports_and_why_one_is_broken(with_broken):
    shown = " ".join(with_broken.nbdcore("transports").stdout.split())
    assert "proxy" in shown
    assert "broken" in shown
    assert "flux capacitor" in shown


def test_blocked_third_party_transport_is_not_imported(with_broken):
    states = json.loads(with_broken.python(CONVERSE, NBDCORE_BLOCK_TRANSPORTS="broken"))["states"]
    assert states["broken"][0] == "blocked"


# Without vsock


def test_python_without_af_vsock_has_all_the_rest_and_says_what_is_missing(plain):
    without = "import runpy, socket, sys; vars(socket).pop('AF_VSOCK', None); runpy.run_path(sys.argv.pop(1))"
    said = json.loads(plain.python("-c", without, CONVERSE, PYTHONPATH=str(HERE)))
    assert (said["vsock"], said["tcp"], said["states"]["vsock"][0]) == (False, True, "unavailable")
    assert re.match("ENOTSUP .*AF_VSOCK", plain.python("-c", without, CONNECT_WITHOUT_VSOCK))


def built_for_a_platform_without_vsock(tmp_path):
    return build(PROJECT, tmp_path / "wheel", NBDCORE_BUILD_TRANSPORTS="command, ssh, tcp, unix")


def built_from_sources_without_vsock(tmp_path):
    sources = copy_sources(tmp_path / "sources")
    (sources / "transports" / "nbdcore_vsock.py").rename(tmp_path / "nbdcore_vsock.py")
    return build(sources, tmp_path / "wheel")


@pytest.mark.parametrize("make", [built_for_a_platform_without_vsock, built_from_sources_without_vsock])
def test_build_without_vsock_works_and_says_that_it_is_not_in_this_build(tmp_path, make):
    wheel = make(tmp_path)
    assert top_level(wheel) == {"nbdcore", *(f"nbdcore_{name}.py" for name in TRANSPORTS if name != "vsock")}
    environment = Environment(tmp_path / "environment")
    environment.install(wheel)
    said = json.loads(environment.python(CONVERSE))
    assert (said["vsock"], said["tcp"]) == (False, True)
    assert said["states"]["vsock"][:2] == ["unavailable", "it is not in this build: there is no module nbdcore_vsock"]
    assert re.match("ENOTSUP .*not in this build", environment.python(CONNECT_WITHOUT_VSOCK))


@pytest.mark.parametrize(("names", "kept"), [("tcp", {"nbdcore_tcp.py"}), ("", set())])
def test_build_for_a_platform_has_the_transports_it_names_only(tmp_path, names, kept):
    assert top_level(build(PROJECT, tmp_path, NBDCORE_BUILD_TRANSPORTS=names)) == {"nbdcore", *kept}


def test_build_for_a_platform_refuses_a_transport_that_does_not_exist(tmp_path):
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, PROJECT)
    done = run(*command, fails=True, NBDCORE_BUILD_TRANSPORTS="tcp,vsok")
    assert "names no transport of this project: vsok" in done.stdout + done.stderr
    assert not [*tmp_path.iterdir()]

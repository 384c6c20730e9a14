"""The registry: what it finds, what it keeps of plugins that do not load, who wins, and that nobody harms anybody else."""

from __future__ import annotations

import builtins
import errno
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import types
import warnings
from pathlib import Path

import pluggy
import pytest

from nbdcore.errors import TransportUnavailable, UsageError
from nbdcore.plugins import registry as registry_module
from nbdcore.plugins.registry import BLOCK_VARIABLE, Registry, State, TransportStatus, TransportWarning
from nbdcore.uri import parse_uri
from tests.plugins.conftest import TRANSPORT

PROJECT = Path(__file__).parents[2]


def status_of(registry, name):
    [status] = [status for status in registry.statuses() if status.name == name]
    return status


def example_source(name):
    return textwrap.dedent(TRANSPORT).format(name=name, schemes=(f"nbd+{name}",))


def run(code, *arguments, **environment):
    """Run `code` in a fresh interpreter and return what it printed."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=environment or None)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# What is found


def test_installed_transport_is_loaded_and_described(site):
    site.install_transport("nbdcore-pigeon", "pigeon", ("nbd+pigeon", "nbd+dove"))
    registry = Registry()
    assert registry.supports("pigeon")
    assert registry.get("pigeon").name == "pigeon"
    assert status_of(registry, "pigeon") == TransportStatus(
        name="pigeon",
        state=State.LOADED,
        reason="",
        module="nbdcore_pigeon",
        distribution="nbdcore-pigeon",
        version="1.0",
        schemes=("nbd+pigeon", "nbd+dove"),
    )
    assert pickle.loads(pickle.dumps(registry.statuses())) == registry.statuses()


@pytest.mark.parametrize("uri", ["nbd+dove://x/", "nbds+dove://x/", "NBD+Dove://x/"])
def test_transport_answers_to_its_schemes_and_their_tls_twins(site, uri):
    site.install_transport("nbdcore-pigeon", "pigeon", ("nbd+pigeon", "nbd+dove"))
    assert Registry().for_uri(parse_uri(uri)).name == "pigeon"


def test_uri_parameter_that_the_transport_does_not_know_is_refused(site):
    site.install_transport("nbdcore-pigeon", "pigeon")
    with pytest.raises(UsageError, match="no query parameter speed;"):
        Registry().for_uri(parse_uri("nbd+pigeon://x/?tls-type=psk&speed=1"))


def test_one_plugin_may_bring_several_transports(site):
    source = """
        import nbdcore_pigeon

        class Owl(nbdcore_pigeon.Example):
            name = "owl"
            schemes = ("nbd+owl",)

        @nbdcore_pigeon.hookimpl
        def nbdcore_transports():
            yield Owl()
            yield nbdcore_pigeon.Example()
    """
    site.install_transport("nbdcore-pigeon", "eagle")
    site.install("nbdcore-owl", {"owl": "nbdcore_owl"}, nbdcore_owl=source)
    registry = Registry()
    with pytest.warns(TransportWarning, match="eagle already"):
        assert registry.supports("owl")
    assert [(status.distribution, status.state) for status in registry.statuses() if status.name == "eagle"] == [
        ("nbdcore-owl", State.CONFLICT),
        ("nbdcore-pigeon", State.LOADED),
    ]


def test_nothing_is_scanned_or_imported_before_the_first_question(site):
    site.install_transport("nbdcore-pigeon", "pigeon")
    printed = run(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        from nbdcore.plugins import registry
        watched = ("pluggy", "nbdcore.plugins.spec", "nbdcore_pigeon")
        print(sum(name in sys.modules for name in watched))
        registry.supports("pigeon")
        print(sum(name in sys.modules for name in watched))
        """,
        site.directory,
    )
    assert printed == ["0", "3"]


@pytest.mark.parametrize("name", ["tcp", "unix", "vsock"])
def test_shorthands_answer_for_the_shared_registry(name):
    shorthand = getattr(registry_module, f"supports_{name}")
    assert shorthand() is registry_module.supports(name) is registry_module.registry.supports(name)


# Plugins that do not load


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "from nbdcore.errors import TransportUnavailable\nraise TransportUnavailable('no pigeons on this roof')",
            "no pigeons on this roof",
        ),
        (
            "from nbdcore.plugins.spec import *\n@hookimpl\ndef nbdcore_transports(): raise TransportUnavailable('it rains')",
            "it rains",
        ),
        (None, "it is not in this build: there is no module nbdcore_bad"),
    ],
    ids=["at import", "in the hook", "no such module"],
)
def test_plugin_that_cannot_work_here_is_quiet_and_gives_its_reason(site, source, reason):
    site.install("nbdcore-bad", {"bad": "nbdcore_bad"}, **({"nbdcore_bad": source} if source else {}))
    registry = Registry()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not registry.supports("bad")
    assert status_of(registry, "bad").state is State.UNAVAILABLE
    assert status_of(registry, "bad").reason == reason
    with pytest.raises(TransportUnavailable) as caught:
        registry.get("bad")
    assert caught.value.errno == errno.ENOTSUP
    assert reason in str(caught.value)


def test_missing_package_of_a_plugin_in_a_package_is_not_in_this_build(site):
    site.install("nbdcore-bad", {"bad": "nbdcore_bad.inner:plugin"})
    registry = Registry()
    assert status_of(registry, "bad").state is State.UNAVAILABLE


HOOK = "from nbdcore.plugins.spec import Transport, hookimpl\n@hookimpl\ndef nbdcore_transports():\n    "
CLASS = (
    "\nclass Example(Transport):\n    name = 'bad'\n    schemes = ('nbd+bad',)\n"
    "    def address(self): pass\n    def parse(self, uri): pass\n    def connect(self, address): pass\n    "
)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("this is no Python", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise ImportError('libpigeon.so.1')", "libpigeon.so.1"),
        ("import module_that_nobody_has", "it needs the module module_that_nobody_has, which is not installed"),
        ("import nbdcore_bad.deeper", "needs the module nbdcore_bad.deeper"),
        ("class Odd(Exception):\n    def __str__(self): raise ValueError\nraise Odd", "Odd"),
        ("raise ValueError('\\x1b[31mred')", "\\x1b[31mred"),
        ("from nbdcore.plugins.registry import supports\nsupports('tcp')\nraise ValueError('answered')", "answered"),
        ("", "its hook nbdcore_transports (marked with hookimpl) is missing or returns nothing"),
        ("def nbdcore_transports(): return []", "is missing"),
        (HOOK + "return None", "returns nothing"),
        (HOOK + "return []", "no transport named bad"),
        (HOOK + "return 42", "must return transports, not 42"),
        (HOOK + "return 'tcp'", "'t' is no Transport object"),
        (HOOK + "return [None]", "None is no Transport object"),
        (HOOK + "1 / 0", "ZeroDivisionError"),
        (HOOK + "raise SystemExit", "SystemExit"),
        (HOOK + "yield 1 / 0", "ZeroDivisionError"),
        (HOOK.replace("s():", "s(surplus):") + "return []", "surplus"),
        (HOOK.replace("nbdcore_transports", "nbdcore_pigeons") + "return []", "nbdcore_pigeons"),
        (HOOK + "return Example()" + CLASS, "must return transports"),
        (HOOK + "return [Example]" + CLASS, "is no Transport object"),
        (HOOK + "return [Example()]" + CLASS + "name = 'other'", "no transport named bad"),
        (HOOK + "return [Example()]" + CLASS + "schemes = 'nbd+bad'", "schemes must be a tuple"),
        (HOOK + "return [Example()]" + CLASS + "schemes = ('NBD+BAD',)", "lower-case"),
        (HOOK + "return [Example()]" + CLASS + "schemes = (7,)", "lower-case"),
        (HOOK + "return [Example()]" + CLASS + "schemes = ('nbds+bad',)", "without TLS"),
        (HOOK + "return [Example()]" + CLASS + "schemes = ('nbd bad',)", "scheme"),
        (HOOK + "return [Example()]" + CLASS + "parameters = 'socket'", "parameters must be a tuple"),
        (HOOK + "return [Example()]" + CLASS + "del schemes", "schemes"),
        (HOOK + "return [Example(), Other()]" + CLASS + "\nclass Other(Example): name = 7", "has no name"),
        (
            HOOK + "return [Example(), Other()]" + CLASS.replace("Example", "Other").replace("    name = 'bad'\n", "") + "\n"
            "class Example(Other): name = 'bad'",
            "has no name",
        ),
    ],
)
def test_broken_plugin_is_warned_of_once_and_harms_no_other(site, source, reason):
    site.install("nbdcore-bad", {"bad": "nbdcore_bad"}, nbdcore_bad=source)
    site.install_transport("aaa", "aaa")
    site.install_transport("zzz", "zzz")
    registry = Registry()
    with pytest.warns(TransportWarning) as told:
        assert not registry.supports("bad")
    [warning] = told
    assert reason in str(warning.message)
    assert "nbdcore-bad 1.0" in str(warning.message)
    assert warning.filename == __file__
    assert (registry.supports("aaa"), registry.supports("zzz")) == (True, True)
    status = status_of(registry, "bad")
    assert (status.state, status.module, status.schemes) == (State.FAILED, "nbdcore_bad", ())
    assert reason in status.reason
    with pytest.raises(TransportUnavailable) as caught:
        registry.get("bad")
    assert status.reason in str(caught.value)


def test_plugin_that_asks_the_registry_loading_it_fails_alone(site):
    source = "import builtins\nbuiltins.registry_under_test.supports('tcp')"
    site.install("nbdcore-bad", {"bad": "nbdcore_bad"}, nbdcore_bad=source)
    site.install_transport("zzz", "zzz")
    builtins.registry_under_test = registry = Registry()
    try:
        with pytest.warns(TransportWarning, match="may not ask the registry"):
            assert registry.supports("zzz")
    finally:
        del builtins.registry_under_test


@pytest.mark.parametrize("damage", ["entry_points.txt", "METADATA"])
def test_unreadable_metadata_of_one_distribution_hides_no_other(site, damage):
    site.install_transport("aaa", "aaa")
    site.install_transport("nbdcore-bad", "bad")
    site.install_transport("zzz", "zzz")
    [metadata] = site.directory.glob("nbdcore_bad*.dist-info")
    if damage == "METADATA":
        (metadata / damage).unlink()
    else:
        (metadata / damage).write_text("[nbdcore.transports]\nbad is no entry point\n")
    registry = Registry()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert (registry.supports("aaa"), registry.supports("zzz")) == (True, True)
    assert registry.supports("bad") or [warning for warning in told if "cannot be read" in str(warning.message)]


def test_where_warnings_are_errors_the_registry_answers_after_the_first(site):
    site.install("nbdcore-bad", {"bad": "nbdcore_bad"}, nbdcore_bad="1 / 0")
    site.install_transport("zzz", "zzz")
    registry = Registry()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TransportWarning):
            registry.supports("zzz")
        assert registry.supports("zzz")


def test_interrupted_scan_starts_over_at_the_next_question(site):
    source = (
        "import sys\nif not hasattr(sys, 'pigeon_interrupted'):\n    sys.pigeon_interrupted = True\n    raise KeyboardInterrupt"
    )
    site.install("nbdcore-bad", {"bad": "nbdcore_bad"}, nbdcore_bad=source)
    registry = Registry()
    try:
        with pytest.raises(KeyboardInterrupt):
            registry.statuses()
        with pytest.warns(TransportWarning, match="hook"):
            assert status_of(registry, "bad").state is State.FAILED
    finally:
        del sys.pigeon_interrupted


# Who wins


def test_of_two_plugins_with_one_name_the_first_distribution_wins(site):
    site.install_transport("nbdcore-pigeon2", "pigeon", ("nbd+two",))
    site.install_transport("nbdcore-pigeon1", "pigeon", ("nbd+one",))
    registry = Registry()
    with pytest.warns(TransportWarning, match="nbdcore_pigeon1 of nbdcore-pigeon1 has the name pigeon already"):
        assert registry.get("pigeon").schemes == ("nbd+one",)
    loser = [status for status in registry.statuses() if status.state is State.CONFLICT]
    assert [(status.distribution, status.schemes) for status in loser] == [("nbdcore-pigeon2", ())]
    assert "nbdcore-pigeon2" in loser[0].reason
    with pytest.raises(TransportUnavailable):
        registry.for_uri(parse_uri("nbd+two://"))


def test_of_two_plugins_with_one_scheme_the_first_name_wins(site):
    site.install_transport("aaa", "owl", ("nbd+owl", "nbd+bird"))
    site.install_transport("bbb", "eagle", ("nbd+bird",))
    registry = Registry()
    with pytest.warns(TransportWarning, match="has the URI scheme nbd\\+bird already"):
        assert registry.for_uri(parse_uri("nbd+bird://")).name == "eagle"
    assert not registry.supports("owl")
    assert status_of(registry, "owl").state is State.CONFLICT


@pytest.mark.parametrize(("name", "schemes"), [("tcp", ("nbd+a",)), ("aaa", ("nbd",))])
def test_stranger_takes_no_name_or_scheme_from_nbdcore(site, name, schemes):
    site.install_transport("aaa", name, schemes)
    registry = Registry()
    with pytest.warns(TransportWarning, match="nbdcore_tcp of nbdcore has"):
        assert type(registry.get("tcp")).__module__ == "nbdcore_tcp"
    assert registry.for_uri(parse_uri("nbd://")) is registry.get("tcp")


def test_name_of_a_plugin_that_did_not_load_is_free_for_the_next(site):
    site.install("aaa", {"pigeon": "module_not_in_this_build"})
    site.install_transport("bbb", "pigeon")
    registry = Registry()
    assert registry.supports("pigeon")
    states = [(status.distribution, status.state) for status in registry.statuses() if status.name == "pigeon"]
    assert states == [("aaa", State.UNAVAILABLE), ("bbb", State.LOADED)]


def test_statuses_come_in_the_order_of_names_then_distributions(site):
    for distribution, name in (("m", "zebra"), ("k", "ant"), ("l", "zebra"), ("a", "yak")):
        site.install(distribution, {name: f"module_of_{distribution}"})
    order = [(status.name, status.distribution) for status in Registry().statuses()]
    assert order == sorted(order)
    assert [pair for pair in order if len(pair[1]) == 1] == [("ant", "k"), ("yak", "a"), ("zebra", "l"), ("zebra", "m")]


# Blocking


@pytest.mark.parametrize("value", ["pigeon", " owl , pigeon,,", "pigeon,no-such-transport"])
def test_transport_blocked_by_the_environment_is_never_imported(site, monkeypatch, value):
    site.install_transport("nbdcore-pigeon", "pigeon")
    monkeypatch.setenv(BLOCK_VARIABLE, value)
    registry = Registry()
    assert not registry.supports("pigeon")
    assert "nbdcore_pigeon" not in sys.modules
    assert status_of(registry, "pigeon").state is State.BLOCKED
    with pytest.raises(TransportUnavailable, match=BLOCK_VARIABLE):
        registry.get("pigeon")
    with pytest.raises(TransportUnavailable, match=BLOCK_VARIABLE):
        registry.for_uri(parse_uri("nbd+pigeon://"))


def test_transport_blocked_by_the_program_is_never_imported(site):
    site.install_transport("nbdcore-pigeon", "pigeon")
    registry = Registry()
    registry.block("pigeon")
    assert not registry.supports("pigeon")
    assert "nbdcore_pigeon" not in sys.modules
    with pytest.raises(TransportUnavailable, match="blocked by this program"):
        registry.get("pigeon")
    assert Registry().supports("pigeon")  # nobody else's decision


def test_transport_blocked_after_loading_is_withdrawn(site):
    site.install_transport("nbdcore-pigeon", "pigeon")
    registry = Registry()
    assert registry.supports("pigeon")
    registry.block("pigeon")
    assert not registry.supports("pigeon")
    assert (status_of(registry, "pigeon").state, status_of(registry, "pigeon").schemes) == (State.BLOCKED, ())
    with pytest.raises(TransportUnavailable, match="blocked"):
        registry.for_uri(parse_uri("nbd+pigeon://"))


def test_blocked_transport_of_a_plugin_with_another_name_is_blocked_too(site):
    source = """
        import nbdcore_pigeon

        class Owl(nbdcore_pigeon.Example):
            name = "owl"
            schemes = ("nbd+owl",)

        @nbdcore_pigeon.hookimpl
        def nbdcore_transports():
            return [Owl(), nbdcore_pigeon.Example()]
    """
    site.install("nbdcore-owl", {"owl": "nbdcore_owl"}, nbdcore_owl=source)
    site.install_transport("nbdcore-pigeon", "pigeon")
    registry = Registry()
    registry.block("pigeon")
    assert (registry.supports("owl"), registry.supports("pigeon")) == (True, False)


# Registering


def example_plugin(name):
    """Return a module object that no entry point announces."""
    module = types.ModuleType(f"frozen_{name}")
    exec(example_source(name), module.__dict__)
    return module


@pytest.mark.parametrize("scanned", [False, True], ids=["before the scan", "after the scan"])
@pytest.mark.parametrize("kind", ["module", "object", "name"])
def test_registered_plugin_is_a_plugin_like_any_other(site, kind, scanned):
    site.install_transport("plain-module", "pigeon")
    for metadata in site.directory.glob("*.dist-info/*"):
        metadata.unlink()
    module = example_plugin("pigeon")
    plugin = {"module": module, "object": ObjectPlugin(module), "name": "plain_module"}[kind]
    registry = Registry()
    if scanned:
        assert not registry.supports("pigeon")
    registry.register(plugin, name="pigeon")
    assert registry.for_uri(parse_uri("nbd+pigeon://")) is registry.get("pigeon")
    status = status_of(registry, "pigeon")
    assert (status.state, status.distribution, status.version) == (State.LOADED, "", "")
    expected = {"module": "frozen_pigeon", "object": f"{__name__}:ObjectPlugin", "name": "plain_module"}
    assert status.module == expected[kind]


class ObjectPlugin:
    """A plugin that is an object: its hook is a method."""

    def __init__(self, module):
        self.nbdcore_transports = module.nbdcore_transports


def test_registered_plugin_goes_before_installed_ones(site):
    site.install_transport("aaa", "pigeon", ("nbd+a",))
    registry = Registry()
    registry.register(example_plugin("pigeon"), name="pigeon")
    with pytest.warns(TransportWarning, match="which this program registered has the name pigeon already"):
        assert registry.get("pigeon").schemes == ("nbd+pigeon",)


def test_plugin_both_registered_and_installed_is_one_plugin(site):
    site.install_transport("nbdcore-pigeon", "pigeon")
    registry = Registry()
    registry.register("nbdcore_pigeon", name="pigeon")
    assert status_of(registry, "pigeon").state is State.LOADED


def test_registered_plugin_that_breaks_is_warned_of(site):
    registry = Registry()
    registry.statuses()
    with pytest.warns(TransportWarning, match="registered by this program") as told:
        registry.register(object(), name="broken")
    assert told[0].filename == __file__
    assert status_of(registry, "broken").state is State.FAILED


def test_registered_plugin_may_be_blocked(site):
    registry = Registry()
    registry.block("pigeon")
    registry.register("module_that_nobody_has", name="pigeon")
    assert status_of(registry, "pigeon").state is State.BLOCKED


def test_program_without_any_package_metadata_registers_its_transports(tmp_path):
    # What a frozen program looks like: the packages' files, and nothing that says that they were installed.
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    installed = [path for path in Path(pluggy.__file__).parents[1].iterdir() if path.suffix not in (".dist-info", ".pth")]
    for path in {path.name: path for path in [*installed, PROJECT / "nbdcore"]}.values():
        (bundle / path.name).symlink_to(path)
    (bundle / "plain_module.py").write_text(example_source("pigeon"))
    printed = run(
        """
        import sys
        sys.path[:] = [path for path in sys.path if "-packages" not in path] + [sys.argv[1]]
        from nbdcore.plugins.registry import registry, Registry
        try:
            registry.get("pigeon")
        except OSError as error:
            print("registry.register()" in str(error), len(registry.statuses()))
        registry.register("plain_module", name="pigeon")
        print(registry.supports("pigeon"))
        """,
        bundle,
    )
    assert printed == ["True", "0", "True"]


# What is said to somebody who asks for what is not there


def test_unknown_transport_is_told_what_is_loaded_and_what_to_install(site):
    site.install_transport("nbdcore-pigeon", "pigeon")
    with pytest.raises(TransportUnavailable, match=r"loaded here: .*pigeon.*pip install nbdcore-carrier") as caught:
        Registry().get("carrier")
    assert caught.value.errno == errno.ENOTSUP


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("nbd+carrier://", "pip install nbdcore-carrier"),
        ("nbds+carrier://", "pip install nbdcore-carrier"),
        ("nbd+carrier://", "nbd+pigeon"),
        ("nbd+carrier://", "sleepy is not loaded: it is asleep"),
        ("http://host/", "no transport answers to http://"),
        ("nbd+sleepy://", "transport sleepy cannot be used: it is asleep"),
    ],
)
def test_uri_that_no_transport_answers_to_is_told_which_do(site, uri, said):
    site.install_transport("nbdcore-pigeon", "pigeon")
    source = "from nbdcore.errors import TransportUnavailable\nraise TransportUnavailable('it is asleep')"
    site.install("nbdcore-sleepy", {"sleepy": "nbdcore_sleepy"}, nbdcore_sleepy=source)
    with pytest.raises(TransportUnavailable) as caught:
        Registry().for_uri(parse_uri(uri))
    assert said in str(caught.value)
    assert caught.value.errno == errno.ENOTSUP
    assert ("pip install" in str(caught.value)) == ("carrier" in uri)


# Threads and forks


def test_many_threads_asking_at_once_cause_one_scan(site):
    source = "import sys, time\nsys.pigeon_imports = getattr(sys, 'pigeon_imports', 0) + 1\ntime.sleep(0.05)\n"
    site.install("nbdcore-pigeon", {"pigeon": "nbdcore_pigeon"}, nbdcore_pigeon=source + example_source("pigeon"))
    registry = Registry()
    start = threading.Barrier(16)
    answers = []

    def ask():
        start.wait(timeout=20)
        answers.append(registry.get("pigeon"))

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    try:
        assert sys.pigeon_imports == 1
    finally:
        del sys.pigeon_imports
    assert len(answers) == 16
    assert len(set(map(id, answers))) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_child_forked_in_the_middle_of_a_scan_scans_for_itself(site):
    source = """
        import os
        import sys

        PARENT = os.getpid()

        class Slow(Example):
            name = "slow"
            schemes = ("nbd+slow",)

        @hookimpl
        def nbdcore_transports():
            if os.getpid() == PARENT:  # the parent's scan stays in the middle until the child is done
                sys.in_the_scan.set()
                sys.child_is_done.wait(30)
            return [Slow()]
    """
    site.install("nbdcore-slow", {"slow": "nbdcore_slow"})
    (site.directory / "nbdcore_slow.py").write_text(example_source("slow") + textwrap.dedent(source))
    printed = run(
        """
        import os, signal, sys, threading, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons advise against forking with threads: the point here
        sys.path.insert(0, sys.argv[1])
        sys.in_the_scan, sys.child_is_done = threading.Event(), threading.Event()
        from nbdcore.plugins.registry import registry
        thread = threading.Thread(target=registry.statuses)
        thread.start()
        assert sys.in_the_scan.wait(30)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if registry.supports("slow") else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        sys.child_is_done.set()
        thread.join(30)
        print(registry.supports("slow"))
        """,
        site.directory,
    )
    assert printed == ["0", "True"]

"""Entry points are found in folders by reading them, and everywhere else by importlib_metadata; both find the same."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import importlib_metadata
import pytest

from nbdcore.plugins.announced import announced_plugins


def found():
    """Return what is announced by what the tests install: not nbdcore's own."""
    complaints = []
    plugins = announced_plugins(complaints)
    assert complaints == []
    return sorted((it.name, it.module, it.distribution, it.version) for it in plugins if it.distribution != "nbdcore")


class Elsewhere:
    """A finder of modules that finds none, and may find distributions that are in no folder."""

    @staticmethod
    def find_spec(*_):
        return None

    @staticmethod
    def find_distributions(_):
        return iter(())


@pytest.fixture(params=["folders", "importlib_metadata"])
def searched(request, monkeypatch):
    """Have one or the other way of searching find what is in folders."""
    if request.param == "importlib_metadata":
        monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Elsewhere()])
    else:
        monkeypatch.setattr(importlib_metadata, "distributions", None)


@pytest.mark.usefixtures("searched")
def test_groups_comments_and_extras_of_entry_points_are_understood(site):
    site.install("nbdcore-pigeon", {"pigeon": "pigeons:Roof.plugin [fast, far]"}, "2.0.1")
    [file] = site.directory.glob("*.dist-info/entry_points.txt")
    file.write_text(
        f"[console_scripts]\npigeon = pigeons:main\n\n# a comment\n{file.read_text()}\n[other]\nnbdcore.transports = 1\n"
    )
    assert found() == [("pigeon", "pigeons:Roof.plugin [fast, far]", "nbdcore-pigeon", "2.0.1")]


@pytest.mark.usefixtures("searched")
def test_object_in_a_module_is_loaded_and_a_lost_one_is_not(site):
    entry_points = {"there": "pigeons:Roof.plugin", "lost": "pigeons:Roof.cat", "nonsense": "pigeons : : roof"}
    site.install("nbdcore-pigeon", entry_points, pigeons="class Roof:\n    plugin = 'coo'")
    loads = {plugin.name: plugin.load for plugin in announced_plugins([]) if plugin.name in entry_points}
    assert loads["there"]() == "coo"
    with pytest.raises(AttributeError, match="cat"):
        loads["lost"]()
    with pytest.raises(ValueError, match="neither a module nor an object"):
        loads["nonsense"]()


@pytest.mark.usefixtures("searched")
def test_of_two_copies_of_a_distribution_the_first_on_the_path_counts(site, tmp_path_factory, monkeypatch):
    site.install_transport("nbdcore-pigeon", "pigeon")
    site.directory = tmp_path_factory.mktemp("first")
    site.install("nbdcore-pigeon", {"pigeon": "newer"}, "2.0")
    monkeypatch.syspath_prepend(site.directory)
    assert found() == [("pigeon", "newer", "nbdcore-pigeon", "2.0")]


@pytest.mark.usefixtures("searched")
def test_line_that_is_no_entry_point_is_a_complaint_that_names_the_distribution(site):
    site.install_transport("nbdcore-pigeon", "pigeon")
    site.install_transport("nbdcore-bad", "bad")
    [file] = site.directory.glob("nbdcore_bad*/entry_points.txt")
    file.write_text("[nbdcore.transports]\nneither name nor value\n")
    complaints = []
    assert "pigeon" in [plugin.name for plugin in announced_plugins(complaints)]
    [complaint] = complaints
    assert "bad" in complaint
    assert "cannot be read: ValueError: no entry point: neither name nor value" in complaint


def test_what_is_in_an_archive_is_found_beside_what_is_in_folders(site, tmp_path):
    site.install_transport("nbdcore-pigeon", "pigeon")
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("nbdcore_owl-1.0.dist-info/METADATA", "Name: nbdcore-owl\nVersion: 1.0\n")
        file.writestr("nbdcore_owl-1.0.dist-info/entry_points.txt", "[nbdcore.transports]\nowl = nbdcore_owl\n")
    # In a process of its own: importlib_metadata keeps an archive open that it has looked into.
    program = """
import sys
sys.path[:0] = sys.argv[1:]
from nbdcore.plugins.announced import announced_plugins
for plugin in announced_plugins([]):
    print(plugin.name, plugin.distribution)
"""
    command = [sys.executable, "-c", program, str(archive), str(site.directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert {"owl nbdcore-owl", "pigeon nbdcore-pigeon"} < set(done.stdout.splitlines())


@pytest.mark.usefixtures("searched")
def test_missing_and_unreadable_places_and_those_that_are_no_names_are_passed_over(site, monkeypatch):
    site.install_transport("nbdcore-pigeon", "pigeon")
    monkeypatch.setattr(sys, "path", [*sys.path, str(site.directory / "missing"), "x" * 5000, site.directory, ""])
    assert [name for name, *_ in found()] == ["pigeon"]

"""Public signatures say what they take and return: Any hides a mistake from every type checker."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

# Not the contract of transports: each has addresses of a kind of its own, which only it can name.
MODULES = ["nbdcore", "nbdcore.aio", "nbdcore.disk", "nbdcore.server", "nbdcore.streams.base"]
_ANY = re.compile(r"\bAny\b")


def functions(owner):
    """Yield each public function of a class or module, inherited ones of ours too, by its full name."""
    if inspect.isfunction(owner):
        yield owner.__qualname__, owner
    elif inspect.isclass(owner):
        for base in owner.__mro__:
            for name, found in vars(base).items() if base.__module__.startswith("nbdcore") else ():
                if name == "__init__" or not name.startswith("_"):
                    function = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
                    if inspect.isfunction(function):
                        yield f"{base.__qualname__}.{name}", function


def annotated_with_any(module):
    names = importlib.import_module(module)
    return sorted(
        {
            f"{name}({parameter}: {annotation})"
            for public in names.__all__
            for name, function in functions(getattr(names, public))
            for parameter, annotation in function.__annotations__.items()
            if _ANY.search(str(annotation))
        }
    )


@pytest.mark.parametrize("module", MODULES)
def test_no_public_signature_takes_or_returns_anything(module):
    assert annotated_with_any(module) == []


def test_a_signature_with_any_is_found():
    class Loose:
        def call(self, argument: Any) -> None:  # noqa: F821 (a name is enough)
            """Take anything."""

    Loose.__module__ = "nbdcore.loose"
    assert [name for name, function in functions(Loose) if _ANY.search(str(function.__annotations__))]

"""What would be installed beside this distribution, and a process in which nothing else can be imported.

Run as a program, ``python -m tests.support.installed NAMES ACT ARGUMENT ...`` calls a function of
:mod:`tests.support.acts` as after a ``pip install`` of the distributions NAMES and no other, and prints what it returns
as JSON.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import sys
import tomllib
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from importlib import metadata
from types import ModuleType
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import ROOT

OWN = "featstore"


@cache
def project() -> dict[str, Any]:
    """``[project]`` of ``pyproject.toml``."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _requirements(name: str) -> Iterator[tuple[Requirement, str]]:
    """What a distribution requires, and under which extra; of this one as the checkout has it, installed or not."""
    if name != OWN:
        for text in metadata.requires(name) or ():
            yield Requirement(text), ""
        return
    for text in project()["dependencies"]:
        yield Requirement(text), ""
    for extra, texts in project()["optional-dependencies"].items():
        for text in texts:
            yield Requirement(text), extra


def closure(*names: str) -> set[str]:
    """Distributions that ``pip install`` of some would bring along, those themselves among them.

    Args:
        *names: Such as ``featstore[align]`` or ``numpy``.
    """
    found: dict[str, set[str]] = {}
    todo = [Requirement(name) for name in names]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        new = {"", *requirement.extras} - found.get(name, set())
        found.setdefault(name, set()).update(new)
        try:
            inner = list(_requirements(name)) if new else []
        except metadata.PackageNotFoundError:
            continue  # for another platform, or not what anything here is about
        for each, extra in inner:
            if (not extra or extra in new) and (
                each.marker is None or any(each.marker.evaluate({"extra": name}) for name in new)
            ):
                todo.append(each)
    return set(found)


def hidden(*names: str) -> list[str]:
    """Import names of everything that is installed here and would not be, after a ``pip install`` of some.

    Args:
        *names: As :func:`closure` takes them; this distribution itself is never hidden.
    """
    there = closure(*names) | {OWN}
    return sorted(
        name
        for name, owners in metadata.packages_distributions().items()
        if not there & {canonicalize_name(owner) for owner in owners}
    )


class Without(importlib.abc.MetaPathFinder):
    """A finder that finds all but what would not be installed: neither modules nor entry points and versions."""

    def __init__(self, finder: Any, installed: Collection[str], modules: Collection[str]) -> None:
        self.finder = finder
        self.installed = installed
        self.modules = modules

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in self.modules:
            return None
        found: importlib.machinery.ModuleSpec | None = self.finder.find_spec(name, path, target)
        return found

    def find_distributions(self, *arguments: Any) -> Iterator[metadata.Distribution]:
        if hasattr(self.finder, "find_distributions"):
            for each in self.finder.find_distributions(*arguments):
                if canonicalize_name(each.name) in self.installed:
                    yield each


def main() -> None:
    wanted, act, *arguments = sys.argv[1:]
    names = wanted.split()
    installed, modules = closure(*names) | {OWN}, set(hidden(*names))
    sys.meta_path[:] = [Without(finder, installed, modules) for finder in sys.meta_path]
    result = getattr(importlib.import_module("tests.support.acts"), act)(*arguments)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

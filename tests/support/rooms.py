"""The modules of the three packages and who uses whom, read from the source itself.

``python -m tests.support.rooms`` counts the rooms (modules and packages) directly inside each package, and the arrows
between them: one where anything inside a room uses anything inside another, imports in functions included.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.support import ROOT

#: The packages, from the ground up: each may use the ones before it.
PACKAGES_IN_ORDER = ("featstore", "align", "evaluate")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for room in PACKAGES_IN_ORDER for path in sorted((ROOT / room).rglob("*.py"))}
PACKAGES = {name for name, path in SOURCES.items() if path.name == "__init__.py"}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text(encoding="utf-8"), filename=str(SOURCES[name]))


def imported(node: ast.AST) -> Iterator[str]:
    """Modules that one statement imports; `from a import b` gives both `a` and `a.b`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield node.module or ""
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Statements that run when a module is imported: outside functions and outside `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.expr)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from at_import(child)


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements below a node; expressions, which are most of a tree, hold none."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield child
            yield from statements(child)


@cache
def import_statements(name: str) -> list[ast.Import | ast.ImportFrom]:
    """The imports of a module, wherever they stand."""
    return [node for node in statements(tree(name)) if isinstance(node, (ast.Import, ast.ImportFrom))]


@cache
def all_imports(name: str) -> set[str]:
    return {target for node in import_statements(name) for target in imported(node)}


@cache
def import_time_imports(name: str) -> set[str]:
    return {target for node in at_import(tree(name)) for target in imported(node)}


@cache
def used_modules(name: str) -> set[str]:
    """Modules whose definitions a module uses, lazily or not; what a package passes on counts as its definer's."""
    used = set()
    for node in import_statements(name):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names} & SOURCES.keys()
        elif node.module in SOURCES:
            for alias in node.names:
                used.add(definer(node.module, alias.name))
    return used - {name}


def definer(module: str, name: str) -> str:
    """The module behind `from module import name`."""
    if f"{module}.{name}" in SOURCES:
        return f"{module}.{name}"
    if module in PACKAGES:
        for node in import_statements(module):
            if isinstance(node, ast.ImportFrom) and node.module in SOURCES:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return definer(node.module, alias.name)
    return module


def arrows(package: str) -> dict[str, set[str]]:
    """Who uses whom among the modules and packages directly inside a package, lazily or not."""
    depth = package.count(".") + 1
    found: dict[str, set[str]] = defaultdict(set)
    for name in SOURCES:
        if name.startswith(f"{package}."):
            room = ".".join(name.split(".")[: depth + 1])
            # A package's __init__ passes on what is inside; its own arrows are those of the modules inside.
            targets = {target for target in used_modules(name) if target.startswith(f"{package}.")}
            found[room] |= {".".join(target.split(".")[: depth + 1]) for target in targets} - {room}
    return {room: targets & found.keys() for room, targets in found.items()}


def main() -> None:
    for package in sorted(PACKAGES):
        found = arrows(package)
        sys.stdout.write(f"{package:36} {len(found):3} rooms {sum(map(len, found.values())):4} arrows\n")


if __name__ == "__main__":
    main()

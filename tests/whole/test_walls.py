"""The rooms and what may pass between them, read from the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable

import pytest

from tests.support.rooms import (
    PACKAGES,
    PACKAGES_IN_ORDER,
    SOURCES,
    all_imports,
    arrows,
    at_import,
    import_time_imports,
    imported,
    tree,
    used_modules,
)
from tests.support.store_fixtures import Recipe, write_quickly

#: Every room may use the ones before it.
ALLOWED = {
    "featstore": {"featstore"},
    "align": {"featstore", "align"},
    "evaluate": {"featstore", "align", "evaluate"},
}

#: Rooms that may import transformers and its company.
KNOW_TRANSFORMERS = ("featstore.models", "featstore.demo", "evaluate.injection")

#: What the store may use of the rest of its package.
BELOW_THE_STORE = {
    "featstore.errors",
    "featstore.runtime.provenance",
    "featstore.runtime.console",
    # Numbers and names, which are part of the format.
    "featstore.text.roles",
}

#: Rooms whose functions take arrays, and know neither a store nor a run.
ARRAYS_ONLY = {
    "align.solvers": {"align.moments.scatter"},
    "align.statistics": set(),
    "align.metrics": {"align.moments.scatter", "align.solvers.row_effects", "align.statistics"},
    "align.kernels": {"align.solvers.row_effects"},
    "align.similarity.measures": {
        "align.moments.scatter",
        "align.solvers",
        "align.statistics",
        "featstore.store.format.elements",
    },
}

UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def within(name: str, rooms: Iterable[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of one circle, or none."""
    done: set[str] = set()

    def visit(node: str, above: tuple[str, ...]) -> list[str]:
        if node in above:
            return [*above[above.index(node) :], node]
        if node in done:
            return []
        done.add(node)
        return next((found for target in sorted(graph[node]) if (found := visit(target, (*above, node)))), [])

    return next((found for node in sorted(graph) if (found := visit(node, ()))), [])


def test_the_sources_are_found():
    assert {"featstore", "featstore.store", "align.solvers", "evaluate"} <= SOURCES.keys()
    assert "transformers" in all_imports("featstore.models.loading")
    assert "transformers" not in import_time_imports("featstore.models.loading")
    assert "featstore.store.read.store" in used_modules("featstore.store.write.index")
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_a_room_uses_only_the_rooms_before_it():
    for name in SOURCES:
        used = {target.partition(".")[0] for target in all_imports(name)} & set(PACKAGES_IN_ORDER)
        assert used <= ALLOWED[name.partition(".")[0]], name


def test_no_module_imports_itself_in_a_circle():
    """Imports inside functions and under TYPE_CHECKING count."""
    graph = {name: used_modules(name) - PACKAGES for name in SOURCES.keys() - PACKAGES}
    assert circle(graph) == []


def test_no_room_imports_itself_in_a_circle():
    """Of every package: what its modules and packages use of each other goes one way."""
    for package in PACKAGES:
        assert circle(arrows(package)) == [], package


def test_no_module_shadows_a_name_that_its_package_gives():
    """`package.name` must not be a function before and a module after somebody imports it."""
    for package in PACKAGES:
        own = {name.rpartition(".")[2] for name in SOURCES if name.rpartition(".")[0] == package}
        given = {
            alias.asname or alias.name
            for node in at_import(tree(package))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if f"{node.module}.{alias.name}" not in SOURCES
        }
        given |= {node.name for node in tree(package).body if isinstance(node, ast.FunctionDef)}
        # What a package gives lazily.
        for node in tree(package).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                given |= set(ast.literal_eval(node.value))
        # `featstore.errors` is the module itself, by either way.
        modules = {name for name in own if f"{package}.{name}" in import_time_imports(package)}
        assert own & given <= modules, package


def test_the_other_rooms_do_not_know_transformers():
    for name in SOURCES:
        libraries = {target.partition(".")[0] for target in all_imports(name)}
        assert within(name, KNOW_TRANSFORMERS) or not libraries & {"transformers", "tokenizers", "huggingface_hub"}, (
            name
        )


def test_rooms_of_arrays_know_nothing_else():
    for room, more in ARRAYS_ONLY.items():
        for name in SOURCES:
            if within(name, [room]):
                others = {target for target in used_modules(name) if not within(target, [room, *more])}
                assert others <= {"featstore.errors"}, name


def test_nothing_unsafe_and_no_bare_assert():
    for name in SOURCES:
        for node in ast.walk(tree(name)):
            where = f"{name}:{getattr(node, 'lineno', 0)}"
            assert not isinstance(node, ast.Assert), f"{where}: `assert` vanishes under python -O; raise an error"
            assert not {target.partition(".")[0] for target in imported(node)} & UNSAFE, where
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in ("torch.load", "torch.save", "pickle.load", "pickle.loads"), where
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "shell"):
                assert isinstance(node.value, ast.Constant), where
                assert node.value.value is False, f"{where}: {node.arg}"
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                        assert isinstance(value, ast.Constant), where
                        assert value.value is False, where
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "__import__"), where


READER = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    names = {"torch", "transformers", "tokenizers", "datasets", "huggingface_hub", "scipy", "sklearn", "dask",
             "matplotlib", "accelerate", "safetensors", "pandas", "align", "evaluate"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
from pathlib import Path
import numpy as np
import zarr
from featstore import open_store
from featstore.store.write.index import add_pairs
from featstore.store.read.loader import PairBatches
from featstore.store.inspect.verify import verify_store

store = open_store(sys.argv[1])
pairs = store.pairs("a", "b").select(0)
batches = PairBatches(store.rows("a", 0), store.rows("b", 0), pairs)
x, y = next(batches.shuffled(64, seed=0, epoch=1))
assert x.shape == y.shape == (64, 8) and x.dtype == np.float32
assert len(store.corpus.window_text(0)) > 10 and store.norms("a", 3).all()
assert zarr.open_group(sys.argv[1], mode="r", use_consolidated=False)["models/a/resid/0"].dtype == np.uint16
assert verify_store(sys.argv[1], quiet=True)["damage"] == []
add_pairs(Path(sys.argv[1]), "word")
print(len(pairs), sorted(set(sys.modules) & Blocked.names))
"""


def test_a_store_is_read_without_torch_or_transformers(tmp_path):
    path = write_quickly(tmp_path / "store.zarr", Recipe())
    done = subprocess.run([sys.executable, "-c", READER, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, _, blocked = done.stdout.partition(" ")
    assert int(count) > 300
    assert blocked.strip() == "[]"


def test_the_store_knows_nothing_of_models():
    """What reads a store must not need what wrote it."""
    for name in SOURCES:
        if within(name, ["featstore.store"]):
            above = {target for target in import_time_imports(name) if target in SOURCES and "." in target}
            assert all(
                within(target, ["featstore.store", *BELOW_THE_STORE, "featstore.runtime"]) for target in above
            ), name
            assert not {target.partition(".")[0] for target in import_time_imports(name)} & {
                "torch",
                "dask",
                "datasets",
            }


@pytest.mark.parametrize("room", PACKAGES_IN_ORDER)
def test_importing_a_room_imports_no_heavy_library(room):
    """`--help` and tab completion stay quick; heavy imports stay inside the functions that need them."""
    heavy = {"torch", "transformers", "matplotlib", "dask", "pandas", "pydantic"}
    code = f"import sys, {room}.cli; print(sorted(set(sys.modules) & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

"""The rooms and what may pass between them, read from the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from store_fixtures import Recipe, write_quickly

ROOT = Path(__file__).parents[1]
ROOMS = ("featstore", "align", "evaluate")

#: Every room may use the ones before it.
ALLOWED = {
    "featstore": {"featstore"},
    "align": {"featstore", "align"},
    "evaluate": {"featstore", "align", "evaluate"},
}

#: Modules of featstore that know transformers; all of evaluate does, nothing of align.
KNOW_TRANSFORMERS = {
    f"featstore.{name}"
    for name in (
        "models",
        "sites",
        "tokens",
        "extract",
        "forward",
        "doctor",
        "calibration",
        "calibration.assets",
        "calibration.twin",
    )
}


#: What the store may use of the rest of its room.
BELOW_THE_STORE = {"featstore.errors", "featstore.provenance", "featstore.console"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))}


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
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from at_import(child)


def all_imports(name: str) -> set[str]:
    return {target for node in ast.walk(tree(name)) for target in imported(node)}


def import_time_imports(name: str) -> set[str]:
    return {target for node in at_import(tree(name)) for target in imported(node)}


def test_the_sources_are_found():
    assert {"featstore", "featstore.store", "align.solvers", "evaluate"} <= SOURCES.keys()
    assert "transformers" in all_imports("featstore.models")
    assert "transformers" not in import_time_imports("featstore.models")
    assert "featstore.store.reader" in import_time_imports("featstore.store.index")


@pytest.mark.parametrize("name", SOURCES)
def test_a_room_uses_only_the_rooms_before_it(name):
    used = {target.partition(".")[0] for target in all_imports(name)} & set(ROOMS)
    assert used <= ALLOWED[name.partition(".")[0]]


def test_no_module_imports_itself_in_a_circle():
    graph = {name: import_time_imports(name) & SOURCES.keys() - {name} for name in SOURCES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            pytest.fail(" -> ".join((*above[above.index(name) :], name)))
        if name not in done:
            for target in sorted(graph[name]):
                # A package's __init__ imports its modules; they, in turn, name it only as `from package import module`.
                if not name.startswith(f"{target}."):
                    visit(target, (*above, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
    assert len(done) == len(SOURCES)


@pytest.mark.parametrize(
    "name", [name for name in SOURCES if name not in KNOW_TRANSFORMERS and not name.startswith("evaluate")]
)
def test_the_other_modules_do_not_know_transformers(name):
    libraries = {target.partition(".")[0] for target in all_imports(name)}
    assert not libraries & {"transformers", "tokenizers", "huggingface_hub"}


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_unsafe_and_no_bare_assert(name):
    for node in ast.walk(tree(name)):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{where}: `assert` vanishes under python -O; raise an error"
        unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
        assert not {target.partition(".")[0] for target in imported(node)} & unsafe, where
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
from featstore.store.index import add_pairs
from featstore.store.loader import PairBatches
from featstore.store.verify import verify_store

store = open_store(sys.argv[1])
pairs = store.pairs("a", "b").select(0)
batches = PairBatches(store.rows("a", 0), store.rows("b", 0), pairs)
x, y = next(batches.shuffled(64, seed=0, epoch=1))
assert x.shape == y.shape == (64, 8) and x.dtype == np.float32
assert len(store.corpus.window_text(0)) > 10 and store.norms("a", 3).all()
assert zarr.open_group(sys.argv[1], mode="r")["models/a/resid/0"].dtype == np.uint16
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


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("featstore.store")])
def test_the_store_knows_nothing_of_models(name):
    """What reads a store must not need what wrote it."""
    above = {target for target in import_time_imports(name) if target in SOURCES and target.startswith("featstore.")}
    assert all(target.startswith("featstore.store") or target in BELOW_THE_STORE for target in above), above
    assert not {target.partition(".")[0] for target in import_time_imports(name)} & {"torch", "dask", "datasets"}


@pytest.mark.parametrize("room", ROOMS)
def test_importing_a_room_imports_no_heavy_library(room):
    """`--help` and tab completion stay quick; heavy imports stay inside the functions that need them."""
    code = (
        f"import sys, {room}.cli; print(sorted(set(sys.modules) & {{'torch', 'transformers', 'matplotlib', 'dask'}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

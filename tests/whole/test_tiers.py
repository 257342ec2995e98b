"""What is installed decides what can be done: each extra is enough for what it is for, and what is missing is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from featstore.runtime.extras import DISTRIBUTION, INCLUDES, LIBRARIES, extra_of
from tests.support import ROOT
from tests.support.commands import command_environment
from tests.support.installed import closure, project
from tests.support.rooms import SOURCES, all_imports, import_time_imports

#: What an import name of :data:`LIBRARIES` is called as a distribution, where that is not the same.
CALLED = {"sklearn": "scikit-learn", "google": "protobuf", "yaml": "pyyaml", "array_api_compat": "array-api-compat"}

Acted = Any


def act(name: str, installed: str, store: Path, out: Path, *more: str) -> Acted:
    """What a function of :mod:`tests.support.acts` returns where only some distributions are installed."""
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.installed", installed, name, store, out, *more],
        env=command_environment(TOKENIZERS_PARALLELISM="false"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_rows_are_read_with_numpy_and_zarr_alone(tiny_store: Path, tmp_path: Path) -> None:
    found = act("reading", "numpy zarr", tiny_store, tmp_path)
    assert found["batch"][0] == 64
    assert found["same"]
    assert found["text"] > 10


def test_stores_are_looked_after_without_an_extra(tiny_store: Path, tmp_path: Path) -> None:
    act("looking_after", "featstore", tiny_store, tmp_path)


def test_maps_are_fitted_and_layers_compared_without_torch_or_pictures(tiny_store: Path, tmp_path: Path) -> None:
    found = act("fitting", "featstore[align]", tiny_store, tmp_path)
    assert (found["runs"], found["estimator"]) == (3, "AffineAligner")
    # What was measured is written; what is left out is said.
    assert found["files"] == ["cka.json", "cka_documents.json"]
    [line] = [line for line in found["said"] if "left out" in line]
    assert line == "without jinja2, the page and the heatmaps are left out: pip install 'featstore[page]'"


def test_pages_pictures_and_frames_need_their_extra_alone(tiny_store: Path, tmp_path: Path) -> None:
    found = act("drawing", "featstore[page]", tiny_store, tmp_path)
    assert found["page"] > 10_000
    assert {"cka.html", "cka.json"} < set(found["files"])
    assert all(found["frames"])


def test_models_are_read_without_anything_that_fits(tiny_store: Path, tmp_path: Path) -> None:
    assert act("extracting", "featstore[models]", tiny_store, tmp_path)["rows"] > 100


def test_models_are_evaluated_without_pictures(tiny_store: Path, tmp_path: Path) -> None:
    found = act("injecting", "featstore[evaluate]", tiny_store, tmp_path)
    assert {"stitch.json", "adapter.safetensors", "tensorboard"} <= set(found["files"])
    assert "loss.png" not in found["files"]


def test_buckets_and_schedulers_need_their_extra_alone(tiny_store: Path, tmp_path: Path) -> None:
    found = act("reaching", "featstore[align,cloud]", tiny_store, tmp_path)
    assert found == {"bucket": "ObjectStore", "estimator": "debiased"}


#: What is asked for, where what is installed, and the extra that the refusal names.
MISSING = {
    "featstore": {
        "featstore.extract": "models",
        "featstore.rebuild": "models",
        "featstore.demo_pair": "models",
        "featstore.small_models": "models",
        "open_store": "cloud",
        "Store.to_pandas": "page",
        "align.train": "align",
        "align.cka": "align",
        "align.AffineAligner": "align",
        "align.load": "align",
        "align.compare": "align",
        "evaluate.stitch": "evaluate",
        "evaluate.generate": "evaluate",
        "evaluate.communicate": "evaluate",
        "evaluate.load_models": "evaluate",
        "evaluate.report": "page",
        "featstore extract": "models",
        "featstore doctor": "models",
        "featstore calibrate": "models",
        "featstore demo": "models",
        "align train": "align",
        "align sweep": "align",
        "align cka": "align",
        "align compare": "align",
        "evaluate stitch": "evaluate",
        "evaluate generate": "evaluate",
        "evaluate communicate": "evaluate",
        "evaluate report": "page",
        "evaluate reproduce": "evaluate",
    },
    "featstore[align]": {
        "align.train lora": "models",
        "align.cka scheduler": "cloud",
        "align.cka arrays": "models",
        "align.compare": "page",
        "evaluate.stitch": "evaluate",
        "evaluate.report": "page",
        "evaluate stitch": "evaluate",
        "evaluate report": "page",
    },
}


@pytest.mark.parametrize("installed", MISSING)
def test_what_is_missing_is_named_with_its_extra(installed: str, tiny_store: Path, tmp_path: Path) -> None:
    import align

    align.train(tiny_store, layers=[2], out=tmp_path / "made", quiet=True)
    said = act("refused", installed, tiny_store, tmp_path, *MISSING[installed])
    for name, extra in MISSING[installed].items():
        remedy = f"pip install 'featstore[{extra}]'"
        assert remedy in said[name], (name, said[name])
        assert len(said[name].splitlines()) == 1, said[name]
        if " " in name and not name.startswith("align."):
            assert said[name].startswith(f"{name.split()[0]}: "), said[name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"], "nothing was begun"


def test_extras_are_those_of_the_project() -> None:
    extras = project()["optional-dependencies"]
    assert {*LIBRARIES, *INCLUDES} == extras.keys() - {"all", "dev", "docs"}
    for extra, libraries in LIBRARIES.items():
        brought = closure(f"{DISTRIBUTION}[{extra}]")
        for library in libraries:
            name = CALLED.get(library, library).replace("_", "-").lower()
            assert name in brought, f"[{extra}] does not bring {name}"
    for extra, others in INCLUDES.items():
        for other in others:
            assert closure(f"{DISTRIBUTION}[{other}]") <= closure(f"{DISTRIBUTION}[{extra}]"), (extra, other)
    everything = closure(f"{DISTRIBUTION}[all]")
    assert all(closure(f"{DISTRIBUTION}[{extra}]") <= everything for extra in extras.keys() - {"dev", "docs"})


def test_every_library_that_is_imported_is_declared() -> None:
    core = closure(DISTRIBUTION)
    own = {"featstore", "align", "evaluate", "tests", *sys.stdlib_module_names}
    for module in SOURCES:
        for library in {name.partition(".")[0] for name in all_imports(module)} - own - {""}:
            name = CALLED.get(library, library).replace("_", "-")
            assert extra_of(library) is not None or name in core, f"{module} imports {library}, which nothing declares"


def test_no_command_needs_an_extra_to_be_imported() -> None:
    """Whatever the three commands import before they know what is asked for is installed with them."""
    todo, seen = {f"{name}.cli" for name in ("featstore", "align", "evaluate")}, set[str]()
    while todo:
        module = todo.pop()
        seen.add(module)
        names = import_time_imports(module)
        parents = {module.rsplit(".", k)[0] for k in range(1, module.count(".") + 1)}
        todo |= ((names | parents) & SOURCES.keys()) - seen
        libraries = {name.partition(".")[0] for name in names}
        assert {name for name in libraries if extra_of(name) is not None} == set(), module

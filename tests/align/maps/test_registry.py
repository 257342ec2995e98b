"""The records of the map types: what they refer to exists, and a new type needs nothing else."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from align.closed_form.procrustes import solve
from align.layers import LayerPair
from align.maps import registry
from align.maps.fitted import Aligner, load_adapter
from align.maps.formula import Formula
from align.maps.on_tensors import linear
from align.maps.registry import having, listed, map_type, map_types, register, resolve
from align.notebook.maps import Map
from align.runs.train import train
from align.settings import LoopSettings, Settings, check
from align.sweeps.compare import compare_runs
from align.sweeps.grid import Grid, cells
from align.training.modules import low_rank
from featstore.errors import AdapterError, SpecError
from tests.align.maps.toy.definition import TYPE as DIAGONAL
from tests.support.commands import call
from tests.support.planted import Planted, plant, spectrum_rows

ALL = map_types()


@pytest.fixture
def diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy type, known until the end of the test."""
    monkeypatch.setattr(registry, "_registered", {})
    register(DIAGONAL)


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    x = spectrum_rows(3000, 12, 1, decay=0.5, mean=1.0)
    noise = 0.01 * np.random.default_rng(0).normal(size=x.shape)
    return plant(tmp_path / "s.zarr", x, x * np.linspace(-2, 2, 12) + 3 + noise)


def test_types_come_in_order() -> None:
    names = ["procrustes", "linear", "affine", "reduced-rank", "lora", "mlp", "compress"]
    assert [type_.name for type_ in ALL] == names


@pytest.mark.parametrize("type_", ALL, ids=lambda type_: type_.name)
def test_what_a_record_refers_to_is_there(type_: registry.MapType) -> None:
    for reference, like in ((type_.closed, solve), (type_.module, low_rank), (type_.formula.on_tensors, linear)):
        if reference is not None:
            assert list(inspect.signature(resolve(reference)).parameters) == list(inspect.signature(like).parameters)
    assert type_.closed or type_.module or type_.windows
    assert type_.yardstick.closed is not None
    assert type_.yardstick is type_ or type_.yardstick.label, "an optimum without a name"
    known = {entry.name for settings in (Settings, LoopSettings) for entry in fields(settings)}
    assert type_.options | type_.defaults.keys() | type_.refuses.keys() <= known
    assert type_.summary
    assert type_.title


def test_asking_for_a_type_imports_no_solver_and_no_torch() -> None:
    code = "import sys, align.settings; print({'torch', 'scipy', 'align.closed_form.fit'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_an_unknown_type_is_named_with_those_that_there_are() -> None:
    with pytest.raises(SpecError, match="type 'gan': choose one of procrustes, linear, affine, reduced-rank, lora"):
        map_type("gan")


def test_types_as_words() -> None:
    assert having("skip") == "reduced-rank, lora and mlp"
    assert having("components") == "procrustes"
    assert listed(["a", "b"], "or") == "a or b"


def test_a_name_is_given_once(diagonal: None) -> None:
    register(DIAGONAL)
    with pytest.raises(SpecError, match="a type 'diagonal' already"):
        register(replace(DIAGONAL, order=6))
    with pytest.raises(SpecError, match="a type 'lora' already"):
        register(replace(DIAGONAL, name="lora"))


def test_a_new_type_is_two_files(
    diagonal: None, planted: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    metrics = train(Settings(str(planted.path), "diagonal", both=True), out, quiet=True)
    entry = metrics["pairs"]["a:1->b:1"]
    assert metrics["type"] == "diagonal"
    assert entry["test"]["r2"] > 0.99
    assert entry["baselines"]["shuffled"]["r2"] < 0.1
    assert entry["reasons"]["baselines.closed_form"] == "this is a closed form"
    # Saved and loaded.
    aligner = load_adapter(out).aligners["a:1->b:1"]
    np.testing.assert_allclose(np.diag(aligner.tensors["weight"]), np.linspace(-2, 2, 12), atol=0.01)
    assert aligner.options["numbers"] == 12
    assert aligner.trainable == 24
    test = planted.split == 2
    x, y = (side[1][test].astype(np.float32) for side in (planted.x, planted.y))
    np.testing.assert_allclose(aligner.apply(x), y, atol=0.1)
    # Compared with another run, chosen partners by, and swept.
    other = tmp_path / "affine"
    train(Settings(str(planted.path), "affine"), other, quiet=True)
    rows = compare_runs([out, other])["rows"]
    assert sorted(row["type"] for row in rows) == ["affine", "diagonal", "diagonal"]
    chosen = train(Settings(str(planted.path), "diagonal", layer_map="auto"), tmp_path / "auto", quiet=True)
    assert chosen["layer_map"][0]["fit"] == "diagonal"
    assert [cell.name for cell in cells(Settings("s"), Grid(types=("diagonal", "affine")))] == ["diagonal", "affine"]
    # And by command.
    again = call(
        capsys, "align", "train", "--store", planted.path, "--type", "diagonal", "--out", tmp_path / "cli", "--json"
    ).json
    assert again["pairs"]["a:1->b:1"]["test"] == entry["test"]


def test_a_formula_for_arrays_alone_maps_tensors_and_lets_no_gradient_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    halved = Formula("halved", {"mean_source": "s", "mean_target": "t"}, lambda tensors, x: (x / 2).astype(np.float32))
    register(replace(DIAGONAL, name="halved", formula=halved))
    tensors = dict.fromkeys((*halved.axes, "control_mean_source", "control_mean"), np.zeros(4, np.float32))
    fitted = Map(Aligner(LayerPair("a", (1,), "b", 1), tensors, kind="halved"))
    x = torch.ones(2, 3, 4)
    torch.testing.assert_close(fitted.transform(x), x / 2)
    with pytest.raises(AdapterError, match="is a halved map, which is written for arrays alone: no gradient flows"):
        fitted.transform(x.requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(fitted.transform(x), x / 2)


def test_a_new_type_has_the_options_that_it_says(diagonal: None) -> None:
    for refused, words in (
        (Settings("s", "diagonal", solver="adamw"), "'diagonal' has a closed form only"),
        (Settings("s", "diagonal", shared=True), "--shared: not for type 'diagonal'"),
        (Settings("s", "diagonal", components="3"), "--components is for --type procrustes"),
        (Settings("s", "diagonal", eval_models=True), "on a diagonal run"),
    ):
        with pytest.raises(SpecError, match=words):
            check(refused)
    check(Settings("s", "diagonal"))

"""Closed forms made together are what each is alone, read and computed once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import align.closed_form.problem
import align.runs.train
from align import solvers
from align.runs.judge import Judge
from align.runs.together import share, train_together
from align.runs.train import train
from align.settings import LoopSettings, Settings
from featstore.errors import FitError, SpecError
from featstore.runtime.provenance import read_json
from tests.support.planted import Planted, plant, rotation, spectrum_rows

TYPES = ("procrustes", "linear", "affine", "reduced-rank")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, 1500)
    zero = rng.normal(size=(40, 12))[tokens]
    x = {0: zero, 1: spectrum_rows(1500, 12, 1, decay=0.5, mean=2.0) + zero}
    y = {0: zero, 2: x[1] @ rotation(12, 2) + 0.3 * spectrum_rows(1500, 12, 5), 3: x[1] @ rotation(12, 3) - zero}
    # A few rows of the test split are sinks.
    x[1][-40::20] *= 50
    return plant(tmp_path_factory.mktemp("together") / "s.zarr", x, y, tokens=tokens)


def settings_of(planted: Planted, type_: str, **options: Any) -> Settings:
    loop = LoopSettings(skip="none", rank=3)
    return Settings(str(planted.path), type_, layer_map="1:2,1:3", loop=loop, **options)


@pytest.mark.parametrize("options", [{}, {"both": True}, {"keep_sinks": True}, {"max_rows": 300}], ids=str)
def test_each_is_the_run_that_it_is_alone(planted: Planted, tmp_path: Path, options: dict[str, Any]) -> None:
    runs = [(settings_of(planted, name, **options), tmp_path / name) for name in TYPES]
    assert train_together(runs) == [None] * len(TYPES)
    for settings, out in runs:
        alone = tmp_path / "alone" / settings.type
        train(settings, alone, quiet=True)
        for name in ("metrics.json", "documents.json", "eval_epoch_0.json", "run.yaml"):
            assert (out / name).read_text() == (alone / name).read_text(), (settings.type, name)
        for name in ("adapter.safetensors", "tokens.safetensors"):
            assert (out / name).read_bytes() == (alone / name).read_bytes()


def test_those_among_principal_components_are_made_together(planted: Planted, tmp_path: Path) -> None:
    runs = [(settings_of(planted, "procrustes", components=number), tmp_path / number) for number in ("3", "auto")]
    assert train_together(runs) == [None, None]
    for settings, out in runs:
        train(settings, tmp_path / "alone" / out.name, quiet=True)
        for name in ("metrics.json", "adapter.safetensors"):
            assert (out / name).read_bytes() == (tmp_path / "alone" / out.name / name).read_bytes()


def test_rows_are_read_and_controls_scored_once(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: dict[str, int] = {}

    def count(place: Any, name: str) -> None:
        own = getattr(place, name)

        def called(*given: Any, **words: Any) -> Any:
            counted[name] = counted.get(name, 0) + 1
            return own(*given, **words)

        monkeypatch.setattr(place, name, called)

    count(align.runs.train, "scan")
    count(solvers.spectrum, "eigh")
    count(solvers, "random_orthogonal")
    count(align.closed_form.problem, "polar")
    count(align.closed_form.fit.Solver, "random_rotation")
    runs = [(settings_of(planted, name), tmp_path / name) for name in ("procrustes", "affine", "reduced-rank")]
    assert train_together(runs) == [None] * 3
    assert counted["scan"] == 1
    assert counted["random_orthogonal"] == 1
    # The source of both layer pairs, and what the token alone is predicted from.
    assert counted["eigh"] == 2
    # Of either layer pair the map's and the control's: a map of low rank is on top of the same rotation.
    assert counted["polar"] == 4


def test_one_that_fails_leaves_the_others(planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Judge.entry

    def entry(self: Judge, pair: Any, candidate: Any, known: Any) -> Any:
        if candidate.like.type == "affine":
            raise FitError("no")
        return own(self, pair, candidate, known)

    monkeypatch.setattr(Judge, "entry", entry)
    runs = [(settings_of(planted, name), tmp_path / name) for name in ("affine", "procrustes")]
    runs.append((replace(runs[1][0], type="reduced-rank", loop=replace(runs[1][0].loop, rank=99)), tmp_path / "wide"))
    failed = train_together(runs)
    assert [str(error) if error else None for error in failed] == ["no", None, str(failed[2])]
    assert isinstance(failed[2], FitError)
    assert not (tmp_path / "affine" / "metrics.json").exists()
    assert set(read_json(tmp_path / "procrustes" / "metrics.json")["pairs"]) == {"a:1->b:2", "a:1->b:3"}


@pytest.mark.parametrize(
    "other",
    [
        {"type": "lora"},
        {"type": "compress"},
        {"shared": True},
        {"layer_map": "auto"},
        {"layer_map": "1:3"},
        {"max_rows": 300},
        # Among principal components the target's Gram matrix is needed.
        {"components": "3"},
        {"loop": LoopSettings(skip="none", rank=3, seed=1)},
    ],
    ids=str,
)
def test_what_has_other_rows_or_layers_is_made_alone(planted: Planted, tmp_path: Path, other: dict[str, Any]) -> None:
    first = settings_of(planted, "affine")
    second = replace(settings_of(planted, "procrustes"), **other)
    assert share(first) is not None
    assert share(second) != share(first)
    with pytest.raises(SpecError, match="are fitted together"):
        train_together([(first, tmp_path / "a"), (second, tmp_path / "b")])
    assert list(tmp_path.iterdir()) == []

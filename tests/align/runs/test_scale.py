"""Runs between models of other norms, or with a column far from zero: no default map falls behind the mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import align
from align.judging.sentences import sentence
from align.maps.fitted import load_adapter
from align.maps.registry import map_type, map_types
from align.runs.plan import training_plan
from align.settings import LoopSettings
from align.training.checkpoint import read_checkpoint, write_checkpoint
from featstore.errors import StoreStateError
from tests.support.planted import Planted, only, plant, rotation, spectrum_rows, trained

N = 1500
WIDTHS = [(16, 16), (12, 20), (20, 12)]
#: Options that keep a training short.
SHORT = {"rank": 4, "epochs": 2, "hidden": 16, "latents": 4, "latent_dim": 8, "tracker": "none", "cka_every": 0}


def tenth(path: Path, dx: int, dy: int, noise: float = 0.3, far: float = 0.0) -> Planted:
    """Targets a tenth as long as their sources, turned; with ``far`` a column of each side lies far from zero."""
    x = spectrum_rows(N, dx, 1, decay=0.2, mean=1.0)
    y = 0.1 * x @ rotation(dx, 2, dy)
    y += noise * y.std() * np.random.default_rng(3).normal(size=y.shape)
    x[:, 0] += far
    y[:, 1] += far / 10
    return plant(path / "s.zarr", x, y)


@pytest.fixture(scope="module", params=WIDTHS, ids=str)
def norms(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return tenth(tmp_path_factory.mktemp("norms"), *request.param)


def codes(entry: dict[str, Any]) -> set[str]:
    return {finding["code"] for finding in entry["warnings"]}


def every_default() -> list[str]:
    return [type_.name for type_ in map_types()]


@pytest.mark.parametrize("type_", every_default())
def test_no_default_map_falls_behind_the_mean(norms: Planted, tmp_path: Path, type_: str) -> None:
    # Windows are no rows, and few of them train no compress map.
    for name, rows in (("all", None), ("few", 24))[: 1 if type_ == "compress" else 2]:
        entry = only(trained(norms, tmp_path / name, type_, max_rows=rows, **SHORT))
        for split in ("val", "test"):
            assert entry[split]["r2"] > 0, (name, split)
        assert "no-scale" not in codes(entry)


@pytest.mark.parametrize("type_", ["procrustes", "lora", "mlp", "reduced-rank"])
def test_a_rotation_without_a_factor_is_found_out(norms: Planted, tmp_path: Path, type_: str) -> None:
    own = {**SHORT, "skip": "procrustes"}
    bare = only(trained(norms, tmp_path / "bare", type_, scale=False, **own))
    scaled = only(trained(norms, tmp_path / "scaled", type_, **own))
    assert scaled["test"]["r2"] > 0 > bare["test"]["r2"]
    [finding] = [finding for finding in bare["warnings"] if finding["code"] == "no-scale"]
    options = {name: load_adapter(tmp_path / name).card["pairs"][0]["options"] for name in ("bare", "scaled")}
    factor = "scale" if type_ == "procrustes" else "skip_scale"
    assert options["bare"][factor] == 1
    assert f"least squares gives it {options['scaled'][factor]:.3g}," in sentence(finding)
    assert "leave out --no-scale" in sentence(finding)
    assert "no-scale" not in codes(scaled)


def test_lora_and_its_optimum_are_no_worse_than_the_rank_alone(norms: Planted, tmp_path: Path) -> None:
    lora = only(trained(norms, tmp_path / "lora", "lora", **SHORT))
    alone = only(trained(norms, tmp_path / "alone", "reduced-rank", rank=4, skip="none"))
    optimum = lora["baselines"]["closed_form"]
    assert optimum["name"] == "reduced-rank 4 on procrustes"
    assert optimum["r2"] >= alone["test"]["r2"]
    assert lora["test"]["r2"] > alone["test"]["r2"]


@pytest.mark.parametrize("type_", ["procrustes", "affine", "lora"])
def test_shared_maps_have_a_factor_for_each_pair(tmp_path: Path, type_: str) -> None:
    x = {k: spectrum_rows(N, 12, k) for k in (1, 2)}
    y = {k: 0.1**k * x[k] @ rotation(12, 5) for k in (1, 2)}
    planted = plant(tmp_path / "s.zarr", x, y)
    scaled = trained(planted, tmp_path / "scaled", type_, shared=True, **SHORT)
    bare = trained(planted, tmp_path / "bare", type_, shared=True, scale=False, **SHORT)
    for key in scaled["pairs"]:
        assert scaled["pairs"][key]["test"]["r2"] > 0.9
        assert "no-scale" not in codes(scaled["pairs"][key])
        # Layers share a ridge map between their units, which is no rotation.
        assert ("no-scale" in codes(bare["pairs"][key])) == (type_ != "affine")


def test_an_old_checkpoint_is_not_resumed_on_a_scaled_rotation(tmp_path: Path) -> None:
    """Rotations had no factor once, and trainings on them did not say so."""
    loop = LoopSettings(rank=4, skip="procrustes")
    now = training_plan(map_type("lora"), loop).identity
    before = {name: value for name, value in now.items() if name != "scale"}
    write_checkpoint(tmp_path, {"weight.A": np.zeros(3)}, {"epoch": 1}, before)
    with pytest.raises(StoreStateError, match="scale is null there and true here"):
        read_checkpoint(tmp_path, now)
    bare = training_plan(map_type("lora"), loop, scale=False).identity
    write_checkpoint(tmp_path, {"weight.A": np.zeros(3)}, {"epoch": 1}, bare)
    with pytest.raises(StoreStateError, match="scale is false there and true here"):
        read_checkpoint(tmp_path, now)


@pytest.mark.parametrize("type_", [name for name in every_default() if name != "compress"])
def test_a_column_far_from_zero_is_no_trouble(tmp_path: Path, type_: str) -> None:
    near, moved = tenth(tmp_path / "near", 16, 16), tenth(tmp_path / "far", 16, 16, far=1e5)
    first, second = (
        only(trained(planted, tmp_path / name, type_, **SHORT)) for name, planted in (("a", near), ("b", moved))
    )
    # Without an intercept the far column is spent on the means; a good tenth of the variance leans on it.
    loss = 0.2 if type_ == "linear" else 5e-3
    assert second["test"]["r2"] > first["test"]["r2"] - loss
    assert first["test"]["r2"] > (0.2 if type_ == "reduced-rank" else 0.5)
    # Target columns of mean 1e4 are known to 0.0005 in float32, a hundredth of what they vary by.
    assert second["test"]["cka_debiased"] == pytest.approx(first["test"]["cka_debiased"], abs=loss)
    assert ("no-intercept" in codes(second)) == (type_ == "linear")


def test_the_finding_of_a_missing_intercept_has_figures_and_a_remedy(tmp_path: Path) -> None:
    planted = tenth(tmp_path, 16, 16, far=1e5)
    linear = only(trained(planted, tmp_path / "linear", "linear"))
    affine = only(trained(planted, tmp_path / "affine", "affine"))
    [finding] = [finding for finding in linear["warnings"] if finding["code"] == "no-intercept"]
    figures = f"validation R2 is {linear['val']['r2']:.3f} and {affine['val']['r2']:.3f} with an intercept"
    assert figures in sentence(finding)
    assert sentence(finding).endswith("use --type affine")
    assert "no-intercept" not in codes(affine)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_cka_knows_no_column_far_from_zero(tmp_path: Path, kernel: str) -> None:
    near, moved = tenth(tmp_path / "near", 16, 16), tenth(tmp_path / "far", 16, 16, far=1e5)
    figures = []
    for name, planted in (("a", near), ("b", moved)):
        align.cka(str(planted.path), kernel=kernel, out=tmp_path / name, quiet=True)
        figures.append(json.loads((tmp_path / name / "cka.json").read_text())["cross"][0][0])
    assert figures[1] == pytest.approx(figures[0], abs=2e-3)

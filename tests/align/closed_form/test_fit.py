"""Closed-form fits from a store: planted maps are found, maps that are not there are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

import align.solvers.spectrum
from align import solvers
from align.closed_form.fit import Fit, Solver, baselines, fit_closed, fit_shared_procrustes
from align.closed_form.partners import validation_r2
from align.judging.sentences import sentence
from align.layers import LayerPair
from align.maps.fitted import Aligner, load_adapter
from align.maps.low_rank import check_low_rank
from align.moments.scan import Scan, scan
from align.moments.scatter import centered
from featstore.errors import FitError, PairingError, SpecError
from tests.support.planted import (
    TEST,
    TRAIN,
    VAL,
    Planted,
    leaky,
    only,
    plant,
    rotation,
    spectrum_rows,
    splits_of,
    trained,
)

PAIR = LayerPair("a", (1,), "b", 1)
N, D = 6000, 64


def fitted(planted: Planted, fit: Fit, pair: LayerPair = PAIR) -> Aligner:
    store = planted.store
    pairs = store.pairs(pair.source, pair.target).select()
    return fit_closed(fit, pair, scan(store, pairs, [pair])[pair.key])


def weight_of(out: Path) -> Any:
    [aligner] = load_adapter(out).aligners.values()
    return aligner.tensors["weight"]


@pytest.fixture(scope="module")
def rotated(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """y is x rotated about other means, exactly."""
    x = spectrum_rows(N, D, 1, decay=0.7, mean=3.0)
    return plant(tmp_path_factory.mktemp("fit") / "r.zarr", x, (x - 1.0) @ rotation(D, 2) + 5.0)


def test_a_planted_rotation_is_found(rotated: Planted, tmp_path: Path) -> None:
    entry = only(trained(rotated, tmp_path, "procrustes"))
    np.testing.assert_allclose(weight_of(tmp_path), rotation(D, 2), atol=1e-4)
    for split in ("train", "val", "test"):
        assert entry[split]["r2"] > 1 - 1e-6
        assert entry[split]["retrieval_top1"] == 1
    assert entry["test"]["n"] == (rotated.split == TEST).sum()
    assert entry["baselines"]["mean"]["r2"] == pytest.approx(0, abs=0.02)
    for control in ("identity", "random_rotation", "shuffled"):
        assert entry["baselines"][control]["r2"] < 0.1, control
    assert entry["baselines"]["closed_form"] is None


def test_the_fit_is_scipys_on_the_train_rows(tmp_path: Path) -> None:
    x = spectrum_rows(2000, 24, 3, decay=0.5, mean=2.0)
    y = x @ rotation(24, 4) + np.random.default_rng(5).normal(size=x.shape)
    planted = plant(tmp_path / "s.zarr", x, y)
    rows = planted.split == TRAIN
    xt, yt = (side[rows].astype(np.float32).astype(np.float64) for side in (x, y))
    aligner = fitted(planted, Fit("procrustes", scale=False))
    np.testing.assert_allclose(aligner.tensors["mean_source"], xt.mean(0), atol=1e-5)
    np.testing.assert_allclose(aligner.tensors["mean_target"], yt.mean(0), atol=1e-5)
    expected = orthogonal_procrustes(xt - xt.mean(0), yt - yt.mean(0))[0]
    np.testing.assert_allclose(aligner.tensors["weight"], expected, atol=2e-4)


@pytest.mark.parametrize("scale", [0.2, 3.0])
def test_a_planted_scale_is_found_unless_it_is_turned_off(tmp_path: Path, scale: float) -> None:
    x = spectrum_rows(N, D, 1, decay=0.5)
    planted = plant(tmp_path / "s.zarr", x, scale * x @ rotation(D, 2))
    with_scale = only(trained(planted, tmp_path / "with", "procrustes"))
    assert with_scale["test"]["r2"] > 1 - 1e-6
    assert "no-scale" not in {finding["code"] for finding in with_scale["warnings"]}
    np.testing.assert_allclose(weight_of(tmp_path / "with"), scale * rotation(D, 2), atol=1e-3)
    card = load_adapter(tmp_path / "with").card["pairs"][0]
    assert card["options"]["scale"] == pytest.approx(scale, rel=1e-4)
    # |y - x Q| = |s - 1| / s of |y|.
    without = only(trained(planted, tmp_path / "without", "procrustes", scale=False))
    assert without["test"]["r2"] == pytest.approx(1 - ((scale - 1) / scale) ** 2, abs=0.01)
    [finding] = [finding for finding in without["warnings"] if finding["code"] == "no-scale"]
    assert f"least squares gives it {scale:.3g}," in sentence(finding)
    assert "to 1.000:" in sentence(finding)
    # Debiased CKA knows no factor.
    assert with_scale["cka"]["after"] == pytest.approx(without["cka"]["after"], abs=1e-5)
    assert with_scale["cka"]["after"] == pytest.approx(with_scale["cka"]["before"], abs=1e-5)
    assert with_scale["cka"]["invariant"]
    assert without["cka"]["invariant"]


def test_a_wider_target_is_reached_by_a_semi_orthogonal_map(tmp_path: Path) -> None:
    x = spectrum_rows(N, 48, 1, decay=0.5)
    planted = plant(tmp_path / "s.zarr", x, x @ rotation(48, 2, 64))
    entry = only(trained(planted, tmp_path / "run", "procrustes"))
    weight = weight_of(tmp_path / "run")
    assert entry["test"]["r2"] > 1 - 1e-6
    np.testing.assert_allclose(weight @ weight.T, np.eye(48), atol=1e-4)
    assert entry["baselines"]["identity"] is None
    assert entry["reasons"]["baselines.identity"] == "widths differ (48 and 64)"


def test_a_narrower_target_is_reached_where_no_direction_is_preferred(tmp_path: Path) -> None:
    x = spectrum_rows(N, 64, 1)
    # White to the last digit on the train rows: only then is the semi-orthogonal map the least-squares one, too.
    train = x[splits_of(N) == TRAIN]
    x = (x - train.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(train.T))).T
    planted = plant(tmp_path / "s.zarr", x, x @ rotation(64, 2, 40))
    entry = only(trained(planted, tmp_path / "run", "procrustes"))
    weight = weight_of(tmp_path / "run")
    assert entry["test"]["r2"] > 1 - 1e-5
    np.testing.assert_allclose(weight, rotation(64, 2, 40), atol=1e-3)
    assert only(trained(planted, tmp_path / "affine", "affine"))["test"]["r2"] > 1 - 1e-5


def test_reduced_rank_finds_a_map_of_its_rank_and_procrustes_does_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    x = spectrum_rows(N, D, 1)
    map_ = rng.normal(size=(D, 4)) @ rng.normal(size=(4, D)) / 8
    planted = plant(tmp_path / "s.zarr", x, x @ map_)
    r2 = {
        rank: only(trained(planted, tmp_path / f"rank{rank}", "reduced-rank", rank=rank))["test"]["r2"]
        for rank in (1, 3, 4, 8)
    }
    assert r2[1] < r2[3] < 0.95
    assert r2[4] > 1 - 1e-4
    assert r2[8] > 1 - 1e-4
    np.testing.assert_allclose(weight_of(tmp_path / "rank4"), map_, atol=2e-3)
    assert np.linalg.matrix_rank(weight_of(tmp_path / "rank3"), tol=1e-4) == 3
    assert only(trained(planted, tmp_path / "procrustes", "procrustes"))["test"]["r2"] < 0.6


@pytest.mark.parametrize("skip", ["procrustes", "ridge", "identity"])
def test_reduced_rank_adds_to_its_skip(tmp_path: Path, skip: str) -> None:
    rng = np.random.default_rng(3)
    x = spectrum_rows(N, D, 1)
    base = np.eye(D) if skip == "identity" else rotation(D, 2)
    planted = plant(tmp_path / "s.zarr", x, x @ (base + rng.normal(size=(D, 4)) @ rng.normal(size=(4, D)) / 16))
    entry = only(trained(planted, tmp_path / "run", "reduced-rank", rank=4, skip=skip))
    if skip == "procrustes":
        # The best rotation is not the planted one once the rest is added to it: rank 4 need not close the gap.
        assert entry["test"]["r2"] > only(trained(planted, tmp_path / "p", "procrustes"))["test"]["r2"] + 0.05
    else:
        assert entry["test"]["r2"] > 1 - 1e-3


def test_affine_finds_a_shift_and_linear_does_not(tmp_path: Path) -> None:
    x = spectrum_rows(N, D, 1)
    shift = 5 * np.random.default_rng(4).normal(size=D)
    planted = plant(tmp_path / "s.zarr", x, x @ rotation(D, 2) * 0.5 + shift)
    affine = only(trained(planted, tmp_path / "affine", "affine"))
    linear = only(trained(planted, tmp_path / "linear", "linear"))
    assert affine["test"]["r2"] > 1 - 1e-5
    assert linear["test"]["r2"] < 0
    tensors = load_adapter(tmp_path / "linear").aligners[PAIR.key].tensors
    assert not tensors["mean_source"].any()
    assert not tensors["mean_target"].any()
    # Controls need the means all the same.
    np.testing.assert_allclose(tensors["control_mean"], shift, atol=0.1)
    assert linear["baselines"]["mean"]["r2"] == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("type_", ["procrustes", "affine", "linear"])
def test_noise_of_known_size_gives_the_r2_of_theory(tmp_path: Path, type_: str) -> None:
    x = spectrum_rows(12_000, 32, 1)
    noise = np.random.default_rng(5).normal(size=x.shape)
    planted = plant(tmp_path / "s.zarr", x, x @ rotation(32, 2) + 0.5 * noise)
    r2 = only(trained(planted, tmp_path / type_, type_))["test"]["r2"]
    assert r2 == pytest.approx(1 / (1 + 0.5**2), abs=0.01)


@pytest.fixture(scope="module")
def unrelated(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    path = tmp_path_factory.mktemp("fit") / "u.zarr"
    return plant(path, spectrum_rows(N, D, 1, decay=0.5), spectrum_rows(N, D, 2, decay=0.5))


@pytest.mark.parametrize("type_", ["procrustes", "affine", "linear", "reduced-rank"])
def test_nothing_is_found_where_nothing_is(unrelated: Planted, tmp_path: Path, type_: str) -> None:
    entry = only(trained(unrelated, tmp_path, type_))
    test = entry["test"]
    assert test["r2"] <= 0.02
    assert test["retrieval_chance"] == 1 / 512
    assert test["retrieval_top1"] < 0.015
    assert test["retrieval_median_rank"] == pytest.approx(256, abs=60)
    assert abs(test["cka_debiased"]) < 0.05
    codes = {warning["code"] for warning in entry["warnings"]}
    assert {"no-better-than-controls", "retrieval-at-chance"} <= codes


def test_a_good_map_draws_no_warning(rotated: Planted, tmp_path: Path) -> None:
    # The store is small; of the map there is nothing to say.
    assert {w["code"] for w in only(trained(rotated, tmp_path, "procrustes"))["warnings"]} == {"few-documents"}


def test_few_rows_draw_a_warning(rotated: Planted, tmp_path: Path) -> None:
    entry = only(trained(rotated, tmp_path, "affine", max_rows=600))
    [warning] = [w for w in entry["warnings"] if w["code"] == "few-rows"]
    assert sentence(warning).startswith("600 pairs for width 64")
    assert entry["train"]["n"] == 600
    assert entry["test"]["n"] == (rotated.split == TEST).sum()


def test_overfitting_draws_a_warning(tmp_path: Path) -> None:
    # 100 rows in 64 dimensions: perfect on train, worse than nothing held out. A factor would be shrunk to nothing.
    rows = spectrum_rows(125, D, 1), spectrum_rows(125, D, 2)
    entry = only(trained(plant(tmp_path / "s.zarr", *rows), tmp_path / "run", "procrustes", scale=False))
    codes = {warning["code"] for warning in entry["warnings"]}
    assert {"few-rows", "overfit"} <= codes
    assert entry["train"]["r2"] > entry["test"]["r2"] + 0.5


def with_sinks(path: Path) -> tuple[Planted, Planted]:
    """A store with 40 huge rows that follow no map, and the same store without them."""
    rng = np.random.default_rng(7)
    x = spectrum_rows(4000, 32, 1, mean=1.0)
    y = x @ rotation(32, 2) + 0.1 * rng.normal(size=x.shape)
    sink = np.zeros(4000, dtype=bool)
    sink[rng.choice(np.arange(1500, 4000), 40, replace=False)] = True
    document = np.arange(4000) * 20 // 4000
    huge_x, huge_y = x.copy(), y.copy()
    # Half of them are sinks on one side only: a pair is masked if either of its rows is one.
    at = np.flatnonzero(sink)
    huge_x[at[:30]] = 300 * rng.normal(size=(30, 32))
    huge_y[at[10:]] = 300 * rng.normal(size=(30, 32))
    full = plant(path / "full.zarr", huge_x, huge_y, document=document)
    clean = plant(path / "clean.zarr", x[~sink], y[~sink], document=document[~sink])
    return full, clean


def test_masked_sinks_change_nothing_and_kept_ones_do(tmp_path: Path) -> None:
    full, clean = with_sinks(tmp_path)
    masked = only(trained(full, tmp_path / "masked", "affine"))
    without = only(trained(clean, tmp_path / "clean", "affine"))
    kept = only(trained(full, tmp_path / "kept", "affine", keep_sinks=True))
    assert full.store.pairs("a", "b").sink.sum() == 40
    np.testing.assert_allclose(weight_of(tmp_path / "masked"), weight_of(tmp_path / "clean"), atol=1e-5)
    for split in ("train", "val", "test"):
        assert masked[split]["n"] == without[split]["n"]
        assert masked[split]["r2"] == pytest.approx(without[split]["r2"], abs=1e-6)
        assert kept[split]["n"] > masked[split]["n"]
    assert kept["test"]["r2"] < 0.5 < 0.9 < masked["test"]["r2"]
    assert "sinks-kept" in {w["code"] for w in kept["warnings"]}
    assert "sinks-kept" not in {w["code"] for w in masked["warnings"]}
    # Both figures stand in either run.
    assert masked["by_mask"]["masked"]["r2"] == masked["test"]["r2"]
    assert kept["by_mask"]["kept"]["r2"] == kept["test"]["r2"]
    assert masked["by_mask"]["kept"]["n"] == kept["test"]["n"]
    assert load_adapter(tmp_path / "kept").card["mask"]["keep_sinks"] is True


@pytest.mark.parametrize("type_", ["procrustes", "affine", "linear", "reduced-rank"])
def test_no_fit_and_no_choice_sees_a_test_row(tmp_path: Path, type_: str) -> None:
    clean, spoiled = leaky(tmp_path, "clean"), leaky(tmp_path, "spoiled", split=TEST)
    results = [trained(store, tmp_path / store.path.stem, type_, rank=8) for store in (clean, spoiled)]
    one, two = (load_adapter(tmp_path / name).aligners[PAIR.key] for name in ("clean", "spoiled"))
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(tensor, two.tensors[name], err_msg=name)
    assert one.options == two.options
    first, second = map(only, results)
    assert first["val"] == second["val"]
    assert first["test"]["r2"] > 0.5 > second["test"]["r2"]


def test_validation_chooses_the_ridge_and_the_factor_and_touches_nothing_else(tmp_path: Path) -> None:
    clean, spoiled = leaky(tmp_path, "clean"), leaky(tmp_path, "spoiled", split=VAL)
    ridge = [fitted(store, Fit("affine")).options["lambda"] for store in (clean, spoiled)]
    # Against noise the strongest ridge wins.
    assert ridge[1] == pytest.approx(solvers.lambda_grid()[-1])
    assert ridge[0] < ridge[1]
    one, two = (fitted(store, Fit("procrustes", scale=False)) for store in (clean, spoiled))
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(tensor, two.tensors[name])
    # Against noise a rotation is worth nothing, as any other map is.
    one, two = (fitted(store, Fit("procrustes")) for store in (clean, spoiled))
    assert two.options["scale"] < 0.1 < one.options["scale"]
    turned = [fit.tensors["weight"] / fit.options["scale"] for fit in (one, two)]
    np.testing.assert_allclose(*turned, atol=1e-5)


def test_directions_and_layers_are_kept_apart(tmp_path: Path) -> None:
    x = {k: spectrum_rows(3000, 24, k) for k in (1, 2)}
    y = {k: x[k] @ rotation(24, 10 + k, 32) for k in (1, 2)}
    planted = plant(tmp_path / "s.zarr", x, y)
    result = trained(planted, tmp_path / "run", "affine", both=True)
    assert list(result["pairs"]) == ["a:1->b:1", "a:2->b:2", "b:1->a:1", "b:2->a:2"]
    aligners = load_adapter(tmp_path / "run").aligners
    for k in (1, 2):
        np.testing.assert_allclose(aligners[f"a:{k}->b:{k}"].tensors["weight"], rotation(24, 10 + k, 32), atol=1e-3)
        back = aligners[f"b:{k}->a:{k}"].tensors["weight"]
        assert back.shape == (32, 24)
        for side in ("train", "test"):
            assert result["pairs"][f"a:{k}->b:{k}"][side]["r2"] > 0.999
            assert result["pairs"][f"b:{k}->a:{k}"][side]["r2"] > 0.999
    crossed = trained(planted, tmp_path / "crossed", "affine", layer_map="1:2")
    assert only(crossed)["test"]["r2"] < 0.02


def test_a_model_against_itself_is_the_identity(rotated: Planted, tmp_path: Path) -> None:
    entry = only(trained(rotated, tmp_path, "procrustes", source="a", target="a", both=True))
    np.testing.assert_allclose(weight_of(tmp_path), np.eye(D), atol=1e-5)
    assert entry["test"]["r2"] == pytest.approx(1, abs=1e-9)
    assert entry["baselines"]["identity"]["r2"] == 1
    # Nothing left over for training to do: that is no warning of a map that loses.
    assert {w["code"] for w in entry["warnings"]} <= {"no-better-than-controls", "few-documents"}


def test_the_seed_moves_the_random_controls_only(rotated: Planted) -> None:
    store = rotated.store
    pairs = store.pairs("a", "b").select()
    bare = Fit("procrustes", scale=False)
    maps = [baselines(bare, PAIR, scan(store, pairs, [PAIR], seed=s)[PAIR.key], s) for s in (0, 0, 1)]
    for name in ("random_rotation", "shuffled"):
        one, two, other = (m[name].tensors["weight"] for m in maps)  # type: ignore[union-attr]
        np.testing.assert_array_equal(one, two)
        assert np.abs(one - other).max() > 0.01
    weights = maps[0]["random_rotation"].tensors["weight"]  # type: ignore[union-attr]
    np.testing.assert_allclose(weights.T @ weights, np.eye(D), atol=1e-5)


def test_too_few_train_pairs_are_refused(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(9, 4))
    planted = plant(tmp_path / "s.zarr", rows, rows, documents=3, splits=[TRAIN, VAL, TEST])
    with pytest.raises(PairingError, match="3 pairs of a and b for training, at least 8 are needed"):
        fitted(planted, Fit("procrustes"))


@pytest.mark.parametrize(("missing", "words"), [(VAL, "0 pairs .* for validation"), (TEST, "0 pairs .* for testing")])
def test_an_empty_split_is_refused(tmp_path: Path, missing: int, words: str) -> None:
    rows = np.random.default_rng(0).normal(size=(300, 4))
    splits = [TRAIN if s == missing else s for s in (TRAIN, VAL, TEST)]
    planted = plant(tmp_path / "s.zarr", rows, rows, documents=3, splits=splits)
    with pytest.raises(PairingError, match=words):
        trained(planted, tmp_path / "run", "procrustes")


@pytest.mark.parametrize("split", [TRAIN, VAL])
def test_infinite_rows_give_one_clear_error(tmp_path: Path, split: int) -> None:
    x = spectrum_rows(2000, 16, 1)
    y = x.copy()
    # Beyond the pilot, whose median it would spoil.
    y[np.flatnonzero(splits_of(2000) == split)[-7], 3] = np.nan
    planted = plant(tmp_path / "s.zarr", x, y)
    with pytest.raises(FitError, match=r"row \d+ holds NaN, infinity"):
        trained(planted, tmp_path / "run", "affine")


@pytest.mark.parametrize(
    ("rank", "skip", "widths", "words"),
    [
        (9, "none", (8, 8), "rank 9 does not fit widths 8 and 8: use 1 to 8"),
        (7, "none", (6, 8), "use 1 to 6"),
        (0, "none", (8, 8), "rank 0"),
        (2, "identity", (6, 8), "skip 'identity' needs equal widths, not 6 and 8; use --skip procrustes"),
        (2, "bogus", (8, 8), "skip 'bogus': choose one of procrustes, ridge, identity, none"),
    ],
)
@pytest.mark.parametrize("type_", ["reduced-rank", "lora"])
def test_a_low_rank_map_that_cannot_be_is_refused_before_the_scan(
    tmp_path: Path, rank: int, skip: str, widths: tuple[int, int], words: str, type_: str
) -> None:
    with pytest.raises(FitError, match=words):
        check_low_rank(rank, skip, *widths)
    rng = np.random.default_rng(0)
    planted = plant(tmp_path / "s.zarr", *(rng.normal(size=(300, width)) for width in widths))
    with pytest.raises((FitError, SpecError), match=words):
        trained(planted, tmp_path / "run", type_, rank=rank, skip=skip)
    assert not (tmp_path / "run").exists()


# What several layer pairs share.


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """b:2 follows from a:1, b:1 from a:3, and b:3 from a:1 and a:3 together; b:3 needs both."""
    x = {k: spectrum_rows(3000, 24, k, decay=0.4, mean=2.0) for k in (1, 3)}
    both = x[1] @ rotation(24, 20) + x[3] @ rotation(24, 30)
    noise = np.random.default_rng(0).normal(size=(3000, 24))
    y = {1: 3 * x[3] @ rotation(24, 10) + 0.05 * noise, 2: x[1] @ rotation(24, 11) + 4, 3: both - 1}
    return plant(tmp_path_factory.mktemp("fit") / "l.zarr", x, y)


FITS = [
    Fit("procrustes"), Fit("procrustes", scale=False),
    Fit("procrustes", components=9), Fit("procrustes", components="auto"),
    Fit("affine"), Fit("linear"),
    *(Fit("reduced-rank", rank=5, skip=skip) for skip in ("none", "ridge", "identity", "procrustes")),
]  # fmt: skip


def scanned(planted: Planted, wanted: list[LayerPair]) -> dict[str, Scan]:
    return scan(planted.store, planted.store.pairs(wanted[0].source, wanted[0].target).select(), wanted)


def words(fit: Fit) -> str:
    return f"{fit.type}-{fit.skip}-{fit.components}"


@pytest.mark.parametrize("fit", FITS, ids=words)
def test_a_solver_decomposes_a_source_once_and_fits_as_afresh(
    layered: Planted, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [LayerPair("a", (k,), "b", j) for k in (1, 3) for j in (1, 2, 3)]
    found = scanned(layered, wanted)
    fresh = {pair.key: fit_closed(fit, pair, found[pair.key]) for pair in wanted}
    calls: list[int] = []
    original = align.solvers.spectrum.eigh

    def counted(matrix: Any) -> Any:
        calls.append(len(matrix))
        return original(matrix)

    monkeypatch.setattr(align.solvers.spectrum, "eigh", counted)
    solver = Solver()
    for pair in wanted:
        again = fit_closed(fit, pair, found[pair.key], solver=solver)
        for name, tensor in fresh[pair.key].tensors.items():
            np.testing.assert_array_equal(again.tensors[name], tensor)
        assert again.options == fresh[pair.key].options
        # The shuffled control has the same source.
        baselines(fit, pair, found[pair.key], 0, solver=solver)
    of_sources = 0 if fit.type == "procrustes" and fit.components is None else 2
    of_targets = 2 * len(wanted) if fit.components is not None else 0
    assert len(calls) == of_sources + of_targets


@pytest.mark.parametrize("fit", FITS, ids=words)
def test_torch_solves_what_numpy_does(layered: Planted, fit: Fit) -> None:
    """The path of a GPU, on torch's host device."""
    for pair in (LayerPair("a", (1,), "b", 3), LayerPair("a", (1, 3), "b", 3)):
        if fit.skip == "identity" and len(pair.source_layers) > 1:
            continue
        found = scanned(layered, [pair])[pair.key]
        here, there = (fit_closed(fit, pair, found, device=device) for device in ("cpu", "torch-cpu"))
        np.testing.assert_allclose(there.tensors["weight"], here.tensors["weight"], atol=1e-5)
        assert there.trainable == here.trainable
        for name, value in here.options.items():
            assert there.options[name] == (pytest.approx(value, rel=1e-8) if isinstance(value, float) else value)
        one, two = (baselines(fit, pair, found, 0, device=device)["shuffled"] for device in ("cpu", "torch-cpu"))
        np.testing.assert_allclose(two.tensors["weight"], one.tensors["weight"], atol=1e-4)  # type: ignore[union-attr]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("fit", FITS, ids=words)
def test_a_gpu_solves_what_numpy_does(layered: Planted, fit: Fit) -> None:
    pair = LayerPair("a", (1,), "b", 3)
    found = scanned(layered, [pair])[pair.key]
    here, there = (fit_closed(fit, pair, found, device=device) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(there.tensors["weight"], here.tensors["weight"], atol=1e-5)


def test_a_source_of_other_rows_is_decomposed_anew(layered: Planted, rotated: Planted) -> None:
    solver, fits = Solver(), []
    for planted in (layered, rotated, layered):
        found = scanned(planted, [PAIR])[PAIR.key]
        fits.append(fit_closed(Fit("affine"), PAIR, found, solver=solver).tensors["weight"])
        np.testing.assert_array_equal(fits[-1], fit_closed(Fit("affine"), PAIR, found).tensors["weight"])
        # Fewer validation rows, the same train rows.
        other = replace(found, val=found.train)
        again = fit_closed(Fit("affine"), PAIR, other, solver=solver).options["lambda"]
        assert again == fit_closed(Fit("affine"), PAIR, other).options["lambda"]
    np.testing.assert_array_equal(fits[0], fits[2])


@pytest.mark.parametrize("fit", [Fit("procrustes"), Fit("affine"), Fit("linear")], ids=words)
@pytest.mark.parametrize("device", ["cpu", "torch-cpu"])
def test_the_options_tell_how_the_source_varies(layered: Planted, fit: Fit, device: str) -> None:
    found = scanned(layered, [PAIR])[PAIR.key]
    values = np.linalg.eigvalsh(centered(found.train).gx)
    options = fit_closed(fit, PAIR, found, device=device).options
    assert options["gram_min"] == pytest.approx(values[0], rel=1e-8)
    assert options["gram_max"] == pytest.approx(values[-1], rel=1e-8)
    np.testing.assert_allclose(Solver(device).gram_values(PAIR, found), values, rtol=1e-8)


def test_components_are_counted_and_chosen(layered: Planted) -> None:
    pair = LayerPair("a", (1,), "b", 2)
    found = scanned(layered, [pair])[pair.key]
    few, chosen, whole = (fit_closed(Fit("procrustes", components=k), pair, found) for k in (5, "auto", 24))
    assert np.linalg.matrix_rank(few.tensors["weight"], tol=1e-4) == few.options["components"] == 5
    # The planted map is a rotation of everything.
    assert chosen.options["components"] == 24
    np.testing.assert_allclose(whole.tensors["weight"], rotation(24, 11), atol=1e-4)
    with pytest.raises(FitError, match="25 components do not fit widths 24 and 24"):
        fit_closed(Fit("procrustes", components=25), pair, found)
    with pytest.raises(FitError, match="components 'some': give a number of principal components, or 'auto'"):
        fit_closed(Fit("procrustes", components="some"), pair, found)
    with pytest.raises(FitError, match="type 'affine' has no components"):
        fit_closed(Fit("affine", components=3), pair, found)


def test_a_joint_map_reaches_what_needs_two_layers(layered: Planted) -> None:
    wanted = [LayerPair("a", layers, "b", 3) for layers in ((1,), (3,), (1, 3), (3, 1))]
    found = scanned(layered, wanted)
    maps = [fit_closed(Fit("affine"), pair, found[pair.key]) for pair in wanted]
    r2 = [validation_r2(one, found[one.pair.key].val) for one in maps]
    assert max(r2[:2]) < 0.6
    assert min(r2[2:]) > 1 - 1e-6
    np.testing.assert_allclose(maps[2].tensors["weight"], np.vstack([rotation(24, 20), rotation(24, 30)]), atol=1e-3)
    np.testing.assert_allclose(maps[3].tensors["weight"], np.vstack([rotation(24, 30), rotation(24, 20)]), atol=1e-3)
    scaled = fit_closed(Fit("procrustes"), wanted[2], found[wanted[2].key])
    turn = scaled.tensors["weight"] / scaled.options["scale"]
    np.testing.assert_allclose(turn.T @ turn, np.eye(24), atol=1e-5)
    with pytest.raises(FitError, match="skip 'identity' needs equal widths, not 48 and 24"):
        fit_closed(Fit("reduced-rank", rank=2, skip="identity"), wanted[2], found[wanted[2].key])
    with pytest.raises(FitError, match="rank 25 does not fit widths 48 and 24"):
        fit_closed(Fit("reduced-rank", rank=25), wanted[2], found[wanted[2].key])


def test_one_rotation_for_all_layers(tmp_path: Path) -> None:
    turn = rotation(24, 9)
    x = {k: 10.0**k * spectrum_rows(3000, 24, k, decay=0.4, mean=2.0) for k in (1, 2)}
    # The larger layer's own best rotation is another one; in units of their norms both have the same say.
    y = {1: 0.5 * x[1] @ turn + 3, 2: 2 * x[2] @ turn - 7}
    planted = plant(tmp_path / "s.zarr", x, y)
    wanted = [LayerPair("a", (k,), "b", k) for k in (1, 2)]
    found = scanned(planted, wanted)
    with_scale = fit_shared_procrustes(wanted, found, scale=True)
    for pair, scale in zip(wanted, (0.5, 2), strict=True):
        one = with_scale[pair.key]
        np.testing.assert_allclose(one.tensors["weight"], scale * turn, atol=1e-4)
        assert one.options["scale"] == pytest.approx(scale, rel=1e-5)
        assert validation_r2(one, found[pair.key].val) > 1 - 1e-6
        np.testing.assert_allclose(one.tensors["mean_source"], found[pair.key].means[0], rtol=1e-6)
    same = fit_shared_procrustes(wanted, found, scale=False)
    np.testing.assert_array_equal(*(one.tensors["weight"] for one in same.values()))
    # Its objective, against the maximum by definition: the nuclear norm of the sum.
    total = 0.0
    for pair in wanted:
        rows = centered(found[pair.key].train)
        units = [np.sqrt(np.trace(gram) / (rows.n * 24)) for gram in (rows.gx, rows.gy)]
        total = total + rows.c / (units[0] * units[1])
    weight = same[wanted[0].key].tensors["weight"].astype(np.float64)
    assert np.sum(weight * total) == pytest.approx(np.linalg.norm(total, "nuc"), rel=1e-6)
    with pytest.raises(FitError, match="no layer pairs"):
        fit_shared_procrustes([], found)
    with pytest.raises(FitError, match=r"no moments of a:2->b:2"):
        fit_shared_procrustes(wanted, {wanted[0].key: found[wanted[0].key]})
    joint = LayerPair("a", (1, 2), "b", 1)
    with pytest.raises(FitError, match=r"widths .*\(24, 24\), \(48, 24\).* cannot share"):
        fit_shared_procrustes([wanted[0], joint], found | scanned(planted, [joint]))


def test_an_unknown_type_has_no_closed_form(rotated: Planted) -> None:
    with pytest.raises(FitError, match="type 'mlp' has no closed form"):
        fitted(rotated, Fit("mlp"))

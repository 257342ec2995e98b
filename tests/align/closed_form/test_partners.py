"""The best target layer of each source layer: planted partners are found, by validation rows alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.closed_form.fit import Fit, fit_closed
from align.closed_form.partners import best_partners, validation_r2
from align.layers import LayerPair
from align.metrics import score
from align.moments.scan import memory_of, scan, sites_of, usable_moments
from featstore.errors import FitError, LayerRangeError
from featstore.store.moments.writing import add_moments
from tests.support.planted import TEST, VAL, Planted, plant, rotation, spectrum_rows, splits_of

N, D = 3000, 16
#: Which target layer follows from which source layer; target layer 5 follows from none.
PARTNER = {0: 4, 1: 0, 2: 2}
TARGETS = (0, 2, 4, 5)


def plant_partners(path: Path, spoiled: int | None = None) -> Planted:
    x = {k: spectrum_rows(N, D, k, decay=0.5, mean=2.0) for k in PARTNER}
    y = {j: x[k] @ rotation(D, 10 + k) + 0.3 * spectrum_rows(N, D, 70 + k) for k, j in PARTNER.items()}
    y[5] = spectrum_rows(N, D, 99)
    if spoiled is not None:
        # In one split layers 0 and 4 of the target stand for each other.
        rows = splits_of(N) == spoiled
        y[0][rows], y[4][rows] = y[4][rows].copy(), y[0][rows].copy()
    return plant(path, x, y)


@pytest.fixture(scope="module")
def partners(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant_partners(tmp_path_factory.mktemp("partners") / "s.zarr")


def found(planted: Planted, fit: Fit, **options: Any) -> tuple[list[LayerPair], dict[str, Any]]:
    store = planted.store
    pairs = store.pairs("a", "b").select()
    return best_partners(store, pairs, "a", "b", tuple(PARTNER), TARGETS, fit, **options)


@pytest.mark.parametrize(
    "fit", [Fit("procrustes", scale=True), Fit("affine"), Fit("linear"), Fit("reduced-rank", rank=8)]
)
def test_the_planted_partners_are_found(partners: Planted, fit: Fit) -> None:
    chosen, table = found(partners, fit)
    assert chosen == [LayerPair("a", (k,), "b", j) for k, j in PARTNER.items()]
    assert table["chosen"] == [4, 0, 2]
    assert (table["fit"], table["source_layers"], table["target_layers"]) == (fit.type, [0, 1, 2], [0, 2, 4, 5])
    for row, j in zip(table["val_r2"], PARTNER.values(), strict=True):
        for value, layer in zip(row, TARGETS, strict=True):
            assert (value > 0.4) == (layer == j)


@pytest.mark.parametrize("fit", [Fit("procrustes"), Fit("affine"), Fit("linear")])
def test_the_table_is_r2_of_the_validation_rows(partners: Planted, fit: Fit) -> None:
    _, table = found(partners, fit)
    store = partners.store
    pairs = store.pairs("a", "b").select()
    rows = pairs.where(pairs.split == VAL)
    for i, k in enumerate(PARTNER):
        for j, layer in enumerate(TARGETS):
            pair = LayerPair("a", (k,), "b", layer)
            one = fit_closed(fit, pair, scan(store, pairs, [pair])[pair.key])
            x, y = store.rows("a", k)[rows.row_source], store.rows("b", layer)[rows.row_target]
            figures, _ = score(y, one.apply(x), one.tensors["control_mean"])
            assert table["val_r2"][i][j] == pytest.approx(figures["r2"], abs=1e-6)


def test_passes_stored_moments_and_a_device_choose_the_same(
    partners: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    copy = plant_partners(tmp_path / "s.zarr")
    chosen, table = found(copy, Fit("affine"))
    store, wanted = copy.store, [LayerPair("a", (k,), "b", j) for k in PARTNER for j in TARGETS]
    assert found(copy, Fit("affine"), memory=memory_of(store, wanted[:3])) == (chosen, table)
    add_moments(copy.path, quiet=True)
    stored = usable_moments(copy.store, ("a", "b"), [sites_of(pair) for pair in wanted])
    assert stored is not None
    monkeypatch.setattr("align.closed_form.partners.scans", None)
    kept = found(copy, Fit("affine"), stored=stored)
    assert kept[0] == chosen
    np.testing.assert_allclose(kept[1]["val_r2"], table["val_r2"], atol=1e-6)
    monkeypatch.undo()
    there = found(copy, Fit("affine"), device="torch-cpu")
    assert there[0] == chosen
    np.testing.assert_allclose(there[1]["val_r2"], table["val_r2"], atol=1e-6)


def test_validation_chooses_and_test_has_no_say(partners: Planted, tmp_path: Path) -> None:
    fit = Fit("affine")
    before = found(partners, fit)
    other = found(plant_partners(tmp_path / "test.zarr", TEST), fit)
    assert other[0] == before[0]
    # The pilot's origin lies elsewhere, which moves the last digits.
    np.testing.assert_allclose(other[1]["val_r2"], before[1]["val_r2"], atol=1e-5)
    spoiled = found(plant_partners(tmp_path / "val.zarr", VAL), fit)
    assert spoiled[1]["val_r2"][0][2] < 0.1 < 0.4 < before[1]["val_r2"][0][2]


def test_a_layer_that_does_not_vary_is_no_partner(tmp_path: Path) -> None:
    x = spectrum_rows(N, D, 1)
    planted = plant(tmp_path / "s.zarr", x, {1: np.ones_like(x), 2: x @ rotation(D, 2)})
    store = planted.store
    pairs = store.pairs("a", "b").select()
    chosen, table = best_partners(store, pairs, "a", "b", (1,), (1, 2), Fit("affine"))
    assert chosen == [LayerPair("a", (1,), "b", 2)]
    assert table["val_r2"][0][0] is None
    with pytest.raises(FitError, match=r"layer 1 of a has no best partner: no target layer varies"):
        best_partners(store, pairs, "a", "b", (1,), (1,), Fit("affine"))
    pair = LayerPair("a", (1,), "b", 1)
    moments = scan(store, pairs, [pair])[pair.key]
    assert np.isnan(validation_r2(fit_closed(Fit("affine"), pair, moments), moments.val))


def test_what_cannot_be_searched_is_refused(partners: Planted) -> None:
    store = partners.store
    pairs = store.pairs("a", "b").select()
    for sources, targets in (((), (0,)), ((0,), ())):
        with pytest.raises(FitError, match="no layer pairs"):
            best_partners(store, pairs, "a", "b", sources, targets, Fit("affine"))
    with pytest.raises(LayerRangeError):
        best_partners(store, pairs, "a", "b", (0, 6), (0,), Fit("affine"))
    with pytest.raises(FitError, match="c:0->b:0 is not of the pairs of a and b"):
        best_partners(store, pairs, "c", "b", (0,), (0,), Fit("affine"))
    with pytest.raises(FitError, match="rank 17"):
        best_partners(store, pairs, "a", "b", (0,), (0,), Fit("reduced-rank", rank=17))

"""The factor of a rotation: found where norms differ, shrunk where rows are few, and far columns left no trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from align.closed_form.fit import Fit, fit_closed, fit_shared_procrustes
from align.closed_form.partners import validation_r2
from align.closed_form.scaling import LEAST_SHARE, least_squares, rotation, shrunken, unscaled
from align.closed_form.skip import factor_of, skip_weight
from align.layers import LayerPair
from align.maps.registry import map_types
from align.moments.scan import Scan
from align.moments.scatter import about, centered, moments_of
from align.scoring.moments import score_moments
from align.solvers import procrustes
from tests.support.planted import rotation as turned
from tests.support.planted import spectrum_rows

PAIR = LayerPair("a", (1,), "b", 1)
#: Square, to a wider and to a narrower space.
WIDTHS = [(16, 16), (12, 20), (20, 12)]


class Rows:
    """Source rows, targets a tenth as long, and their moments by split."""

    def __init__(
        self, dx: int, dy: int, *, train: int, val: int, noise: float, factor: float = 0.1, seed: int = 0
    ) -> None:
        n, rng = train + val + 2000, np.random.default_rng(seed)
        self.x = spectrum_rows(n, dx, seed + 1, decay=0.3, mean=2.0)
        y = factor * self.x @ turned(dx, seed + 2, dy)
        self.y = y + noise * y.std() * rng.normal(size=y.shape)
        self.cuts = slice(train), slice(train, train + val), slice(train + val, None)
        origins = self.x[self.cuts[0]].mean(axis=0), self.y[self.cuts[0]].mean(axis=0)
        self.train, self.val, self.test = (moments_of(self.x[cut], self.y[cut], *origins) for cut in self.cuts)
        self.scan = Scan(self.train, self.val)

    def r2(self, fit: Fit) -> float:
        """On the test rows."""
        return validation_r2(fit_closed(fit, PAIR, self.scan), self.test)


def closed_types() -> list[str]:
    return [type_.name for type_ in map_types() if type_.closed is not None]


@pytest.mark.parametrize(("dx", "dy"), WIDTHS)
def test_the_factor_is_that_of_least_squares(dx: int, dy: int) -> None:
    rows = Rows(dx, dy, train=2000, val=500, noise=0.5)
    x, y = (side[rows.cuts[0]] - side[rows.cuts[0]].mean(axis=0) for side in (rows.x, rows.y))
    u, _, vt = np.linalg.svd(x.T @ y, full_matrices=False)
    flat = (x @ (u @ vt)).ravel()
    expected = float(flat @ y.ravel() / (flat @ flat))
    train = centered(rows.train)
    weight, _ = procrustes(train.c, train.gx)
    assert least_squares(weight, train) == pytest.approx(expected, rel=1e-9)
    # With many rows validation has next to nothing to add.
    found = fit_closed(Fit("procrustes"), PAIR, rows.scan)
    assert found.options["scale"] == pytest.approx(expected, rel=0.03)
    np.testing.assert_allclose(found.tensors["weight"], found.options["scale"] * (u @ vt), atol=1e-6)


def test_validation_shrinks_a_factor_and_never_stretches_it() -> None:
    rows = Rows(8, 8, train=500, val=500, noise=0.0)
    train, val = centered(rows.train), about(rows.val, *rows.scan.means)
    weight, own = procrustes(train.c, train.gx, scale=True)
    assert shrunken(own, weight, val) == pytest.approx(own)
    assert shrunken(2 * own, weight, val) == pytest.approx(own)
    assert shrunken(own / 2, weight, val) == own / 2
    assert shrunken(own, -weight, val) == pytest.approx(own * LEAST_SHARE)
    assert shrunken(0.0, weight, val) == 0
    nothing = replace(val, gx=np.zeros_like(val.gx), c=np.zeros_like(val.c))
    assert shrunken(own, weight, nothing) == own


@pytest.mark.parametrize(("dx", "dy"), WIDTHS)
def test_few_noisy_rows_no_longer_make_a_rotation_worse_than_the_mean(dx: int, dy: int) -> None:
    """Least squares on 12 train rows alone has R2 below -0.1 on others here; 4 validation rows are enough to see it."""
    found, unshrunk = [], []
    for seed in range(20):
        rows = Rows(dx, dy, train=12, val=4, noise=2.0, seed=seed)
        train, val, test = centered(rows.train), about(rows.val, *rows.scan.means), about(rows.test, *rows.scan.means)
        spread = np.trace(test.gy)
        for factors, scale in (
            (found, rotation(train, val, scale=True)),
            (unshrunk, procrustes(train.c, train.gx, scale=True)),
        ):
            w = scale[1] * scale[0]
            factors.append(float(np.sum(w * (2 * test.c - test.gx @ w)) / spread))
    assert np.mean(unshrunk) < -0.1
    assert np.mean(found) > -0.02


@pytest.mark.parametrize("noise", [0.1, 0.5])
@pytest.mark.parametrize(("train", "val"), [(2000, 300), (64, 16), (24, 8)])
@pytest.mark.parametrize(("dx", "dy"), WIDTHS)
@pytest.mark.parametrize("type_", closed_types())
def test_no_default_map_is_worse_than_the_mean(
    type_: str, dx: int, dy: int, train: int, val: int, noise: float
) -> None:
    rows = Rows(dx, dy, train=train, val=val, noise=noise)
    for skip in ("none", "procrustes", "ridge"):
        assert rows.r2(Fit(type_, rank=4, skip=skip)) > 0, skip
    # What the default was: nothing but norms is wrong with it.
    if type_ == "procrustes":
        assert rows.r2(Fit(type_, scale=False)) < -5


@pytest.mark.parametrize("components", ["auto", 6])
@pytest.mark.parametrize(("dx", "dy"), WIDTHS)
def test_within_components_there_is_a_factor_too(dx: int, dy: int, components: Any) -> None:
    for train, val in ((2000, 300), (24, 8)):
        rows = Rows(dx, dy, train=train, val=val, noise=0.3)
        assert rows.r2(Fit("procrustes", components=components)) > 0
    assert rows.r2(Fit("procrustes", components=components, scale=False)) < -5


@pytest.mark.parametrize(("dx", "dy"), WIDTHS)
def test_a_shared_rotation_has_a_factor_for_each_pair(dx: int, dy: int) -> None:
    pairs = [LayerPair("a", (k,), "b", k) for k in (1, 2)]
    rows = {pair.key: Rows(dx, dy, train=400, val=80, noise=0.3, factor=10.0**-k) for k, pair in enumerate(pairs)}
    scans = {key: one.scan for key, one in rows.items()}
    for key, found in fit_shared_procrustes(pairs, scans).items():
        assert validation_r2(found, rows[key].test) > 0.3
    bare = fit_shared_procrustes(pairs, scans, scale=False)
    assert validation_r2(bare[pairs[1].key], rows[pairs[1].key].test) < -20


@pytest.mark.parametrize(("dx", "dy"), WIDTHS)
def test_the_optimum_of_a_rank_on_a_rotation_is_no_worse_than_the_rank_alone(dx: int, dy: int) -> None:
    rows = Rows(dx, dy, train=2000, val=300, noise=0.3)
    for rank in (1, 4, 8):
        alone, on_top, bare = (
            rows.r2(Fit("reduced-rank", rank=rank, **more))
            for more in ({"skip": "none"}, {"skip": "procrustes"}, {"skip": "procrustes", "scale": False})
        )
        assert on_top >= alone - 1e-3
        assert bare < alone


def test_a_skip_has_the_factor_of_the_map() -> None:
    rows = Rows(12, 20, train=300, val=50, noise=1.0)
    train, val = centered(rows.train), about(rows.val, *rows.scan.means)
    whole = fit_closed(Fit("procrustes"), PAIR, rows.scan)
    skip = skip_weight("procrustes", train, val)
    assert skip is not None
    np.testing.assert_allclose(skip, whole.tensors["weight"], atol=1e-6)
    assert factor_of(skip) == pytest.approx(whole.options["scale"])
    card = fit_closed(Fit("reduced-rank", rank=2, skip="procrustes"), PAIR, rows.scan).options
    assert card["skip_scale"] == pytest.approx(whole.options["scale"])
    bare = skip_weight("procrustes", train, val, scale=False)
    assert bare is not None
    np.testing.assert_allclose(bare @ bare.T, np.eye(12), atol=1e-9)
    card = fit_closed(Fit("reduced-rank", rank=2, skip="procrustes", scale=False), PAIR, rows.scan).options
    assert card["skip_scale"] == 1
    assert "skip_scale" not in fit_closed(Fit("reduced-rank", rank=2, skip="ridge"), PAIR, rows.scan).options


def test_what_a_factor_would_do() -> None:
    rows = Rows(16, 16, train=2000, val=300, noise=0.3)
    bare = fit_closed(Fit("procrustes", scale=False), PAIR, rows.scan)
    whole = fit_closed(Fit("procrustes"), PAIR, rows.scan)
    told = unscaled(bare.tensors["weight"].astype(np.float64), rows.scan)
    assert told.factor == pytest.approx(whole.options["scale"], rel=1e-5)
    assert told.before == pytest.approx(validation_r2(bare, rows.val), rel=1e-5)
    assert told.after == pytest.approx(validation_r2(whole, rows.val), rel=1e-5)


def far(train: int = 3000, column: float = 1e5) -> tuple[Rows, Rows]:
    """The same rows, and with one source column far from zero."""
    near = Rows(16, 16, train=train, val=500, noise=0.1)
    moved = Rows(16, 16, train=train, val=500, noise=0.1)
    moved.x[:, 0] += column
    origins = moved.x[moved.cuts[0]].mean(axis=0), moved.y[moved.cuts[0]].mean(axis=0)
    moved.train, moved.val, moved.test = (moments_of(moved.x[cut], moved.y[cut], *origins) for cut in moved.cuts)
    moved.scan = Scan(moved.train, moved.val)
    return near, moved


@pytest.mark.parametrize("type_", [name for name in closed_types() if name != "linear"])
def test_a_column_far_from_zero_changes_no_map_with_an_intercept(type_: str) -> None:
    near, moved = far()
    for skip in ("none", "procrustes"):
        fit = Fit(type_, rank=4, skip=skip)
        # A mean of 1e5 is known to 0.004 in float32.
        assert moved.r2(fit) == pytest.approx(near.r2(fit), abs=1e-5)


@pytest.mark.parametrize("column", [0.0, 10.0, 1e3, 1e5, 1e6])
def test_a_map_without_intercept_is_the_best_of_its_kind(column: float) -> None:
    """Least squares without an intercept by numpy; the ridge that validation chooses is next to none here."""
    _, moved = far(column=column)
    train, _, test = moved.cuts
    weight, *_ = np.linalg.lstsq(moved.x[train], moved.y[train], rcond=1e-15)
    error = ((moved.y[test] - moved.x[test] @ weight) ** 2).sum()
    expected = 1 - error / ((moved.y[test] - moved.y[train].mean(axis=0)) ** 2).sum()
    assert moved.r2(Fit("linear")) == pytest.approx(expected, abs=1e-4)
    assert expected > 0.8


def test_scores_from_moments_are_those_of_rows_with_a_column_far_from_zero() -> None:
    near, moved = far()
    for type_ in closed_types():
        found = fit_closed(Fit(type_, rank=4), PAIR, moved.scan)
        figures = score_moments(moved.test, {"map": found})["map"][0]
        assert figures is not None
        test = moved.cuts[2]
        mapped = found.apply(moved.x[test].astype(np.float32)).astype(np.float64)
        spread = ((moved.y[test] - moved.scan.means[1]) ** 2).sum()
        assert figures["r2"] == pytest.approx(1 - ((moved.y[test] - mapped) ** 2).sum() / spread, abs=1e-3), type_
    assert score_moments(near.test, {}) == {}

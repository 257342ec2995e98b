"""One map for several layers: the planted one is found, and what a layer adds to it is its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from align.closed_form.shared import fit_shared
from align.moments.scan import Scan
from align.moments.scatter import moments_of
from featstore.errors import FitError
from tests.support.planted import rotation, spectrum_rows

D, N = 16, 4000


def scans_of(sides: dict[str, tuple[Any, Any]]) -> dict[str, Scan]:
    result = {}
    for key, (x, y) in sides.items():
        cut = 3 * len(x) // 4
        origins = x.mean(axis=0), y.mean(axis=0)
        train, val = (moments_of(x[part], y[part], *origins) for part in (slice(cut), slice(cut, None)))
        result[key] = Scan(train, val, train)
    return result


def planted_layers(weight: Any, factors: tuple[float, ...], noise: float = 0.05) -> dict[str, tuple[Any, Any]]:
    """Layers whose norms differ a hundredfold, each mapped by one weight and a factor of its own."""
    sides = {}
    for i, factor in enumerate(factors):
        x = spectrum_rows(N, D, i, decay=0.3, mean=2.0) * 10.0**i
        y = factor * (x @ weight)
        y += noise * y.std() * np.random.default_rng(50 + i).normal(size=y.shape) + 3.0
        sides[f"a:{i}->b:{i}"] = x, y
    return sides


def test_the_rotation_that_layers_share_is_found_with_a_factor_for_each() -> None:
    true = rotation(D, 7)
    shared = fit_shared(scans_of(planted_layers(true, (0.5, 1.0, 4.0))), "procrustes")
    assert np.abs(shared.weight - true).max() < 0.01
    np.testing.assert_allclose(list(shared.factors.values()), [0.5, 1.0, 4.0], rtol=0.01)
    np.testing.assert_allclose(shared.of("a:2->b:2"), 4.0 * true, atol=0.06)


def test_without_scale_the_factors_are_one() -> None:
    shared = fit_shared(scans_of(planted_layers(rotation(D, 7), (0.5, 4.0))), "procrustes", scale=False)
    assert set(shared.factors.values()) == {1.0}


def test_a_general_map_is_shared_between_units() -> None:
    true = np.random.default_rng(9).normal(size=(D, D)) / 4
    shared = fit_shared(scans_of(planted_layers(true, (1.0, 1.0))), "ridge")
    for key in shared.factors:
        assert np.abs(shared.of(key) - true).max() < 0.05 * np.abs(true).max()
    assert shared.lam is not None


def test_no_layer_decides_by_its_norm_alone() -> None:
    """Two layers with different maps and norms far apart: the shared one lies between, near neither."""
    first, second = rotation(D, 1), rotation(D, 2)
    sides = planted_layers(first, (1.0,)) | {"a:9->b:9": planted_layers(second, (1.0, 1.0))["a:1->b:1"]}
    shared = fit_shared(scans_of(sides), "procrustes").weight
    agreement = [float(np.sum(shared * w)) / D for w in (first, second)]
    assert abs(agreement[0] - agreement[1]) < 0.1
    assert min(agreement) > 0.4


def test_a_layer_that_does_not_vary_is_named() -> None:
    x = np.ones((100, D))
    with pytest.raises(FitError, match=r"a:0->b:0: a layer does not vary"):
        fit_shared(scans_of({"a:0->b:0": (x, spectrum_rows(100, D, 1))}), "procrustes")


@pytest.mark.parametrize("base", ["identity", "none"])
def test_only_fitted_maps_can_be_shared(base: str) -> None:
    with pytest.raises(FitError, match=f"not '{base}'"):
        fit_shared(scans_of(planted_layers(rotation(D, 1), (1.0,))), base)


def test_nothing_to_share_is_an_error() -> None:
    with pytest.raises(FitError, match="no layer pairs to share"):
        fit_shared({}, "procrustes")

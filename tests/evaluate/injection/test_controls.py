"""What is put in to compare a map with: nothing of the source, or as much as a map could have from elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import evaluate.injection.controls
from align.layers import LayerPair
from align.maps.fitted import Aligner
from evaluate.injection.controls import CONTROLS, control_states


def map_of(d_source: int = 6, d_target: int = 6) -> Aligner:
    rng = np.random.default_rng(0)
    shapes = {
        "weight": (d_source, d_target),
        "mean_source": (d_source,),
        "mean_target": (d_target,),
        "control_mean_source": (d_source,),
        "control_mean": (d_target,),
    }
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return Aligner(LayerPair("a", (1,), "b", 1), tensors)


def states(name: str, aligner: Aligner, n: int = 40, seed: int = 0, rng_seed: int = 0) -> Any:
    rng = np.random.default_rng(1)
    width = len(aligner.tensors["mean_source"])
    source, other = (rng.normal(size=(n, width)).astype(np.float32) for _ in range(2))
    result = control_states(name, aligner, source, other, np.random.default_rng(rng_seed), seed)
    if not isinstance(result, str):
        assert result.shape == (n, len(aligner.tensors["mean_target"]))
        assert result.dtype == np.float32
    return source, other, result


def test_mean_and_zero_hold_nothing_of_the_source() -> None:
    aligner = map_of()
    np.testing.assert_array_equal(states("mean", aligner)[2], np.tile(aligner.tensors["control_mean"], (40, 1)))
    assert not states("zero", aligner)[2].any()


def test_random_vectors_have_the_mapped_states_length_and_no_direction_of_theirs() -> None:
    aligner = map_of()
    source, _, noise = states("random_norm", aligner, n=4000)
    mapped = aligner.apply(source)
    np.testing.assert_allclose(np.linalg.norm(noise, axis=1), np.linalg.norm(mapped, axis=1), rtol=1e-4)
    cosine = (noise * mapped).sum(1) / np.linalg.norm(mapped, axis=1) ** 2
    assert abs(cosine.mean()) < 0.03
    np.testing.assert_array_equal(noise, states("random_norm", aligner, n=4000)[2])
    assert (noise != states("random_norm", aligner, n=4000, rng_seed=1)[2]).any()


def test_a_random_rotation_keeps_distances_and_follows_its_seed_alone() -> None:
    aligner = map_of()
    source, _, rotated = states("random_rotation", aligner)
    own = source - aligner.tensors["control_mean_source"]
    turned = rotated - aligner.tensors["control_mean"]
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(own, axis=1), rtol=1e-4)
    np.testing.assert_allclose(turned @ turned.T, own @ own.T, atol=1e-4)
    assert np.abs(turned - own).max() > 0.1
    # A rerun is another process, which draws it again.
    evaluate.injection.controls._rotation.cache_clear()
    np.testing.assert_array_equal(rotated, states("random_rotation", aligner, rng_seed=5)[2])
    assert np.abs(rotated - states("random_rotation", aligner, seed=1)[2]).max() > 0.1


def test_shuffled_states_are_mapped_states_of_other_text() -> None:
    aligner = map_of()
    _, other, shuffled = states("shuffled", aligner)
    np.testing.assert_array_equal(shuffled, aligner.apply(other))
    rng = np.random.default_rng(0)
    assert "no other text" in control_states("shuffled", aligner, other, None, rng, 0)


def test_raw_states_need_equal_widths() -> None:
    source, _, raw = states("raw", map_of())
    np.testing.assert_array_equal(raw, source)
    assert states("raw", map_of(6, 8))[2] == "widths differ (6 and 8)"


@pytest.mark.parametrize("name", CONTROLS)
def test_no_positions_give_no_states(name: str) -> None:
    states(name, map_of(), n=0)
    if name != "raw":
        states(name, map_of(6, 8), n=3)

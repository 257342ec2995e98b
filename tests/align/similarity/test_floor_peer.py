"""p values and thresholds of floors beside those of calibrated-similarity, on the same exchanges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from align.metrics import debiased_cka
from align.similarity.floors.exchange import Sampled
from align.similarity.floors.strata import strata
from align.similarity.floors.summary import summary
from align.similarity.measures.base import Partners
from align.similarity.measures.by_name import parse_measures
from align.statistics import permutation_p

peer: Any = pytest.importorskip("calibrated_similarity", reason="calibrated-similarity is not installed")

DRAWS = 39


def sides(planted: float) -> tuple[list[np.ndarray], list[np.ndarray], Sampled]:
    rng = np.random.default_rng(0)
    document, place = np.divmod(np.arange(160), 20)
    both, topic = rng.normal(size=(160, 5)), rng.normal(size=(8, 5))[document]

    def layers(count: int) -> list[np.ndarray]:
        return [(planted * (k + 1) * both + topic + rng.normal(size=(160, 5))).astype(np.float32) for k in range(count)]

    return layers(2), layers(3), Sampled(document, place, document)


def in_turn(partners: Partners) -> Callable[[int, torch.device], torch.Tensor]:
    """The exchanges of a floor, one after the other."""
    lines: Iterator[np.ndarray] = iter(partners.index[1:])
    return lambda _, device: torch.from_numpy(next(lines)).to(device)


@pytest.mark.parametrize("planted", [0.0, 0.12, 1.0])
def test_p_values_and_thresholds_are_the_peers(planted: float) -> None:
    xs, ys, rows = sides(planted)
    chosen = strata(rows.document, rows.place)
    partners = chosen.partners(rows.document, DRAWS, np.random.default_rng(1))
    # Exchanges are of the rows that take part, in their order.
    xs, ys = ([layer[chosen.chosen] for layer in side] for side in (xs, ys))
    document = rows.document[chosen.chosen]
    [measure] = parse_measures("cka")
    found = measure.under(xs, ys, partners, lambda _: None)
    tables = summary(found, "higher")

    def cka(x: torch.Tensor, y: torch.Tensor) -> float:
        return debiased_cka(x.numpy(), y.numpy(), documents=document)[0]

    x, y = ([torch.from_numpy(layer) for layer in side] for side in (xs, ys))
    for i, j in ((0, 0), (1, 2)):
        _, p, threshold = peer.calibrate(x[i], y[j], cka, K=DRAWS, smax=None, perm_fn=in_turn(partners))
        assert tables["p"][i, j] == pytest.approx(float(p))
        # Theirs is an order statistic of draws and value together.
        order = np.sort(found[:, i, j])[math.ceil(0.95 * (1 + DRAWS)) - 1]
        assert order == pytest.approx(float(threshold), abs=1e-5)
        assert (tables["p"][i, j] <= 0.05) == (float(found[0, i, j]) >= order - 1e-6)
    _, p, _ = peer.calibrate_layers(x, y, cka, K=DRAWS, smax=None, perm_fn=in_turn(partners))
    # Theirs is the largest value among the largest of each exchange; ours first takes each pair in its own units.
    assert permutation_p(found[0].max(), found[1:].max(axis=(1, 2))) == pytest.approx(float(p))

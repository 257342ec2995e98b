"""How often the intervals of stitched losses hold the truth, and how often a map without an effect wins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluate.injection.controls import CONTROLS
from evaluate.stitching.figures import compared, figures

#: Expected loss per token under each condition.
TRUTH = {"clean": 3.0, "mapped": 4.0, "token": 5.0, "mean": 8.0}
DIVERGENCE, SAME = 0.8, 0.6


def documents(count: int, rng: np.random.Generator, truth: dict[str, float]) -> dict[str, NDArray[np.float64]]:
    """Sums over documents of unequal length, of which some are hard under every condition."""
    tokens = np.maximum(20, rng.lognormal(5.3, 0.6, count)).round()
    hard = rng.gamma(25, 1 / 25, count)
    tables = {}
    for name, loss in truth.items():
        own = rng.gamma(60, 1 / 60, count)
        nats = tokens * (loss * hard * own) + rng.normal(0, 2, count) * np.sqrt(tokens)
        kl = tokens * DIVERGENCE * rng.gamma(20, 1 / 20, count)
        same = rng.binomial(tokens.astype(int), rng.beta(12, 8, count))
        tables[name] = np.stack([nats, tokens, (4.2 * tokens).round(), kl, same], axis=1)
    return tables


def covered(count: int, repeats: int = 2000) -> dict[str, float]:
    rng = np.random.default_rng(count)
    hits: dict[str, list[bool]] = {}
    share = {name: (TRUTH[name] - TRUTH["mapped"]) / (TRUTH[name] - TRUTH["clean"]) for name in ("token", "mean")}
    for _ in range(repeats):
        tables = documents(count, rng, TRUTH)
        block = figures(tables["mapped"], tables["mean"])
        entry, _ = compared(tables, ("token", "mean"), {})
        for name, ends, truth in (
            ("loss", block["ci95"], TRUTH["mapped"]),
            ("bits", block["bits_per_byte_ci95"], TRUTH["mapped"] / np.log(2) / 4.2),
            ("kl", block["kl_ci95"], DIVERGENCE),
            ("top1", block["top1_ci95"], SAME),
            ("below_mean", block["below_mean_ci95"], TRUTH["mean"] - TRUTH["mapped"]),
            ("beyond_token", entry["beyond_token"]["ci95"], TRUTH["token"] - TRUTH["mapped"]),
            ("recovered_token", entry["recovered_token"]["ci95"], share["token"]),
            ("recovered", entry["recovered"]["ci95"], share["mean"]),
        ):
            if ends is not None:
                hits.setdefault(name, []).append(ends[0] <= truth <= ends[1])
    assert all(len(found) > repeats / 4 for found in hits.values())
    return {name: float(np.mean(found)) for name, found in hits.items()}


@pytest.mark.thorough
@pytest.mark.parametrize("count", [3, 6, 30])
def test_intervals_hold_the_truth_as_often_as_they_say(count: int) -> None:
    for name, rate in covered(count).items():
        assert 0.92 <= rate <= 0.97, (name, rate)


def winning(count: int, truth: dict[str, float], repeats: int) -> float:
    rng = np.random.default_rng(100 + count)
    entries: list[dict[str, Any]] = [compared(documents(count, rng, truth), CONTROLS, {})[0] for _ in range(repeats)]
    return float(np.mean([entry["beats_every_control"] is True for entry in entries]))


@pytest.mark.thorough
@pytest.mark.parametrize("count", [3, 6, 30])
def test_a_map_that_equals_one_control_seldom_beats_all(count: int) -> None:
    others = dict.fromkeys(CONTROLS, 8.0)
    for equal in ("token", "shuffled"):
        assert winning(count, {"clean": 3.0, "mapped": 4.0, **others, equal: 4.0}, 1000) <= 0.045
    # Of six equal ones all would have to be lucky at once.
    assert winning(count, {"clean": 3.0, "mapped": 4.0, **dict.fromkeys(CONTROLS, 4.0)}, 300) <= 0.01
    # A real gain is found where the documents are enough.
    if count == 30:
        assert winning(count, {"clean": 3.0, "mapped": 4.0, **dict.fromkeys(CONTROLS, 6.0)}, 200) > 0.95

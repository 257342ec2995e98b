"""Representational similarity analysis (Kriegeskorte, Mur and Bandettini 2008).

The dissimilarity of two rows is the correlation distance, 1 minus the Pearson correlation of their entries, the choice
of that paper; two layers are compared by the Pearson correlation of their dissimilarities over all pairs of rows. Rows
are about the mean of the sample, as for every measure here: what all rows share, which dominates the correlations of
raw hidden states, is no dissimilarity. Rank correlation of the dissimilarities is not offered: it needs all n (n-1)/2
of them in order at once (1.3e8 a layer at 16,384 rows), and again for every draw.

A draw is the weighted Pearson correlation with the pairs of rows weighed as in :mod:`align.similarity.measures.panels`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from align.moments.scatter import Array, Rows
from align.similarity.measures.base import Partners, Resampling, Result, Tick, Wanted
from align.similarity.measures.exchanged import Similarities, cosines
from align.similarity.measures.panels import (
    Pair,
    Panel,
    centred,
    check,
    grouping,
    pair_sums,
    reason_of,
    tile,
    with_selves,
)

MIN_ROWS = 3


class Rsa:
    """Pearson correlation of correlation distances between rows."""

    name: str = "rsa"
    title: str = "RSA, correlation distance"
    closer: Literal["higher", "lower"] = "higher"
    symmetric: bool = True
    bounds: tuple[float | None, float | None] = (-1.0, 1.0)
    biased: bool = True
    floor_rows: int = 4096

    def __call__(
        self, layers: Sequence[NDArray[np.float32]], wanted: Wanted, draws: Resampling | None, tick: Tick
    ) -> dict[Pair, Result]:
        """Compare layers (:class:`align.similarity.measures.base.Measure`).

        Facts: with draws, ``documents`` and the ``groups`` of them that were drawn.

        Raises:
            FitError: Layers, pairs and draws do not belong together.
        """
        n = check(layers, wanted, draws)
        every = with_selves(wanted)
        groups = grouping(draws, n, pairs=max(1, len(every)))
        none = None if groups.counts is None else np.full(len(groups.counts), math.nan)
        if n < MIN_ROWS:
            tick(1.0)
            return {pair: Result(math.nan, f"RSA needs at least {MIN_ROWS} rows, not {n}", none) for pair in wanted}
        panels: dict[int, Panel] = {}
        reasons: dict[int, str | None] = {}
        for layer in sorted({layer for pair in wanted for layer in pair}):
            of = centred(layers[layer], groups.order)
            profiles, reason = (of.rows, of.reason) if of.reason else _profiles(of.rows)
            reasons[layer] = reason
            if reason is None:
                panels[layer] = _Correlations(profiles)
        pairs = [pair for pair in every if pair[0] in panels and pair[1] in panels]
        sums, products = pair_sums(panels, pairs, groups, tick)

        count = groups.pairs_of_rows()
        # The sample itself first, then the draws of it.
        total = _sample_and_draws(count, groups.again(count))
        first = {layer: _sample_and_draws(block, groups.again(block)) for layer, block in sums.items()}
        second = {pair: _sample_and_draws(block, groups.again(block)) for pair, block in products.items()}
        spreads = {layer: total * second[layer, layer] - first[layer] ** 2 for layer in panels}
        for layer in panels:
            # Correlations are off by about eps.
            if not spreads[layer][0] > (4 * float(np.finfo(layers[layer].dtype).eps) * total[0]) ** 2:
                reasons[layer] = "has all its rows equally far from each other"
        results = {}
        for pair in wanted:
            reason = reason_of(pair, reasons)
            if reason:
                results[pair] = Result(math.nan, reason, none, groups.facts())
                continue
            i, j = pair
            size = spreads[i] * spreads[j]
            with np.errstate(divide="ignore", invalid="ignore"):
                found = (total * second[pair] - first[i] * first[j]) / np.sqrt(size)
            found = np.where((spreads[i] > 0) & (spreads[j] > 0), found, math.nan)
            drawn = None if groups.counts is None else found[1:]
            results[pair] = Result(float(found[0]), None, drawn, groups.facts())
        return results

    def under(self, xs: Sequence[Rows], ys: Sequence[Rows], partners: Partners, tick: Tick) -> Array:
        """Compare layers under exchanged partners (:class:`align.similarity.measures.base.Measure`)."""
        sides = [[_similarities(layer) for layer in side] for side in (xs, ys)]
        return cosines(sides[0], sides[1], partners, tick)


def _similarities(layer: Rows) -> Similarities | None:
    """Correlations between rows about their mean over all pairs; None where a layer has none."""
    of, n = centred(layer), len(layer)
    profiles, reason = (of.rows, of.reason) if of.reason else _profiles(of.rows)
    if n < MIN_ROWS or reason is not None:
        return None
    wide = profiles.sum(axis=0, dtype=np.float64)
    own = float(np.einsum("id,id->", profiles, profiles, dtype=np.float64))
    mean = profiles.dtype.type((float(wide @ wide) - own) / (n * (n - 1)))

    def panel(start: int, stop: int) -> Rows:
        similarity = tile(profiles[start:stop], profiles)
        similarity -= mean
        similarity[np.arange(stop - start), np.arange(start, stop)] = 0
        return similarity

    return Similarities(panel, (4 * float(np.finfo(profiles.dtype).eps) * n) ** 2)


class _Correlations:
    """Correlations between rows, panel by panel; a distance 1 - r correlates as -r does, on both sides."""

    def __init__(self, profiles: Rows) -> None:
        self._profiles = profiles

    def __call__(self, start: int, stop: int) -> Array:
        similarity = tile(self._profiles[start:stop], self._profiles[start:]).astype(np.float64)
        np.fill_diagonal(similarity, 0)
        return similarity


def _profiles(rows: Rows) -> tuple[Rows, str | None]:
    """Rows whose products are their correlations, and why there are none."""
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1)
    wide -= wide.mean(axis=1, keepdims=True)
    spreads = np.linalg.norm(wide, axis=1)
    # What is left of a row of equal entries is the rounding of these, and of the mean that was subtracted.
    flat = int(np.count_nonzero(spreads <= 4 * float(np.finfo(rows.dtype).eps) * np.maximum(norms, 1e-3)))
    if flat:
        return (
            rows,
            f"has {flat} of {len(rows)} rows without variation across their entries, which correlate with nothing",
        )
    wide /= spreads[:, None]
    return wide.astype(rows.dtype), None


def _sample_and_draws(blocks: Array, drawn: Array) -> Array:
    return np.concatenate([[float(blocks.sum())], drawn])

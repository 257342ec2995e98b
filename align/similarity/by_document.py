"""What every measure says without each document: from these anybody can make other intervals.

A measure knows how to draw documents again, so leaving out one at a time is as many draws more: each document drawn
once, but for one. With T the value and T_d that without document d, the jackknife's variance is ``(D - 1) / D sum_d
(T_d - mean T_d)^2`` (Efron 1982, chapter 3); differences of two figures have the differences of their T_d, and what two
comparisons over the same documents have in common cancels. As in all draws, what was prepared of a layer is held: row
effects of CKA, neighbours, principal subspaces, rotations, maps. The main figure has its row effects fitted anew
(:mod:`align.similarity.measures.left_out`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from align.moments.scatter import Array
from align.similarity.measures.base import Measure, Resampling, Result, Tick, Wanted
from align.similarity.measures.left_out import half_widths, left_out
from align.similarity.measures.panels import most_groups, with_selves
from align.similarity.sample import Sample
from align.solvers.row_effects import in_order
from align.statistics.linearised import FEWEST, FEWEST_EFFECTIVE

Found = Mapping[tuple[int, int], Result]
#: Values without each document by pair of layers, or the reason why there are none.
Without = dict[tuple[int, int], list[float]] | str


def measured(
    measure: Measure, layers: Sequence[Any], wanted: Wanted, draws: Resampling, tick: Tick
) -> tuple[Found, Without]:
    """A measure with its draws, and without each document.

    Args:
        measure: Any.
        layers: As the measure takes them.
        wanted: As the measure takes them.
        draws: Documents and draws of them.
        tick: Progress.

    Returns:
        Results whose draws are the given ones, and the values without each document, in the documents' order.
    """
    count, most = draws.counts.shape[1], most_groups(len(with_selves([(min(p), max(p)) for p in wanted])))
    if not len(draws.counts):
        return measure(layers, wanted, draws, tick), "documents cannot be left out of a single one"
    if count > most:
        why = f"{count} documents: with so many layers up to {most} are told apart; compare fewer layers"
        return measure(layers, wanted, draws, tick), why
    left_out = np.vstack([draws.counts, 1 - np.eye(count)])
    found = measure(layers, wanted, Resampling(draws.document, left_out), tick)
    cut, without = {}, {}
    for pair, result in found.items():
        if result.draws is not None:
            without[pair] = [float(value) for value in result.draws[len(draws.counts) :]]
        cut[pair] = replace(result, draws=None if result.draws is None else result.draws[: len(draws.counts)])
    return cut, without


def main_figure(
    sample: Sample,
    names: tuple[Sequence[str], Sequence[str]],
    main: Mapping[str, Any],
    *,
    fraction: float | None,
    tick: Tick,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Intervals of the main figure, from its values over a sample without each document.

    Args:
        sample: Rows; of one model alone both sides are the same.
        names: ``model:layer`` of every layer of both sides.
        main: The figure over all rows, ``cross`` and ``within``, float64 with NaN where undefined.
        fraction: Bandwidth of a Gaussian kernel in median distances; None for the linear kernel.
        tick: Progress.

    Returns:
        What ``cka.json`` has as ``ci95``, and what ``cka_documents.json`` has as ``main``.
    """
    alone, count = sample.xs is sample.ys, len(sample.xs)
    layers = list(sample.xs) if alone else [*sample.xs, *sample.ys]
    every = list(names[0]) if alone else [*names[0], *names[1]]
    numbers, document = np.unique(sample.document, return_inverse=True)
    sizes = in_order(sample.document)[1]
    reason = None
    if len(numbers) < FEWEST or sizes.effective < FEWEST_EFFECTIVE:
        many = f"{len(numbers)} documents, which say as much as {sizes.effective:.1f} of equal length"
        reason = f"{many}: an interval needs at least {FEWEST}; extract more documents"
    without = left_out(layers, document.astype(np.int64), fraction=fraction, tick=tick)
    values = {(i, j): without[:, i, j].tolist() for i in range(len(every)) for j in range(i, len(every))}
    reach = half_widths(without, sizes.effective)
    first, second = np.s_[:count], np.s_[:] if alone else np.s_[count:]
    within = dict(zip(main["within"], (first, second), strict=False))
    intervals = {
        "cross": _around(main["cross"], reach[first, second]),
        "within": {model: _around(main["within"][model], reach[side, side]) for model, side in within.items()},
        "rows": sample.n,
        "of": sample.of,
        "documents": len(numbers),
        "effective_documents": sizes.effective,
        "reason": reason,
    }
    documents = {
        "documents": numbers.tolist(),
        "rows": sizes.sizes.tolist(),
        "effective_documents": sizes.effective,
        "values": {f"{every[i]} {every[j]}": column for (i, j), column in values.items()},
        "reason": reason,
    }
    return intervals, documents


def _around(values: Array, reach: Array) -> list[list[tuple[float, float] | None]]:
    """Values and as much to either side; None where one of them is undefined."""
    return [
        [(float(v - half), float(v + half)) if math.isfinite(v - half) else None for v, half in zip(*row, strict=True)]
        for row in zip(values, reach, strict=True)
    ]

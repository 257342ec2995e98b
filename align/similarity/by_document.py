"""What every measure says without each document: from these anybody can make other intervals.

A measure knows how to draw documents again, so leaving out one at a time is as many draws more: each document drawn
once, but for one. With T the value and T_d that without document d, the jackknife's variance is ``(D - 1) / D sum_d
(T_d - mean T_d)^2`` (Efron 1982, chapter 3); differences of two figures have the differences of their T_d, and what two
comparisons over the same documents have in common cancels. As in all draws, what was prepared of a layer is held: row
effects of CKA, neighbours, principal subspaces, rotations, maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from align.similarity.measures.base import Measure, Resampling, Result, Tick, Wanted
from align.similarity.measures.panels import most_groups, with_selves

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

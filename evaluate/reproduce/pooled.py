"""One figure over several layer pairs, from their sums over the same documents.

A claim about a kind of map is about all layer pairs and not about the one where it looks best. Its figure is the mean
of the layer pairs' figures; since all are of the same documents, so is its interval: what one document adds to the mean
is the mean of what it adds to each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import numpy as np
from numpy.typing import NDArray

from align.metrics import r2_of
from align.results import PairDocuments
from align.statistics import Estimate, Linearised, quotient, ratio
from evaluate.reproduce.evidence import Evidence
from evaluate.results import StitchedSums

#: A run and one of its layer pairs.
Place = tuple[str, str]
_Column = NDArray[np.float64]


def r2_difference(evidence: Evidence, first: Sequence[Place], second: Sequence[Place]) -> Estimate | None:
    """Mean R2 of some layer pairs less that of others.

    Args:
        evidence: Of the programme.
        first: Runs and layer pairs.
        second: As many, each compared with the one at its place.

    Returns:
        None where no two at the same place have sums by document.
    """
    means = _mean_r2(evidence, first, second)
    return None if means is None else (means[0] - means[1]).estimate()


def r2_quotient(evidence: Evidence, first: Sequence[Place], second: Sequence[Place]) -> Estimate | None:
    """Mean R2 of some layer pairs over that of others, with Fieller's interval.

    Args:
        evidence: Of the programme.
        first: Runs and layer pairs.
        second: As many, each compared with the one at its place.

    Returns:
        None where no two at the same place have sums by document, or the others explain nothing in the mean.
    """
    means = _mean_r2(evidence, first, second)
    return None if means is None or not means[1].value > 0 else quotient(*means)


def r2_mean(evidence: Evidence, places: Sequence[Place]) -> Estimate | None:
    """Mean R2 of some layer pairs; None where none has sums by document.

    Args:
        evidence: Of the programme.
        places: Runs and layer pairs.
    """
    means = _mean_r2(evidence, places, places)
    return None if means is None else means[0].estimate()


def nats_below(evidence: Evidence, places: Sequence[Place], control: str) -> Estimate | None:
    """Nats per token by which mapped states do better than a control, mean over layer pairs.

    Args:
        evidence: Of the programme.
        places: Runs and layer pairs.
        control: A condition of the stitched losses.

    Returns:
        None where no layer pair has both.
    """
    found = _mean_less(evidence, places, control, "mapped")
    return None if found is None else found.estimate()


def recovered_share(evidence: Evidence, places: Sequence[Place], control: str = "mean") -> Estimate | None:
    """(control - mapped) / (control - clean) of losses that are means over layer pairs, with Fieller's interval.

    Args:
        evidence: Of the programme.
        places: Runs and layer pairs.
        control: A condition of the stitched losses.

    Returns:
        None where no layer pair has them, or the control does no harm in the mean.
    """
    gained, lost = (_mean_less(evidence, places, control, other) for other in ("mapped", "clean"))
    return None if gained is None or lost is None or not lost.value > 0 else quotient(gained, lost)


def controls_of(evidence: Evidence, places: Sequence[Place]) -> list[str]:
    """Controls of which all stitched layer pairs have sums by document.

    Args:
        evidence: Of the programme.
        places: Runs and layer pairs.
    """
    known = [set(sums.nats) for place in places if (sums := evidence.stitched_sums(*place)) is not None]
    shared = set.intersection(*known) if known else set()
    return sorted(shared - {"clean", "self", "mapped"})


def _mean_r2(
    evidence: Evidence, first: Sequence[Place], second: Sequence[Place]
) -> tuple[Linearised, Linearised] | None:
    blocks = [
        (one, other)
        for one, other in ((evidence.sums(*a), evidence.sums(*b)) for a, b in zip(first, second, strict=True))
        if one is not None and other is not None
    ]
    if not blocks:
        return None
    documents = sorted({number for block in blocks for sums in block for number in sums.documents})
    first_mean, second_mean = (
        _mean([r2_of(*_r2_sums(sums, documents)) for sums in side]) for side in zip(*blocks, strict=True)
    )
    return first_mean, second_mean


def _r2_sums(sums: PairDocuments, documents: Sequence[int]) -> tuple[_Column, _Column]:
    return _spread(sums.documents, sums.sse["map"], documents), _spread(sums.documents, sums.sst, documents)


def _mean_less(evidence: Evidence, places: Sequence[Place], control: str, other: str) -> Linearised | None:
    blocks = [
        sums
        for place in places
        if (sums := evidence.stitched_sums(*place)) is not None and {control, other} <= set(sums.nats)
    ]
    if not blocks:
        return None
    documents = sorted({number for sums in blocks for number in sums.documents})
    return _mean([_less(sums, control, other, documents) for sums in blocks])


def _less(sums: StitchedSums, control: str, other: str, documents: Sequence[int]) -> Linearised:
    nats = [_spread(sums.documents, sums.nats[name], documents) for name in (control, other)]
    return ratio(nats[0] - nats[1], _spread(sums.documents, sums.tokens, documents))


def _mean(figures: Sequence[Linearised]) -> Linearised:
    return (1 / len(figures)) * reduce(add, figures)


def _spread(own: Sequence[int], values: Sequence[float | None], documents: Sequence[int]) -> _Column:
    """Sums in the order of all documents; one that a layer pair has no rows of adds nothing to it."""
    place = {number: i for i, number in enumerate(documents)}
    column = np.zeros(len(documents))
    column[[place[number] for number in own]] = np.array(values, dtype=np.float64)
    return column

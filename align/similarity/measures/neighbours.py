"""Whether two layers agree on the nearest neighbours of a row (Huh et al. 2024, on platonic representations).

Neighbours are the k other rows of the largest inner product of normalised rows, as in that paper, here about the mean
of the sample (the common mean of raw hidden states makes all of them neighbours) and without clipping outliers, which
the paper does beforehand. Candidates come from products in the rows' own precision and are decided in float64, so that
equal rows tie exactly; ties go to the lower row number, in every layer alike; ``tied_rows`` says how many there are.

Both measures are the cosine of two weighted neighbourhoods over pairs of rows: ``sum_ij s_ij t_ij`` over the roots of
``sum_ij s_ij^2`` and ``sum_ij t_ij^2``, with s_ij 0 unless j is among the k nearest of i. Draws keep the neighbours of
the sample and weigh the pairs as in :mod:`align.similarity.measures.panels`. Rows weighed alone, without their
neighbours, would give intervals of about half the width: what a document does as neighbour of other rows varies as
well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from align.moments.scatter import Array, Rows
from align.similarity.measures.base import Partners, Resampling, Result, Tick, Wanted
from align.similarity.measures.panels import (
    Pair,
    centred,
    check,
    cosine,
    grouping,
    panel_rows,
    reason_of,
    tile,
    with_selves,
)
from featstore.errors import FitError

#: Numbers gathered at a time when candidates are decided.
GATHERED = 2**22


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest rows of every row.

    Attributes:
        index: int64 ``(n, k)``, nearest first.
        product: float64 ``(n, k)``, inner products with them.
        tied: bool ``(n,)``, whether the k-th is as near as one left out.
    """

    index: NDArray[np.int64]
    product: Array
    tied: NDArray[np.bool_]


def nearest(unit: Rows, k: int) -> Neighbours:
    """The k other rows of the largest inner product.

    Args:
        unit: ``(n, d)`` of norm 1.
        k: At least 1 and below n.

    Raises:
        FitError: There are not so many other rows.
    """
    n, d = unit.shape
    if not 1 <= k < n:
        raise FitError(f"{k} nearest neighbours among {n} rows: ask for 1 to {n - 1}")
    index, product = np.empty((n, k), np.int64), np.empty((n, k))
    tied = np.zeros(n, bool)
    # Products of unit rows are rounded by far less than this, so no neighbour is missing among the candidates.
    margin = 8 * math.sqrt(d) * float(np.finfo(unit.dtype).eps)
    step = panel_rows(n, 2)
    for start in range(0, n, step):
        stop = min(start + step, n)
        near = tile(unit[start:stop], unit)
        near[np.arange(stop - start), np.arange(start, stop)] = -np.inf
        least = np.partition(near, n - k, axis=1)[:, n - k]
        row, column = np.nonzero(near >= (least - margin)[:, None])
        exact = _products(unit, row + start, column)
        order = np.lexsort((column, -exact, row))
        # np.nonzero gives rows in order, so sorting within rows leaves their places.
        first = np.searchsorted(row, np.arange(stop - start))
        taken = order[first[:, None] + np.arange(k)]
        index[start:stop], product[start:stop] = column[taken], exact[taken]
        ends = np.append(first[1:], len(row))
        following = order[np.minimum(first + k, ends - 1)]
        tied[start:stop] = (first + k < ends) & (exact[following] == product[start:stop, -1])
    return Neighbours(index, product, tied)


def _products(unit: Rows, row: NDArray[np.int64], column: NDArray[np.int64]) -> Array:
    """Inner products in float64, each summed in the same order, so that equal rows give equal products."""
    exact, step = np.empty(len(row)), max(1, GATHERED // unit.shape[1])
    for start in range(0, len(row), step):
        part = slice(start, start + step)
        exact[part] = np.einsum("id,id->i", unit[row[part]].astype(np.float64), unit[column[part]].astype(np.float64))
    return exact


class _NeighbourMeasure:
    """What the two measures share: neighbours once per layer, sums by document, their ratio on every draw."""

    closer: Literal["higher", "lower"] = "higher"
    symmetric: bool = True
    #: Whether a neighbour counts by how near it is, or simply as one.
    weighted: bool = False
    biased: bool = True
    floor_rows: int = 4096

    def __init__(self, k: int = 10) -> None:
        if k < 1:
            raise FitError(f"{k} nearest neighbours: ask for at least 1")
        self.k = k

    def __call__(
        self, layers: Sequence[NDArray[np.float32]], wanted: Wanted, draws: Resampling | None, tick: Tick
    ) -> dict[Pair, Result]:
        """Compare layers (:class:`align.similarity.measures.base.Measure`).

        Facts: ``k``; ``tied_rows``, whose neighbours a tie decided in either layer; ``chance`` where it is known; with
        draws, ``documents`` and the ``groups`` of them that were drawn.

        Raises:
            FitError: Layers, pairs and draws do not belong together.
        """
        n = check(layers, wanted, draws)
        every = with_selves(wanted)
        groups = grouping(draws, n, pairs=max(1, len(every)))
        none = None if groups.counts is None else np.full(len(groups.counts), math.nan)
        if n <= self.k:
            tick(1.0)
            few = f"{self.k} nearest neighbours need at least {self.k + 1} rows, not {n}"
            return {pair: Result(math.nan, few, none) for pair in wanted}
        reasons: dict[int, str | None] = {}
        known: dict[int, tuple[Neighbours, Array]] = {}
        mentioned = sorted({layer for pair in wanted for layer in pair})
        for layer in mentioned:
            of = centred(layers[layer])
            unit, reason = (of.rows, of.reason) if of.reason else _unit(of.rows)
            reasons[layer] = reason
            if reason is None:
                near = nearest(unit, self.k)
                expected = unit.astype(np.float64) @ unit.mean(axis=0, dtype=np.float64)
                known[layer] = near, near.product - expected[:, None] if self.weighted else np.ones_like(near.product)
            tick(1 / len(mentioned))
        group, size = groups.of_rows(), len(groups.sizes)
        pairs = [(i, j) for i, j in every if i in known and j in known]
        products = {(i, j): _agreement(known[i], known[j], group, size) for i, j in pairs}
        for layer, (near, _) in known.items():
            # Inner products of unit rows are off by about eps.
            if not products[layer, layer].sum() > near.index.size * (4 * float(np.finfo(layers[layer].dtype).eps)) ** 2:
                reasons[layer] = "has neighbours no nearer than the mean of all rows"
        results = {}
        for pair in wanted:
            i, j = pair
            reason = reason_of(pair, reasons)
            facts: dict[str, float] = {"k": self.k} | groups.facts()
            if reason:
                results[pair] = Result(math.nan, reason, none, facts)
                continue
            facts |= {"tied_rows": int((known[i][0].tied | known[j][0].tied).sum())}
            if not self.weighted:
                facts["chance"] = self.k / (n - 1)
            results[pair] = cosine(pair, products, groups, facts)
        return results

    def under(self, xs: Sequence[Rows], ys: Sequence[Rows], partners: Partners, tick: Tick) -> Array:
        """Compare layers under exchanged partners (:class:`align.similarity.measures.base.Measure`)."""
        found = np.full((len(partners.index), len(xs), len(ys)), math.nan)
        sides = [[self._known(layer) for layer in side] for side in (xs, ys)]
        # By row number, so that two neighbourhoods are compared by one search.
        for b, line in enumerate(partners.index):
            place = np.argsort(line)
            for j, other in enumerate(sides[1]):
                if other is None:
                    continue
                keys, weights = other.exchanged(line, place)
                for i, one in enumerate(sides[0]):
                    if one is not None:
                        found[b, i, j] = one.shared(keys, weights) / (one.size * other.size)
            tick(1 / len(found))
        return found

    def _known(self, layer: Rows) -> _Neighbourhood | None:
        """A layer's neighbourhoods; None where it has none."""
        if len(layer) <= self.k:
            return None
        of = centred(layer)
        unit, reason = (of.rows, of.reason) if of.reason else _unit(of.rows)
        if reason is not None:
            return None
        near = nearest(unit, self.k)
        expected = unit.astype(np.float64) @ unit.mean(axis=0, dtype=np.float64)
        weight = near.product - expected[:, None] if self.weighted else np.ones_like(near.product)
        square = float(np.square(weight).sum())
        if not square > near.index.size * (4 * float(np.finfo(layer.dtype).eps)) ** 2:
            return None
        return _Neighbourhood(near.index, weight, math.sqrt(square))


@dataclass(frozen=True, eq=False)
class _Neighbourhood:
    """Whom every row names, and how much each counts.

    Attributes:
        index: int64 ``(n, k)``.
        weight: float64 ``(n, k)``.
        size: Root sum of squares of the weights.
    """

    index: NDArray[np.int64]
    weight: Array
    size: float

    def exchanged(self, line: NDArray[np.int64], place: NDArray[np.int64]) -> tuple[NDArray[np.int64], Array]:
        """Pairs of rows as row * n + neighbour in the numbers of the first side, ascending, and their weights.

        Args:
            line: int64 ``(n,)``, the partner of each row.
            place: Its inverse.
        """
        n = len(line)
        keys = (np.arange(n)[:, None] * n + place[self.index[line]]).ravel()
        order = np.argsort(keys)
        return keys[order], self.weight[line].ravel()[order]

    def shared(self, keys: NDArray[np.int64], weights: Array) -> float:
        """The sum of products of weights over pairs that both sides name.

        Args:
            keys: Of the other side.
            weights: Of the other side.
        """
        n = len(self.index)
        own = (np.arange(n)[:, None] * n + self.index).ravel()
        at = np.minimum(np.searchsorted(keys, own), len(keys) - 1)
        return float(self.weight.ravel() @ (weights[at] * (keys[at] == own)))


class MutualKnn(_NeighbourMeasure):
    """The share of a row's k nearest neighbours that both layers name, over rows (Huh et al. 2024, appendix A).

    Facts have ``chance``, its expectation k / (n - 1) between independent rows.

    Args:
        k: Neighbours; 10 in the paper.

    Raises:
        FitError: There are none.
    """

    name: str = "mutual-knn"
    title: str = "mutual nearest neighbours"
    bounds: tuple[float | None, float | None] = (0.0, 1.0)


class Cknna(_NeighbourMeasure):
    """Centred kernel nearest-neighbour alignment (Huh et al. 2024, appendix A).

    With normalised rows f_i, g_i, ``Align(K, L) = sum_ij a_ij (f_i.f_j - E_l[f_i.f_l]) (g_i.g_j - E_l[g_i.g_l])``,
    where a_ij is 1 if j is not i and among the k nearest of i in both layers, and the mean over l is one over all rows;
    CKNNA = Align(K, L) / sqrt(Align(K, K) Align(L, L)). This is the formula of the paper; its published code, which
    puts the masked matrices into HSIC_1 instead, gives other values.

    Args:
        k: Neighbours; 10 in the paper.

    Raises:
        FitError: There are none.
    """

    name: str = "cknna"
    title: str = "CKNNA"
    bounds: tuple[float | None, float | None] = (-1.0, 1.0)
    weighted: bool = True


def _unit(rows: Rows) -> tuple[Rows, str | None]:
    """Rows of norm 1, and why there are none."""
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    nowhere = int(np.count_nonzero(norms <= float(np.finfo(rows.dtype).eps)))
    if nowhere:
        return rows, f"has {nowhere} of {len(rows)} rows at its mean, which have no direction"
    return (rows / norms[:, None]).astype(rows.dtype), None


def _agreement(
    one: tuple[Neighbours, Array], other: tuple[Neighbours, Array], group: NDArray[np.int64], groups: int
) -> Array:
    """Over the neighbours that both name, the product of what each counts, by (group, group) of row and neighbour."""
    (near, closeness), (near_other, closeness_other) = one, other
    both = near.index[:, :, None] == near_other.index[:, None, :]
    agreed = closeness * np.einsum("ib,iab->ia", closeness_other, both)
    place = group[:, None] * groups + group[near.index]
    sums = np.bincount(place.ravel(), weights=agreed.ravel(), minlength=groups * groups)
    return sums.reshape(groups, groups).astype(np.float64)

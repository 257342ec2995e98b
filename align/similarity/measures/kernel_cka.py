"""Debiased CKA from pairs of rows of different documents, with a linear or a Gaussian kernel.

With K a kernel matrix in which the pairs of rows of one document are zero, taking off row effects fitted on the pairs
of different documents

    A_ij = K_ij - a_i - a_j,   A_ij = 0 within documents

leaves rows that sum to zero (:mod:`align.solvers.row_effects`), and debiased CKA (Kornblith et al. 2019) is the cosine
of A and B over pairs of rows. It lies between -1 and 1, and is 0 on average for layers that share nothing but the
documents they were read from, whatever their width and however few these are. Where every row is its own document this
is CKA with the unbiased HSIC_1 of Song et al. (2012, equation 5), and A the U-centred kernel of Szekely and Rizzo
(2014, equation 2.5).

**Draws.** A draw weighs the pairs of rows (:mod:`align.similarity.measures.panels`) and keeps the row effects of the
sample: ``sum p_ij A_ij B_ij`` over the roots of those of A with A and of B with B. Fitting them anew would change the
draws at second order only: moving a adds terms f_i + f_j to A, and these are orthogonal to B, whose rows sum to zero.
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
from align.similarity.measures.exchanged import Similarities, cosines
from align.similarity.measures.panels import (
    Pair,
    centred,
    check,
    cosine,
    grouping,
    pair_sums,
    panel_rows,
    reason_of,
    tile,
    with_selves,
)
from align.solvers.row_effects import Documents, in_order
from featstore.errors import FitError

#: Rows among which the median distance is taken.
BANDWIDTH_ROWS = 2048


def median_bandwidth(rows: Rows, *, fraction: float = 1.0) -> float:
    """The width sigma of the kernel exp(-|x - y|^2 / (2 sigma^2)): a fraction of the median distance between rows.

    The convention of Kornblith et al. (2019, section 4). The median is that of the squared distances between all pairs
    of at most 2048 rows evenly spread over those given, and sigma is the fraction times its root.

    Args:
        rows: ``(n, d)``, n at least 2.
        fraction: Above 0.

    Returns:
        sigma in the unit of the rows; 0 where at least half of the distances are, to rounding.

    Raises:
        FitError: The fraction is not positive and finite, or there are fewer than two rows.
    """
    if not (math.isfinite(fraction) and fraction > 0):
        raise FitError(f"bandwidth fraction {fraction}: give one above 0, such as 1")
    n = len(rows)
    if n < 2:
        raise FitError(f"a median distance needs at least 2 rows, not {n}; give more rows")
    some = rows[np.arange(min(n, BANDWIDTH_ROWS)) * n // min(n, BANDWIDTH_ROWS)]
    norms = _norms(some)
    squared = _squared_distances(some, some, norms, norms)
    median = float(np.median(np.concatenate([row[i + 1 :] for i, row in enumerate(squared)])))
    # Distances between equal rows are off by the rounding of their norms.
    equal = median <= 16 * float(np.finfo(rows.dtype).eps) * float(np.median(norms))
    return 0.0 if equal else fraction * math.sqrt(median)


def _norms(rows: Rows) -> Rows:
    norms: Rows = np.einsum("ij,ij->i", rows, rows, dtype=np.float64).astype(rows.dtype)
    return norms


def _squared_distances(x: Rows, y: Rows, norms_x: Rows, norms_y: Rows) -> Rows:
    distances = tile(x, y)
    distances *= -2
    distances += norms_x[:, None]
    distances += norms_y
    # Rounding takes equal rows below 0; it is the distance that is mended, not the result.
    return np.maximum(distances, 0, out=distances)


@dataclass(frozen=True, eq=False)
class _Kernel:
    """A kernel between the rows of a layer.

    Attributes:
        rows: ``(n, d)``, centred.
        norms: ``(n,)``, squared, of these very rows.
        sigma: Width of the Gaussian kernel; None for the linear one.
        documents: In the order of the rows.
        effects: float64 ``(n,)``, a of the module docstring.
    """

    rows: Rows
    norms: Rows
    sigma: float | None
    documents: Documents
    effects: Array

    def floor(self) -> float:
        """What rounding alone makes of sum A_ij^2: every K_ij is off by about eps sqrt(K_ii K_jj)."""
        eps = float(np.finfo(self.rows.dtype).eps)
        diagonal = float(len(self.rows)) if self.sigma is not None else float(self.norms.sum(dtype=np.float64))
        return (4 * eps * diagonal) ** 2

    def panel(self, start: int, stop: int) -> Array:
        """A of rows start to stop with those from start on."""
        a = _kernel_panel(self.rows, self.norms, self.sigma, self.documents, start, stop)
        a -= self.effects[start:stop, None]
        a -= self.effects[start:]
        _leave_out(a, self.documents, start, stop)
        return a


def _leave_out(panel: Array, documents: Documents, start: int, stop: int) -> None:
    """Zero for the pairs within documents, of rows start to stop with those from start on."""
    if len(documents.sizes) == documents.n:
        np.fill_diagonal(panel, 0)
        return
    ends = np.cumsum(documents.sizes)
    first, last = np.searchsorted(ends, [start, stop - 1], side="right")
    for end, size in zip(ends[first : last + 1].tolist(), documents.sizes[first : last + 1].tolist(), strict=True):
        low = max(end - size, start) - start
        panel[low : min(end, stop) - start, low : end - start] = 0


def _kernel_panel(rows: Rows, norms: Rows, sigma: float | None, documents: Documents, start: int, stop: int) -> Array:
    """K of rows start to stop with those from start on, in float64."""
    if sigma is None:
        k = tile(rows[start:stop], rows[start:])
    else:
        k = _squared_distances(rows[start:stop], rows[start:], norms[start:stop], norms[start:])
        k *= -1 / (2 * sigma * sigma)
        np.exp(k, out=k)
    wide = k.astype(np.float64)
    _leave_out(wide, documents, start, stop)
    return wide


def _kernel(rows: Rows, sigma: float | None, documents: Documents) -> _Kernel:
    n, norms = len(rows), _norms(rows)
    if sigma is None:
        # Known without a pass over the pairs: sum_j x_i.x_j over all rows, less that over the rows of the document.
        totals = rows @ rows.sum(axis=0, dtype=np.float64)
        if len(documents.sizes) == n:
            totals -= norms
        else:
            for end, size in zip(np.cumsum(documents.sizes).tolist(), documents.sizes.tolist(), strict=True):
                part = rows[end - size : end]
                totals[end - size : end] -= part @ part.sum(axis=0, dtype=np.float64)
    else:
        totals = np.zeros(n)
        step = panel_rows(n, 1)
        for start in range(0, n, step):
            stop = min(start + step, n)
            k = _kernel_panel(rows, norms, sigma, documents, start, stop)
            totals[start:stop] += k.sum(axis=1)
            totals[stop:] += k[:, stop - start :].sum(axis=0)
    return _Kernel(rows, norms, sigma, documents, documents.effects(totals))


class Cka:
    """Debiased CKA with the linear kernel, in sample space: every draw follows from sums by (document, document)."""

    name: str = "cka"
    title: str = "debiased CKA"
    closer: Literal["higher", "lower"] = "higher"
    symmetric: bool = True
    bounds: tuple[float | None, float | None] = (-1.0, 1.0)
    biased: bool = False
    floor_rows: int = 4096

    def __call__(
        self, layers: Sequence[NDArray[np.float32]], wanted: Wanted, draws: Resampling | None, tick: Tick
    ) -> dict[Pair, Result]:
        """Compare layers (:class:`align.similarity.measures.base.Measure`).

        Facts: with documents, how many ``documents`` there are, how many ``effective_documents`` (as many of equal
        length weigh as much), and the ``groups`` of them that were drawn.

        Raises:
            FitError: Layers, pairs and draws do not belong together.
        """
        return _compare(layers, wanted, draws, tick, fraction=None)

    def under(self, xs: Sequence[Rows], ys: Sequence[Rows], partners: Partners, tick: Tick) -> Array:
        """Compare layers under exchanged partners (:class:`align.similarity.measures.base.Measure`)."""
        return _exchanged(xs, ys, partners, tick, fraction=None)


class RbfCka:
    """Debiased CKA with the Gaussian kernel exp(-|x - y|^2 / (2 sigma^2)).

    Args:
        fraction: sigma is so many times the median distance between rows (:func:`median_bandwidth`).

    Raises:
        FitError: The fraction is not positive.
    """

    name: str = "rbf-cka"
    title: str = "debiased CKA, Gaussian kernel"
    closer: Literal["higher", "lower"] = "higher"
    symmetric: bool = True
    bounds: tuple[float | None, float | None] = (-1.0, 1.0)
    biased: bool = False
    floor_rows: int = 4096

    def __init__(self, fraction: float = 1.0) -> None:
        if not (math.isfinite(fraction) and fraction > 0):
            raise FitError(f"bandwidth fraction {fraction}: give one above 0, such as 1")
        self.fraction = fraction

    def __call__(
        self, layers: Sequence[NDArray[np.float32]], wanted: Wanted, draws: Resampling | None, tick: Tick
    ) -> dict[Pair, Result]:
        """Compare layers (:class:`align.similarity.measures.base.Measure`).

        Facts: ``fraction``; ``sigma_first`` and ``sigma_second`` in the layers' own units; and those of :class:`Cka`.

        Raises:
            FitError: Layers, pairs and draws do not belong together.
        """
        return _compare(layers, wanted, draws, tick, fraction=self.fraction)

    def under(self, xs: Sequence[Rows], ys: Sequence[Rows], partners: Partners, tick: Tick) -> Array:
        """Compare layers under exchanged partners (:class:`align.similarity.measures.base.Measure`)."""
        return _exchanged(xs, ys, partners, tick, fraction=self.fraction)


def _compare(
    layers: Sequence[Rows], wanted: Wanted, draws: Resampling | None, tick: Tick, *, fraction: float | None
) -> dict[Pair, Result]:
    n = check(layers, wanted, draws)
    every = with_selves(wanted)
    groups = grouping(draws, n, pairs=max(1, len(every)))
    none = None if groups.counts is None else np.full(len(groups.counts), math.nan)
    if undefined := groups.documents.reason:
        tick(1.0)
        return {pair: Result(math.nan, undefined, none, groups.facts()) for pair in wanted}
    kernels: dict[int, _Kernel] = {}
    reasons: dict[int, str | None] = {}
    sigmas: dict[int, float] = {}
    for layer in sorted({layer for pair in wanted for layer in pair}):
        of = centred(layers[layer], groups.order)
        sigma = None
        if of.reason is None and fraction is not None:
            # In the order of the layer, so that the subset does not depend on whether there are draws.
            sigma = median_bandwidth(centred(layers[layer]).rows, fraction=fraction)
            sigmas[layer] = sigma * of.scale
        reasons[layer] = of.reason if sigma != 0 else "has no median distance: at least half of its rows are equal"
        if reasons[layer] is None:
            kernels[layer] = _kernel(of.rows, sigma, groups.documents)
    pairs = [pair for pair in every if pair[0] in kernels and pair[1] in kernels]
    _, products = pair_sums({layer: kernel.panel for layer, kernel in kernels.items()}, pairs, groups, tick)
    for layer, kernel in kernels.items():
        if not products[layer, layer].sum() > kernel.floor():
            reasons[layer] = "has no similarity structure: its self-HSIC is 0 to rounding"
    results = {}
    for pair in wanted:
        facts = groups.facts()
        if fraction is not None and pair[0] in sigmas and pair[1] in sigmas:
            facts |= {"fraction": fraction, "sigma_first": sigmas[pair[0]], "sigma_second": sigmas[pair[1]]}
        reason = reason_of(pair, reasons)
        results[pair] = Result(math.nan, reason, none, facts) if reason else cosine(pair, products, groups, facts)
    return results


def _exchanged(
    xs: Sequence[Rows], ys: Sequence[Rows], partners: Partners, tick: Tick, *, fraction: float | None
) -> Array:
    """CKA of two sides under exchanged partners; a row keeps its document on either side."""
    sides = [[similarities(layer, partners.document, fraction) for layer in side] for side in (xs, ys)]
    return cosines(sides[0], sides[1], partners, tick, between=partners.document)


def similarities(layer: Rows, document: NDArray[np.int64], fraction: float | None) -> Similarities | None:
    """A kernel less its row effects over pairs of different documents.

    Args:
        layer: float32 ``(n, d)``.
        document: int64 ``(n,)``, numbered from 0 without gaps.
        fraction: Bandwidth of a Gaussian kernel in median distances; None for the linear kernel.

    Returns:
        None where CKA is undefined.
    """
    order, documents = in_order(document)
    of, n = centred(layer), len(layer)
    if documents.reason is not None or of.reason is not None:
        return None
    sigma = None if fraction is None else median_bandwidth(of.rows, fraction=fraction)
    if sigma == 0:
        return None
    norms = _norms(of.rows)

    def kernel(start: int, stop: int) -> Rows:
        if sigma is None:
            k = tile(of.rows[start:stop], of.rows)
        else:
            k = _squared_distances(of.rows[start:stop], of.rows, norms[start:stop], norms)
            k *= -1 / (2 * sigma * sigma)
            np.exp(k, out=k)
        return k

    def apart(k: Rows, start: int, stop: int) -> Rows:
        k[document[start:stop, None] == document] = 0
        return k

    if sigma is None:
        # Known without a pass over the pairs: products with the sum of all other documents.
        by_document = np.zeros((len(documents.sizes), of.rows.shape[1]))
        np.add.at(by_document, document, of.rows)
        totals = np.einsum("id,id->i", of.rows, (by_document.sum(axis=0) - by_document)[document])
    else:
        step = panel_rows(n, 1)
        totals = np.empty(n)
        for i in range(0, n, step):
            stop = min(i + step, n)
            totals[i:stop] = apart(kernel(i, stop), i, stop).sum(axis=1, dtype=np.float64)
    effects = np.empty(n, dtype=of.rows.dtype)
    effects[order] = documents.effects(totals[order])

    def panel(start: int, stop: int) -> Rows:
        k = kernel(start, stop)
        k -= effects[start:stop, None]
        k -= effects
        return apart(k, start, stop)

    diagonal = float(n) if sigma is not None else float(norms.sum(dtype=np.float64))
    return Similarities(panel, (4 * float(np.finfo(of.rows.dtype).eps) * diagonal) ** 2)

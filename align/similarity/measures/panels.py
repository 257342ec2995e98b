"""Sums over pairs of rows, panel by panel, and how they are drawn again by document.

Debiased CKA, RSA and the neighbour measures are all made of sums over pairs of rows ``s_ij t_ij``, where s and t are
similarities between rows i and j in two layers. No n x n array is made: a panel of rows against itself and the rows
that follow, once per layer, is reduced to sums by (document, document), from which every draw follows. (In debiased CKA
the pairs within a document are left out: there s_ij is 0.)

**What a draw weighs.** Documents are drawn, so a document that is drawn twice brings two copies of its rows. A row and
its copy, or a row and the copy of its neighbour in the document, are not two independent looks at anything; counted as
such they would raise every draw above the value it is meant to surround. So copies of one document are never paired
with each other, as a row is never paired with itself, and the pair (i, j) weighs

    p_ij = w_a w_b  for rows of documents a != b drawn w_a and w_b times,
    p_ij = w_a      for two rows of document a,
    p_ii = 0.

Within each copy, and between copies of different documents, this is what the same sum over the drawn rows gives. The
share of pairs within documents stays near that of the sample: their expected weight is 1 and that of others
1 - 1/documents, whereas w_a^2 would count them twice. One row a document is the usual bootstrap of a U-statistic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from align.moments.scatter import Array, Rows
from align.similarity.measures.base import Resampling, Result, Tick, Wanted
from align.solvers.row_effects import Documents, alone
from featstore.errors import FitError

#: At most so many groups of documents are told apart: the sums take groups^2 numbers a pair of layers.
GROUPS = 512
#: Sums by (group, group) of all pairs of layers together stay below so many numbers.
SUMS = 2**25
#: Panels of all layers together take about so many bytes.
PANEL_BYTES = 2**27

Pair = tuple[int, int]
#: A symmetric similarity of rows start to stop with rows start to n, float64 ``(stop - start, n - start)``, 0 between a
#: row and itself.
Panel = Callable[[int, int], Array]


def tile(x: Rows, y: Rows) -> Rows:
    """Products of rows with rows, in their own precision: the one place where a matrix product over rows is made.

    Args:
        x: ``(m, d)``.
        y: ``(n, d)``.

    Returns:
        ``(m, n)``.
    """
    product: Rows = x @ y.T
    return product


def check(layers: Sequence[Rows], wanted: Wanted, draws: Resampling | None) -> int:
    """The number of rows.

    Raises:
        FitError: Layers that do not belong together, a pair that is not there, or draws of other rows.
    """
    shapes = [np.shape(rows) for rows in layers]
    if not shapes or any(len(shape) != 2 or shape[0] != shapes[0][0] or shape[1] < 1 for shape in shapes):
        raise FitError(f"layers of shapes {shapes}: give all of them as (rows, width) with the same rows")
    for i, j in wanted:
        if not 0 <= i <= j < len(layers):
            raise FitError(f"pair ({i}, {j}) of {len(layers)} layers: give positions, the first at most the second")
    n = int(shapes[0][0])
    if draws is not None:
        if draws.document.shape != (n,):
            raise FitError(
                f"{n} rows, but the documents of {draws.document.size}; draw from the documents of these rows"
            )
        found = np.bincount(draws.document)
        if draws.counts.ndim != 2 or draws.counts.shape[1] != len(found) or not found.all():
            raise FitError(
                f"draws of shape {draws.counts.shape} for {np.count_nonzero(found)} documents with rows"
                "; draw from the documents of these rows"
            )
    return n


@dataclass(frozen=True, eq=False)
class Centred:
    """A layer about its own mean, in units of its root mean square row norm.

    Attributes:
        rows: ``(n, d)`` in the precision of the layer.
        scale: The unit, so that ``rows * scale`` are the layer's rows about their mean.
        reason: What is wrong with it; None where it varies.
    """

    rows: Rows
    scale: float
    reason: str | None


def centred(layer: Rows, order: NDArray[np.int64] | None = None) -> Centred:
    """Subtract the exact mean and divide by the typical norm, so that no measure depends on an origin or a unit.

    Args:
        layer: ``(n, d)``, about any origin near its mean.
        order: Which row comes where; as they are when None.
    """
    mean = np.mean(layer, axis=0, dtype=np.float64)
    rows = (layer if order is None else layer[order]).astype(np.float64)
    rows -= mean
    spread, eps = float(np.einsum("ij,ij->", rows, rows)), float(np.finfo(layer.dtype).eps)
    # Equal rows differ from their mean by its rounding.
    if spread <= len(rows) * eps * eps * float(np.sum(mean * mean)):
        return Centred(np.zeros_like(layer), 0.0, "does not vary")
    scale = float(np.sqrt(spread / len(rows)))
    rows /= scale
    return Centred(rows.astype(layer.dtype), scale, None)


def reason_of(pair: Pair, reasons: dict[int, str | None]) -> str | None:
    """The first reason of two layers, as a sentence that says which of them it is."""
    for name, layer in zip(("first", "second"), pair, strict=True):
        if reasons[layer] is not None:
            return f"the {name} set of states {reasons[layer]}"
    return None


@dataclass(frozen=True, eq=False)
class Grouping:
    """Rows in the order of their documents, and the draws of these.

    Attributes:
        order: int64 ``(n,)``, the rows sorted by group.
        starts: int64 ``(groups,)``, where each group starts in that order.
        sizes: int64 ``(groups,)``, rows of each.
        counts: float64 ``(draws, groups)``, how often each is drawn; None without documents.
        documents: How many rows each document has, in this order; a group is one or several that follow each other.
    """

    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    counts: Array | None
    documents: Documents

    def of_rows(self) -> NDArray[np.int64]:
        """The group of every row in the rows' own order, int64 ``(n,)``."""
        group = np.empty(len(self.order), np.int64)
        group[self.order] = np.repeat(np.arange(len(self.sizes)), self.sizes)
        return group

    def facts(self) -> dict[str, float]:
        """The documents and the groups that were drawn; nothing where every row is its own document."""
        if self.counts is None:
            return {}
        documents = self.documents
        return {
            "documents": len(documents.sizes),
            "effective_documents": documents.effective,
            "groups": len(self.sizes),
        }

    def again(self, blocks: Array) -> Array:
        """A sum over pairs of rows on every draw (module docstring).

        Args:
            blocks: float64 ``(groups, groups)``, its sums by (group, group).

        Returns:
            float64 ``(draws,)``; empty without draws.
        """
        if self.counts is None:
            return np.empty(0)
        own = np.diagonal(blocks)
        between = blocks - np.diag(own)
        drawn: Array = np.einsum("ta,ta->t", self.counts @ between, self.counts) + self.counts @ own
        return drawn

    def pairs_of_rows(self) -> Array:
        """How many ordered pairs of different rows there are by (group, group), float64 ``(groups, groups)``."""
        sizes = self.sizes.astype(np.float64)
        return np.outer(sizes, sizes) - np.diag(sizes)


def most_groups(pairs: int) -> int:
    """Documents that are told apart when sums of so many pairs of layers are kept together.

    Args:
        pairs: Of layers, each layer with itself included.
    """
    return max(2, min(GROUPS, int(np.sqrt(SUMS / pairs))))


def grouping(draws: Resampling | None, n: int, *, pairs: int = 1) -> Grouping:
    """Put the rows in the order of their documents.

    More documents than can be told apart are put together, neighbours with neighbours and about as many to each group,
    and then whole groups are drawn: as documents that follow each other in a corpus may belong together, this keeps
    intervals from becoming too narrow. These draws follow from those of the documents, and so from their seed.

    Args:
        draws: The documents and their draws; without them all rows are one group, of a document each.
        n: Rows.
        pairs: Pairs of layers whose sums are kept together.
    """
    if draws is None:
        rows = np.arange(n, dtype=np.int64)
        return Grouping(rows, np.zeros(1, np.int64), np.array([n], np.int64), None, alone(n))
    documents = draws.counts.shape[1]
    groups = min(documents, most_groups(pairs))
    group, counts = draws.document, draws.counts
    if groups < documents:
        group = group * groups // documents
        seed = draws.counts.ravel()[:1024].astype(np.int64)
        drawn = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=len(counts))
        counts = drawn.astype(np.float64)
    sizes = np.bincount(group, minlength=groups)
    # Groups are documents that follow each other, so this is their order, too.
    order = np.argsort(draws.document, kind="stable")
    return Grouping(order, np.cumsum(sizes) - sizes, sizes, counts, Documents(np.bincount(draws.document)))


def _runs(starts: NDArray[np.int64], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The groups that meet rows start to stop: the group, its first row there and the row after its last."""
    first, last = np.searchsorted(starts, [start, stop - 1], side="right") - 1
    edges = [start, *(int(edge) for edge in starts[first + 1 : last + 1]), stop]
    for group, (low, high) in enumerate(pairwise(edges), int(first)):
        yield group, low - start, high - start


def panel_rows(n: int, layers: int) -> int:
    """How many rows a panel has when those of several layers are kept together."""
    return max(16, min(256, PANEL_BYTES // (8 * max(n, 1) * max(layers, 1))))


def with_selves(wanted: Iterable[Pair]) -> list[Pair]:
    """The pairs wanted and every layer with itself, each once."""
    pairs = sorted(set(wanted))
    return sorted({*pairs, *((layer, layer) for pair in pairs for layer in pair)})


def pair_sums(
    panels: dict[int, Panel], pairs: Sequence[Pair], groups: Grouping, tick: Tick
) -> tuple[dict[int, Array], dict[Pair, Array]]:
    """Sums of similarities, and of products of two similarities, by (group, group) of rows.

    Each layer's panels are made once, whatever the number of pairs, and of two rows only the similarity of the first
    with the second.

    Args:
        panels: The similarity of each layer, its rows in the order of ``groups``.
        pairs: Which layers to multiply.
        groups: Of rows.
        tick: Progress; the shares add up to 1.

    Returns:
        float64 ``(groups, groups)`` for each layer, ``sum s_ij``, and for each pair, ``sum s_ij t_ij``.
    """
    n, starts = len(groups.order), groups.starts
    size = len(starts), len(starts)
    sums = {layer: np.zeros(size) for layer in panels}
    products = {pair: np.zeros(size) for pair in pairs}
    step = panel_rows(n, len(panels))
    for start in range(0, n, step):
        stop = min(start + step, n)
        made = {layer: panel(start, stop) for layer, panel in panels.items()}
        first = int(np.searchsorted(starts, start, side="right")) - 1
        edges = np.maximum(starts[first:] - start, 0)
        for group, low, high in _runs(starts, start, stop):
            for layer, block in sums.items():
                block[group, first:] += _by_group(made[layer][low:high].sum(axis=0), stop - start, edges)
            for (i, j), block in products.items():
                columns = np.einsum("ij,ij->j", made[i][low:high], made[j][low:high])
                block[group, first:] += _by_group(columns, stop - start, edges)
        tick((2 * n - start - stop) * (stop - start) / n**2)
    return (
        {layer: block + block.T for layer, block in sums.items()},
        {pair: block + block.T for pair, block in products.items()},
    )


def _by_group(columns: Array, own: int, edges: NDArray[np.int64]) -> Array:
    """Sums over groups of columns, so that with its transpose a panel counts every ordered pair of rows once.

    A panel holds both orders of two of its ``own`` rows, but one order of a row and one that follows the panel.
    """
    columns[:own] *= 0.5
    found: Array = np.add.reduceat(columns, edges)
    return found


def cosine(pair: Pair, products: dict[Pair, Array], groups: Grouping, facts: dict[str, float]) -> Result:
    """The cosine of two similarities over pairs of rows, in the sample and on every draw.

    Args:
        pair: Two layers, both with a positive sum of squares.
        products: Sums by (group, group) as of :func:`pair_sums`, of the pair and of each layer with itself.
        groups: Of rows.
        facts: To go with the result.
    """
    i, j = pair
    value = float(products[pair].sum()) / math.sqrt(float(products[i, i].sum()) * float(products[j, j].sum()))
    if groups.counts is None:
        return Result(value, None, None, facts)
    # A draw of a single one-row document has no pairs at all: 0 / 0.
    with np.errstate(invalid="ignore"):
        drawn = groups.again(products[pair]) / np.sqrt(groups.again(products[i, i]) * groups.again(products[j, j]))
    return Result(value, None, drawn, facts)

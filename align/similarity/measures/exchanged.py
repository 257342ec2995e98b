"""Measures that are cosines of two similarities over pairs of rows, under exchanged partners.

Debiased CKA and RSA are ``sum_ij A_ij B_ij / (|A| |B|)`` with A and B similarities between rows of either side, made
mean-free once (:class:`Similarities`). When partners are exchanged by a permutation p only the cross term changes,

    T(p) = sum_{i<j} A_ij B_p(i)p(j) / (|A| |B|)

so each layer is prepared once and one pass over the pairs of rows gives every exchange of all layers: a row of A of all
first layers, times the gathered rows of B of all second layers, is a small matrix product for every exchange.

**Pairs within a document.** CKA over documents has no pairs of rows within a document. An exchange may bring rows of
one document of the second side together with different documents of the first; such pairs are 0 in B, so they are left
out of the cross term, which is scaled up by the share of pairs that is left. Exchanges of whole documents lose none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from align.moments.scatter import Array, Rows
from align.similarity.measures.base import Partners, Tick

#: Layers of the second side that are gathered together: 8 float32 are 32 bytes, which are copied at once.
TOGETHER = 8
#: Rows of a panel.
_PANEL = 64


@dataclass(frozen=True, eq=False)
class Similarities:
    """A symmetric similarity between the rows of a layer, mean-free, 0 between a row and itself.

    Attributes:
        panel: Rows start to stop with all rows, float32 ``(stop - start, n)``.
        least: A sum of squares over all pairs that is no more than this is rounding, and the layer undefined.
    """

    panel: Callable[[int, int], Rows]
    least: float


def bytes_needed(n: int) -> int:
    """What :func:`cosines` holds beside the rows.

    Args:
        n: Rows.
    """
    return 4 * TOGETHER * n * n


def cosines(
    first: Sequence[Similarities | None],
    second: Sequence[Similarities | None],
    partners: Partners,
    tick: Tick,
    *,
    between: NDArray[np.int64] | None = None,
) -> Array:
    """The cosine of two similarities over pairs of rows under every exchange (module docstring).

    Args:
        first: Of every layer of the first side; None where it is undefined.
        second: Of every layer of the second side.
        partners: Exchanges.
        tick: Progress.
        between: ``(n,)`` documents whose inner pairs are 0 in all similarities; None where all pairs count.

    Returns:
        float64 ``(exchanges, first, second)``, NaN where either is undefined.
    """
    found = np.full((len(partners.index), len(first), len(second)), np.nan)
    rows = [i for i, one in enumerate(first) if one is not None]
    columns = [j for j, one in enumerate(second) if one is not None]
    parts = [columns[start : start + TOGETHER] for start in range(0, len(columns), TOGETHER)]
    for part in parts if rows else []:
        given = [one for i in rows if (one := first[i]) is not None]
        taken = [one for j in part if (one := second[j]) is not None]
        share = len(parts)
        if partners.strata:
            sums, *squares = _by_strata(given, taken, partners, lambda done: tick(done / share))  # noqa: B023
        else:
            sums, *squares = _contracted(given, taken, partners.index, lambda done: tick(done / share))  # noqa: B023
        sizes = []
        for side, found_squares in zip((given, taken), squares, strict=True):
            rounding = [square <= one.least for square, one in zip(found_squares, side, strict=True)]
            sizes.append(np.where(rounding, np.nan, np.sqrt(found_squares)))
        if between is not None and not partners.strata:
            sums /= _shares(partners.index, between)[:, None, None]
        found[np.ix_(range(len(found)), rows, part)] = sums / np.multiply.outer(*sizes)
    return found


def _by_strata(
    first: Sequence[Similarities], second: Sequence[Similarities], partners: Partners, tick: Tick
) -> tuple[Array, Array, Array]:
    """What :func:`_contracted` gives, where whole documents change places within strata.

    For documents d, e of two strata and f, g of the same strata, the products of A between d and e with B between f and
    g, place by place, are one matrix product over places; an exchange is a sum over d and e of those with f and g the
    documents in their place.
    """
    n, shapes = len(partners.document), partners.strata
    starts = [0]
    for documents, places in shapes:
        starts.append(starts[-1] + documents * places)
    # orders[s]: (exchanges, documents), the document in the place of each.
    orders = [
        partners.index[:, start : start + documents] - start
        for start, (documents, _) in zip(starts[:-1], shapes, strict=True)
    ]
    sums = np.zeros((len(partners.index), len(first), len(second)))
    squares = [np.zeros(len(first)), np.zeros(len(second))]
    for s, (documents, places) in enumerate(shapes):
        step = max(1, _PANEL // documents)
        for place in range(0, places, step):
            low = starts[s] + place * documents
            high = min(low + step * documents, starts[s + 1])
            sides = [np.stack([one.panel(low, high) for one in side]) for side in (first, second)]
            for own, panels in zip(squares, sides, strict=True):
                own += np.square(panels).sum(axis=2).sum(axis=1, dtype=np.float64)
            for t in range(s, len(shapes)):
                others, columns = shapes[t][0], slice(starts[t], starts[t + 1])
                a, b = (
                    panels[:, :, columns]
                    .reshape(len(panels), -1, documents, shapes[t][1], others)
                    .transpose(0, 2, 4, 1, 3)
                    .reshape(len(panels) * documents * others, -1)
                    for panels in sides
                )
                table = (a @ b.T).reshape(len(first), documents, others, len(second), documents, others)
                d, e = np.arange(documents)[:, None], np.arange(others)
                moved = orders[s][:, :, None], orders[t][:, None, :]
                # (exchanges, d, e, first, second): what is indexed comes first.
                picked = table.transpose(1, 2, 4, 5, 0, 3)[d, e, moved[0], moved[1]]
                sums += (1 if s == t else 2) * picked.sum(axis=(1, 2), dtype=np.float64)
            tick((high - low) / n)
    return sums, squares[0], squares[1]


def _contracted(
    first: Sequence[Similarities], second: Sequence[Similarities], index: NDArray[np.int64], tick: Tick
) -> tuple[Array, Array, Array]:
    """``sum_ij A_ij B_p(i)p(j)``, float64 ``(exchanges, first, second)``, and the sums of squares of both sides."""
    n, width = index.shape[1], 1 << max(0, len(second) - 1).bit_length()
    stacked, squares = np.zeros((n, n, width), dtype=np.float32), np.zeros(len(second))
    for k, one in enumerate(second):
        for start in range(0, n, _PANEL):
            stop = min(start + _PANEL, n)
            panel = one.panel(start, stop)
            squares[k] += float(np.square(panel).sum(axis=1).sum(dtype=np.float64))
            stacked[start:stop, :, k] = panel
    sums, own = np.zeros((len(index), len(first), width)), np.zeros(len(first))
    gathered, whole = (np.empty((n, width), dtype=np.float32) for _ in range(2))
    for start in range(0, n, _PANEL):
        stop = min(start + _PANEL, n)
        panels = np.stack([one.panel(start, stop)[:, start:] for one in first])
        for row in range(stop - start):
            i = start + row
            # Each pair of rows once: what lies after row i.
            a = np.ascontiguousarray(panels[:, row, row + 1 :])
            own += np.square(a).sum(axis=1)
            out = gathered[: n - i - 1]
            for total, line in zip(sums, index, strict=True):
                # In order into the cache first: gathering from memory waits for every element.
                np.copyto(whole, stacked[line[i]])
                np.take(whole, line[i + 1 :], axis=0, out=out, mode="clip")
                total += a @ out
        tick((2 * n - start - stop) * (stop - start) / n**2)
    return 2 * sums[:, :, : len(second)], 2 * own, squares


def _shares(index: NDArray[np.int64], document: NDArray[np.int64]) -> Array:
    """The share of pairs of rows of different documents whose partners are of different documents too, by exchange."""
    n, count = len(document), int(document.max()) + 1
    within = float(np.square(np.bincount(document)).sum())
    found = np.empty(len(index))
    for b, line in enumerate(index):
        _, both = np.unique(document * count + document[line], return_counts=True)
        # Pairs that are within a document on either side, less those within one on both, which were counted twice.
        found[b] = (n**2 - 2 * within + float(np.square(both).sum())) / (n**2 - within)
    return found

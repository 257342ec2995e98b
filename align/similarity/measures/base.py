"""What every measure of similarity over rows takes and gives.

A measure sees all layers at once, because most of what it computes belongs to a single layer (a Gram tile, the nearest
neighbours, a whitening) and is shared by all pairs of layers. Intervals resample whole documents; each measure knows
how to draw itself again from sums by document, without recomputing anything per draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from align.moments.scatter import Array
from align.statistics.linearised import FEWEST, FEWEST_EFFECTIVE, LEVEL
from featstore.errors import FitError

#: Which layers of a list to compare: positions, the first at most the second.
Wanted = Sequence[tuple[int, int]]
#: Called with the share of the work done since the last call; the shares add up to 1.
Tick = Callable[[float], None]


@dataclass(frozen=True, eq=False)
class Resampling:
    """The documents of rows, drawn with replacement or not at all.

    Attributes:
        document: int64 ``(n,)``, which document a row belongs to, numbered from 0 without gaps.
        counts: float64 ``(draws, documents)``, how often each document is drawn; rows sum to the documents. Without any
            draws the documents alone are told: ``(0, documents)``.
    """

    document: NDArray[np.int64]
    counts: Array

    @property
    def effective(self) -> float:
        """How many documents of equal length would weigh as much: ``1 / sum (n_d / n)^2``."""
        sizes = np.bincount(self.document).astype(np.float64)
        return float(sizes.sum() ** 2 / np.square(sizes).sum()) if sizes.size else 0.0


def resampling(documents: NDArray[np.integer], *, draws: int = 1000, seed: int = 0) -> Resampling:
    """Draws of whole documents, the same for every measure and pair of layers.

    Args:
        documents: ``(n,)`` any labels.
        draws: Resamples.
        seed: Fixes them.

    Returns:
        The documents and their draws; no draws of a single document, where there is nothing to resample.

    Raises:
        FitError: No draws.
    """
    if draws < 1:
        raise FitError(f"{draws} draws: an interval needs at least one")
    names, document = np.unique(documents, return_inverse=True)
    if len(names) < 2:
        return Resampling(document.astype(np.int64), np.zeros((0, len(names))))
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return Resampling(document.astype(np.int64), counts.astype(np.float64))


@dataclass(frozen=True, eq=False)
class Result:
    """What a measure says of two layers.

    Attributes:
        value: NaN where undefined.
        reason: Why it is undefined.
        draws: float64 ``(draws,)``, the value on every resample, NaN where undefined; None without resampling.
        facts: Numbers that the value depends on and a reader should see, such as a bandwidth.
    """

    value: float
    reason: str | None = None
    draws: Array | None = None
    facts: dict[str, float] | None = None

    def interval(self, of: Resampling | None) -> tuple[float, float] | None:
        """The 95 % interval: the value and as much to either side.

        The standard deviation of the draws, times ``sqrt(D / (D - 1))`` since drawing D documents from D varies less
        than drawing them from all there are, times the quantile of a t distribution with D - 1 degrees of freedom, D
        being :attr:`Resampling.effective`. Percentiles of few documents' draws lie too close together.

        Args:
            of: The draws that the result was computed with.

        Returns:
            None without draws, or of fewer documents than :data:`align.statistics.linearised.FEWEST`.
        """
        if of is None or self.draws is None or not math.isfinite(self.value):
            return None
        found, effective = self.draws[np.isfinite(self.draws)], of.effective
        if found.size < 2 or of.counts.shape[1] < FEWEST or effective < FEWEST_EFFECTIVE:
            return None
        spread = float(found.std()) * math.sqrt(effective / (effective - 1))
        reach = spread * float(stdtrit(effective - 1, 1 - (1 - LEVEL) / 2))
        return self.value - reach, self.value + reach


@dataclass(frozen=True, eq=False)
class Partners:
    """Exchanges of partners over one set of rows.

    Attributes:
        index: int64 ``(exchanges, n)``, each line a permutation of the rows: in exchange b row i of the first side is
            compared with row ``index[b, i]`` of the second.
        document: int64 ``(n,)``, the document of each row, as its true partner has it.
        strata: Documents and places of each stratum, where whole documents change places within strata: rows are then
            in the order of strata, places and documents. Empty for other exchanges.
    """

    index: NDArray[np.int64]
    document: NDArray[np.int64]
    strata: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Validate shapes and permutations.

        Raises:
            FitError: A line is no permutation of the rows, or documents are of other rows.
        """
        n = len(self.document)
        if self.index.ndim != 2 or self.index.shape[1] != n:
            raise FitError(
                f"partners of shape {self.index.shape} for the documents of {n} rows; draw them for these rows"
            )
        if not (np.sort(self.index, axis=1) == np.arange(n)).all():
            raise FitError(
                "partners must be a permutation of the rows in every exchange; draw them with exchanged documents"
            )

    def inverse(self) -> Partners:
        """The same exchanges as the second side sees them: who compares itself with row j."""
        return Partners(np.argsort(self.index, axis=1), self.document, self.strata)


class Measure(Protocol):
    """A measure over rows in memory.

    Attributes:
        name: As it is typed and written, such as ``mutual-knn``.
        title: As a plot names it.
        closer: Whether similar layers get higher or lower values.
        symmetric: Whether (x, y) and (y, x) are the same; where not, only the pairs asked for are computed.
        bounds: The values it can take in principle, for a plot's scale; None for an open side.
        biased: Whether unrelated rows get another value than 0 (or, of a distance, the largest), by a margin that
            depends on how many there are: the interval is then that of the value less its floor.
        floor_rows: Rows that its floors are made from at most: fewer where every exchange is another decomposition.
    """

    name: str
    title: str
    closer: Literal["higher", "lower"]
    symmetric: bool
    bounds: tuple[float | None, float | None]
    biased: bool
    floor_rows: int

    def __call__(
        self, layers: Sequence[NDArray[np.float32]], wanted: Wanted, draws: Resampling | None, tick: Tick
    ) -> dict[tuple[int, int], Result]:
        """Compare layers.

        Args:
            layers: float32 ``(n, d)`` each, about an origin near their mean, rows paired throughout, all finite.
            wanted: Which with which.
            draws: The documents of the rows, for measures that tell pairs within a document from others or keep
                documents together, and draws of them for intervals. None where every row is its own document and no
                interval is wanted.
            tick: Progress.

        Returns:
            A result for every pair wanted; what is undefined is NaN with a reason, never an exception.
        """
        ...

    def under(
        self, xs: Sequence[NDArray[np.float32]], ys: Sequence[NDArray[np.float32]], partners: Partners, tick: Tick
    ) -> Array:
        """Compare every layer of one side with every layer of the other under exchanged partners.

        Layers are prepared once for all exchanges. The values are those of
        :func:`align.similarity.measures.partners.recomputed`, to rounding; where exchanges mix documents, debiased CKA
        leaves out what is a pair within a document on either side, while that would know the first side's alone.

        Args:
            xs: Layers of the first side, float32 ``(n, d)`` each.
            ys: Layers of the second.
            partners: Exchanges.
            tick: Progress.

        Returns:
            float64 ``(exchanges, layers of the first side, layers of the second)``, NaN where undefined.
        """
        ...

"""Differences of R2 between maps on the same documents, and what may be said of a whole table of them.

Two R2 with overlapping intervals may still differ beyond doubt, since documents are hard or easy for both: so it is the
*difference* that has an interval and a p value, over the documents that both were scored on. A table of many of them
finds some by chance; p values are adjusted for all that the table shows (Holm), so that at most one table in twenty of
equal maps has a "better" in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from align.metrics import paired_difference
from align.moments.scatter import Array
from align.results import Documents, PairDocuments
from align.statistics import SIGNIFICANT, Estimate, holm

BETTER, WORSE, LEVEL, UNKNOWN = "better", "worse", "no clear difference", "unknown"
#: States are float32 or less: R2 that differ by less than this differ by rounding, however surely.
ROUNDING = 1e-6
#: A run's own map among its sums.
MAP = "map"


@dataclass(frozen=True)
class Sums:
    """A layer pair's entry of ``documents.json`` as arrays."""

    documents: tuple[int, ...]
    n: tuple[int, ...]
    sst: Array
    sse: Mapping[str, Array]

    @classmethod
    def of(cls, block: PairDocuments) -> Sums:
        """From what was read.

        Args:
            block: The entry.

        Raises:
            ValueError: A list is missing, or they differ in length.
        """
        if not block.has("documents", "n", "sst", "sse"):
            raise ValueError("a layer pair lacks sums over documents")
        sse = {name: np.array(values, dtype=np.float64) for name, values in block.sse.items()}
        sums = cls(block.documents, block.n, np.array(block.sst, dtype=np.float64), sse)
        if {len(sums.n), *(len(v) for v in (sums.sst, *sse.values()))} != {len(sums.documents)}:
            raise ValueError("its lists of documents differ in length")
        return sums


def difference(first: Sums | str, second: Sums | str, name: str, where: str) -> Estimate | str:
    """R2 of one run's map less that of another's map or baseline, over the same documents.

    Args:
        first: Sums of the one, or why there are none.
        second: Sums of the other.
        name: Of the other's: :data:`MAP`, or a baseline.
        where: What the other is called, for the reason.

    Returns:
        The estimate, or why there is none.
    """
    for sums in (first, second):
        if isinstance(sums, str):
            return sums
    if isinstance(first, str) or isinstance(second, str) or MAP not in first.sse or name not in second.sse:
        return f"{Documents.file} has no sums of {name}: the run did not score it by document"
    if (first.documents, first.n) != (second.documents, second.n):
        return f"scored on other test rows than {where}"
    found = paired_difference((first.sse[MAP], first.sst), (second.sse[name], second.sst))
    return found if found.reason is None else found.reason


@dataclass(frozen=True)
class Said:
    """What a table says of one of its differences.

    Attributes:
        p_adjusted: Adjusted for all differences of the table; None where there is no p value.
        verdict: ``better``, ``worse``, ``no clear difference``, or ``unknown`` where nothing can be tested.
    """

    p_adjusted: float | None
    verdict: str


def verdicts(differences: Sequence[Estimate | None]) -> list[Said]:
    """Judge all differences of a table together.

    Args:
        differences: In any order; None where there is none.

    Returns:
        In the same order.
    """
    known = [None if each is None else each.p for each in differences]
    return [
        Said(p, UNKNOWN if each is None or p is None else _verdict(each.value, p))
        for each, p in zip(differences, holm(known), strict=True)
    ]


def _verdict(value: float, p: float) -> str:
    if p > SIGNIFICANT or abs(value) < ROUNDING:
        return LEVEL
    return BETTER if value > 0 else WORSE

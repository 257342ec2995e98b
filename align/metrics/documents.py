"""Squared errors summed over each document: what intervals of R2 and paired comparisons of runs are made of.

R2 = 1 - sum SSE / sum SST, so sums over documents are all that an interval over documents needs
(:mod:`align.statistics`). Maps that were scored on the same documents are compared document by document: what makes one
hard is common to them and cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from align.metrics.rows import checked_rows
from align.moments.scatter import Array, Rows
from align.statistics import Estimate, Linearised, ratio
from align.statistics.linearised import FEWEST
from featstore.errors import FitError

Interval = tuple[float, float]


class DocumentSums:
    """SSE of several maps, SST about the train mean and rows, by document, over blocks of rows.

    Rows may come in any order and any number of blocks, but the same rows for every map.
    """

    def __init__(self) -> None:
        self._totals: dict[str, dict[int, float]] = {"n": {}, "sst": {}}
        self._sse: dict[str, dict[int, float]] = {}

    def add_targets(self, document: ArrayLike, y: Rows, mean_train_y: ArrayLike) -> None:
        """Add rows' distances from the train mean, once for all maps.

        Args:
            document: Integers ``(m,)``, the document of each row.
            y: ``(m, dy)`` true target states.
            mean_train_y: ``(dy,)`` mean target state over the train rows, the zero of R2.

        Raises:
            FitError: The shapes do not fit each other.
        """
        mean = np.asarray(mean_train_y, dtype=np.float64)
        y = checked_rows("y", y, mean.size)
        with np.errstate(invalid="ignore", over="ignore"):
            squares = _squares(np.subtract(y, mean, dtype=np.float64))
        _tally(self._totals["n"], document, np.ones(len(y)))
        _tally(self._totals["sst"], document, squares)

    def add(self, name: str, document: ArrayLike, y: Rows, y_hat: Rows) -> None:
        """Add a map's errors on rows.

        Args:
            name: The map's.
            document: Integers ``(m,)``, the document of each row.
            y: ``(m, dy)`` true target states.
            y_hat: ``(m, dy)`` predicted ones.

        Raises:
            FitError: The shapes do not fit each other.
        """
        if y.shape != y_hat.shape:
            raise FitError(f"y has shape {y.shape} and the states of map {name!r} {y_hat.shape}; they must be equal")
        # Infinite predictions give NaN sums here and a reason in the interval's place.
        with np.errstate(invalid="ignore", over="ignore"):
            _tally(self._sse.setdefault(name, {}), document, _squares(np.subtract(y, y_hat)))

    @property
    def documents(self) -> list[int]:
        """Their numbers, in order."""
        return sorted(self._totals["n"])

    @property
    def n(self) -> Array:
        """float64 ``(documents,)``, rows of each."""
        return self._ordered(self._totals["n"])

    @property
    def sst(self) -> Array:
        """float64 ``(documents,)``, squared distance of the true states from the train mean."""
        return self._ordered(self._totals["sst"])

    @property
    def sse(self) -> dict[str, Array]:
        """float64 ``(documents,)`` squared errors by map."""
        return {name: self._ordered(totals) for name, totals in self._sse.items()}

    def _ordered(self, totals: Mapping[int, float]) -> Array:
        missing = [number for number in self.documents if number not in totals]
        if missing or len(totals) != len(self.documents):
            raise FitError(
                f"a map was not scored on the documents of the targets, such as {(missing or [*totals])[0]}"
                "; score all maps in one pass over the same rows"
            )
        return np.array([totals[number] for number in self.documents], dtype=np.float64)

    def renamed(self, names: Mapping[str, str]) -> DocumentSums:
        """The same sums with maps under other names.

        Args:
            names: New name by old one; what it does not mention keeps its own.
        """
        other = DocumentSums()
        other._totals = self._totals
        other._sse = {names.get(name, name): totals for name, totals in self._sse.items()}
        return other

    def with_maps_of(self, other: DocumentSums, names: Sequence[str]) -> DocumentSums:
        """The same sums and those of maps that were scored on the same rows before.

        Args:
            other: Holds them.
            names: Of all maps in the order wanted; those that neither holds are left out.

        Raises:
            FitError: The others were scored on other rows.
        """
        if self._totals != other._totals:
            raise FitError("maps that were scored on other rows cannot be put beside these; score them again")
        both = DocumentSums()
        both._totals = self._totals
        known = {**other._sse, **self._sse}
        both._sse = {name: known[name] for name in names if name in known}
        return both

    def block(self) -> dict[str, Any]:
        """A layer pair's entry of ``documents.json``."""
        return {
            "documents": self.documents,
            "n": self.n.astype(np.int64).tolist(),
            "sst": self.sst.tolist(),
            "sse": {name: values.tolist() for name, values in self.sse.items()},
        }


def _squares(rows: Rows) -> Array:
    squares: Array = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    return squares


def _tally(totals: dict[int, float], document: ArrayLike, values: Array) -> None:
    owner = np.asarray(document, dtype=np.int64)
    if owner.shape != values.shape:
        raise FitError(f"{len(values)} rows came with documents of shape {owner.shape}; one number a row is needed")
    numbers, place = np.unique(owner, return_inverse=True)
    sums = np.bincount(place, weights=values, minlength=len(numbers))
    for number, value in zip(numbers.tolist(), sums.tolist(), strict=True):
        totals[number] = totals.get(number, 0.0) + value


def r2_interval(sse: Array, sst: Array) -> tuple[Interval | None, str | None]:
    """The 95 % interval of R2 = 1 - sum SSE / sum SST (:func:`align.statistics.ratio`).

    Args:
        sse: float64 ``(documents,)`` squared errors.
        sst: float64 ``(documents,)`` squared distances from the train mean.

    Returns:
        ``(interval, None)``, or ``(None, reason)`` below three documents or where a sum is not finite.
    """
    if reason := _unfit(sse, sst):
        return None, reason
    found = r2_of(sse, sst).estimate()
    return found.interval, found.reason


def r2_of(sse: Array, sst: Array) -> Linearised:
    """R2 with what each document adds to it, for differences and means of R2.

    Args:
        sse: float64 ``(documents,)`` squared errors.
        sst: float64 ``(documents,)`` squared distances from the train mean.
    """
    return (-ratio(sse, sst)).plus(1.0)


def paired_difference(first: tuple[Array, Array], second: tuple[Array, Array]) -> Estimate:
    """R2(first) - R2(second) over the same documents, what they have in common taken off.

    Args:
        first: SSE and SST, float64 ``(documents,)`` each. SST may differ from the second's: another choice of train
            rows has another mean.
        second: The same of the other map, over the same documents in the same order.

    Returns:
        With its interval and p value; where there is none, its ``reason`` says why.

    Raises:
        FitError: The two have different numbers of documents.
    """
    if len(first[0]) != len(second[0]):
        raise FitError(f"paired sums of {len(first[0])} and {len(second[0])} documents; pass the same documents twice")
    return (r2_of(*first) - r2_of(*second)).estimate()


def _unfit(sse: Array, sst: Array) -> str | None:
    if not (np.isfinite(sse).all() and np.isfinite(sst).all()):
        return "a true or predicted state is not finite"
    return None if sst.sum() > 0 or len(sst) < FEWEST else "the target equals the train mean in every row"


def add_intervals(entry: dict[str, Any], sums: DocumentSums | str) -> None:
    """Put ``r2_ci95`` beside every R2 of the test split, or null and the reason for it.

    Args:
        entry: A layer pair's entry of ``metrics.json`` with ``test``, ``baselines`` and ``reasons``; changed in place.
        sums: Of the test rows, the run's own map under the name ``map`` and baselines under theirs; or the reason why
            there are none.
    """
    places = {"map": ("test", entry["test"])}
    places |= {name: (f"baselines.{name}", figures) for name, figures in entry["baselines"].items()}
    sse, sst = ({}, np.zeros(0)) if isinstance(sums, str) else (sums.sse, sums.sst)
    for name, (place, figures) in places.items():
        if figures is None:
            continue
        interval: Interval | None = None
        if isinstance(sums, str):
            reason: str | None = sums
        elif figures.get("r2") is None:
            reason = entry["reasons"].get(f"{place}.r2", "R2 is undefined")
        elif name in sse:
            interval, reason = r2_interval(sse[name], sst)
        else:
            reason = "no sums over documents were made of this map"
        figures["r2_ci95"] = None if interval is None else list(interval)
        if reason is not None:
            entry["reasons"][f"{place}.r2_ci95"] = reason

"""Both floors of a measure over a sample of rows: documents in each other's place, and the same token elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.moments.scatter import Array
from align.similarity.floors import tokens
from align.similarity.floors.strata import FEWEST, strata
from align.similarity.floors.summary import summary
from align.similarity.measures.base import Measure, Partners, Resampling, resampling
from align.similarity.measures.exchanged import bytes_needed

Layers = Sequence[NDArray[np.float32]]
Index = NDArray[np.int64]

#: Exchanges behind a floor; with the value itself forty figures, so that p can be 0.025.
PERMUTATIONS = 39
#: Rows of a floor, at most: similarities between all pairs of them are held.
FLOOR_ROWS = 4096
#: Fewest rows that a floor is made from.
_LEAST = 8


@dataclass(frozen=True, eq=False)
class Sampled:
    """Where the rows of a sample come from.

    Attributes:
        document: int64 ``(n,)``.
        place: int64 ``(n,)``, where in its document a row is.
        token: int64 ``(n,)``, the current token of the first model.
    """

    document: Index
    place: Index
    token: Index


def affordable(memory: int) -> int:
    """Rows of a floor whose similarities take at most half of the memory.

    Args:
        memory: Bytes.
    """
    return max(_LEAST, min(FLOOR_ROWS, isqrt(memory // (2 * bytes_needed(1)))))


def floors(
    measure: Measure,
    xs: Layers,
    ys: Layers,
    rows: Sampled,
    *,
    draws: int = PERMUTATIONS,
    most: int = FLOOR_ROWS,
    resamples: int = 0,
    seed: int = 0,
    alone: bool = False,
    tick: Callable[[float], None] = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """A measure's value and its floors over rows that can have other partners.

    Args:
        measure: Any.
        xs: Layers of the first model, float32 ``(n, d)`` each.
        ys: Layers of the second.
        rows: Where they come from.
        draws: Exchanges of each floor.
        most: Rows at most; a measure may allow fewer.
        resamples: Draws of documents behind the interval of a biased measure's values less the mean of its floor
            ``documents``; 0 for none.
        seed: Of rows and exchanges. The same seed exchanges the same rows for every measure with as many.
        alone: Whether both models are one.
        tick: Called with the share of the work done since the last call.

    Returns:
        ``documents`` and ``token``: the matrices of :func:`align.similarity.floors.summary.summary`, those of the
        other direction as ``opposite`` where the measure has one, ``rows``, ``of``, ``documents`` and ``draws``; or
        ``reason`` where there is no floor. Of a biased measure ``documents`` has ``excess`` and ``excess_ci95``, too.
    """
    most = min(most, measure.floor_rows)
    found = {}
    for name, choose in (("documents", _documents), ("token", _tokens)):
        chosen, partners = choose(rows, most, draws, seed)
        about = {"rows": len(chosen), "of": len(rows.document), "draws": draws, "seed": seed}
        about["documents"] = len(np.unique(rows.document[chosen]))
        if partners is None or len(chosen) < _LEAST:
            found[name] = {**about, "draws": 0, "reason": _REASONS[name](rows)}
            tick(0.5)
            continue
        x, y = [layer[chosen] for layer in xs], [layer[chosen] for layer in ys]
        both = not measure.symmetric and not alone
        part = _part(tick, 0.25 if both else 0.5)
        # Intervals of a biased measure are those of what it is above the floor that keeps documents whole.
        resampled = resampling(partners.document, draws=resamples, seed=seed) if resamples else None
        of = resampled if measure.biased and name == "documents" else None
        tables = summary(measure.under(x, y, partners, part), measure.closer, alone=alone)
        found[name] = {**tables, **about, **_excess(measure, x, y, tables["mean"], of)}
        if both:
            backwards: Array = measure.under(y, x, partners.inverse(), part).transpose(0, 2, 1)
            tables = summary(backwards, measure.closer)
            excess = _excess(measure, y, x, tables["mean"].T, of)
            found[name]["opposite"] = {**tables, **{key: _transposed(table) for key, table in excess.items()}}
    return found


def _excess(measure: Measure, xs: Layers, ys: Layers, mean: Array, draws: Resampling | None) -> dict[str, Any]:
    """``excess``, the values less the floor's mean, and ``excess_ci95``, over the rows of the floor."""
    if draws is None:
        return {}
    wanted = [(i, len(xs) + j) for i in range(len(xs)) for j in range(len(ys))]
    found = measure([*xs, *ys], wanted, draws, lambda _: None)
    excess = np.full(mean.shape, np.nan)
    intervals: list[list[tuple[float, float] | None]] = [[None] * len(ys) for _ in xs]
    for i, k in wanted:
        j, result = k - len(xs), found[i, k]
        excess[i, j] = result.value - mean[i, j]
        ends = result.interval(draws)
        intervals[i][j] = None if ends is None else (ends[0] - mean[i, j], ends[1] - mean[i, j])
    return {"excess": excess.tolist(), "excess_ci95": intervals}


def _transposed(table: list[list[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*table, strict=True)]


def _part(tick: Callable[[float], None], share: float) -> Callable[[float], None]:
    return lambda done: tick(done * share)


def _documents(rows: Sampled, most: int, draws: int, seed: int) -> tuple[Index, Partners | None]:
    rng = np.random.default_rng((seed, 1))
    found = strata(rows.document, rows.place).limited(most, rng)
    return found.chosen, found.partners(rows.document, draws, rng) if found.documents >= FEWEST else None


def _tokens(rows: Sampled, most: int, draws: int, seed: int) -> tuple[Index, Partners | None]:
    rng, n = np.random.default_rng((seed, 2)), len(rows.document)
    kept = np.arange(n) if n <= most else np.sort(rng.choice(n, most, replace=False))
    chosen = kept[tokens.exchangeable(rows.token[kept], rows.document[kept], rng)]
    if len(np.unique(rows.document[chosen])) < 2:
        return chosen, None
    return chosen, tokens.partners(rows.token[chosen], rows.document[chosen], draws, rng)


def _no_documents(rows: Sampled) -> str:
    count = len(np.unique(rows.document))
    return f"{count} documents, of which {FEWEST} or more must have rows at the same positions: extract more documents"


def _no_tokens(rows: Sampled) -> str:
    count = len(np.unique(rows.document))
    return f"hardly any token occurs in more than one of {count} documents: extract more documents"


_REASONS: dict[str, Callable[[Sampled], str]] = {"documents": _no_documents, "token": _no_tokens}

"""Floors and ceilings of any measure: what it says where there is nothing to find, and where nothing else can differ.

Floors, the second model's layers replaced:

- ``shuffled``: their rows in another order, the same for all layers. Every layer keeps its shape; only the pairing
  goes.
- ``noise``: Gaussian rows with the covariance of the layers' own rows, within and between layers. Shape beyond the
  covariance goes as well.

Ceilings, each layer against itself:

- ``rounding``: the same states after one more rounding to the store's elements (:func:`rounded`).
- ``twice``: the same text read again by the same model, where the caller has such rows.

And :func:`halves`, which tells how far a figure depends on the documents at hand: it is computed on two disjoint
halves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from align.similarity.measures.base import Measure, Resampling, Result, Tick, Wanted
from align.similarity.measures.predictability import dealt
from featstore.errors import FitError
from featstore.store.format.elements import Format, column_scale_of, parse_format

Layers = Sequence[NDArray[np.float32]]
Table = list[list[Result]]

#: Rows of noise made at once.
_BLOCK = 512
#: Rows that a format changes by less than this part of them hold what it stores already.
_STORED = 1e-6


def _check(xs: Layers, ys: Layers) -> int:
    """The common number of rows.

    Raises:
        FitError: A side has no layers, or the layers have different numbers of rows.
    """
    if not xs or not ys:
        raise FitError(f"{len(xs)} and {len(ys)} layers: controls need at least one of each model")
    rows = {len(layer) for layer in (*xs, *ys)}
    if len(rows) > 1:
        raise FitError(f"layers of {', '.join(map(str, sorted(rows)))} rows: rows are paired, so give equally many")
    return rows.pop()


def _documents(document: NDArray[np.integer] | None, n: int) -> Resampling | None:
    """Documents without draws: for measures that keep documents together but need no interval."""
    if document is None:
        return None
    if len(document) != n:
        raise FitError(f"{len(document)} document labels for {n} rows: give one for each row")
    names, numbers = np.unique(document, return_inverse=True)
    return Resampling(numbers.astype(np.int64), np.zeros((0, len(names))))


def _part(tick: Tick, share: float) -> Tick:
    def ticked(done: float) -> None:
        tick(done * share)

    return ticked


def _cross(measure: Measure, xs: Layers, ys: Layers, draws: Resampling | None, tick: Tick) -> Table:
    """Every layer of the first model with every one of the second, in this order."""
    wanted: Wanted = [(i, len(xs) + j) for i in range(len(xs)) for j in range(len(ys))]
    found = measure([*xs, *ys], wanted, draws, tick)
    return [[_bare(found[i, len(xs) + j]) for j in range(len(ys))] for i in range(len(xs))]


def _own(measure: Measure, xs: Layers, again: Layers, draws: Resampling | None, tick: Tick) -> list[Result]:
    """Every layer with its own other version."""
    wanted: Wanted = [(i, len(xs) + i) for i in range(len(xs))]
    found = measure([*xs, *again], wanted, draws, tick)
    return [_bare(found[pair]) for pair in wanted]


def _bare(result: Result) -> Result:
    return Result(result.value, result.reason, None, result.facts)


def shuffled(layers: Layers, seed: int) -> list[NDArray[np.float32]]:
    """The rows of all layers in one other order.

    Args:
        layers: float32 ``(n, d)`` each.
        seed: Fixes the order.
    """
    order = np.random.default_rng(seed).permutation(len(layers[0]))
    return [layer[order] for layer in layers]


def noise(layers: Layers, seed: int) -> list[NDArray[np.float32]]:
    """Gaussian rows whose covariance, within and between layers, is that of the layers' rows, about the same means.

    Row i is ``mean + g_i' (Y - mean) / sqrt(n)`` with g_i of n independent standard normal numbers, the same for all
    layers: given Y, its covariance is exactly the covariance of Y's rows, without a decomposition, whatever n and d.

    Args:
        layers: float32 ``(n, d)`` each, the same rows.
        seed: Fixes the noise.

    Returns:
        float32 ``(n, d)`` each.
    """
    n = len(layers[0])
    means = [layer.mean(axis=0, dtype=np.float64) for layer in layers]
    about = [(layer - mean).astype(np.float32) for layer, mean in zip(layers, means, strict=True)]
    made = [np.empty_like(layer) for layer in layers]
    rng = np.random.default_rng(seed)
    for first in range(0, n, _BLOCK):
        mixing = rng.standard_normal((min(_BLOCK, n - first), n), dtype=np.float32) / np.float32(math.sqrt(n))
        for out, rows, mean in zip(made, about, means, strict=True):
            out[first : first + _BLOCK] = mixing @ rows + mean
    return made


def floors(
    measure: Measure,
    xs: Layers,
    ys: Layers,
    *,
    seed: int = 0,
    document: NDArray[np.integer] | None = None,
    tick: Tick = lambda _: None,
) -> dict[str, Table]:
    """What a measure says of every layer of one model and unrelated rows in place of the other model's.

    Args:
        measure: Any.
        xs: Layers of the first model, float32 ``(n, d)`` each.
        ys: Layers of the second, paired with them. Of a measure that is not symmetric the figures are of (x, y); swap
            the models for (y, x).
        seed: Fixes order and noise.
        document: ``(n,)`` labels, for a measure that splits rows by document; there are no intervals.
        tick: Progress.

    Returns:
        ``shuffled`` and ``noise``, each by layer of the first and of the second model.

    Raises:
        FitError: No layers, or rows or labels of unequal number.
    """
    draws = _documents(document, _check(xs, ys))
    half = _part(tick, 0.5)
    return {
        "shuffled": _cross(measure, xs, shuffled(ys, seed), draws, half),
        "noise": _cross(measure, xs, noise(ys, seed), draws, half),
    }


def ceilings(
    measure: Measure,
    xs: Layers,
    ys: Layers,
    form: Format | str,
    *,
    origins: tuple[Layers, Layers] | None = None,
    twice: tuple[Layers, Layers] | None = None,
    seed: int = 0,
    document: NDArray[np.integer] | None = None,
    tick: Tick = lambda _: None,
) -> dict[str, Table]:
    """What a measure says of every layer and itself, read or rounded once more.

    Args:
        measure: Any.
        xs: Layers of the first model, float32 ``(n, d)`` each.
        ys: Layers of the second, as many rows.
        form: How the store holds them.
        origins: What was taken off the layers of each model, float32 ``(d,)`` each; rounding depends on it.
        twice: The same rows of both models from a second reading of the same text, about the same origins.
        seed: Fixes the rounding.
        document: As for :func:`floors`.
        tick: Progress.

    Returns:
        ``rounding`` and, if given, ``twice``: one list by layer for the first model and one for the second. Of a
        measure that is not symmetric, from the given states to the other version.

    Raises:
        FitError: No layers, or numbers of rows, labels, origins or second readings that do not fit.
        SpecError: No such format.
        NonFiniteStateError: The format cannot hold a state.
    """
    draws = _documents(document, _check(xs, ys))
    for name, given in (("origins", origins), ("second readings", twice)):
        if given is not None and [len(side) for side in given] != [len(xs), len(ys)]:
            raise FitError(
                f"{name} of {[len(s) for s in given]} layers for models of {[len(xs), len(ys)]}"
                "; give one entry for every layer of both models"
            )
    if twice is not None and any(a.shape != b.shape for a, b in zip((*xs, *ys), (*twice[0], *twice[1]), strict=True)):
        raise FitError("a second reading has another shape than the first: give the same rows of the same layers")
    part = _part(tick, 0.5 if twice is None else 0.25)
    table: Table = []
    for number, side in enumerate((xs, ys)):
        taken = [None] * len(side) if origins is None else list(origins[number])
        again = [
            rounded(rows, form, origin=origin, seed=seed + k)
            for k, (rows, origin) in enumerate(zip(side, taken, strict=True))
        ]
        table.append(_own(measure, side, again, draws, part))
    found = {"rounding": table}
    if twice is not None:
        found["twice"] = [_own(measure, side, again, draws, part) for side, again in zip((xs, ys), twice, strict=True)]
    return found


@dataclass(frozen=True, eq=False)
class Halves:
    """A measure on two disjoint halves of the documents.

    Attributes:
        first: By layer of the first and of the second model, on one half.
        second: The same on the other.
        largest: The largest absolute difference between them; the layer numbers where it is, the rows of each half and
            how many pairs of layers are ``undefined`` on either, among its facts. NaN with a reason where no pair is
            defined on both.
    """

    first: Table
    second: Table
    largest: Result


def halves(
    measure: Measure,
    xs: Layers,
    ys: Layers,
    *,
    document: NDArray[np.integer] | None = None,
    tick: Tick = lambda _: None,
) -> Halves:
    """A measure on the two halves of the corpus.

    Args:
        measure: Any.
        xs: Layers of the first model, float32 ``(n, d)`` each.
        ys: Layers of the second.
        document: ``(n,)`` labels: whole documents go to one half or the other, so that both get about equally many
            rows; without them the first half of the rows and the rest.
        tick: Progress.

    Raises:
        FitError: No layers, rows or labels of unequal number, or fewer than two rows or documents.
    """
    n = _check(xs, ys)
    draws = _documents(document, n)
    groups = np.arange(n) * 2 // max(n, 1) if draws is None else draws.document
    if len(np.unique(groups)) < 2:
        raise FitError(f"{n} rows of a single document have no two halves: give more documents")
    side = dealt(groups, 2)
    tables: list[Table] = []
    half = _part(tick, 0.5)
    for number in range(2):
        chosen = side == number
        kept = _documents(None if document is None else document[chosen], int(chosen.sum()))
        tables.append(_cross(measure, [x[chosen] for x in xs], [y[chosen] for y in ys], kept, half))
    first, second = (np.array([[one.value for one in row] for row in table]) for table in tables)
    apart = np.abs(first - second)
    if not np.isfinite(apart).any():
        reason = next((one.reason for table in tables for row in table for one in row if one.reason), "not finite")
        return Halves(tables[0], tables[1], Result(math.nan, f"undefined on the halves: {reason}"))
    i, j = (int(k) for k in np.unravel_index(np.nanargmax(apart), apart.shape))
    facts = {
        "layer_x": float(i),
        "layer_y": float(j),
        "rows_first": float((side == 0).sum()),
        "rows_second": float((side == 1).sum()),
        "undefined": float(np.count_nonzero(~np.isfinite(apart))),
    }
    return Halves(tables[0], tables[1], Result(float(apart[i, j]), facts=facts))


def rounded(
    rows: NDArray[np.float32], form: Format | str, *, origin: NDArray[np.floating] | None = None, seed: int = 0
) -> NDArray[np.float32]:
    """The same states after one more rounding of the size that the store's elements bring.

    Where encoding changes the rows, that is the rounding. Rows that come from a store of this format hold its elements
    already, and another encoding changes nothing; what the first one cost is then shown by a state that would have been
    rounded to each of them: every element is moved, evenly distributed, within the half steps to its two neighbours,
    and *not* encoded again, which would only bring it back. Where a dimension varies by less than a step, its states
    were not spread evenly over it, and this says more than the rounding cost. float32 elements have no such states in
    float32, and come back as they are.

    Args:
        rows: float32 ``(n, d)``, about ``origin``.
        form: The store's format. The column scales of ``int8`` are those of the given rows.
        origin: ``(d,)`` that was taken off the rows; an element's step depends on its size with it.
        seed: Fixes the dither.

    Returns:
        float32 ``(n, d)`` about the same origin.

    Raises:
        SpecError: No such format.
        NonFiniteStateError: A state is not finite, or float16 cannot hold it.
    """
    kind = parse_format(form) if isinstance(form, str) else form
    offset = np.float32(0) if origin is None else np.asarray(origin, dtype=np.float32)
    whole = rows + offset
    scale = column_scale_of(whole) if kind.column_scaled else None
    encoded = kind.encode(whole, scale)
    once = kind.decode(encoded.stored, encoded.row_scale, scale)
    if np.linalg.norm(once - whole) <= _STORED * np.linalg.norm(whole):
        once = _dithered(kind, encoded.stored, encoded.row_scale, scale, seed)
    result: NDArray[np.float32] = (once - offset).astype(np.float32, copy=False)
    return result


def _dithered(
    form: Format,
    stored: NDArray[np.generic],
    row_scale: NDArray[np.float32] | None,
    column_scale: NDArray[np.float32] | None,
    seed: int,
) -> NDArray[np.float32]:
    """Stored elements moved within the half steps to their neighbours."""

    def decoded(payload: NDArray[np.generic]) -> NDArray[np.float32]:
        with np.errstate(invalid="ignore"):
            return form.decode(payload.view(stored.dtype), row_scale, column_scale)

    here = decoded(stored)
    if form.name == "float32":
        return here
    if stored.dtype.kind == "i":
        above, below = (
            decoded(np.clip(stored.astype(np.int16) + step, -127, 127).astype(np.int8)) - here for step in (1, -1)
        )
    else:
        # Payloads of one sign count magnitudes: the next one is the next value away from zero.
        bits = stored.view(f"u{stored.dtype.itemsize}")
        away = decoded(bits + 1) - here
        magnitude = bits & ((1 << (8 * bits.itemsize - 1)) - 1)
        toward = np.where(magnitude == 0, -away, decoded(bits - (magnitude > 0)) - here)
        # Beyond the largest element the step is taken to be that below it.
        away = np.where(np.isfinite(away), away, -toward)
        negative = bits != magnitude
        above, below = np.where(negative, toward, away), np.where(negative, away, toward)
    move = np.random.default_rng(seed).uniform(-0.5, 0.5, size=here.shape).astype(np.float32)
    result: NDArray[np.float32] = here + np.where(move > 0, move * above, -move * below)
    return result

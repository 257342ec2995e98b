"""A measure over a sample of rows, with its floors, ceilings and intervals, as ``cka.json`` holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.similarity.by_document import measured
from align.similarity.floors import exchange
from align.similarity.measures.base import Measure, Resampling, Result
from align.similarity.measures.controls import Table, ceilings, floors, halves
from align.similarity.sample import Layers, Sample
from featstore.errors import FitError

#: Both models' rows of a second reading, or the reason why there is none.
Twice = tuple[Layers, Layers] | str
_Found = Mapping[tuple[int, int], Result]


def compare(
    measure: Measure,
    sample: Sample,
    names: tuple[Sequence[str], Sequence[str]],
    *,
    forms: tuple[str, str],
    draws: Resampling,
    twice: Twice,
    permutations: int = 0,
    most: int = exchange.FLOOR_ROWS,
    seed: int = 0,
    tick: Callable[[float], None] = lambda _: None,
) -> dict[str, Any]:
    """One measure over all layers, within each model and between them.

    Args:
        measure: Which.
        sample: Rows; of one model alone both sides are the same.
        names: ``model:layer`` of every layer of both sides.
        forms: Element formats of both models in the store.
        draws: Documents, and draws of them for intervals.
        twice: A second reading of the same text by the same models, or why there is none.
        permutations: Exchanges of partners behind each of its floors; 0 for none.
        most: Rows of these floors at most.
        seed: Of the controls.
        tick: Called with the share of the work done since the last call.

    Returns:
        ``title``, ``closer``, ``symmetric``, ``bounds``; ``cross``, ``within`` and, where the measure is not symmetric,
        ``reverse``, float64 matrices with NaN where undefined; ``ci95`` of the same shapes with ``[low, high]`` or
        None, of a biased measure with a ``reason`` why there are none; ``facts`` and ``reasons`` by pair of layers;
        ``floors``, ``permutations`` and ``ceilings``; ``without``, for ``cka_documents.json``.
    """
    alone = sample.xs is sample.ys
    count = len(sample.xs)
    layers = list(sample.xs) if alone else [*sample.xs, *sample.ys]
    every = list(names[0]) if alone else [*names[0], *names[1]]
    part = _share(tick, 0.3)
    wanted = [(i, j) for i in range(len(layers)) for j in range(len(layers)) if i <= j or not measure.symmetric]
    found, without = measured(measure, layers, wanted, draws, part)
    first, second = range(count), range(count) if alone else range(count, len(layers))
    models = list(dict.fromkeys(name.rpartition(":")[0] for name in (names[0][0], names[1][0])))
    within = {models[0]: _matrix(found, first, first)}
    draws_of = None if measure.biased else draws
    ci = {models[0]: _intervals(found, first, first, draws_of)}
    if not alone:
        within[models[1]] = _matrix(found, second, second)
        ci[models[1]] = _intervals(found, second, second, draws_of)
    result: dict[str, Any] = {
        "title": measure.title,
        "closer": measure.closer,
        "symmetric": measure.symmetric,
        "bounds": list(measure.bounds),
        "cross": _matrix(found, first, second),
        "within": within,
        "ci95": {"cross": _intervals(found, first, second, draws_of), "within": ci},
        "facts": {f"{every[i]} {every[j]}": one.facts for (i, j), one in found.items() if one.facts},
        "reasons": {f"{every[i]} {every[j]}": one.reason for (i, j), one in found.items() if one.reason},
    }
    if not (measure.symmetric or alone):
        result["reverse"] = _matrix(found, second, first).T
        result["ci95"]["reverse"] = [
            list(column) for column in zip(*_intervals(found, second, first, draws_of), strict=True)
        ]
    if measure.biased:
        result["ci95"]["reason"] = (
            "unrelated rows get another value by how many they are: the interval of the value less its floor stands "
            "there, as excess_ci95"
        )
    if isinstance(without, str):
        result["without"] = {"values": {}, "reason": without}
    else:
        result["without"] = {"values": {f"{every[i]} {every[j]}": values for (i, j), values in without.items()}}
    result["floors"] = _floors(measure, sample, names, seed, _share(tick, 0.2))
    result["ceilings"] = _ceilings(measure, sample, names, forms, twice, seed, _share(tick, 0.2))
    result["permutations"] = {}
    if permutations:
        result["permutations"] = exchange.floors(
            measure,
            sample.xs,
            sample.ys,
            sample.rows,
            draws=permutations,
            most=most,
            resamples=len(draws.counts),
            seed=seed,
            alone=alone,
            tick=_share(tick, 0.3),
        )
    return result


def _floors(
    measure: Measure,
    sample: Sample,
    names: tuple[Sequence[str], Sequence[str]],
    seed: int,
    tick: Callable[[float], None],
) -> dict[str, Any]:
    def both(xs: Layers, ys: Layers, share: float) -> dict[str, Table]:
        return floors(measure, xs, ys, seed=seed, document=sample.document, tick=_share(tick, share))

    one_way = not measure.symmetric and sample.xs is not sample.ys
    forth = both(sample.xs, sample.ys, 0.5 if one_way else 1.0)
    back = both(sample.ys, sample.xs, 0.5) if one_way else {}
    found: dict[str, Any] = {}
    for name, table in forth.items():
        found[name] = {"cross": _values(table), "reasons": _reasons(table, *names), "n": sample.n}
        if one_way:
            found[name]["reverse"] = _values(back[name]).T
    return found


def _ceilings(
    measure: Measure,
    sample: Sample,
    names: tuple[Sequence[str], Sequence[str]],
    forms: tuple[str, str],
    twice: Twice,
    seed: int,
    tick: Callable[[float], None],
) -> dict[str, Any]:
    alone = sample.xs is sample.ys
    again = None if isinstance(twice, str) else twice
    reasons: dict[str, str] = {} if again else {"twice": str(twice)}
    found: dict[str, Any] = {"twice": None}
    part = _share(tick, 0.5 if forms[0] == forms[1] else 0.25)
    by_form = {
        form: ceilings(
            measure,
            sample.xs,
            sample.ys,
            form,
            origins=sample.origins,
            twice=again,
            seed=seed,
            document=sample.document,
            tick=part,
        )
        for form in dict.fromkeys(forms)
    }
    for name in by_form[forms[0]]:
        found[name] = {}
        for side, form in enumerate(forms[:1] if alone else forms):
            results = by_form[form][name][side]
            model = names[side][0].rpartition(":")[0]
            found[name][model] = [one.value for one in results]
            reasons |= {
                f"{name} {layer}": one.reason for layer, one in zip(names[side], results, strict=True) if one.reason
            }
    try:
        two = halves(measure, sample.xs, sample.ys, document=sample.document, tick=_share(tick, 0.5))
    except FitError as error:
        found["halves"], reasons["halves"] = None, str(error)
    else:
        found["halves"] = {
            "cross": np.abs(_values(two.first) - _values(two.second)),
            "largest": two.largest.value,
            "rows": {key: two.largest.facts[key] for key in ("rows_first", "rows_second")} if two.largest.facts else {},
        }
        reasons |= {
            f"halves {key}": why for table in (two.first, two.second) for key, why in _reasons(table, *names).items()
        }
    return {**found, "reasons": reasons}


def _share(tick: Callable[[float], None], share: float) -> Callable[[float], None]:
    return lambda done: tick(done * share)


def _at(found: _Found, i: int, j: int) -> Result:
    return found[i, j] if (i, j) in found else found[j, i]


def _matrix(found: _Found, rows: Sequence[int], columns: Sequence[int]) -> NDArray[np.float64]:
    return np.array([[_at(found, i, j).value for j in columns] for i in rows], dtype=np.float64)


def _intervals(
    found: _Found, rows: Sequence[int], columns: Sequence[int], draws: Resampling | None
) -> list[list[tuple[float, float] | None]]:
    return [[_at(found, i, j).interval(draws) for j in columns] for i in rows]


def _values(table: Table) -> NDArray[np.float64]:
    return np.array([[one.value for one in row] for row in table], dtype=np.float64)


def _reasons(table: Table, rows: Sequence[str], columns: Sequence[str]) -> dict[str, str]:
    return {
        f"{rows[i]} {columns[j]}": one.reason
        for i, row in enumerate(table)
        for j, one in enumerate(row)
        if one.reason is not None
    }

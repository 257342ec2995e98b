"""Similarity of all layers with all layers: debiased linear CKA, exact over the whole store, over Dask.

Rows are centred at the pilot's origin and the layers of both models put side by side, ``Z = [X_1 .. X_K, Y_1 .. Y_M]``.
One product ``Z'Z`` per block of rows then holds every cross-covariance at once; with the squared row norms ``a`` of
every layer, the sums of ``Z``, ``Z'a`` and ``a'a`` complete what the estimator needs (see :mod:`align.moments`). Blocks
merge by addition in a fixed tree, so a rerun gives the same bits whatever the workers do. Wide layers are worked
through in groups, which bounds memory. A store that keeps its moments is not scanned at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import ssyrk
from threadpoolctl import threadpool_limits

from align.metrics import biased_cka_from_moments, debiased_cka, debiased_cka_from_moments
from align.moment_scores import NEEDS_ROWS, layer_similarity
from align.moments import Moments
from align.scan import usable_moments
from featstore.console import progress
from featstore.errors import PairingError, SpecError
from featstore.store import Store, open_store
from featstore.store.moments import has_rows
from featstore.store.pairs import Pairs

#: Rows of a task: float32 sums of so many terms keep their digits, and a small store still fills two cores.
BLOCK_ROWS = 4096
#: Width of the layers one task multiplies: 8192 squared in float64 is half a gigabyte.
GROUP_WIDTH = 8192
_FAN_IN = 8
_NULL_ROWS = 4096
ESTIMATORS = ("debiased", "biased")


@dataclass(frozen=True)
class Site:
    """One layer of one side.

    Attributes:
        model: Model name.
        layer: Layer.
        source: Whether its rows are those of the pairs' first model.
    """

    model: str
    layer: int
    source: bool


@dataclass(frozen=True, eq=False)
class Partial:
    """Sums over rows for two groups of sites, side by side; adds up.

    Attributes:
        n: Rows.
        gram: ``Z_p' Z_q``.
        sums: Column sums of both groups.
        norms: Sums of the squared row norms of every site of both groups.
        products: ``A_p' A_q``, A being the ``(n, sites)`` squared row norms.
        cross: ``Z_p' A_q`` and ``Z_q' A_p``.
    """

    n: int
    gram: NDArray[np.float64]
    sums: tuple[NDArray[np.float64], NDArray[np.float64]]
    norms: tuple[NDArray[np.float64], NDArray[np.float64]]
    products: NDArray[np.float64]
    cross: tuple[NDArray[np.float64], NDArray[np.float64]]


def add(parts: Sequence[Partial]) -> Partial:
    """Merge sums over disjoint rows, in the order given.

    Args:
        parts: At least one.
    """
    first = parts[0]
    for other in parts[1:]:
        first = Partial(
            first.n + other.n,
            first.gram + other.gram,
            (first.sums[0] + other.sums[0], first.sums[1] + other.sums[1]),
            (first.norms[0] + other.norms[0], first.norms[1] + other.norms[1]),
            first.products + other.products,
            (first.cross[0] + other.cross[0], first.cross[1] + other.cross[1]),
        )
    return first


def accumulate(p: Sequence[NDArray[np.float32]], q: Sequence[NDArray[np.float32]] | None) -> Partial:
    """Sum a block of rows for two groups of sites.

    Args:
        p: float32 ``(n, width)`` of each site of the first group, about their origins.
        q: The same of the second group; None for the first group with itself, at half the work.
    """
    z_p = np.concatenate(p, axis=1)
    z_q = z_p if q is None else np.concatenate(q, axis=1)
    if q is None:
        upper = np.triu(ssyrk(1.0, z_p.T)).astype(np.float64)
        gram = upper + upper.T - np.diag(np.diag(upper))
    else:
        gram = (z_p.T @ z_q).astype(np.float64)
    a_p = _squared_norms(p)
    a_q = a_p if q is None else _squared_norms(q)
    sum_p, cross_p = _weighted_sums(z_p, a_q)
    sum_q, cross_q = (sum_p, cross_p) if q is None else _weighted_sums(z_q, a_p)
    return Partial(len(z_p), gram, (sum_p, sum_q), (a_p.sum(axis=0), a_q.sum(axis=0)), a_p.T @ a_q, (cross_p, cross_q))


def _squared_norms(group: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    return np.stack([np.einsum("ij,ij->i", x, x, dtype=np.float64) for x in group], axis=1)


def _weighted_sums(z: NDArray[np.float32], a: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``Z'1`` and ``Z'A`` in float64, widening a few rows at a time."""
    sums, cross = np.zeros(z.shape[1]), np.zeros((z.shape[1], a.shape[1]))
    for start in range(0, len(z), 1024):
        wide = z[start : start + 1024].astype(np.float64)
        sums += wide.sum(axis=0)
        cross += wide.T @ a[start : start + 1024]
    return sums, cross


@dataclass(frozen=True)
class Selection:
    """Which pairs of which store, small enough to travel with every task.

    Attributes:
        path: The store, as the workers reach it.
        fingerprint: Of the store; keeps a worker from using one it opened before it changed.
        source: Model name.
        target: Model name.
        policy: Pair policy.
        keep_sinks: Whether attention sinks are in.
    """

    path: str
    fingerprint: str
    source: str
    target: str
    policy: str
    keep_sinks: bool


@lru_cache(maxsize=4)
def _selected(selection: Selection) -> tuple[Store, Pairs]:
    """A worker's own store and pairs, opened once for all its tasks."""
    store = open_store(selection.path)
    pairs = store.pairs(selection.source, selection.target, selection.policy)
    return store, pairs.select(keep_sinks=selection.keep_sinks)


def _block(selection: Selection, start: int, p: list[Site], q: list[Site]) -> Partial:
    """The task a worker runs: read a block's rows, centre them, accumulate."""
    store, pairs = _selected(selection)
    part = slice(start, start + BLOCK_ROWS)

    def rows(site: Site) -> NDArray[np.float32]:
        origin = store.origin(site.model, site.layer).astype(np.float32)
        numbers = pairs.row_source if site.source else pairs.row_target
        return store.rows(site.model, site.layer)[numbers[part]] - origin

    # One thread a task: the scheduler runs as many tasks as there are cores.
    with threadpool_limits(1):
        left = [rows(site) for site in p]
        return accumulate(left, None if p == q else [rows(site) for site in q])


def groups(sites: Sequence[Site], widths: dict[str, int], limit: int = GROUP_WIDTH) -> list[list[Site]]:
    """Cut the list of sites into groups of bounded total width.

    Args:
        sites: All sites.
        widths: Hidden width by model.
        limit: Total width of a group; a single wider site is a group of its own.
    """
    result: list[list[Site]] = [[]]
    total = 0
    for site in sites:
        if result[-1] and total + widths[site.model] > limit:
            result.append([])
            total = 0
        result[-1].append(site)
        total += widths[site.model]
    return result


def similarity(selection: Selection, sites: Sequence[Site], estimator: str, *, label: str, quiet: bool) -> Any:
    """CKA between all sites over paired rows, on the current Dask client.

    Args:
        selection: Pairs to use.
        sites: Layers of either side.
        estimator: ``debiased`` or ``biased``.
        label: For the progress display.
        quiet: No progress.

    Returns:
        ``(values, reasons)``: a symmetric ``(sites, sites)`` matrix, NaN where undefined, and the reason by position.
    """
    from dask import delayed
    from distributed import as_completed, get_client

    store, pairs = _selected(selection)
    widths = {name: store.model(name).width for name in (selection.source, selection.target)}
    parts = groups(sites, widths)
    combinations = list(combinations_with_replacement(range(len(parts)), 2))
    tasks = []
    for i, j in combinations:
        level = [delayed(_block)(selection, s, parts[i], parts[j]) for s in range(0, len(pairs), BLOCK_ROWS)]
        while len(level) > 1:
            level = [delayed(add)(level[at : at + _FAN_IN]) for at in range(0, len(level), _FAN_IN)]
        tasks.append(level[0])
    client = get_client()
    futures = client.compute(tasks)
    with progress(label, len(tasks) * len(pairs), "rows", quiet=quiet) as tick:
        for _ in as_completed(futures):
            tick(len(pairs))
        merged = dict(zip(combinations, client.gather(futures), strict=True))
    return _matrix(store, sites, parts, merged, estimator)


def _matrix(
    store: Store,
    sites: Sequence[Site],
    parts: list[list[Site]],
    merged: dict[tuple[int, int], Partial],
    estimator: str,
) -> tuple[NDArray[np.float64], dict[tuple[int, int], str]]:
    compute = debiased_cka_from_moments if estimator == "debiased" else biased_cka_from_moments
    place = {site: (g, i) for g, part in enumerate(parts) for i, site in enumerate(part)}
    values = np.full((len(sites), len(sites)), math.nan)
    reasons: dict[tuple[int, int], str] = {}
    for r, first in enumerate(sites):
        for c in range(r, len(sites)):
            second = sites[c]
            value, reason = compute(_moments(store, parts, merged, place[first], place[second]))
            values[r, c] = values[c, r] = value
            if reason:
                reasons[r, c] = reason
    return values, reasons


def _moments(
    store: Store,
    parts: list[list[Site]],
    merged: dict[tuple[int, int], Partial],
    first: tuple[int, int],
    second: tuple[int, int],
) -> Moments:
    """Cut one pair of layers out of the group sums."""

    def columns(group: int, index: int) -> slice:
        widths = [store.model(site.model).width for site in parts[group]]
        return slice(sum(widths[:index]), sum(widths[: index + 1]))

    (g, i), (h, j) = first, second
    cross, own_x, own_y = merged[g, h], merged[g, g], merged[h, h]
    x, y = columns(g, i), columns(h, j)
    site_x, site_y = parts[g][i], parts[h][j]
    return Moments(
        n=cross.n,
        origin_x=store.origin(site_x.model, site_x.layer),
        origin_y=store.origin(site_y.model, site_y.layer),
        sx=cross.sums[0][x],
        sy=cross.sums[1][y],
        gx=own_x.gram[x, x],
        gy=own_y.gram[y, y],
        c=cross.gram[x, y],
        a=float(cross.norms[0][i]),
        b=float(cross.norms[1][j]),
        d=float(cross.products[i, j]),
        aa=float(own_x.products[i, i]),
        bb=float(own_y.products[j, j]),
        ux=cross.cross[0][x, j],
        uy=cross.cross[1][y, i],
        vx=own_x.cross[0][x, i],
        vy=own_y.cross[0][y, j],
    )


def compare_layers(
    path: Path,
    *,
    models: tuple[str, str],
    layers: dict[str, tuple[int, ...]],
    estimator: str = "debiased",
    policy: str = "end",
    keep_sinks: bool = False,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """All layers of two models against each other and within each, with floor and sinks beside.

    Needs a current Dask client.

    Args:
        path: The store.
        models: Two model names; equal for one model alone.
        layers: Layers by model.
        estimator: ``debiased`` or ``biased``.
        policy: Pair policy.
        keep_sinks: Whether the main figures include attention sinks.
        seed: Of the shuffled floor.
        quiet: No progress.

    Returns:
        The contents of ``cka.json``.

    Raises:
        SpecError: Unknown estimator.
        PairingError: Fewer than four pairs.
        StoreStateError: The store holds no rows, and its moments do not answer.
    """
    if estimator not in ESTIMATORS:
        raise SpecError(f"estimator {estimator!r}: choose one of {', '.join(ESTIMATORS)}")
    store = open_store(path)
    first, second = models
    everything = store.pairs(first, second, policy)
    masked = everything.select(keep_sinks=False)
    sites = [Site(first, k, source=True) for k in layers[first]]
    count = len(sites)
    if first != second:
        sites += [Site(second, k, source=False) for k in layers[second]]
    named = [(site.model, site.layer) for site in sites]
    wanted = list(combinations_with_replacement(named, 2))
    stored = usable_moments(store, (first, second), wanted, policy=policy, keep_sinks=keep_sinks)
    rows = all(has_rows(store, *site) for site in named)

    def tables(*, sinks: bool) -> dict[str, Any]:
        # Workers of another process have another working directory.
        selection = Selection(str(path.resolve()), store.fingerprint, first, second, policy, sinks)
        n = len(everything if sinks else masked)
        if n < 4:
            raise PairingError(f"{n} pairs of {first} and {second}: CKA needs at least 4; extract more text")
        if stored is not None and not sinks:
            values, reasons = layer_similarity(stored, named, estimator)
        elif rows:
            label = "cka with sinks" if sinks else "cka"
            values, reasons = similarity(selection, sites, estimator, label=label, quiet=quiet)
        else:
            values = np.full((len(sites), len(sites)), math.nan)
            reasons = dict.fromkeys(combinations_with_replacement(range(len(sites)), 2), NEEDS_ROWS)
        cross = values[:count, count:] if first != second else values
        within = {first: values[:count, :count]}
        if first != second:
            within[second] = values[count:, count:]
        names = [f"{model}:{layer}" for model, layer in named]
        undefined = {f"{names[r]} {names[c]}": why for (r, c), why in reasons.items()}
        return {"n": n, "cross": cross, "within": within, "reasons": undefined}

    main = everything if keep_sinks else masked
    result = tables(sinks=keep_sinks)
    beside = tables(sinks=not keep_sinks)
    return {
        "models": [first, second],
        "layers": {name: list(layers[name]) for name in dict.fromkeys(models)},
        "estimator": estimator,
        "kernel": "linear",
        **result,
        "null": _floor(store, main, sites[:count], sites[count:] or sites, seed, rows=rows),
        "masked_rows": len(everything) - len(masked),
        "keep_sinks": keep_sinks,
        "masked" if keep_sinks else "unmasked": beside,
        "store": {"path": str(path), "fingerprint": store.fingerprint},
    }


def _floor(
    store: Store, pairs: Pairs, down: Sequence[Site], columns: Sequence[Site], seed: int, *, rows: bool
) -> dict[str, Any]:
    """Debiased CKA of the same states with their pairing destroyed; null in a store without rows."""
    about = {"method": "shuffled pairs", "estimator": "debiased"}
    if not rows:
        return {"cross": np.full((len(down), len(columns)), math.nan), "n": 0, **about, "reason": NEEDS_ROWS}
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(pairs), min(len(pairs), _NULL_ROWS), replace=False))
    order = rng.permutation(len(chosen))
    x = {site: store.rows(site.model, site.layer)[pairs.row_source[chosen]] for site in down}
    y = {site: store.rows(site.model, site.layer)[pairs.row_target[chosen][order]] for site in columns}
    cross = [[debiased_cka(x[r], y[c])[0] for c in columns] for r in down]
    return {"cross": cross, "n": len(chosen), **about}


def best_partners(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For every layer of the first model the most similar layer of the second.

    Args:
        result: From :func:`compare_layers`.
    """
    first, second = result["models"]
    table = {}
    for layer, row in zip(result["layers"][first], np.asarray(result["cross"], dtype=float), strict=True):
        if np.isfinite(row).any():
            best = int(np.nanargmax(row))
            table[str(layer)] = {"layer": result["layers"][second][best], "cka": float(row[best])}
    return table

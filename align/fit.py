"""Closed-form fits of all layer pairs from one scan of the store, or from the moments it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from align import solvers
from align.aligners import Aligner
from align.layers import LayerPair
from align.moments import BLOCK_ROWS, Array, Moments, Scatter, about, centered, means, merge, moments_of, raw
from featstore.corpus import TRAIN, VALIDATION
from featstore.errors import FitError, StoreStateError
from featstore.store import Store
from featstore.store.moments import SitePair, StoredMoments, has_rows
from featstore.store.pairs import Pairs

#: Fewest train pairs: below, no fit is worth the name.
MINIMUM_PAIRS = 8

SKIPS = ("procrustes", "ridge", "identity", "none")


@dataclass(frozen=True)
class Scan:
    """What one pass over the store knows of a layer pair.

    Attributes:
        train: Moments of the train pairs.
        val: Moments of the validation pairs.
        shuffled: The train moments with targets permuted, or drawn as if: the fit that must find nothing.
    """

    train: Moments
    val: Moments
    shuffled: Moments

    @property
    def means(self) -> tuple[Array, Array]:
        """Train means of source and target."""
        return means(self.train)


def limit_rows(pairs: Pairs, max_rows: int | None, seed: int) -> Pairs:
    """Keep a random subset of pairs, in document order.

    Args:
        pairs: Any selection.
        max_rows: At most so many; None for all.
        seed: Of the choice.
    """
    if max_rows is None or len(pairs) <= max_rows:
        return pairs
    keep = np.zeros(len(pairs), dtype=bool)
    keep[np.random.default_rng(seed).choice(len(pairs), max_rows, replace=False)] = True
    return pairs.where(keep)


def scan(
    store: Store,
    pairs: Pairs,
    wanted: Sequence[LayerPair],
    *,
    seed: int = 0,
    tick: Callable[[float], None] = lambda _: None,
) -> dict[str, Scan]:
    """Accumulate the moments of all layer pairs, reading every row once.

    Args:
        store: Complete store.
        pairs: Of the models, all splits, mask applied.
        wanted: Layer pairs, all of these two models in this direction.
        seed: Of the shuffled control.
        tick: Called with the number of pairs done since the last call.

    Raises:
        PairingError: Too few train or no validation pairs.
    """
    train = pairs.where(pairs.split == TRAIN).need(MINIMUM_PAIRS, "training")
    val = pairs.where(pairs.split == VALIDATION).need(1, "validation")
    fit, shuffled = _accumulate(store, train, wanted, np.random.default_rng(seed), tick)
    check, _ = _accumulate(store, val, wanted, None, tick)
    return {p.key: Scan(fit[p.key], check[p.key], shuffled[p.key]) for p in wanted}


def _accumulate(
    store: Store,
    pairs: Pairs,
    wanted: Sequence[LayerPair],
    rng: np.random.Generator | None,
    tick: Callable[[float], None],
) -> tuple[dict[str, Moments], dict[str, Moments]]:
    total: dict[str, Moments] = {}
    shuffled: dict[str, Moments] = {}
    for start in range(0, len(pairs), BLOCK_ROWS):
        part = slice(start, min(start + BLOCK_ROWS, len(pairs)))
        x = {k: store.rows(pairs.source, k)[pairs.row_source[part]] for k in {p.source_layer for p in wanted}}
        y = {k: store.rows(pairs.target, k)[pairs.row_target[part]] for k in {p.target_layer for p in wanted}}
        order = rng.permutation(part.stop - part.start) if rng is not None else None
        for pair in wanted:
            origins = store.origin(pair.source, pair.source_layer), store.origin(pair.target, pair.target_layer)
            rows, targets = x[pair.source_layer], y[pair.target_layer]
            new = moments_of(rows, targets, *origins)
            total[pair.key] = merge(total[pair.key], new) if pair.key in total else new
            if order is not None:
                # Permuting targets changes the cross term alone as far as any fit is concerned.
                cross = (rows - origins[0].astype(np.float32)).T @ (targets[order] - origins[1].astype(np.float32))
                mixed = replace(new, c=cross.astype(np.float64))
                shuffled[pair.key] = merge(shuffled[pair.key], mixed) if pair.key in shuffled else mixed
        tick(part.stop - part.start)
    return total, shuffled


def usable_moments(
    store: Store,
    models: tuple[str, str],
    wanted: Sequence[SitePair],
    *,
    policy: str = "end",
    keep_sinks: bool = False,
    max_rows: int | None = None,
) -> StoredMoments | None:
    """The store's own moments where they are sums over exactly the pairs asked for; None where a scan has to do.

    Args:
        store: Complete store.
        models: Whose pairs, source and target.
        wanted: Which layers with which.
        policy: Pair policy.
        keep_sinks: Lift the sink mask.
        max_rows: Pairs of the train split at most.

    Raises:
        StoreStateError: The stored moments do not answer, and there are no rows that would.
    """
    source, target = models
    stored = StoredMoments(store, source, target)
    reasons = {
        f"--policy {policy}": policy != "end",
        "--keep-sinks": keep_sinks,
        "--max-rows": max_rows is not None,
        f"aligning {source!r} with itself": source == target,
    }
    asked = next((words for words, applies in reasons.items() if applies), None)
    if asked is None and stored.covers(wanted):
        return stored
    need_rows(store, wanted, asked or "a fit without moments of these pairs")
    return None


def need_rows(store: Store, wanted: Sequence[SitePair], what: str) -> None:
    """Refuse what only rows can answer where a store kept none.

    Args:
        store: Complete store.
        wanted: Which layers with which.
        what: What needs them, for the message.

    Raises:
        StoreStateError: A layer has no rows.
    """
    for model, layer in sorted({site for pair in wanted for site in pair}):
        if not has_rows(store, model, layer):
            raise StoreStateError(
                f"{what} needs rows, and {store.path} holds none of layer {layer} of {model!r}, only moments "
                "(policy end, sinks masked): fit a closed form to these, or extract again without --moments-only"
            )


def stored_scan(stored: StoredMoments, wanted: Sequence[LayerPair], *, seed: int = 0) -> dict[str, Scan]:
    """What :func:`scan` finds, from moments that the store keeps.

    Args:
        stored: From :func:`usable_moments`.
        wanted: Layer pairs, all of these two models in either direction.
        seed: Of the shuffled control.

    Raises:
        PairingError: Too few train or no validation pairs.
        StoreStateError: The moments have gone meanwhile.
    """
    stored.pairs.where(stored.pairs.split == TRAIN).need(MINIMUM_PAIRS, "training")
    stored.pairs.where(stored.pairs.split == VALIDATION).need(1, "validation")
    rng, result = np.random.default_rng(seed), {}
    for pair in wanted:
        train, val = (read_split(stored, pair, split) for split in (TRAIN, VALIDATION))
        result[pair.key] = Scan(train, val, as_if_shuffled(train, rng))
    return result


def sites_of(pair: LayerPair) -> SitePair:
    """A layer pair as stored moments name it.

    Args:
        pair: Which layers.
    """
    return (pair.source, pair.source_layer), (pair.target, pair.target_layer)


def read_split(stored: StoredMoments, pair: LayerPair, split: int) -> Moments:
    """The stored moments of a layer pair.

    Args:
        stored: From :func:`usable_moments`.
        pair: Which layers.
        split: 0 train, 1 validation, 2 test.

    Raises:
        StoreStateError: There are none.
    """
    found = stored.read(*sites_of(pair), split)
    if found is None:
        raise StoreStateError(f"{stored.store.path} holds no moments of {pair.key}; make them with `featstore moments`")
    return found


def as_if_shuffled(m: Moments, rng: np.random.Generator) -> Moments:
    """Moments as permuting the targets would leave them, drawn without the rows.

    Over all permutations P of n rows the centred cross term ``X'PY`` has mean zero and covariance
    ``kron(X'X, Y'Y) / (n - 1)`` exactly, and many rows make it normal (Hoeffding, A combinatorial central limit
    theorem, 1951). So with ``X'X = L L'`` and ``Y'Y = M M'`` a draw is ``L Z M' / sqrt(n - 1)``, Z standard normal.

    Args:
        m: Moments of at least two pairs.
        rng: Source of the draw.
    """
    whole = centered(m)
    noise = rng.standard_normal(m.c.shape)
    cross = _root(whole.gx) @ noise @ _root(whole.gy).T / np.sqrt(max(m.n - 1, 1))
    # Back about the origin, like the other terms.
    return replace(m, c=cross + np.outer(m.sx, m.sy) / m.n)


def _root(gram: Array) -> Array:
    """A matrix L with ``L L'`` the given one."""
    try:
        root: Array = np.linalg.cholesky(gram).astype(np.float64, copy=False)
    except np.linalg.LinAlgError:
        # Fewer rows than dimensions: semidefinite, with rounding on either side of zero.
        values, vectors = np.linalg.eigh(gram)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
    return root


@dataclass(frozen=True)
class Fit:
    """What to fit.

    Attributes:
        type: ``procrustes``, ``linear``, ``affine``, ``reduced-rank``.
        scale: Optimal isotropic scale (Procrustes).
        rank: Rank (reduced-rank).
        skip: What a low-rank map is added to: ``procrustes``, ``ridge``, ``identity``, ``none``.
    """

    type: str
    scale: bool = False
    rank: int = 32
    skip: str = "none"


def fit_closed(fit: Fit, pair: LayerPair, moments: Scan) -> Aligner:
    """Fit one map in closed form.

    Args:
        fit: What to fit.
        pair: Which layers.
        moments: Of this pair; lambda is chosen on its validation part.

    Raises:
        FitError: Rank above width, identity between different widths, or the solver refused.
    """
    mean_x, mean_y = moments.means
    train = centered(moments.train)
    val = about(moments.val, mean_x, mean_y)
    if fit.type == "procrustes":
        weight, scale = solvers.procrustes(train.c, train.gx, scale=fit.scale)
        return _aligner(pair, scale * weight, mean_x, mean_y, moments.means, {"scale": scale}, weight.size)
    if fit.type == "affine":
        choice = solvers.select_ridge(train, val)
        trainable = choice.weight.size + len(mean_y)
        return _aligner(pair, choice.weight, mean_x, mean_y, moments.means, {"lambda": choice.lam}, trainable)
    if fit.type == "linear":
        choice = solvers.select_ridge(raw(moments.train), raw(moments.val))
        zero_x, zero_y = np.zeros_like(mean_x), np.zeros_like(mean_y)
        return _aligner(pair, choice.weight, zero_x, zero_y, moments.means, {"lambda": choice.lam}, choice.weight.size)
    if fit.type == "reduced-rank":
        skip = skip_weight(fit.skip, train, val)
        choice = solvers.select_reduced_rank(train, val, fit.rank, skip=skip)
        weight = choice.weight if skip is None else skip + choice.weight
        trainable = sum(factor.size for factor in choice.factors)
        options: dict[str, float | int | str] = {"lambda": choice.lam, "rank": fit.rank, "skip": fit.skip}
        return _aligner(pair, weight, mean_x, mean_y, moments.means, options, trainable)
    raise FitError(f"type {fit.type!r} has no closed form; choose procrustes, linear, affine or reduced-rank")


def skip_weight(name: str, train: Scatter, val: Scatter) -> Array | None:
    """The fixed map that a low-rank map is added to.

    Args:
        name: ``procrustes``, ``ridge``, ``identity`` or ``none``.
        train: Centred train moments.
        val: Validation moments about the train means.

    Returns:
        float64 ``(d_source, d_target)``, or None.

    Raises:
        FitError: Unknown, or identity between different widths.
    """
    check_low_rank(1, name, *train.c.shape)
    if name == "none":
        return None
    if name == "procrustes":
        return solvers.procrustes(train.c, train.gx)[0]
    if name == "ridge":
        return solvers.select_ridge(train, val).weight
    return np.eye(len(train.c))


def check_low_rank(rank: int, skip: str, dx: int, dy: int) -> None:
    """Refuse a low-rank map that cannot be, before any row is read.

    Args:
        rank: Its rank.
        skip: What it is added to.
        dx: Source width.
        dy: Target width.

    Raises:
        FitError: Unknown skip, identity between different widths, or a rank above the smaller width.
    """
    if skip not in SKIPS:
        raise FitError(f"skip {skip!r}: choose one of {', '.join(SKIPS)}")
    if skip == "identity" and dx != dy:
        raise FitError(f"skip 'identity' needs equal widths, not {dx} and {dy}; use --skip procrustes")
    if not 1 <= rank <= min(dx, dy):
        raise FitError(f"rank {rank} does not fit widths {dx} and {dy}: use 1 to {min(dx, dy)}")


def _aligner(
    pair: LayerPair,
    weight: NDArray[np.float64],
    mean_source: Array,
    mean_target: Array,
    controls: tuple[Array, Array],
    options: dict[str, float | int | str],
    trainable: int,
) -> Aligner:
    tensors = {"weight": weight, "mean_source": mean_source, "mean_target": mean_target}
    tensors |= {"control_mean_source": controls[0], "control_mean": controls[1]}
    return Aligner(pair, {name: t.astype(np.float32) for name, t in tensors.items()}, dict(options), int(trainable))


def baselines(fit: Fit, pair: LayerPair, moments: Scan, seed: int) -> dict[str, Aligner | str]:
    """The maps every result is shown beside.

    Args:
        fit: The type that was fitted; the shuffled control uses the same.
        pair: Which layers.
        moments: Of this pair.
        seed: Of the random rotation.

    Returns:
        By name a map, or the reason why there is none.
    """
    mean_x, mean_y = moments.means
    shape = (len(mean_x), len(mean_y))
    rng = np.random.default_rng(seed)
    rotation = solvers.random_orthogonal(*shape, rng)
    zeros = np.zeros(shape)
    result: dict[str, Aligner | str] = {
        "mean": _aligner(pair, zeros, mean_x, mean_y, moments.means, {}, 0),
        "identity": f"widths differ ({shape[0]} and {shape[1]})",
        "random_rotation": _aligner(pair, rotation, mean_x, mean_y, moments.means, {}, 0),
        "shuffled": fit_closed(fit, pair, replace(moments, train=moments.shuffled)),
    }
    if shape[0] == shape[1]:
        zero = np.zeros_like(mean_x)
        result["identity"] = _aligner(pair, np.eye(shape[0]), zero, zero, moments.means, {}, 0)
    return result

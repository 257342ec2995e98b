"""Closed-form fits of layer pairs from their moments, and the baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
from array_api_compat import device as device_of
from numpy.typing import NDArray

from align import solvers
from align.closed_form.shared import fit_shared
from align.layers import LayerPair
from align.maps.fitted import Aligner
from align.moments.device import torch_device
from align.moments.scan import Scan
from align.moments.scatter import Array, Scatter, about, centered, raw
from align.solvers.linalg import namespace
from featstore.errors import FitError

SKIPS = ("procrustes", "ridge", "identity", "none")


@dataclass(frozen=True)
class Fit:
    """What to fit.

    Attributes:
        type: ``procrustes``, ``linear``, ``affine``, ``reduced-rank``.
        scale: Optimal isotropic scale (Procrustes).
        rank: Rank (reduced-rank).
        skip: What a low-rank map is added to: ``procrustes``, ``ridge``, ``identity``, ``none``.
        components: Procrustes within so many principal components of either side; ``auto`` for the number that is best
            on validation, None for all dimensions.
    """

    type: str
    scale: bool = False
    rank: int = 32
    skip: str = "none"
    components: int | str | None = None


@dataclass(eq=False)
class _Source:
    """What is known of the source layers that were fitted last.

    Attributes:
        facts: By which they are recognised.
        rotated: A layer pair in their eigenbasis; None before there is one.
        spectrum: Their eigendecomposition, or None.
        values: (d,) eigenvalues of their Gram on the host, or None.
    """

    facts: tuple[object, ...]
    rotated: solvers.Rotated | None = None
    spectrum: solvers.Spectrum | None = None
    values: Array | None = None


class Solver:
    """Fits layer pairs one after the other; what those with the same source layers share is computed once.

    That is the eigendecomposition of the source Gram and the validation Gram in its basis, the dearest part of a ridge
    path. Only the last source is remembered (about six matrices of its width), so fit the pairs of a source in a row.

    Args:
        device: ``cpu`` for numpy; otherwise systems are solved in float64 by torch on that device
            (:func:`align.moments.device.torch_device`).

    Raises:
        SpecError: There is no such device.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = torch_device(device)
        self._sources: dict[str, _Source] = {}

    def fit(self, fit: Fit, pair: LayerPair, moments: Scan) -> Aligner:
        """Fit one map in closed form.

        Args:
            fit: What to fit.
            pair: Which layers.
            moments: Of this pair; lambda and components are chosen on its validation part.

        Returns:
            The map. Its options hold what was chosen, and ``gram_min`` and ``gram_max``, the extreme eigenvalues of the
            centred source Gram of the train rows (a sum over them, not divided by their number).

        Raises:
            FitError: Rank or components above width, identity between different widths, or the solver refused.
        """
        if fit.components is not None and fit.type != "procrustes":
            raise FitError(f"type {fit.type!r} has no components to choose; leave --components out or use procrustes")
        mean_x, mean_y = moments.means
        centred = centered(moments.train), about(moments.val, mean_x, mean_y)
        if fit.type == "procrustes":
            weight, options, trainable = self._procrustes(fit, pair, *centred)
        elif fit.type == "reduced-rank":
            weight, options, trainable = self._reduced_rank(fit, pair, *centred)
        elif fit.type in ("affine", "linear"):
            both = centred if fit.type == "affine" else (raw(moments.train), raw(moments.val))
            choice = solvers.select_ridge(*(sides := self._there(*both)), rotated=self._rotate(pair, both, sides))
            weight, options = solvers.to_numpy(choice.weight), {"lambda": choice.lam}
            trainable = weight.size + (len(mean_y) if fit.type == "affine" else 0)
        else:
            raise FitError(f"type {fit.type!r} has no closed form; choose procrustes, linear, affine or reduced-rank")
        if fit.type == "linear":
            mean_x, mean_y = np.zeros_like(mean_x), np.zeros_like(mean_y)
        values = self._values(pair, *centred)
        options |= {"gram_min": float(values[0]), "gram_max": float(values[-1])}
        return _aligner(pair, weight, mean_x, mean_y, moments.means, options, trainable)

    def fit_on(self, skip: Array, pair: LayerPair, moments: Scan, rank: int) -> Aligner:
        """See :func:`fit_low_rank_on`.

        Args:
            skip: float64 ``(d_source, d_target)``.
            pair: Which layers.
            moments: Of this pair.
            rank: 1 to the smaller width.
        """
        means = moments.means
        train, val = centered(moments.train), about(moments.val, *means)
        check_low_rank(rank, "none", *train.c.shape)
        there, check = self._there(train, val)
        rotated = self._rotate(pair, (train, val), (there, check))
        below = skip if self._device is None else namespace(there.c).asarray(skip, device=device_of(there.c))
        choice = solvers.select_reduced_rank(there, check, rank, skip=below, rotated=rotated)
        options: dict[str, float | int | str] = {"lambda": choice.lam, "rank": rank, "skip": "shared"}
        weight = skip + solvers.to_numpy(choice.weight)
        return _aligner(pair, weight, *means, means, options, rank * sum(train.c.shape))

    def gram_values(self, pair: LayerPair, moments: Scan) -> Array:
        """(d,) eigenvalues, ascending, of the centred source Gram of the train rows; none below zero.

        Args:
            pair: Which layers.
            moments: Of this pair.

        Raises:
            FitError: There are no train pairs.
        """
        return self._values(pair, centered(moments.train), about(moments.val, *moments.means))

    def _procrustes(self, fit: Fit, pair: LayerPair, train: Scatter, val: Scatter) -> _Fitted:
        there, check = self._there(train, val)
        if fit.components is None:
            weight, scale = solvers.procrustes(there.c, there.gx, scale=fit.scale)
            return scale * solvers.to_numpy(weight), {"scale": scale}, train.c.size
        spectra = self._spectrum(pair, train, val, there), solvers.Spectrum.of(there.gy)
        if fit.components == "auto":
            found = solvers.select_truncated_procrustes(there, check, scale=fit.scale, spectra=spectra)
            weight, scale, components = found.weight, found.scale, found.components
        elif isinstance(fit.components, int):
            components = fit.components
            weight, scale = solvers.truncated_procrustes(there.c, *spectra, components, scale=fit.scale)
        else:
            raise FitError(f"components {fit.components!r}: give a number of principal components, or 'auto'")
        return scale * solvers.to_numpy(weight), {"scale": scale, "components": components}, train.c.size

    def _reduced_rank(self, fit: Fit, pair: LayerPair, train: Scatter, val: Scatter) -> _Fitted:
        check_low_rank(fit.rank, fit.skip, *train.c.shape)
        there, check = self._there(train, val)
        rotated = self._rotate(pair, (train, val), (there, check))
        skip = skip_weight(fit.skip, there, check, rotated=rotated)
        choice = solvers.select_reduced_rank(there, check, fit.rank, skip=skip, rotated=rotated)
        weight = choice.weight if skip is None else skip + choice.weight
        options: dict[str, float | int | str] = {"lambda": choice.lam, "rank": fit.rank, "skip": fit.skip}
        return solvers.to_numpy(weight), options, fit.rank * sum(train.c.shape)

    def _there(self, train: Scatter, val: Scatter) -> tuple[Scatter, Scatter]:
        if self._device is None:
            return train, val
        return solvers.to_device(train, self._device), solvers.to_device(val, self._device)

    def _source(self, pair: LayerPair, train: Scatter, val: Scatter) -> _Source:
        # Moments of other rows, or about another centre, differ in these; equal ones are the same to the last bit.
        marks = (train.mean_x, np.diag(train.gx), np.diag(val.gx))
        facts = (pair.source, pair.source_layers, train.n, val.n, *(mark.tobytes() for mark in marks))
        kind = "centred" if train.mean_x.any() else "raw"
        if kind not in self._sources or self._sources[kind].facts != facts:
            self._sources[kind] = _Source(facts)
        return self._sources[kind]

    def _rotate(
        self, pair: LayerPair, here: tuple[Scatter, Scatter], there: tuple[Scatter, Scatter]
    ) -> solvers.Rotated:
        source = self._source(pair, *here)
        source.rotated = solvers.rotate(*there, spectrum=source.spectrum, like=source.rotated)
        source.spectrum = source.rotated.spectrum
        return source.rotated

    def _spectrum(self, pair: LayerPair, train: Scatter, val: Scatter, there: Scatter) -> solvers.Spectrum:
        source = self._source(pair, train, val)
        if source.spectrum is None:
            source.spectrum = solvers.Spectrum.of(there.gx)
        return source.spectrum

    def _values(self, pair: LayerPair, train: Scatter, val: Scatter) -> Array:
        source = self._source(pair, train, val)
        if source.values is None and source.spectrum is not None:
            source.values = solvers.to_numpy(source.spectrum.values)
        if source.values is None:
            # Without eigenvectors: a rotation has no other use for the decomposition.
            source.values = np.maximum(scipy.linalg.eigvalsh(train.gx, check_finite=False), 0.0)
        return source.values


#: Weight, options and the number of fitted parameters.
_Fitted = tuple[Array, dict[str, float | int | str], int]


def fit_closed(
    fit: Fit, pair: LayerPair, moments: Scan, *, device: str = "cpu", solver: Solver | None = None
) -> Aligner:
    """Fit one map in closed form; see :meth:`Solver.fit`.

    Args:
        fit: What to fit.
        pair: Which layers, joint ones too.
        moments: Of this pair; lambda and components are chosen on its validation part.
        device: Where systems are solved.
        solver: One that has fitted other pairs with the same source, whose device then counts; None for a fresh one.

    Raises:
        FitError: Rank or components above width, identity between different widths, or the solver refused.
        SpecError: There is no such device.
    """
    return (solver or Solver(device)).fit(fit, pair, moments)


def fit_shared_procrustes(
    pairs: Sequence[LayerPair], scans: Mapping[str, Scan], scale: bool = False
) -> dict[str, Aligner]:
    """One rotation for all layer pairs, each about its own means (:mod:`align.closed_form.shared`).

    W maximises the sum over layer pairs of ``tr(W'C_k) / (u_xk u_yk)``, with u the root of the mean variance of a
    layer's dimensions; a pair's own map is ``s_k W``.

    Args:
        pairs: Layer pairs of two models in one direction.
        scans: Moments of each, by key.
        scale: Each pair's least-squares factor ``s_k = tr(W'C_k) / tr(W'G_k W)`` instead of 1.

    Returns:
        A map for each pair, in order, by key.

    Raises:
        FitError: No pairs, one without moments, source or target widths that differ, or a layer that does not vary.
    """
    missing = [pair.key for pair in pairs if pair.key not in scans]
    if missing:
        raise FitError(f"there are no moments of {', '.join(missing)}; scan all layer pairs that share a rotation")
    shapes = {scans[pair.key].train.c.shape for pair in pairs}
    if len(shapes) > 1:
        raise FitError(f"layer pairs of widths {sorted(shapes)} cannot share a rotation; fit joint maps apart")
    shared = fit_shared({pair.key: scans[pair.key] for pair in pairs}, "procrustes", scale=scale)
    result = {}
    for pair in pairs:
        means = scans[pair.key].means
        options: dict[str, float | int | str] = {"scale": shared.factors[pair.key], "shared": len(pairs)}
        result[pair.key] = _aligner(pair, shared.of(pair.key), *means, means, options, shared.weight.size)
    return result


def fit_low_rank_on(skip: Array, pair: LayerPair, moments: Scan, rank: int, *, solver: Solver | None = None) -> Aligner:
    """The best map of one rank on top of a given map, with the ridge strength that validation chooses.

    Args:
        skip: float64 ``(d_source, d_target)``, say a map that several layer pairs share.
        pair: Which layers.
        moments: Of this pair.
        rank: 1 to the smaller width.
        solver: One that has fitted other pairs with the same source; None for a fresh one.

    Raises:
        FitError: The rank does not fit the widths.
    """
    return (solver or Solver()).fit_on(skip, pair, moments, rank)


def skip_weight(name: str, train: Scatter, val: Scatter, *, rotated: solvers.Rotated | None = None) -> Array | None:
    """The fixed map that a low-rank map is added to.

    Args:
        name: ``procrustes``, ``ridge``, ``identity`` or ``none``.
        train: Centred train moments.
        val: Validation moments about the train means.
        rotated: ``solvers.rotate(train, val)`` if it is known already.

    Returns:
        float64 ``(d_source, d_target)``, of the kind and on the device of the moments, or None.

    Raises:
        FitError: Unknown, or identity between different widths.
    """
    check_low_rank(1, name, *train.c.shape)
    if name == "none":
        return None
    if name == "procrustes":
        return solvers.procrustes(train.c, train.gx)[0]
    if name == "ridge":
        return solvers.select_ridge(train, val, rotated=rotated).weight
    xp = namespace(train.c)
    eye: Array = xp.eye(len(train.c), dtype=xp.float64, device=device_of(train.c))
    return eye


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


def baselines(
    fit: Fit, pair: LayerPair, moments: Scan, seed: int, *, device: str = "cpu", solver: Solver | None = None
) -> dict[str, Aligner | str]:
    """The maps every result is shown beside.

    Args:
        fit: The type that was fitted; the shuffled control uses the same.
        pair: Which layers.
        moments: Of this pair.
        seed: Of the random rotation.
        device: Where systems are solved.
        solver: One that has fitted pairs with the same source; None for a fresh one.

    Returns:
        By name a map, or the reason why there is none.
    """
    mean_x, mean_y = moments.means
    shape = (len(mean_x), len(mean_y))
    rng = np.random.default_rng(seed)
    rotation = solvers.random_orthogonal(*shape, rng)
    zeros = np.zeros(shape)
    shuffled = replace(moments, train=moments.shuffled)
    result: dict[str, Aligner | str] = {
        "mean": _aligner(pair, zeros, mean_x, mean_y, moments.means, {}, 0),
        "identity": f"widths differ ({shape[0]} and {shape[1]})",
        "random_rotation": _aligner(pair, rotation, mean_x, mean_y, moments.means, {}, 0),
        "shuffled": fit_closed(fit, pair, shuffled, device=device, solver=solver),
    }
    if shape[0] == shape[1]:
        zero = np.zeros_like(mean_x)
        result["identity"] = _aligner(pair, np.eye(shape[0]), zero, zero, moments.means, {}, 0)
    return result

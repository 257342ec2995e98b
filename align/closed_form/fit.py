"""Closed-form fits of layer pairs from their moments, and the baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from array_api_compat import device as device_of
from numpy.typing import NDArray

from align import solvers
from align.closed_form.problem import Problem, Solution, Source
from align.closed_form.shared import fit_shared
from align.layers import LayerPair
from align.maps.fitted import Aligner
from align.maps.low_rank import check_low_rank
from align.maps.registry import MapType, having, listed, map_types, resolve
from align.moments.device import torch_device
from align.moments.scan import Scan
from align.moments.scatter import Array, Scatter, raw
from align.solvers.linalg import namespace
from featstore.errors import FitError


@dataclass(frozen=True)
class Fit:
    """What to fit.

    Attributes:
        type: A type of :mod:`align.maps.registry` with a closed form.
        scale: Whether a rotation, fitted or as skip, is multiplied by its factor (:mod:`align.closed_form.scaling`).
        rank: Rank (reduced-rank).
        skip: What a low-rank map is added to: ``procrustes``, ``ridge``, ``identity``, ``none``.
        components: Procrustes within so many principal components of either side; ``auto`` for the number that is best
            on validation, None for all dimensions.
    """

    type: str
    scale: bool = True
    rank: int = 32
    skip: str = "none"
    components: int | str | None = None


class Solver:
    """Fits layer pairs one after the other; what those with the same source layers share is computed once.

    That is the eigendecomposition of the source Gram and the validation Gram in its basis, the most expensive part of a
    ridge path. Only the last source is remembered (about six matrices of its width), so fit the pairs of a source in a
    row.

    Args:
        device: ``cpu`` for numpy; otherwise systems are solved in float64 by torch on that device
            (:func:`align.moments.device.torch_device`).

    Raises:
        SpecError: There is no such device.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = torch_device(device)
        self._sources: dict[str, Source] = {}
        self._rotation: tuple[tuple[int, int], int, NDArray[np.float32]] | None = None

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
        type_, solve = _closed(fit)
        mean_x, mean_y = moments.means
        centred = moments.centred
        sides = centred if type_.centred else (raw(moments.train), raw(moments.val))
        solution = solve(fit, self._problem(pair, *sides))
        if not type_.centred:
            mean_x, mean_y = np.zeros_like(mean_x), np.zeros_like(mean_y)
        values = self._values(pair, *centred)
        options = {**solution.options, "gram_min": float(values[0]), "gram_max": float(values[-1])}
        return _aligner(pair, solution.weight, mean_x, mean_y, moments.means, options, solution.trainable)

    def fit_on(self, skip: Array, pair: LayerPair, moments: Scan, rank: int) -> Aligner:
        """Fit the best map of one rank on top of a given map, with the ridge strength that validation chooses.

        Args:
            skip: float64 ``(d_source, d_target)``, say a map that several layer pairs share.
            pair: Which layers.
            moments: Of this pair.
            rank: 1 to the smaller width.

        Raises:
            FitError: The rank does not fit the widths.
        """
        means = moments.means
        problem = self._problem(pair, *moments.centred)
        check_low_rank(rank, "none", *problem.widths)
        c = problem.train.c
        below = skip if self._device is None else namespace(c).asarray(skip, device=device_of(c))
        choice = solvers.select_reduced_rank(problem.train, problem.val, rank, skip=below, rotated=problem.rotated())
        options: dict[str, float | int | str] = {"lambda": choice.lam, "rank": rank, "skip": "shared"}
        weight = skip + solvers.to_numpy(choice.weight)
        return _aligner(pair, weight, *means, means, options, rank * sum(problem.widths))

    def gram_values(self, pair: LayerPair, moments: Scan) -> Array:
        """(d,) eigenvalues, ascending, of the centred source Gram of the train rows; none below zero.

        Args:
            pair: Which layers.
            moments: Of this pair.

        Raises:
            FitError: There are no train pairs.
        """
        return self._values(pair, *moments.centred)

    def random_rotation(self, widths: tuple[int, int], seed: int) -> NDArray[np.float32]:
        """:func:`align.solvers.random_orthogonal` of a seed, drawn once for all layer pairs and types of map.

        Args:
            widths: Of source and target.
            seed: Of the draw.

        Returns:
            float32 of that shape, always the same array.
        """
        if self._rotation is None or self._rotation[:2] != (widths, seed):
            drawn = solvers.random_orthogonal(*widths, np.random.default_rng(seed))
            # Maps are float32, and so much is kept.
            self._rotation = widths, seed, drawn.astype(np.float32)
        return self._rotation[2]

    def forget(self) -> None:
        """Let go of what is known of the last source, before something else needs the memory."""
        self._sources.clear()

    def _problem(self, pair: LayerPair, train: Scatter, val: Scatter) -> Problem:
        source = self._source(pair, train, val)
        if self._device is not None:
            # The same copies for every map of these moments: what they share is recognised by them.
            moved = source.moved
            if moved is None or moved[0] is not train or moved[1] is not val:
                there = solvers.to_device(train, self._device), solvers.to_device(val, self._device)
                moved = source.moved = (train, val, *there)
            _, _, train, val = moved
        return Problem(train, val, source)

    def _source(self, pair: LayerPair, train: Scatter, val: Scatter) -> Source:
        # Moments of other rows, or about another centre, differ in these; equal ones are the same to the last bit.
        marks = (train.mean_x, np.diag(train.gx), np.diag(val.gx))
        facts = (pair.source, pair.source_layers, train.n, val.n, *(mark.tobytes() for mark in marks))
        kind = "centred" if train.mean_x.any() else "raw"
        if kind not in self._sources or self._sources[kind].facts != facts:
            self._sources[kind] = Source(facts)
        return self._sources[kind]

    def _values(self, pair: LayerPair, train: Scatter, val: Scatter) -> Array:
        source = self._source(pair, train, val)
        if source.values is None and source.spectrum is not None:
            source.values = solvers.to_numpy(source.spectrum.values)
        if source.values is None:
            # Without eigenvectors: a rotation has no other use for the decomposition.
            source.values = np.maximum(scipy.linalg.eigvalsh(train.gx, check_finite=False), 0.0)
        return source.values


def _closed(fit: Fit) -> tuple[MapType, Callable[[Fit, Problem], Solution]]:
    """The record of what is to be fitted and what solves for it; refuses components that the type does not have."""
    types = {type_.name: type_ for type_ in map_types()}
    type_ = types.get(fit.type)
    if fit.components is not None and (type_ is None or "components" not in type_.options):
        raise FitError(
            f"type {fit.type!r} has no components to choose; leave --components out or use {having('components')}"
        )
    if type_ is None or type_.closed is None:
        closed = [name for name, known in types.items() if known.closed is not None]
        raise FitError(f"type {fit.type!r} has no closed form; choose {listed(closed, 'or')}")
    return type_, resolve(type_.closed)


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
    pairs: Sequence[LayerPair], scans: Mapping[str, Scan], scale: bool = True
) -> dict[str, Aligner]:
    """One rotation for all layer pairs, each about its own means (:mod:`align.closed_form.shared`).

    W maximises the sum over layer pairs of ``tr(W'C_k) / (u_xk u_yk)``, with u the root of the mean variance of a
    layer's dimensions; a pair's own map is ``s_k W``.

    Args:
        pairs: Layer pairs of two models in one direction.
        scans: Moments of each, by key.
        scale: Each pair's own factor ``s_k`` (:mod:`align.closed_form.scaling`) instead of 1.

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


def _aligner(
    pair: LayerPair,
    weight: Array | NDArray[np.float32],
    mean_source: Array,
    mean_target: Array,
    controls: tuple[Array, Array],
    options: dict[str, float | int | str],
    trainable: int,
) -> Aligner:
    tensors = {"weight": weight, "mean_source": mean_source, "mean_target": mean_target}
    tensors |= {"control_mean_source": controls[0], "control_mean": controls[1]}
    return Aligner(
        pair, {name: t.astype(np.float32, copy=False) for name, t in tensors.items()}, dict(options), int(trainable)
    )


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
    solver = solver or Solver(device)
    controls = unfitted_baselines(pair, moments, seed, solver)
    return {**controls, "shuffled": solver.fit(fit, pair, moments.without_partners)}


def unfitted_baselines(pair: LayerPair, moments: Scan, seed: int, solver: Solver) -> dict[str, Aligner | str]:
    """Those of :func:`baselines` that are the same whatever is fitted.

    Args:
        pair: Which layers.
        moments: Of this pair.
        seed: Of the random rotation.
        solver: Draws it once for all pairs.

    Returns:
        By name a map, or the reason why there is none.
    """
    mean_x, mean_y = moments.means
    shape = (len(mean_x), len(mean_y))
    rotation = solver.random_rotation(shape, seed)
    result: dict[str, Aligner | str] = {
        "mean": _aligner(pair, np.zeros(shape, np.float32), mean_x, mean_y, moments.means, {}, 0),
        "identity": f"widths differ ({shape[0]} and {shape[1]})",
        "random_rotation": _aligner(pair, rotation, mean_x, mean_y, moments.means, {}, 0),
    }
    if shape[0] == shape[1]:
        zero = np.zeros_like(mean_x)
        result["identity"] = _aligner(pair, np.eye(shape[0], dtype=np.float32), zero, zero, moments.means, {}, 0)
    return result

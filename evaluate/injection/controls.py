"""States that should *not* work, each of which rules out an explanation of a good score.

=================  ====================================================================================
condition          if it did as well as ``mapped`` ...
=================  ====================================================================================
``token``          ... the source's current token would be enough: a table of predictions without any context
``mean``           ... the target would need nothing of the source at the replaced positions
``zero``           ... the target would ignore the layer
``random_norm``    ... only the size of the states would matter
``random_rotation``... any rotation would do, not the fitted one
``shuffled``       ... states of other text would do: plausible, but about something else
``raw``            ... no map would be needed
=================  ====================================================================================
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from align.maps.fitted import Adapter, Aligner
from align.solvers import random_orthogonal
from align.tokens.files import FILE, load_tables
from align.tokens.table import TokenTable
from featstore.errors import AdapterError

CONTROLS = ("token", "mean", "zero", "random_norm", "random_rotation", "shuffled", "raw")


def control_states(
    name: str,
    aligner: Aligner,
    source: NDArray[np.float32],
    other: NDArray[np.float32] | None,
    rng: np.random.Generator,
    seed: int,
    *,
    mapped: NDArray[np.float32] | None = None,
    other_mapped: NDArray[np.float32] | None = None,
    predicted: NDArray[np.float32] | str = "nothing was predicted from the token alone",
) -> NDArray[np.float32] | str:
    """The states of a control at the positions that would take mapped states.

    Args:
        name: One of :data:`CONTROLS`.
        aligner: The map under test.
        source: float32 ``(n, d_source)``, the source states at those positions.
        other: float32 ``(n, d_source)`` source states of other text, or None where there is none.
        rng: For random vectors.
        seed: Of the random rotation, the same for all positions and windows.
        mapped: float32 ``(n, d_target)``, the mapped states where they are at hand: a map of windows cannot make them
            from ``source``.
        other_mapped: float32 ``(n, d_target)``, mapped states of other text, in place of mapping ``other``.
        predicted: float32 ``(n, d_target)``, what is predicted from the source token at each position alone; or why
            there is no such prediction.

    Returns:
        float32 ``(n, d_target)``, or the reason why the control does not exist.
    """
    tensors = aligner.tensors
    d_source, d_target = aligner.widths
    if name == "token":
        return predicted
    if name == "mean":
        return np.broadcast_to(tensors["control_mean"], (len(source), d_target)).copy()
    if name == "zero":
        return np.zeros((len(source), d_target), np.float32)
    if name == "random_norm":
        noise = rng.standard_normal((len(source), d_target)).astype(np.float32)
        unit = noise / np.linalg.norm(noise, axis=1, keepdims=True)
        size = np.linalg.norm(aligner.apply(source) if mapped is None else mapped, axis=1, keepdims=True)
        scaled: NDArray[np.float32] = unit * size
        return scaled
    if name == "random_rotation":
        rotated = (source - tensors["control_mean_source"]) @ _rotation(d_source, d_target, seed)
        rotated = rotated + tensors["control_mean"]
        return rotated.astype(np.float32, copy=False)
    if name == "shuffled":
        if other_mapped is not None:
            return other_mapped
        return "there is no other text to take states from" if other is None else aligner.apply(other)
    if d_source != d_target:
        return f"widths differ ({d_source} and {d_target})"
    return source


def token_table(adapter: Adapter, aligner: Aligner) -> TokenTable | str:
    """What a run predicts a map's target states to be from the source's current token alone.

    Args:
        adapter: The maps of the run.
        aligner: One of its maps.

    Returns:
        The predictions, or why the run has none.

    Raises:
        AdapterError: They are damaged, or of another width than the map gives.
    """
    if not (adapter.directory / FILE).is_file():
        return (
            f"the run has no {FILE}: it was made by an earlier version, or from a store without rows; train it again "
            "from one that has them"
        )
    tables = load_tables(adapter.directory)
    key, width = aligner.pair.key, aligner.widths[1]
    if key not in tables.pairs:
        return f"{FILE} of the run has no predictions for {key}"
    table = tables.table(key)
    if table.mean.shape != (width,):
        raise AdapterError(
            f"{tables.path}: the predictions for {key} have width {table.mean.size}, the map gives {width}; train the "
            "run again"
        )
    return table


@lru_cache(maxsize=2)
def _rotation(d_source: int, d_target: int, seed: int) -> NDArray[np.float32]:
    """The same for every window: drawing one takes seconds at the width of a large model."""
    return random_orthogonal(d_source, d_target, np.random.default_rng(seed)).astype(np.float32)

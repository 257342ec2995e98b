"""What a run predicts a target's states to be from the source's current token alone: the control ``token``.

A run keeps these predictions in ``tokens.safetensors``, for every layer pair the ids of the tokens that have one of
their own, their states, and the mean state, which stands for any other token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featstore.errors import AdapterError

FILE = "tokens.safetensors"


@dataclass(frozen=True, eq=False)
class TokenStates:
    """Predictions of one layer pair.

    Attributes:
        ids: int64 ``(m,)``, ascending.
        states: float32 ``(m, d_target)``.
        mean: float32 ``(d_target,)``, of tokens that are not among ``ids``.
    """

    ids: NDArray[np.int64]
    states: NDArray[np.float32]
    mean: NDArray[np.float32]

    def predict(self, tokens: NDArray[np.integer]) -> NDArray[np.float32]:
        """The predicted target state at every token.

        Args:
            tokens: Integers ``(n,)``, source token ids.

        Returns:
            float32 ``(n, d_target)``.
        """
        wanted = np.asarray(tokens, dtype=np.int64)
        result = np.tile(self.mean, (len(wanted), 1))
        if len(self.ids):
            place = np.minimum(np.searchsorted(self.ids, wanted), len(self.ids) - 1)
            own = self.ids[place] == wanted
            result[own] = self.states[place[own]]
        return result


def token_states(directory: Path, key: str, width: int) -> TokenStates | str:
    """Read the predictions of a layer pair.

    Args:
        directory: Run directory.
        key: Of the layer pair.
        width: Of the target's states.

    Returns:
        The predictions, or why there are none.

    Raises:
        AdapterError: The file is damaged, or of another width.
    """
    from safetensors import SafetensorError, safe_open

    path = directory / FILE
    if not path.is_file():
        return f"the run has no {FILE}; fit it again with `align train` from a store with rows"
    try:
        with safe_open(path, framework="numpy") as stored:
            names = {name: f"{key}.{name}" for name in ("ids", "states", "mean")}
            if not set(names.values()) <= set(stored.keys()):
                return f"{FILE} of the run has no predictions for {key}"
            ids, states, mean = (np.asarray(stored.get_tensor(name)) for name in names.values())
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged ({error}); train the run again") from error
    if mean.shape != (width,) or states.shape != (len(ids), width):
        raise AdapterError(
            f"{path}: {key} has ids {ids.shape}, states {states.shape} and a mean {mean.shape}, the map gives width "
            f"{width}; train the run again"
        )
    order = np.argsort(ids, kind="stable")
    return TokenStates(ids[order].astype(np.int64), states[order].astype(np.float32), mean.astype(np.float32))

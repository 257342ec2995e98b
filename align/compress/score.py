"""How well a window codec does on a split: at the paired positions that tables compare, and at all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from align.compress.windows import Rows, Window, Windows
from align.metrics import DocumentSums, Figures, Reasons, ScoreAccumulator, Scorer
from align.tokens.table import TokenTable


class Codec(Protocol):
    """What reconstructs a window's target states from a few numbers."""

    @property
    def everywhere(self) -> bool:
        """Whether it answers at every target position, and not at the paired ones alone."""
        ...

    def window(self, window: Window) -> Rows:
        """Predict the target's states.

        Args:
            window: The window; of its target only ``ends_y`` may be used.

        Returns:
            float32 ``(T_y, d_target)``; ``(m, d_target)`` at the pairs if not :attr:`everywhere`.
        """
        ...


class Trained:
    """A resampler as a codec.

    Args:
        module: What reconstructs.
    """

    everywhere = True

    def __init__(self, module: Reconstructs) -> None:
        self._module = module

    def window(self, window: Window) -> Rows:
        """See :meth:`Codec.window`."""
        return self._module.reconstruct(window.x, window.ends_x, window.ends_y)


class ByToken:
    """A prediction from the source's current token alone as a codec; it is sent for nothing but the token ids.

    Args:
        table: What predicts.
    """

    everywhere = False

    def __init__(self, table: TokenTable) -> None:
        self._table = table

    def window(self, window: Window) -> Rows:
        """See :meth:`Codec.window`."""
        return self._table.predict(window.tokens_x[window.paired_x])


class Reconstructs(Protocol):
    """A module with :meth:`align.compress.resampler.Resampler.reconstruct`."""

    def reconstruct(self, x: Rows, ends_x: NDArray[np.int32], ends_y: NDArray[np.int32], /) -> Rows:
        """Target states of a window."""
        ...


def score_windows(
    windows: Windows,
    codecs: Mapping[str, Codec],
    mean_target: Rows,
    *,
    seed: int = 0,
    documents: DocumentSums | None = None,
) -> dict[str, tuple[Figures, Reasons]]:
    """Score codecs on the same windows in one pass.

    The figures are those of the linear maps, at the same rows in the same order. ``all_positions`` beside them is the
    pooled R2 at every ordinary unmasked target position, None where a codec only knows the paired ones.

    Args:
        windows: A split.
        codecs: By name.
        mean_target: (d_target,) the train mean over *pairs*: predicting it scores 0.
        seed: Of the retrieval gallery and the CKA subset.
        documents: Takes the squared errors of every codec at the paired positions by document as well.

    Returns:
        By name the figures and why one is None.
    """
    total, tokens = windows.paired(), windows.paired_tokens()
    paired = {name: Scorer(mean_target, total, seed=seed, tokens=tokens) for name in codecs}
    everywhere = {name: ScoreAccumulator(mean_target) for name in codecs}
    owners = windows.store.corpus.window_unit
    for window in windows:
        true = window.y[window.paired_y]
        owner = np.full(len(true), owners[window.number])
        if documents is not None:
            documents.add_targets(owner, true, mean_target)
        for name, codec in codecs.items():
            guess = codec.window(window)
            if codec.everywhere:
                everywhere[name].update(window.y, guess)
                guess = guess[window.paired_y]
            paired[name].update(true, guess, owner)
            if documents is not None:
                documents.add(name, owner, true, guess)
    result = {}
    for name in codecs:
        figures, reasons = paired[name].result()
        figures["all_positions"] = everywhere[name].result()["r2"]
        if figures["all_positions"] is None:
            why = everywhere[name].reasons().get("r2", "no rows")
            reasons["all_positions"] = why if codecs[name].everywhere else "answers at paired positions alone"
        result[name] = figures, reasons
    return result

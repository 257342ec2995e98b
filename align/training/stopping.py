"""The rule of early stopping, for a whole curve at once."""

from __future__ import annotations

from collections.abc import Sequence


def stopping_epoch(losses: Sequence[float], *, patience: int, min_delta: float) -> int | None:
    """The epoch after which a training with these validation losses would have been stopped.

    Patience counts from the last epoch that was better than its predecessor in this sense by ``min_delta``, so slow
    progress counts once it adds up.

    Args:
        losses: By epoch, that before training first.
        patience: Epochs without an improvement.
        min_delta: Least improvement.

    Returns:
        1 or more; None where it would have gone on to the end.
    """
    reference, waited = losses[0], 0
    for epoch, loss in enumerate(losses[1:], 1):
        if loss < reference - min_delta:
            reference, waited = loss, 0
        else:
            waited += 1
        if waited >= patience:
            return epoch
    return None

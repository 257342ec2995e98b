"""What a type of map is trained with where nobody says otherwise. Free of torch."""

from __future__ import annotations

from dataclasses import replace

from align.settings import LoopSettings

#: Pairs in a batch and peak learning rate, by type. Inputs are whitened and outputs in units of their own spread, so
#: that one rate serves all widths.
_OWN = {"linear": (128, 2e-2), "affine": (128, 2e-2), "lora": (128, 2e-2), "mlp": (128, 2e-2)}


def resolved(type_: str, loop: LoopSettings) -> LoopSettings:
    """Settings with the type's own batch size and learning rate where none was given.

    Args:
        type_: Of the map; one without defaults of its own has those of ``affine``.
        loop: As given.
    """
    batch_size, lr = _OWN.get(type_, _OWN["affine"])
    return replace(
        loop,
        batch_size=batch_size if loop.batch_size is None else loop.batch_size,
        lr=lr if loop.lr is None else loop.lr,
    )

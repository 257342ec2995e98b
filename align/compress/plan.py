"""The plan of training a resampler. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class WindowsPlan:
    """Everything that :func:`align.compress.fit.fit_windows` does with the windows it is given.

    Attributes:
        latents: Latents of a window.
        latent_dim: Width of a latent.
        epochs: Maximum number of epochs.
        patience: Epochs without an improvement of ``min_delta`` before stopping.
        min_delta: Least improvement of the validation loss.
        batch_size: Windows in a batch.
        clip: Largest norm of a step's gradient.
        lr: Peak learning rate of AdamW.
        seed: Of initialisation and order.
        device: Torch device name.
        identity: What makes this training the same one when it is resumed, as JSON values.
    """

    latents: int
    latent_dim: int
    epochs: int
    patience: int
    min_delta: float
    batch_size: int
    clip: float
    lr: float
    seed: int
    device: str
    identity: Mapping[str, Any] = field(default_factory=dict)

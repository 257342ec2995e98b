"""The plan of a training by gradient: one record for each of its steps. Free of torch.

Defaults are those of the settings; :mod:`align.runs.plan` makes a plan from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from featstore.errors import SpecError

#: The components that a training loss can be mixed from.
LOSSES = ("mse", "cosine", "infonce")
PRECISIONS = ("auto", "float32", "bfloat16")
TRACKERS = ("tensorboard", "wandb", "none")


@dataclass(frozen=True)
class Placement:
    """Where arithmetic happens, and in which precision.

    Attributes:
        device: Torch device name.
        precision: ``float32``, ``bfloat16`` (the arithmetic; weights stay float32), or ``auto``: bfloat16 on CUDA.
    """

    device: str = "cpu"
    precision: str = "auto"


@dataclass(frozen=True)
class Shape:
    """A map before training.

    Attributes:
        type: A type of :mod:`align.maps.registry` with a module.
        rank: Of a low-rank update.
        alpha: LoRA's scale; None for the rank (a factor of 1).
        skip: The fixed map that is added, by name.
        scale: Whether a rotation as skip is multiplied by its factor.
        hidden: Width of a hidden layer.
        precondition: Whether inputs are whitened inside the parameterisation.
        seed: Of the initialisation.
    """

    type: str
    rank: int = 32
    alpha: float | None = None
    skip: str = "procrustes"
    scale: bool = True
    hidden: int = 1024
    precondition: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Goal:
    """What is minimised.

    Attributes:
        weights: Of the components of the loss, from :func:`parse_loss`.
        temperature: Of InfoNCE.
    """

    weights: dict[str, float] = field(default_factory=lambda: parse_loss("mse=1"))
    temperature: float = 0.07


@dataclass(frozen=True)
class Schedule:
    """How long, in which steps, and how often something is measured or written.

    Attributes:
        epochs: Maximum number of epochs.
        patience: Epochs without an improvement of ``min_delta`` before stopping.
        min_delta: Least improvement of the validation loss.
        batch_size: Pairs in a batch of one process.
        accumulate: Batches of every process whose gradients make one step.
        clip: Largest norm of a step's gradient.
        lr: Peak learning rate of AdamW.
        cka_every: Steps between two CKA figures on a fixed sample of validation rows; 0 for none.
        checkpoint_every: Steps between two checkpoints within an epoch; every epoch ends with one.
        seed: Of the order of rows and of the samples that are measured.
    """

    epochs: int = 10
    patience: int = 2
    min_delta: float = 1e-3
    batch_size: int = 128
    accumulate: int = 1
    clip: float = 1.0
    lr: float = 2e-2
    cka_every: int = 100
    checkpoint_every: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that :func:`align.training.loop.train_map` does with the rows it is given.

    Attributes:
        shape: The map before training.
        goal: What is minimised.
        schedule: How long and in which steps.
        place: Where.
        identity: What makes this training the same one when it is resumed, as JSON values.
    """

    shape: Shape
    goal: Goal = field(default_factory=Goal)
    schedule: Schedule = field(default_factory=Schedule)
    place: Placement = field(default_factory=Placement)
    identity: Mapping[str, Any] = field(default_factory=dict)


def parse_loss(text: str) -> dict[str, float]:
    """Parse ``mse=1,cosine=0,infonce=0.1``; components not named weigh 0.

    Args:
        text: ``name=weight`` pairs, separated by commas.

    Returns:
        A weight for each of :data:`LOSSES`, in that order.

    Raises:
        SpecError: An unknown or repeated name, a weight that is no number or negative, or none that
            is positive.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name not in LOSSES or not equals:
            raise SpecError(f"--loss {part.strip()!r}: write NAME=WEIGHT with a name of {', '.join(LOSSES)}")
        if name in weights:
            raise SpecError(f"--loss names {name} twice; name every component once")
        try:
            weight = float(value)
        except ValueError:
            raise SpecError(f"--loss {name}: {value!r} is not a number; write such as mse=1,cosine=0.5") from None
        if not (math.isfinite(weight) and weight >= 0):
            raise SpecError(f"--loss {name}: the weight must be finite and not negative, not {value}")
        weights[name] = weight
    if not any(weights.values()):
        raise SpecError(f"--loss {text!r} gives no component a positive weight; give one, such as mse=1")
    return {name: weights.get(name, 0.0) for name in LOSSES}

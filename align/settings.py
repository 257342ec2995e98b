"""Everything a run can be told, and what of it cannot be meant.

Free of torch, like everything a closed-form fit needs: importing torch takes longer than most of these fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from align.fit import MINIMUM_PAIRS
from featstore.errors import SpecError
from featstore.store.loader import MEMORY

CLOSED_TYPES = ("procrustes", "linear", "affine", "reduced-rank")
TYPES = (*CLOSED_TYPES, "lora")


@dataclass(frozen=True)
class LoopSettings:
    """How a map is trained.

    Attributes:
        rank: Rank of a ``lora`` map.
        alpha: LoRA's scale; None for the rank (a factor of 1).
        skip: What a ``lora`` map is added to.
        loss: Weights, as typed after ``--loss``.
        temperature: Of InfoNCE.
        epochs: At most.
        patience: Stop after so many epochs without an improvement of ``min_delta``.
        min_delta: Least improvement of the validation loss.
        batch_size: Pairs a step.
        lr: Peak learning rate of AdamW.
        precondition: Whether inputs are whitened inside the parameterisation.
        seed: Of initialisation and order.
        device: Torch device name.
    """

    rank: int = 32
    alpha: float | None = None
    skip: str = "procrustes"
    loss: str = "mse=1,cosine=0,infonce=0"
    temperature: float = 0.07
    epochs: int = 10
    patience: int = 2
    min_delta: float = 1e-3
    batch_size: int = 128
    lr: float = 2e-2
    precondition: bool = True
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Settings:
    """Everything `align train` can be told. Written to ``run.yaml``, from which the same run can be made again.

    Attributes:
        store: Path of the store.
        type: One of :data:`TYPES`.
        source: Source model; None for the store's first.
        target: Target model; None for the store's second.
        both: Also the other direction.
        layers: Source layers, None for all.
        layer_map: ``K:K,...``, None for equal layers.
        solver: ``closed`` or ``adamw``; None for the type's own.
        scale: Optimal scale (Procrustes).
        keep_sinks: Lift the sink mask.
        policy: Pair policy.
        max_rows: Pairs of the train split at most.
        memory: Bytes that the buffers of paired rows may take; the order of minibatches depends on it.
        loop: Rank, skip, loss, epochs and the rest of the gradient loop.
    """

    store: str
    type: str = "procrustes"
    source: str | None = None
    target: str | None = None
    both: bool = False
    layers: str | None = None
    layer_map: str | None = None
    solver: str | None = None
    scale: bool = False
    keep_sinks: bool = False
    policy: str = "end"
    max_rows: int | None = None
    memory: int = MEMORY
    loop: LoopSettings = field(default_factory=LoopSettings)

    @property
    def by_gradient(self) -> bool:
        """Whether the map is trained rather than solved for."""
        return self.type == "lora" or self.solver == "adamw"


def load_settings(path: Path) -> Settings:
    """Read a ``run.yaml``.

    Args:
        path: The file.

    Raises:
        SpecError: It is not one.
    """
    try:
        value = yaml.safe_load(path.read_text())
        loop = _typed(LoopSettings(**value["loop"]))
        return _typed(Settings(**{**value, "loop": loop}))
    except (OSError, yaml.YAMLError, TypeError, KeyError, ValueError) as error:
        raise SpecError(f"{path} is not a run.yaml of this program ({error}); `align train` writes one") from error


_S = TypeVar("_S", Settings, LoopSettings)


def _typed(settings: _S) -> _S:
    """Numbers as what they are: YAML reads ``1e-2`` as text and ``1`` as an integer."""
    changed: dict[str, Any] = {}
    for entry in fields(settings):
        kinds = str(entry.type).split(" | ")
        value = getattr(settings, entry.name)
        if "float" in kinds and isinstance(value, (str, int)) and not isinstance(value, bool):
            changed[entry.name] = float(value)
        elif type(value).__name__ not in kinds and not (value is None and "None" in kinds):
            raise TypeError(f"{entry.name} is {value!r}, expected {entry.type}")
    return replace(settings, **changed)


def check(settings: Settings) -> None:
    """Refuse what cannot be meant.

    Args:
        settings: As given.

    Raises:
        SpecError: Unknown type or solver, a combination that does not exist, or a number out of range.
    """
    if settings.type not in TYPES:
        raise SpecError(f"type {settings.type!r}: choose one of {', '.join(TYPES)}")
    if settings.solver not in (None, "closed", "adamw"):
        raise SpecError(f"solver {settings.solver!r}: choose closed or adamw")
    if settings.solver == "closed" and settings.type == "lora":
        raise SpecError("type 'lora' is trained by gradient; its closed form is --type reduced-rank")
    if settings.solver == "adamw" and settings.type in ("procrustes", "reduced-rank"):
        raise SpecError(f"type {settings.type!r} has a closed form only; leave out --solver adamw")
    loop = settings.loop
    for name in ("epochs", "patience", "batch_size", "rank"):
        if getattr(loop, name) < 1:
            raise SpecError(f"--{name.replace('_', '-')} {getattr(loop, name)}: must be at least 1")
    if settings.max_rows is not None and settings.max_rows < MINIMUM_PAIRS:
        raise SpecError(f"--max-rows {settings.max_rows}: a fit needs at least {MINIMUM_PAIRS} pairs")
    for name in ("lr", "temperature"):
        if not 0 < getattr(loop, name) < math.inf:
            raise SpecError(f"--{name} {getattr(loop, name)}: must be a positive number")
    if not 0 <= loop.min_delta < math.inf:
        raise SpecError(f"--min-delta {loop.min_delta}: must not be negative")
    if loop.seed < 0:
        raise SpecError(f"--seed {loop.seed}: must not be negative")
    if settings.by_gradient:
        from align.losses import parse_loss

        parse_loss(loop.loss)

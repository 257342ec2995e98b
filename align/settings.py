"""Everything a run can be told, and what of it cannot be meant.

Free of torch, like everything a closed-form fit needs: importing torch takes longer than most of these fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from align.moments.scan import MINIMUM_PAIRS
from featstore.errors import SpecError
from featstore.store.read.loader import MEMORY

CLOSED_TYPES = ("procrustes", "linear", "affine", "reduced-rank")
TYPES = (*CLOSED_TYPES, "lora", "mlp", "compress")
#: The components a training loss can be mixed from.
LOSSES = ("mse", "cosine", "infonce")
#: Types of which layers can share a map.
SHARED_TYPES = ("procrustes", "affine", "lora")
PRECISIONS = ("auto", "float32", "bfloat16")
TRACKERS = ("tensorboard", "wandb", "none")


@dataclass(frozen=True)
class LoopSettings:
    """How a map is trained.

    Attributes:
        rank: Rank of a ``lora`` map, and of each layer's own projection beside a shared map.
        alpha: LoRA's scale; None for the rank (a factor of 1).
        skip: What a ``lora`` or ``mlp`` map is added to.
        hidden: Width of the hidden layer of an ``mlp``.
        latents: Latents of a ``compress`` map.
        latent_dim: Width of a latent.
        loss: Weights, as typed after ``--loss``.
        temperature: Of InfoNCE.
        epochs: At most.
        patience: Stop after so many epochs without an improvement of ``min_delta``.
        min_delta: Least improvement of the validation loss.
        batch_size: Pairs in a batch of one process; windows for ``compress``. None for the type's own.
        accumulate: Batches of every process whose gradients make one step.
        clip: Largest norm of a step's gradient.
        lr: Peak learning rate of AdamW; None for the type's own, which serves widths 64 to 4096.
        precision: ``float32``, ``bfloat16`` (the arithmetic; weights stay float32), or ``auto``: bfloat16 on CUDA.
        cka_every: Steps between two CKA figures on a fixed sample of validation rows; 0 for none.
        checkpoint_every: Steps between two checkpoints within an epoch; every epoch ends with one.
        tracker: Where figures go as well: ``tensorboard``, ``wandb``, ``none``.
        precondition: Whether inputs are whitened inside the parameterisation.
        seed: Of initialisation and order.
        device: Torch device name.
    """

    rank: int = 32
    alpha: float | None = None
    skip: str = "procrustes"
    hidden: int = 1024
    latents: int = 32
    latent_dim: int = 64
    loss: str = "mse=1,cosine=0,infonce=0"
    temperature: float = 0.07
    epochs: int = 10
    patience: int = 2
    min_delta: float = 1e-3
    batch_size: int | None = None
    accumulate: int = 1
    clip: float = 1.0
    lr: float | None = None
    precision: str = "auto"
    cka_every: int = 100
    checkpoint_every: int = 1000
    tracker: str = "tensorboard"
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
        layer_map: ``K:K,...``, None for equal layers, ``auto`` for each source layer's best partner by validation R2.
        joint: One map from all source layers side by side to each target layer.
        shared: One map for all layer pairs, with a small projection of each layer's own.
        solver: ``closed`` or ``adamw``; None for the type's own.
        scale: Optimal scale (Procrustes).
        components: Procrustes within so many principal components of either side: a number, or ``auto`` for the best by
            validation R2. None for all dimensions.
        keep_sinks: Lift the sink mask.
        policy: Pair policy.
        max_rows: Pairs of the train split at most.
        memory: Bytes that the buffers of paired rows may take; the order of minibatches depends on it.
        eval_models: Load both models, and measure stitched loss and generations after every epoch.
        loop: Rank, skip, loss, epochs and the rest of the gradient loop.
    """

    store: str
    type: str = "procrustes"
    source: str | None = None
    target: str | None = None
    both: bool = False
    layers: str | None = None
    layer_map: str | None = None
    joint: bool = False
    shared: bool = False
    solver: str | None = None
    scale: bool = False
    components: str | None = None
    keep_sinks: bool = False
    policy: str = "end"
    max_rows: int | None = None
    memory: int = MEMORY
    eval_models: bool = False
    loop: LoopSettings = field(default_factory=LoopSettings)

    @property
    def by_gradient(self) -> bool:
        """Whether the map is trained rather than solved for."""
        return self.type in ("lora", "mlp", "compress") or self.solver == "adamw"


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
    if settings.solver == "closed" and settings.type in ("mlp", "compress"):
        raise SpecError(
            f"type {settings.type!r} is trained by gradient and has no closed form; leave out --solver closed"
        )
    if settings.solver == "adamw" and settings.type in ("procrustes", "reduced-rank"):
        raise SpecError(f"type {settings.type!r} has a closed form only; leave out --solver adamw")
    _check_combinations(settings)
    loop = settings.loop
    for name in ("epochs", "patience", "rank", "accumulate", "checkpoint_every", "hidden", "latents", "latent_dim"):
        if getattr(loop, name) < 1:
            raise SpecError(f"--{name.replace('_', '-')} {getattr(loop, name)}: must be at least 1")
    if loop.batch_size is not None and loop.batch_size < 1:
        raise SpecError(f"--batch-size {loop.batch_size}: must be at least 1")
    if loop.cka_every < 0:
        raise SpecError(f"--cka-every {loop.cka_every}: must not be negative; 0 turns it off")
    if settings.max_rows is not None and settings.max_rows < MINIMUM_PAIRS:
        raise SpecError(f"--max-rows {settings.max_rows}: a fit needs at least {MINIMUM_PAIRS} pairs")
    for name in ("lr", "temperature", "clip"):
        value = getattr(loop, name)
        if value is not None and not 0 < value < math.inf:
            raise SpecError(f"--{name} {value}: must be a positive number")
    if not 0 <= loop.min_delta < math.inf:
        raise SpecError(f"--min-delta {loop.min_delta}: must not be negative")
    if loop.seed < 0:
        raise SpecError(f"--seed {loop.seed}: must not be negative")
    for name, known in (("precision", PRECISIONS), ("tracker", TRACKERS)):
        if getattr(loop, name) not in known:
            raise SpecError(f"--{name} {getattr(loop, name)!r}: choose one of {', '.join(known)}")
    if settings.by_gradient:
        parse_loss(loop.loss)


def _check_combinations(settings: Settings) -> None:
    """Refuse options that do not go together, naming the one to leave out."""
    type_ = settings.type
    if settings.joint and settings.shared:
        raise SpecError("--joint and --shared are two ways to use several layers; give one of them")
    if settings.joint and settings.layer_map is not None:
        raise SpecError("--joint maps all source layers to each target layer; leave out --layer-map")
    loop, own = settings.loop, LoopSettings()
    if type_ == "compress":
        for name in ("loss", "accumulate", "precision"):
            if getattr(loop, name) != getattr(own, name):
                raise SpecError(
                    f"--{name} {getattr(loop, name)}: a compress map is trained on mse in float32, a batch a step; "
                    "leave it out"
                )
    if settings.joint and type_ == "compress":
        raise SpecError("--joint: a compress map reads one layer; leave it out")
    if settings.shared and type_ not in SHARED_TYPES:
        raise SpecError(f"--shared: not for type {type_!r}; choose one of {', '.join(SHARED_TYPES)}")
    if settings.shared and settings.solver == "adamw" and type_ == "affine":
        raise SpecError("--shared --type affine is solved for; leave out --solver adamw, or use --type lora")
    if settings.shared and settings.loop.skip not in ("procrustes", "ridge") and type_ == "lora":
        raise SpecError(
            f"--shared: the map that the layers share is procrustes or ridge, not --skip {settings.loop.skip}"
        )
    if settings.components is not None:
        if type_ != "procrustes" or settings.shared:
            raise SpecError("--components is for --type procrustes without --shared; leave it out")
        if settings.components != "auto" and not (settings.components.isdecimal() and int(settings.components)):
            raise SpecError(f"--components {settings.components!r}: write a number of dimensions, or auto")
    if settings.eval_models and not settings.by_gradient:
        raise SpecError(f"--eval-models is for training by gradient; use `evaluate stitch` on a {type_} run")
    if settings.eval_models and type_ == "compress":
        raise SpecError("--eval-models: the states of a compress map cannot be injected token by token; leave it out")


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
            raise SpecError(f"--loss names {name} twice")
        try:
            weight = float(value)
        except ValueError:
            raise SpecError(f"--loss {name}: {value!r} is not a number") from None
        if not (math.isfinite(weight) and weight >= 0):
            raise SpecError(f"--loss {name}: the weight must be finite and not negative, not {value}")
        weights[name] = weight
    if not any(weights.values()):
        raise SpecError(f"--loss {text!r} gives no component a positive weight")
    return {name: weights.get(name, 0.0) for name in LOSSES}

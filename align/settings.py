"""Run configuration and its validation.

Free of torch, like everything a closed-form fit needs: importing torch takes longer than most of these fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from align.maps.low_rank import SKIPS
from align.maps.registry import MapType, having, listed, map_type, map_types
from align.moments.scan import MINIMUM_PAIRS
from align.options import NOT_NEGATIVE, POSITIVE, POSITIVE_COUNT, Range, check_values, flag, option
from align.training.plan import PRECISIONS, TRACKERS, parse_loss
from featstore.errors import SpecError
from featstore.runtime.options import COMPUTATION, DEVICES, MODELS, POLICY_WORDS
from featstore.runtime.quantities import parse_bytes
from featstore.runtime.schema import shown
from featstore.store.read.loader import MEMORY
from featstore.text.roles import ROLES, roles_text

#: Panels of the help that these options alone have.
MAP, TRAINING, ROWS = "The map", "Training by gradient", "Rows"

#: Largest number of a run.yaml: a seed of 64 bits.
LARGEST = 2**64 - 1
#: Characters of a text in a run.yaml: a path, say.
_LONGEST = 1 << 16
#: Skip maps that layers can share.
_SHARED_SKIPS = ("procrustes", "ridge")


@dataclass(frozen=True)
class LoopSettings:
    """Size of a map, its training, seed and device: the part ``loop`` of a ``run.yaml``.

    Meaning, default and range of every field are declared beside it.
    """

    rank: int = option(
        32,
        f"Rank of {having('rank')} maps, and of the projections of each layer with --shared.",
        panel=MAP,
        range=POSITIVE_COUNT,
    )
    alpha: float | None = option(
        None,
        "Scale of LoRA: the update is multiplied by this number over the rank.",
        panel=MAP,
        range=POSITIVE,
        left_out="the rank",
    )
    skip: str = option(
        "procrustes",
        f"Fixed map to which {having('skip')} maps add what they learn.",
        panel=MAP,
        shown=SKIPS,
        by_type=True,
    )
    hidden: int = option(1024, "Width of the hidden layer of an mlp map.", panel=MAP, range=POSITIVE_COUNT)
    latents: int = option(32, "Number of latents of a compress map.", panel=MAP, range=POSITIVE_COUNT)
    latent_dim: int = option(64, "Width of each latent of a compress map.", panel=MAP, range=POSITIVE_COUNT)
    loss: str = option("mse=1,cosine=0,infonce=0", "Weights of the components of the loss.", panel=TRAINING)
    temperature: float = option(0.07, "Temperature of InfoNCE.", panel=TRAINING, range=POSITIVE)
    epochs: int = option(10, "Maximum number of epochs.", panel=TRAINING, range=POSITIVE_COUNT)
    patience: int = option(
        2, "Number of epochs without improvement before training stops.", panel=TRAINING, range=POSITIVE_COUNT
    )
    min_delta: float = option(
        1e-3, "Smallest decrease of the validation loss that counts as an improvement.", panel=TRAINING,
        range=NOT_NEGATIVE,
    )  # fmt: skip
    batch_size: int | None = option(
        None,
        "Number of pairs in a batch; of windows for a compress map.",
        panel=TRAINING,
        range=POSITIVE_COUNT,
        left_out="that of the type",
    )
    accumulate: int = option(1, "Number of batches in an optimiser step.", panel=TRAINING, range=POSITIVE_COUNT)
    clip: float = option(1.0, "Maximum norm of the gradient.", panel=TRAINING, range=POSITIVE)
    lr: float | None = option(
        None, "Peak learning rate of AdamW.", panel=TRAINING, range=POSITIVE, left_out="that of the type"
    )
    precision: str = option(
        "auto", "Precision of the arithmetic. Weights stay in float32.", panel=TRAINING, choices=PRECISIONS
    )
    cka_every: int = option(
        100,
        "Number of steps between CKA figures on a sample of validation rows; 0 turns them off.",
        panel=TRAINING,
        range=Range("must not be negative; 0 turns it off", 0),
    )
    checkpoint_every: int = option(
        1000, "Number of steps between checkpoints within an epoch. Every epoch ends with one.", panel=TRAINING,
        range=POSITIVE_COUNT,
    )  # fmt: skip
    tracker: str = option("tensorboard", "Tracker that also logs the metrics.", panel=TRAINING, choices=TRACKERS)
    precondition: bool = option(True, "Whiten the inputs inside the parameterisation.", panel=TRAINING)
    seed: int = option(0, "Seed of initialisation, order and random controls.", panel=COMPUTATION, range=NOT_NEGATIVE)
    device: str = option("cpu", "Device to compute on.", panel=COMPUTATION, typed="auto", shown=DEVICES)


@dataclass(frozen=True)
class Settings:
    """Configuration of a run. Written to ``run.yaml``, from which the same run can be made again.

    Meaning, default and range of every option are declared beside it.

    Attributes:
        store: Path of the store.
        loop: Size of the map, its training, seed and device.
    """

    store: str
    type: str = option(
        "procrustes",
        "Type of map.",
        panel=MAP,
        shown=tuple(f"{type_.name} ({type_.summary})" for type_ in map_types()),
    )
    source: str | None = option(
        None, "Model whose states are mapped.", panel=MODELS, left_out="the first model of the store"
    )
    target: str | None = option(
        None,
        "Model onto whose states they are mapped; it may be the source itself.",
        panel=MODELS,
        left_out="the second model of the store",
    )
    both: bool = option(False, "Fit maps in the other direction, too.", panel=MODELS)
    layers: str | None = option(
        None, "Source layers, such as 8,16,24, or depths in percent.", panel=MODELS, left_out="all"
    )
    layer_map: str | None = option(
        None,
        "Pairs of SOURCE:TARGET layers, such as 16:20,24:24; or auto, the target layer with the best validation R2 for "
        "every source layer.",
        panel=MODELS,
        left_out="the same layer, or the one at the same depth",
    )
    joint: bool = option(False, "Fit one map from all source layers together to each target layer.", panel=MODELS)
    shared: bool = option(False, "Share one map between all layers, with a small projection for each.", panel=MODELS)
    solver: str | None = option(
        None,
        "How the map is found.",
        panel=MAP,
        shown=("closed (in closed form)", "adamw (trained by gradient)"),
        left_out="that of the type",
    )
    scale: bool = option(
        True,
        "Multiply rotations by their least-squares factor, in maps of type procrustes and with --skip procrustes.",
        panel=MAP,
    )
    components: str | None = option(
        None,
        "Number of principal components within which procrustes rotates; auto chooses it by validation R2.",
        panel=MAP,
        left_out="all",
    )
    keep_sinks: bool = option(False, "Keep attention sinks among the pairs.", panel=ROWS)
    policy: str = option(
        "end", "Rule by which token states are paired: they end at the same byte.", panel=ROWS, shown=POLICY_WORDS
    )
    roles: str | None = option(
        None, "Roles whose pairs are used, such as assistant or user,assistant.", panel=ROWS, shown=ROLES,
        left_out="all", parse=roles_text,
    )  # fmt: skip
    max_rows: int | None = option(
        None,
        "Maximum number of train pairs.",
        panel=ROWS,
        range=Range(f"a fit needs at least {MINIMUM_PAIRS} pairs", MINIMUM_PAIRS),
        left_out="all",
    )
    memory: int = option(
        MEMORY,
        "Memory for buffers of paired rows: bytes, or an amount such as 500M or 4GiB. The order of minibatches depends "
        "on it.",
        panel=COMPUTATION,
        typed="1GiB",
        parse=parse_bytes,
    )
    eval_models: bool = option(
        False,
        "Load both models, and measure stitched loss and five generated texts after every epoch.",
        panel=TRAINING,
    )
    loop: LoopSettings = field(default_factory=LoopSettings)

    @property
    def by_gradient(self) -> bool:
        """Whether the map is trained rather than solved for."""
        return map_type(self.type).by_gradient(self.solver)


def load_settings(path: Path) -> Settings:
    """Read a ``run.yaml``.

    Args:
        path: The file.

    Raises:
        SpecError: It is not one.
    """
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _typed(Settings, {**value, "loop": _typed(LoopSettings, value["loop"])})
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError, RecursionError) as error:
        # YAML points at the place over several lines.
        reason = " ".join(str(error).split())
        raise SpecError(f"{path} is not a run.yaml of this program ({reason}); `align train` writes one") from error


_S = TypeVar("_S", Settings, LoopSettings)


def _typed(kind: type[_S], given: Mapping[Any, Any]) -> _S:
    """Settings of their types, numbers as what they are: YAML reads ``1e-2`` as text and ``1`` as an integer."""
    if not isinstance(given, Mapping):
        raise TypeError(f"loop is {shown(given)}, expected an object")
    values = dict(given)
    known = {entry.name: entry for entry in fields(kind)}
    unknown = [name for name in values if name not in known]
    if unknown:
        raise TypeError(f"{shown(unknown[0])} is no setting")
    for name, entry in known.items():
        if name not in values:
            if entry.default is MISSING and entry.default_factory is MISSING:
                raise TypeError(f"it lacks {name}")
            continue
        kinds, value = str(entry.type).split(" | "), values[name]
        if "float" in kinds and isinstance(value, (str, int)) and not isinstance(value, bool):
            values[name] = value = _number(name, value)
        if type(value).__name__ not in kinds and not (value is None and "None" in kinds):
            raise TypeError(f"{name} is {shown(value)}, expected {entry.type}")
        if isinstance(value, float) and not math.isfinite(value):
            raise TypeError(f"{name} is {shown(value)}, expected a finite number")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise TypeError(f"{name} is {shown(value)}, expected an integer of 64 bits")
        if isinstance(value, str) and not (value.isprintable() and len(value) < _LONGEST):
            raise TypeError(f"{name} is {shown(value)}, expected one line of text")
    return kind(**values)


def _number(name: str, value: str | int) -> float:
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise TypeError(f"{name} is {shown(value)}, expected a number") from None


def check(settings: Settings) -> None:
    """Validate settings.

    Args:
        settings: As given.

    Raises:
        SpecError: Unknown type or solver, a combination that does not exist, or a number out of range.
    """
    type_ = map_type(settings.type)
    _check_solver(type_, settings.solver)
    _check_combinations(type_, settings)
    check_values(settings.loop)
    check_values(settings)
    roles_text(settings.roles)
    if type_.by_gradient(settings.solver):
        parse_loss(settings.loop.loss)


def _check_solver(type_: MapType, solver: str | None) -> None:
    if solver not in (None, "closed", "adamw"):
        raise SpecError(f"solver {solver!r}: choose closed or adamw")
    if solver == "closed" and type_.closed is None:
        if type_.solved_as is not None:
            raise SpecError(f"type {type_.name!r} is trained by gradient; its closed form is --type {type_.solved_as}")
        raise SpecError(f"type {type_.name!r} is trained by gradient and has no closed form; leave out --solver closed")
    if solver == "adamw" and type_.module is None and not type_.windows:
        raise SpecError(f"type {type_.name!r} has a closed form only; leave out --solver adamw")


def _check_combinations(type_: MapType, settings: Settings) -> None:
    """Refuse options that do not go together, naming the one to leave out."""
    if settings.joint and settings.shared:
        raise SpecError("--joint and --shared are two ways to use several layers; give one of them")
    if settings.joint and settings.layer_map is not None:
        raise SpecError("--joint maps all source layers to each target layer; leave out --layer-map")
    _check_refused(type_, settings)
    if settings.shared:
        _check_shared(type_, settings)
    if settings.components is not None:
        if "components" not in type_.options or settings.shared:
            raise SpecError(f"--components is for --type {having('components')} without --shared; leave it out")
        if settings.components != "auto" and not (settings.components.isdecimal() and int(settings.components)):
            raise SpecError(f"--components {settings.components!r}: write a number of dimensions, or auto")
    if settings.eval_models and not type_.by_gradient(settings.solver):
        raise SpecError(f"--eval-models is for training by gradient; use `evaluate stitch` on a {type_.name} run")


def _check_refused(type_: MapType, settings: Settings) -> None:
    for name, why in type_.refuses.items():
        holder: Settings | LoopSettings = settings if hasattr(settings, name) else settings.loop
        value = getattr(holder, name)
        if value != type(holder).__dataclass_fields__[name].default:
            raise SpecError(f"{flag(name)}{'' if value is True else f' {value}'}: {why}; leave it out")


def _check_shared(type_: MapType, settings: Settings) -> None:
    if type_.sharing is None:
        able = ", ".join(known.name for known in map_types() if known.sharing is not None)
        raise SpecError(f"--shared: not for type {type_.name!r}; choose one of {able}")
    if settings.solver == "adamw" and type_.closed is not None:
        trained = [known.name for known in map_types() if known.sharing is not None and known.closed is None]
        raise SpecError(
            f"--shared --type {type_.name} is solved for; leave out --solver adamw, or use --type "
            f"{listed(trained, 'or')}"
        )
    if "skip" in type_.options and settings.loop.skip not in _SHARED_SKIPS:
        raise SpecError(
            f"--shared: the map that the layers share is {listed(list(_SHARED_SKIPS), 'or')}, not --skip "
            f"{settings.loop.skip}; choose one of these"
        )

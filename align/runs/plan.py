"""How a run's maps come about, resolved from its settings: what is solved for, shared, trained and compared with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from align.closed_form.fit import Fit
from align.compress.plan import WindowsPlan
from align.maps.registry import MapType, map_type
from align.settings import LoopSettings, Settings
from align.training.plan import Goal, Placement, Schedule, Shape, TrainingPlan, parse_loss

#: Settings that say where a map is trained and what is written on the way, but not what comes out.
_BESIDE = ("device", "precision", "accumulate", "cka_every", "checkpoint_every", "tracker")
#: The skip that has a factor.
_ROTATION = "procrustes"
#: What makes two trainings on windows the same.
_OF_WINDOWS = ("latents", "latent_dim", "epochs", "patience", "min_delta", "batch_size", "clip", "lr", "seed")


@dataclass(frozen=True)
class Sharing:
    """One map for several layers.

    Attributes:
        whole: Whether each layer's map is the shared one, but for a factor; otherwise a projection is added to it.
        base: The shared map: ``procrustes`` or ``ridge``.
        scale: Whether a rotation has a factor for each layer pair.
        rank: Of the projections.
    """

    whole: bool
    base: str
    scale: bool
    rank: int


@dataclass(frozen=True)
class MapPlan:
    """How each map of a run comes about.

    Attributes:
        type: The type of map.
        fit: What is solved for: the map itself, or the optimum that a trained one is compared with. The shuffled
            control is fitted in the same way.
        optimum: Name of that optimum.
        sharing: How layers share a map; None for a map of each layer's own.
        training: How the map is trained on rows; None for a closed form and for windows.
        windows: How it is trained on windows; None for rows.
        partners: The closed form that chooses a source layer's partner (``--layer-map auto``).
        isometric: Whether no fit can change debiased CKA, which knows no factor; a rotation within some principal
            components drops the others.
        bare: Whether the map is, or is added to, a rotation without a factor (``--no-scale``).
    """

    type: MapType
    fit: Fit
    optimum: str
    sharing: Sharing | None
    training: TrainingPlan | None
    windows: WindowsPlan | None
    partners: Fit
    isometric: bool
    bare: bool


def map_plan(settings: Settings) -> MapPlan:
    """Resolve how a run's maps come about.

    Args:
        settings: Valid ones.
    """
    type_, loop = map_type(settings.type), settings.loop
    trained = type_.by_gradient(settings.solver)
    solved = type_.yardstick if trained else type_
    bare = not settings.scale and "scale" in type_.options and ("skip" not in type_.options or loop.skip == _ROTATION)
    skip = f"a shared {loop.skip}" if settings.shared else loop.skip
    skip = f"{skip} without scale" if bare else skip
    own = type_.closed is not None and "rank" not in type_.options and not trained
    return MapPlan(
        type=type_,
        fit=_fit(solved, settings),
        optimum=solved.label.format(rank=loop.rank, skip=skip),
        sharing=_sharing(type_, settings) if settings.shared else None,
        training=training_plan(type_, loop, scale=settings.scale) if trained and not type_.windows else None,
        windows=windows_plan(type_, loop) if type_.windows else None,
        partners=Fit(type_.name, scale=settings.scale) if own else Fit("affine"),
        isometric=type_.isometric and settings.components is None,
        bare=bare,
    )


def training_plan(type_: MapType, loop: LoopSettings, *, scale: bool = True) -> TrainingPlan:
    """Resolve how a map is trained on rows, with the type's own defaults.

    Args:
        type_: A type with a module.
        loop: As given.
        scale: Whether a rotation as skip has its factor.

    Raises:
        SpecError: The weights of the loss do not parse.
    """
    own = Schedule()
    schedule = Schedule(
        epochs=loop.epochs,
        patience=loop.patience,
        min_delta=loop.min_delta,
        batch_size=type_.defaults.get("batch_size", own.batch_size) if loop.batch_size is None else loop.batch_size,
        accumulate=loop.accumulate,
        clip=loop.clip,
        lr=type_.defaults.get("lr", own.lr) if loop.lr is None else loop.lr,
        cka_every=loop.cka_every,
        checkpoint_every=loop.checkpoint_every,
        seed=loop.seed,
    )
    resolved = {**asdict(loop), "batch_size": schedule.batch_size, "lr": schedule.lr}
    if "scale" in type_.options and loop.skip == _ROTATION:
        # Always named: rotations had no factor once, and such a training is not to be resumed as one that has.
        resolved["scale"] = scale
    return TrainingPlan(
        shape=Shape(
            type=type_.name,
            rank=loop.rank,
            alpha=loop.alpha,
            skip=loop.skip,
            scale=scale,
            hidden=loop.hidden,
            precondition=loop.precondition,
            seed=loop.seed,
        ),
        goal=Goal(parse_loss(loop.loss), loop.temperature),
        schedule=schedule,
        place=Placement(loop.device, loop.precision),
        identity={name: value for name, value in resolved.items() if name not in _BESIDE},
    )


def windows_plan(type_: MapType, loop: LoopSettings) -> WindowsPlan:
    """Resolve how a map is trained on windows, with the type's own defaults.

    Args:
        type_: A type that reads windows.
        loop: As given.
    """
    return WindowsPlan(
        latents=loop.latents,
        latent_dim=loop.latent_dim,
        epochs=loop.epochs,
        patience=loop.patience,
        min_delta=loop.min_delta,
        batch_size=type_.defaults["batch_size"] if loop.batch_size is None else loop.batch_size,
        clip=loop.clip,
        lr=type_.defaults["lr"] if loop.lr is None else loop.lr,
        seed=loop.seed,
        device=loop.device,
        identity={name: getattr(loop, name) for name in _OF_WINDOWS},
    )


def _sharing(type_: MapType, settings: Settings) -> Sharing:
    loop = settings.loop
    if type_.sharing == "whole":
        return Sharing(whole=True, base=_ROTATION, scale=settings.scale, rank=loop.rank)
    base = loop.skip if "skip" in type_.options else "ridge"
    return Sharing(whole=False, base=base, scale=settings.scale, rank=loop.rank)


def _fit(type_: MapType, settings: Settings) -> Fit:
    """A closed form with those options that its type has."""
    number = settings.components
    given: dict[str, Any] = {
        "scale": settings.scale,
        "rank": settings.loop.rank,
        "skip": settings.loop.skip,
        "components": int(number) if number is not None and number.isdecimal() else number,
    }
    return Fit(type_.name, **{name: value for name, value in given.items() if name in type_.options})

"""A run, resolved against its store into what each step needs, before anything is read or written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from align.layers import LayerPair, choose_models, joint_pairs, layer_pairs, source_layers
from align.maps.low_rank import check_low_rank
from align.moments.scan import limit_rows, need_rows, sites_of, usable_moments
from align.runs.plan import MapPlan, map_plan
from align.settings import Settings, check
from featstore.errors import FitError
from featstore.runtime.provenance import versions
from featstore.store import Store, open_store
from featstore.store.moments.stored import StoredMoments
from featstore.store.read.pairs import Pairs
from featstore.text.roles import count_roles, role_names
from featstore.text.splits import SPLITS, TRAIN


@dataclass(frozen=True)
class Data:
    """Where rows come from.

    Attributes:
        store: Complete store.
        path: Its path, as given.
        policy: Pair policy.
        keep_sinks: Whether attention sinks are among the pairs.
        roles: Roles of the pairs; None for all.
        memory: Bytes that the buffers of paired rows may take; the order of minibatches depends on it.
    """

    store: Store
    path: str
    policy: str
    keep_sinks: bool
    roles: tuple[str, ...] | None
    memory: int


@dataclass(frozen=True)
class Direction:
    """Everything to be done from one model to another.

    Attributes:
        source: Model name.
        target: Model name.
        everything: All pairs of the roles in question, attention sinks included.
        pairs: Those to fit and score with.
        wanted: Layer pairs; with :attr:`Job.choose` every source layer with every target layer, to choose from.
        stored: The store's own moments, where they sum over just these pairs.
    """

    source: str
    target: str
    everything: Pairs
    pairs: Pairs
    wanted: list[LayerPair]
    stored: StoredMoments | None

    @property
    def by_role(self) -> dict[str, dict[str, int]]:
        """Pairs of every role that occurs, by split."""
        counts = {name: count_roles(self.pairs.role[self.pairs.split == at]) for at, name in enumerate(SPLITS)}
        return {role: {name: own.get(role, 0) for name, own in counts.items()} for role in count_roles(self.pairs.role)}


@dataclass(frozen=True)
class Job:
    """A run, resolved.

    Attributes:
        map: How each map comes about.
        data: Where rows come from.
        directions: One, or with ``--both`` two.
        choose: Whether each source layer is mapped to its best partner alone.
        seed: Of every choice at random.
        device: Device name, as given.
    """

    map: MapPlan
    data: Data
    directions: list[Direction]
    choose: bool
    seed: int
    device: str

    def card(self) -> dict[str, Any]:
        """The card without its maps."""
        store = self.data.store
        names = {name for d in self.directions for name in (d.source, d.target)}
        coverage: dict[str, float] = {}
        for d in self.directions:
            coverage |= dict(zip((d.source, d.target), d.everything.coverage, strict=True))
        return {
            "type": self.map.type.name,
            "models": {
                name: {**store.model(name).attributes, "median_norm": store.median_norms(name)}
                for name in store.models
                if name in names
            },
            "store": {"path": self.data.path, "fingerprint": store.fingerprint},
            "corpus": store.attributes["corpus"],
            "window_bytes": store.attributes["window_bytes"],
            "pair_policy": self.data.policy,
            "roles": None if self.data.roles is None else list(self.data.roles),
            "coverage": coverage,
            "mask": {**store.attributes["mask"], "keep_sinks": self.data.keep_sinks},
            "normalisation": "train means subtracted" if self.map.type.centred else "none",
            "provenance": {"versions": versions(), "seed": self.seed},
        }


def resolve(settings: Settings) -> Job:
    """Resolve a run: the map's plan, models, layers, pairs and moments.

    Args:
        settings: As given.

    Raises:
        FeatstoreError: Anything wrong with the settings, the store, the models or the layers.
    """
    check(settings)
    plan = map_plan(settings)
    store = open_store(settings.store)
    source, target = choose_models(store, settings.source, settings.target)
    _check_sizes(plan, settings, store.model(source).width, store.model(target).width)
    ways = [False] + ([True] if settings.both and source != target else [])
    directions = []
    for backwards in ways:
        a, b = (target, source) if backwards else (source, target)
        directions.append(_direction(store, settings, a, b, _wanted(store, settings, source, target, backwards)))
    roles = role_names(settings.roles)
    data = Data(store, settings.store, settings.policy, settings.keep_sinks, roles, settings.memory)
    loop = settings.loop
    return Job(plan, data, directions, settings.layer_map == "auto", loop.seed, loop.device)


def _check_sizes(plan: MapPlan, settings: Settings, dx: int, dy: int) -> None:
    """Refuse ranks and dimensions that the states do not have, before anything is read."""
    options, loop = plan.type.options, settings.loop
    projected = plan.sharing is not None and not plan.sharing.whole
    if projected or {"rank", "skip"} & options:
        rank = loop.rank if projected or "rank" in options else 1
        check_low_rank(rank, "procrustes" if projected else loop.skip, dx, dy)
    components, most = settings.components, max(dx, dy)
    if components is not None and components.isdecimal() and int(components) > most:
        raise FitError(f"--components {components}: the states have {dx} and {dy} dimensions; use 1 to {most}, or auto")
    narrow = min(dx, dy) if settings.both else dx
    if plan.windows is not None and plan.windows.latent_dim > narrow:
        raise FitError(
            f"--latent-dim {plan.windows.latent_dim}: the states have {narrow} dimensions, and a latent no more; use "
            "more --latents instead"
        )


def _wanted(store: Store, settings: Settings, source: str, target: str, backwards: bool) -> list[LayerPair]:
    if settings.layer_map == "auto":
        a, b = (target, source) if backwards else (source, target)
        # Layers that are named are the source's, whichever way.
        layers = source_layers(store, a, settings.layers)
        return [LayerPair(a, (j,), b, k) for j in layers for k in store.model(b).layers]
    forward = layer_pairs(store, source, target, layers=settings.layers, layer_map=settings.layer_map)
    if settings.joint:
        return joint_pairs(forward, backwards=backwards)
    return [pair.reversed for pair in forward] if backwards else forward


def _direction(store: Store, settings: Settings, source: str, target: str, wanted: list[LayerPair]) -> Direction:
    # Refuses an unknown or missing pair index, too, before anything is written.
    everything = store.pairs(source, target, settings.policy).select(keep_sinks=True, roles=settings.roles)
    pairs = everything.select(keep_sinks=settings.keep_sinks)
    if settings.max_rows is not None:
        train = limit_rows(pairs.where(pairs.split == TRAIN), settings.max_rows, settings.loop.seed)
        pairs = pairs.where((pairs.split != TRAIN) | np.isin(pairs.row_source, train.row_source))
    sites = [sites_of(pair) for pair in wanted]
    if settings.by_gradient:
        need_rows(store, sites, f"training {settings.type} by gradient")
    stored = usable_moments(
        store,
        (source, target),
        sites,
        policy=settings.policy,
        keep_sinks=settings.keep_sinks,
        roles=role_names(settings.roles),
        max_rows=settings.max_rows,
    )
    return Direction(source, target, everything, pairs, wanted, stored)

"""Which source layer is mapped to which target layer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from featstore.errors import LayerRangeError, SpecError
from featstore.models.references import parse_layers
from featstore.store import Store

_KEY = re.compile(r"(.+):(\d+(?:\+\d+)*)->(.+):(\d+)", re.DOTALL)


@dataclass(frozen=True)
class LayerPair:
    """The source layer, or layers side by side, whose states are mapped to a target layer.

    Attributes:
        source: Model name.
        source_layers: One layer; several for a joint map, whose x is their states end to end in this order.
        target: Model name.
        target_layer: Layer.
    """

    source: str
    source_layers: tuple[int, ...]
    target: str
    target_layer: int

    @property
    def key(self) -> str:
        """Name in cards and metrics, such as ``llama:16->mistral:16`` or ``llama:8+16->mistral:16``."""
        return f"{self.source}:{'+'.join(map(str, self.source_layers))}->{self.target}:{self.target_layer}"

    @property
    def source_layer(self) -> int:
        """The source layer; of a joint map the last, by which time the source has computed all of them."""
        return self.source_layers[-1]

    @property
    def reversed(self) -> LayerPair:
        """The other direction of a map between two layers."""
        return LayerPair(self.target, (self.target_layer,), self.source, self.source_layer)


def in_order(key: str) -> tuple[str, tuple[int, ...], str, int]:
    """A sort key for keys of layer pairs: by model and then by number, so that layer 2 comes before layer 10.

    Args:
        key: Such as ``llama:16->mistral:16``; a text of another form sorts by its letters.
    """
    found = _KEY.fullmatch(key)
    if found is None:
        return key, (), "", 0
    source, layers, target, layer = found.groups()
    return source, tuple(map(int, layers.split("+"))), target, int(layer)


def choose_models(store: Store, source: str | None, target: str | None) -> tuple[str, str]:
    """Resolve ``--source`` and ``--target``; the defaults are the store's first and second model.

    Args:
        store: Complete store.
        source: Model name or None.
        target: Model name or None; may equal the source (the ceiling).

    Raises:
        StoreStateError: No such model.
    """
    first = source if source is not None else next((m for m in store.models if m != target), store.models[0])
    others = [m for m in store.models if m != first]
    second = target if target is not None else (others[0] if others else first)
    return store.model(first).name, store.model(second).name


def layer_pairs(
    store: Store, source: str, target: str, *, layers: str | None = None, layer_map: str | None = None
) -> list[LayerPair]:
    """Resolve ``--layers`` or ``--layer-map``.

    Without either, equal depths pair equal layers; models of different depth pair the same place in their layer lists.

    Args:
        store: Complete store.
        source: Model name.
        target: Model name.
        layers: Source layers to keep, numbers or depths in percent.
        layer_map: ``K:K,...`` pairs of source and target layer.

    Raises:
        LayerRangeError: A layer that the store does not hold.
        SpecError: Nothing to pair, both options at once, or a map that does not parse.
    """
    if layers is not None and layer_map is not None:
        raise SpecError("--layers and --layer-map say the same thing twice; give one of them")
    if layer_map is not None:
        return list(dict.fromkeys(_mapped(store, source, target, item) for item in layer_map.split(",")))
    held_source, held_target = store.model(source).layers, store.model(target).layers
    if store.model(source).depth == store.model(target).depth:
        table = {k: k for k in held_source if k in held_target}
    elif len(held_source) == len(held_target):
        table = dict(zip(held_source, held_target, strict=True))
    else:
        raise SpecError(
            f"{source} has layers {held_source} and {target} {held_target}: they do not pair by place; use --layer-map"
        )
    if layers is not None:
        wanted = parse_layers([layers], {source: store.model(source).depth})[source]
        for layer in wanted:
            store.layer(source, layer)
            if layer not in table:
                raise LayerRangeError(f"layer {layer} of {source} has no partner in {target}; use --layer-map")
        table = {k: table[k] for k in wanted}
    if not table:
        raise SpecError(f"{source} and {target} share no layers in {store.path}; use --layer-map")
    return [LayerPair(source, (a,), target, b) for a, b in table.items()]


def joint_pairs(pairs: list[LayerPair], *, backwards: bool = False) -> list[LayerPair]:
    """One map from all the source layers of some layer pairs, side by side, to each target layer.

    Args:
        pairs: Single layers, of two models.
        backwards: The other direction: from all the target layers to each source layer.

    Raises:
        SpecError: They have a single source layer.
    """
    singles = [pair.reversed for pair in pairs] if backwards else pairs
    sources = tuple(dict.fromkeys(layer for pair in singles for layer in pair.source_layers))
    if len(sources) < 2:
        raise SpecError(f"--joint needs at least two source layers, not {sources}; name more with --layers")
    targets = dict.fromkeys(pair.target_layer for pair in singles)
    return [LayerPair(singles[0].source, sources, singles[0].target, layer) for layer in targets]


def source_layers(store: Store, model: str, layers: str | None) -> tuple[int, ...]:
    """The layers of a model that ``--layers`` names, all that the store holds without it.

    Args:
        store: Complete store.
        model: Model name.
        layers: Numbers or depths in percent.

    Raises:
        LayerRangeError: A layer that the store does not hold.
    """
    if layers is None:
        return store.model(model).layers
    wanted = parse_layers([layers], {model: store.model(model).depth})[model]
    return tuple(store.layer(model, layer) for layer in wanted)


def _mapped(store: Store, source: str, target: str, item: str) -> LayerPair:
    first, colon, second = item.strip().partition(":")
    if not colon or not all(number.isdecimal() and len(number) < 10 for number in (first, second)):
        raise SpecError(f"--layer-map {item!r}: write SOURCE:TARGET layer numbers, such as 16:20,24:24")
    return LayerPair(source, (store.layer(source, int(first)),), target, store.layer(target, int(second)))

"""Which layers of a store the programme works on, and how a command line names them for both models at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from align.layers import LayerPair, layer_pairs
from featstore.errors import SpecError
from featstore.models.references import parse_layers
from featstore.store import Store

#: 0, 8, 12, 16, 20, 24 and 32 of 32 blocks; the same depths of any other number.
LAYERS = "0%,25%,37.5%,50%,62.5%,75%,100%"
_INNER = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Places:
    """The layer pairs of a store.

    Attributes:
        source: First model.
        target: Second model.
        depths: Blocks by model.
        pairs: From the first model to the second, by depth.
    """

    source: str
    target: str
    depths: Mapping[str, int]
    pairs: tuple[LayerPair, ...]

    @property
    def middle(self) -> LayerPair:
        """The pair nearest to half of the first model's depth."""
        return self._nearest(0.5)

    @property
    def inner(self) -> tuple[LayerPair, ...]:
        """Those nearest to a quarter, a half and three quarters."""
        return tuple(dict.fromkeys(self._nearest(share) for share in _INNER))

    def _nearest(self, share: float) -> LayerPair:
        depth = self.depths[self.source]
        return min(self.pairs, key=lambda pair: abs(pair.source_layer / depth - share))

    def depth_of(self, model: str, layer: int) -> float:
        """How deep a layer lies, from 0 to 1."""
        return layer / self.depths[model]

    def text(self, pairs: Iterable[LayerPair]) -> str:
        """What to write after ``--layers`` to mean these pairs in both directions.

        Args:
            pairs: Some of the pairs.

        Returns:
            Layer numbers where both models have the same, else depths in percent.

        Raises:
            SpecError: No percentage means just these two layers.
        """
        return ",".join(dict.fromkeys(self._written(pair) for pair in pairs))

    def _written(self, pair: LayerPair) -> str:
        wanted = {pair.source: pair.source_layer, pair.target: pair.target_layer}
        # Eighths first, then whole percents: they are what people write. Thousands of blocks are far away.
        order = sorted(range(1001), key=lambda step: (step % 125 > 0, step % 10 > 0, step))
        shares = (f"{step / 10:g}%" for step in order)
        for text in (str(pair.source_layer), *shares):
            if all(_means(text, depth) == wanted[model] for model, depth in self.depths.items()):
                return text
        raise SpecError(
            f"layers {pair.source_layer} of {pair.source!r} and {pair.target_layer} of {pair.target!r} lie at "
            f"different depths; make a store with depths in percent: featstore extract --layers {LAYERS}"
        )


def _means(text: str, depth: int) -> int | None:
    try:
        return parse_layers([text], {"model": depth})["model"][0]
    except SpecError:
        return None


def places(store: Store) -> Places:
    """Find the layer pairs of a store's first two models.

    Args:
        store: Complete store.

    Raises:
        SpecError: It holds a single model, fewer than two layer pairs, or layers that do not pair by place.
    """
    if len(store.models) < 2:
        raise SpecError(
            f"{store.path} holds one model, {store.models[0]!r}; the programme compares two: extract another"
        )
    first, second = store.models[:2]
    pairs = tuple(layer_pairs(store, first, second))
    if len(pairs) < 2:
        raise SpecError(f"{store.path} has one layer pair; the programme compares layers: extract --layers {LAYERS}")
    depths = {name: store.model(name).depth for name in (first, second)}
    return Places(first, second, depths, pairs)

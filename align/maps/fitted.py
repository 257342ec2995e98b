"""A fitted map: its tensors, its card, how it is saved and loaded.

What its tensors are and how it is applied is the formula of its kind (:mod:`align.maps.formula`); most maps are one
matrix between two means. A ``compress`` map takes no rows at all but the states of a window (:mod:`align.compress`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.layers import LayerPair
from align.maps.card import CARD_VERSION, REMEDY, Card, CardPair, read_card
from align.maps.registry import formula
from featstore.errors import AdapterError
from featstore.runtime.provenance import write_atomic, write_json
from featstore.runtime.schema import shown
from featstore.runtime.tensors import Tensors, opened

_TENSORS = "adapter.safetensors"
#: Name of a tensor: the map's key, and which of its parts it is. Neither models' names nor numbers hold a colon.
_TENSOR = re.compile(r"(?P<key>.*?->[^:]*:[0-9]+)\.(?P<part>.+)", re.DOTALL)
#: The train means, which controls need even where the map is not centred, with their axes.
_CONTROLS = {"control_mean_source": "s", "control_mean": "t"}


@dataclass(frozen=True)
class Aligner:
    """A map from one layer's states to another's.

    Attributes:
        pair: Which layers.
        tensors: float32 arrays: those of its kind (of a linear map ``weight`` (d_source, d_target), ``mean_source``,
            ``mean_target``), ``control_mean_source`` and ``control_mean`` (the train means, which controls need even
            where the map is not centred), and what else the type has.
        options: How it was fitted (lambda, rank, ...).
        trainable: Parameters that were fitted.
        kind: Of its formula: ``linear``, ``mlp`` or ``compress``.
    """

    pair: LayerPair
    tensors: dict[str, NDArray[np.float32]]
    options: dict[str, Any] = field(default_factory=dict)
    trainable: int = 0
    kind: str = "linear"

    @property
    def widths(self) -> tuple[int, int]:
        """Width of the states it takes (of a joint map all of them end to end) and of those it gives."""
        return self.tensors["control_mean_source"].size, self.tensors["control_mean"].size

    @property
    def takes_rows(self) -> bool:
        """Whether it maps single states, and not windows."""
        return formula(self.kind).apply is not None

    def apply(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map source states.

        Args:
            x: float32 ``(n, d_source)``.

        Returns:
            float32 ``(n, d_target)``.

        Raises:
            AdapterError: The map takes windows, not rows.
        """
        apply = formula(self.kind).apply
        if apply is None:
            raise AdapterError(
                f"{self.pair.key} is a {self.kind} map: it reads whole windows, and single states cannot be put "
                "through it; choose a run of another type"
            )
        return apply(self.tensors, x)

    @property
    def shipped(self) -> int:
        """Numbers needed to apply the map."""
        own = formula(self.kind).axes or self.tensors.keys() - _CONTROLS.keys()
        return sum(self.tensors[name].size for name in own if name in self.tensors)

    def card(self) -> dict[str, Any]:
        """The map's entry in the card."""
        width_source, width_target = self.widths
        return {
            "key": self.pair.key,
            "kind": self.kind,
            "source": {
                "model": self.pair.source,
                "layer": self.pair.source_layer,
                "layers": list(self.pair.source_layers),
                "width": width_source,
            },
            "target": {"model": self.pair.target, "layer": self.pair.target_layer, "width": width_target},
            "parameters": {"trainable": self.trainable, "shipped": self.shipped},
            "options": self.options,
        }


@dataclass(frozen=True)
class Adapter:
    """All maps of a run and the card that says what they are.

    Attributes:
        directory: Run directory.
        card: ``adapter.json``.
        aligners: By pair key.
    """

    directory: Path
    card: dict[str, Any]
    aligners: dict[str, Aligner]


def save_adapter(directory: Path, aligners: Sequence[Aligner], card: dict[str, Any]) -> None:
    """Write ``adapter.safetensors`` and then ``adapter.json``, each atomically.

    Args:
        directory: Run directory.
        aligners: The maps.
        card: Everything but the pairs.
    """
    from safetensors.numpy import save

    tensors = {
        f"{aligner.pair.key}.{name}": np.ascontiguousarray(value, dtype=np.float32)
        for aligner in aligners
        for name, value in aligner.tensors.items()
    }
    write_atomic(directory / _TENSORS, save(tensors))
    write_json(
        directory / Card.file, {"format": CARD_VERSION, **card, "pairs": [aligner.card() for aligner in aligners]}
    )


def load_adapter(directory: Path) -> Adapter:
    """Read a run directory's maps.

    Args:
        directory: Run directory.

    Raises:
        AdapterError: There is none, it is of a newer format, it is damaged, or its tensors do not fit its card or are
            not finite.
    """
    card = read_card(directory)
    with opened(directory / _TENSORS, AdapterError, remedy=REMEDY) as tensors:
        parts: dict[str, dict[str, str]] = {entry.key: {} for entry in card.pairs}
        for name in tensors.heads:
            named = _TENSOR.fullmatch(name)
            if named is None or named["key"] not in parts:
                raise tensors.damaged(f"has a tensor {shown(name)}, which belongs to no map of the card")
            parts[named["key"]][named["part"]] = name
        aligners = {entry.key: _aligner(entry, tensors, parts[entry.key]) for entry in card.pairs}
    return Adapter(directory, card.content(), aligners)


def _aligner(entry: CardPair, tensors: Tensors, own: Mapping[str, str]) -> Aligner:
    """A map, its tensors checked against its entry of the card before they are read."""
    own_formula = formula(entry.kind)
    axes = {**own_formula.axes, **_CONTROLS}
    missing = [name for name in axes if name not in own and name not in own_formula.optional]
    if missing:
        raise tensors.damaged(f"tensors {', '.join(missing)} of {entry.key} are missing")
    shapes = {part: tensors.heads[name].shape for part, name in own.items()}
    size = own_formula.sizes(shapes, entry.source.width, entry.target.width)
    for part, letters in axes.items():
        shape = tuple(size[letter] for letter in letters)
        if part in own and shapes[part] != shape:
            raise tensors.damaged(f"{part} of {entry.key} has shape {shapes[part]}, the card says {shape}")
    found = {part: tensors.finite(name) for part, name in own.items()}
    return Aligner(entry.pair, found, entry.options.content(), entry.parameters.trainable or 0, entry.kind)

"""A fitted map: its tensors, its card, how it is saved and loaded.

What its tensors are and how it is applied is the formula of its kind (:mod:`align.maps.formula`); most maps are one
matrix between two means. A ``compress`` map takes no rows at all but the states of a window (:mod:`align.compress`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.layers import LayerPair
from align.maps.registry import formula, formulas
from featstore.errors import AdapterError, CorruptDataError
from featstore.runtime.provenance import read_json, write_atomic, write_json

CARD_VERSION = 1
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
    write_atomic(directory / "adapter.safetensors", save(tensors))
    write_json(
        directory / "adapter.json", {"format": CARD_VERSION, **card, "pairs": [aligner.card() for aligner in aligners]}
    )


def load_adapter(directory: Path) -> Adapter:
    """Read a run directory's adapter.

    Args:
        directory: Run directory.

    Raises:
        AdapterError: There is none, it is of a newer format, or its tensors do not fit its card.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = directory / "adapter.json"
    if not path.is_file():
        raise AdapterError(f"no adapter in {str(directory)!r}: it has no adapter.json; make one with `align train`")
    try:
        card = read_json(path)
        if card.get("format") != CARD_VERSION:
            raise AdapterError(f"{path} has format {card.get('format')!r}, this version reads {CARD_VERSION}; upgrade")
        tensors = load_file(directory / "adapter.safetensors")
        aligners = {entry["key"]: _aligner(entry, tensors, path) for entry in card["pairs"]}
    except (CorruptDataError, SafetensorError, OSError, LookupError, TypeError, AttributeError) as error:
        raise AdapterError(f"the adapter in {str(directory)!r} is damaged ({error!r}); train it again") from error
    return Adapter(directory, card, aligners)


def _aligner(entry: dict[str, Any], tensors: dict[str, NDArray[np.float32]], path: Path) -> Aligner:
    source, target = entry["source"], entry["target"]
    pair = LayerPair(source["model"], tuple(source.get("layers", [source["layer"]])), target["model"], target["layer"])
    own = {name.removeprefix(f"{pair.key}."): t for name, t in tensors.items() if name.startswith(f"{pair.key}.")}
    if not isinstance(entry["key"], str):
        raise TypeError(f"the key {entry['key']!r} is not text")
    kind = entry.get("kind", "linear")
    known = formulas()
    if kind not in known:
        raise AdapterError(f"{path}: {pair.key} is of kind {kind!r}, this version knows {', '.join(known)}; upgrade")
    own_formula = known[kind]
    axes = {**own_formula.axes, **_CONTROLS}
    missing = [name for name in axes if name not in own and name not in own_formula.optional]
    if missing:
        raise AdapterError(f"{path}: tensors {', '.join(missing)} of {pair.key} are missing; train it again")
    size = own_formula.sizes(own, source["width"], target["width"])
    for name, letters in axes.items():
        shape = tuple(size[letter] for letter in letters)
        if name in own and own[name].shape != shape:
            raise AdapterError(
                f"{path}: {name} of {pair.key} has shape {own[name].shape}, the card says {shape}; train it again"
            )
    return Aligner(pair, own, entry.get("options", {}), entry.get("parameters", {}).get("trainable", 0), kind)

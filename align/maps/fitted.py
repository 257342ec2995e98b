"""A fitted map: its tensors, its card, how it is applied, saved and loaded.

Row convention: ``y_hat = (x - mean_source) @ weight + mean_target``. Two kinds are no matrix. An ``mlp`` adds to its
skip map, with z = x - mean_source::

    y_hat = z @ skip + silu(z @ hidden_weight + hidden_bias) @ output_weight + output_bias + mean_target

A ``compress`` map does not take rows at all but the states of a window (:mod:`align.compress`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.layers import LayerPair
from featstore.errors import AdapterError, CorruptDataError
from featstore.runtime.provenance import read_json, write_atomic, write_json

CARD_VERSION = 1
_CONTROLS = ("control_mean_source", "control_mean")
#: Tensors by kind, with the axes of each: s source width, t target width, h hidden width.
_AXES = {
    "linear": {"weight": "st", "mean_source": "s", "mean_target": "t"},
    "mlp": {
        "skip": "st",
        "mean_source": "s",
        "mean_target": "t",
        "hidden_weight": "sh",
        "hidden_bias": "h",
        "output_weight": "ht",
        "output_bias": "t",
    },
    "compress": {},
}
#: Tensors of an ``mlp`` that may be left out.
_OPTIONAL = ("skip",)


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
        kind: ``linear``, ``mlp`` or ``compress``.
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
        return self.kind != "compress"

    def apply(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map source states.

        Args:
            x: float32 ``(n, d_source)``.

        Returns:
            float32 ``(n, d_target)``.

        Raises:
            AdapterError: The map takes windows, not rows.
        """
        if not self.takes_rows:
            raise AdapterError(
                f"{self.pair.key} is a {self.kind} map: it reads whole windows, and single states cannot be put "
                "through it; choose a run of another type"
            )
        t = self.tensors
        centred = x - t["mean_source"]
        if self.kind == "linear":
            mapped = centred @ t["weight"] + t["mean_target"]
            return mapped.astype(np.float32, copy=False)
        hidden = centred @ t["hidden_weight"] + t["hidden_bias"]
        # silu(h) = h / (1 + exp(-h)); far below zero exp overflows to infinity, and the quotient is rightly 0.
        with np.errstate(over="ignore"):
            hidden /= 1 + np.exp(-hidden)
        mapped = hidden @ t["output_weight"] + (t["output_bias"] + t["mean_target"])
        if "skip" in t:
            mapped += centred @ t["skip"]
        return mapped.astype(np.float32, copy=False)

    @property
    def shipped(self) -> int:
        """Numbers needed to apply the map."""
        if self.kind == "compress":
            return sum(t.size for name, t in self.tensors.items() if name not in _CONTROLS)
        return sum(self.tensors[name].size for name in _AXES[self.kind] if name in self.tensors)

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
    kind = entry.get("kind", "linear")
    if kind not in _AXES:
        raise AdapterError(f"{path}: {pair.key} is of kind {kind!r}, this version knows {', '.join(_AXES)}; upgrade")
    axes = {**_AXES[kind], "control_mean_source": "s", "control_mean": "t"}
    missing = [name for name in axes if name not in own and not (kind == "mlp" and name in _OPTIONAL)]
    if missing:
        raise AdapterError(f"{path}: tensors {', '.join(missing)} of {pair.key} are missing; train it again")
    size = {"s": source["width"], "t": target["width"], "h": own["hidden_bias"].size if kind == "mlp" else 0}
    for name, letters in axes.items():
        shape = tuple(size[letter] for letter in letters)
        if name in own and own[name].shape != shape:
            raise AdapterError(
                f"{path}: {name} of {pair.key} has shape {own[name].shape}, the card says {shape}; train it again"
            )
    return Aligner(pair, own, entry.get("options", {}), entry.get("parameters", {}).get("trainable", 0), kind)

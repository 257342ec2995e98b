"""The pilot: a few thousand tokens that freeze, before anything is stored, what every later row is measured by.

Medians tell sinks, origins keep moments from cancelling, column scales let 8 bits go round. One pass is then enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import NonFiniteStateError
from featstore.extraction.forward import BatchReader
from featstore.models.fingerprint import Weights
from featstore.runtime.provenance import read_json
from featstore.store.conversion.pilot_rows import origin_of, pilot_windows, without_sinks
from featstore.store.format.elements import Format, column_scale_of
from featstore.store.read.vectors import read_vector
from featstore.store.write.writer import StoreWriter


@dataclass(frozen=True)
class Pilot:
    """What the pilot froze, as far as writing rows needs it.

    Attributes:
        column_scale: float32 ``(width,)`` by layer; empty where the format has none.
    """

    column_scale: dict[int, NDArray[np.float32]]


def pilot_unit(model: str, layer: int) -> str:
    """Name of the unit that holds one layer's pilot.

    Args:
        model: Model name.
        layer: Layer.
    """
    return f"models/{model}/pilot-{layer}"


def recorded_weights(writer: StoreWriter, model: str, layers: Sequence[int]) -> Weights:
    """Fingerprints of the weights that the store's pilots were made with; none before there is a pilot.

    Args:
        writer: The store's writer.
        model: Model name.
        layers: Layers that may have a pilot.
    """
    entries = [writer.entry(pilot_unit(model, layer)) or {} for layer in layers]
    found = [
        Weights.recorded({"weights_fingerprint": entry.get("weights"), "weights_sample": entry.get("weights_sample")})
        for entry in entries
    ]
    # A layer added later may know more than the first: stores from before had the sample alone.
    return Weights(
        next((weights.whole for weights in found if weights.whole), None),
        next((weights.sample for weights in found if weights.sample), None),
    )


def read_pilot(writer: StoreWriter, model: str, layers: Sequence[int]) -> Pilot | None:
    """What an earlier run froze; None where a layer's pilot is missing.

    Args:
        writer: The store's writer.
        model: Model name.
        layers: Layers needed.
    """
    if not all(writer.has(pilot_unit(model, layer)) for layer in layers):
        return None
    scales = {}
    for layer in layers:
        path = writer.path / "models" / model / "column_scale" / str(layer)
        if (path / "zarr.json").is_file():
            scales[layer] = read_vector(path, read_json(path / "zarr.json"))
    return Pilot(scales)


def write_pilot(writer: StoreWriter, reader: BatchReader, layers: Sequence[int], form: Format) -> None:
    """Freeze the median norm, the mean state and the column scales of every layer that has none yet.

    Args:
        writer: The store's writer.
        reader: The model on its plan.
        layers: Layers to be stored.
        form: Element format.

    Raises:
        NonFiniteStateError: The model produced NaN or infinity.
    """
    name, starts = reader.name, reader.planned.row_start
    wanted = [layer for layer in layers if not writer.has(pilot_unit(name, layer))]
    parts: dict[int, list[NDArray[np.float32]]] = {layer: [] for layer in wanted}
    for batch in reader.plan.batches(name, 0, pilot_windows(starts, reader.plan.segments)):
        for layer, values in reader.states(batch, wanted).items():
            rows = values.float().cpu().numpy()
            bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            if bad.size:
                raise NonFiniteStateError(
                    f"{reader.where(batch, layer)(int(bad[0]))} holds NaN or infinity; try --dtype float32, or check "
                    "the model's weights"
                )
            parts[layer].append(rows)
    known = {"weights": reader.weights.whole, "weights_sample": reader.weights.sample}
    facts: dict[str, Any] = {key: value for key, value in known.items() if value is not None}
    for layer in wanted:
        ordinary, median = without_sinks(np.concatenate(parts[layer]))
        base = f"models/{name}"
        arrays: dict[str, NDArray[Any]] = {
            f"{base}/origin/{layer}": origin_of(ordinary, median),
            f"{base}/median_norm/{layer}": np.array([median], dtype=np.float64),
        }
        if form.column_scaled:
            arrays[f"{base}/column_scale/{layer}"] = column_scale_of(ordinary)
        writer.vectors(pilot_unit(name, layer), arrays, **facts)

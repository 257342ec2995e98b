"""Predictions from the token alone, as a run keeps them, made of whatever a test plants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from align.maps.fitted import Adapter
from featstore.store import Store

Planted = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]


def write_tables(directory: Path, tables: Mapping[str, Planted]) -> None:
    """Write ``tokens.safetensors``: by layer pair the ids, their states, and the mean state."""
    from safetensors.numpy import save_file

    named = {
        f"{key}.{name}": np.ascontiguousarray(value)
        for key, planted in tables.items()
        for name, value in zip(("ids", "states", "mean"), planted, strict=True)
    }
    save_file(named, directory / "tokens.safetensors")


def what_the_map_makes_of_tokens(store: Store, adapter: Adapter) -> dict[str, Planted]:
    """What every map makes of the mean source state of each token: of layer 0, where a state is its token, the map."""
    tables = {}
    for key, aligner in adapter.aligners.items():
        pair = aligner.pair
        tokens = store.tokens(pair.source).id.astype(np.int64)
        rows = np.concatenate([store.rows(pair.source, layer)[:] for layer in pair.source_layers], axis=1)
        ids, place, count = np.unique(tokens, return_inverse=True, return_counts=True)
        means = np.zeros((len(ids), rows.shape[1]))
        np.add.at(means, place, rows.astype(np.float64))
        states = aligner.apply((means / count[:, None]).astype(np.float32))
        tables[key] = (ids, states, aligner.tensors["control_mean"])
    return tables

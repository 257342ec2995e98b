"""Predictions from the token alone, as a run keeps them, made of whatever a test plants."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from align.maps.fitted import Adapter, Aligner
from align.tokens.files import save_tables
from align.tokens.table import TokenTable, table_key
from featstore.store import Store


def what_the_map_makes_of_tokens(store: Store, aligner: Aligner) -> TokenTable:
    """What a map makes of the mean source state of each token: of layer 0, where a state is its token, the map."""
    pair = aligner.pair
    tokens = store.tokens(pair.source).id.astype(np.int64)
    rows = np.concatenate([store.rows(pair.source, layer)[:] for layer in pair.source_layers], axis=1)
    ids, place, count = np.unique(tokens, return_inverse=True, return_counts=True)
    means = np.zeros((len(ids), rows.shape[1]))
    np.add.at(means, place, rows.astype(np.float64))
    states = aligner.apply((means / count[:, None]).astype(np.float32))
    return TokenTable(ids, states, aligner.tensors["control_mean"])


def write_table(directory: Path, adapter: Adapter, key: str, table: TokenTable) -> None:
    """Write a run's predictions for one of its layer pairs."""
    pair = adapter.aligners[key].pair
    name = table_key(pair.source, pair.target, pair.target_layer)
    save_tables(directory, {name: table}, [pair], store=adapter.card["store"]["fingerprint"])

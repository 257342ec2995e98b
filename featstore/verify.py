"""Check a store against its own checksums, shapes and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from featstore import formats
from featstore.console import progress
from featstore.errors import CorruptDataError, FeatstoreError
from featstore.provenance import read_json
from featstore.store import Store, open_store


def verify_store(path: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Verify every committed file, then what the files say.

    Args:
        path: The store.
        quiet: No progress.

    Returns:
        ``{"store", "files", "bytes", "damage": [...]}``; an empty list means the store is whole.

    Raises:
        StoreNotFoundError: Nothing there.
        StoreFormatError: Not a feature store.
        StoreStateError: Unfinished.
    """
    try:
        store = open_store(path)
        store.manifest  # noqa: B018 - read now: a damaged entry is damage found, too
    except CorruptDataError as error:
        return {"store": str(path), "files": 0, "bytes": 0, "damage": [str(error)]}
    damage = _check_files(store, quiet=quiet) or _check_recorded(store)
    if not damage:
        # Contents are only worth reading once the bytes are known to be right.
        damage = _check_contents(store)
    total = sum(record["bytes"] for record in store.manifest.values())
    return {"store": str(path), "files": len(store.manifest), "bytes": total, "damage": damage}


def _check_files(store: Store, *, quiet: bool) -> list[str]:
    damage = []
    total = sum(record["bytes"] for record in store.manifest.values())
    with progress("verify", total, "B", quiet=quiet) as tick:
        for name, record in store.manifest.items():
            path = store.path / name
            if not path.is_file():
                damage.append(f"{name}: missing")
            elif (size := path.stat().st_size) != record["bytes"]:
                damage.append(f"{name}: {size} bytes, the manifest says {record['bytes']}")
            elif formats.file_checksum(path.read_bytes()) != record["crc32"]:
                damage.append(f"{name}: checksum differs from the manifest")
            tick(record["bytes"])
    return damage


def _check_recorded(store: Store) -> list[str]:
    """Chunks that an array must have but the manifest does not name: nothing would notice damage to them."""
    damage = []
    for document in [name for name in store.manifest if name.endswith("/zarr.json")]:
        array = read_json(store.path / document)
        if array["node_type"] != "array":
            continue
        (rows, *rest), size = array["shape"], array["chunk_grid"]["configuration"]["chunk_shape"][0]
        for i in range(-(-rows // size)):
            chunk = document.removesuffix("zarr.json") + "/".join(["c", str(i), *("0" for _ in rest)])
            if chunk not in store.manifest:
                damage.append(f"{chunk}: not in the manifest")
    return damage


def _check_contents(store: Store) -> list[str]:
    damage: list[str] = []
    for name in store.models:
        try:
            damage += _check_model(store, name)
        except FeatstoreError as error:
            damage.append(str(error))
    for i, first in enumerate(store.models):
        for second in store.models[i + 1 :]:
            try:
                damage += _check_pairs(store, first, second)
            except (FeatstoreError, IndexError) as error:
                damage.append(f"pairs of {first} and {second}: {error}")
    return damage


def _check_model(store: Store, name: str) -> list[str]:
    model, table = store.model(name), store.tokens(name)
    damage = [
        f"{name}: tokens/{field} has {len(column)} rows, expected {model.rows}"
        for field, column in vars(table).items()
        if len(column) != model.rows
    ]
    window_bytes = store.corpus.window_end - store.corpus.window_start
    if not damage and (table.byte_end > window_bytes[table.window]).any():
        damage.append(f"{name}: a token ends beyond its window")
    for layer in model.layers:
        reader, norms = store.rows(name, layer), store.norms(name, layer)
        if reader.shape != (model.rows, model.width):
            damage.append(f"{name}: layer {layer} has shape {reader.shape}, expected {(model.rows, model.width)}")
            continue
        for start in range(0, model.rows, 4096):
            rows = reader[start : start + 4096]
            wrong = ~np.isclose(np.linalg.norm(rows, axis=1), norms[start : start + 4096], rtol=1e-3, atol=1e-6)
            if wrong.any():
                row = start + int(np.flatnonzero(wrong)[0])
                damage.append(f"{name}: layer {layer}, row {row}: the state is not finite or differs from its norm")
                break
    return damage


def _check_pairs(store: Store, first: str, second: str) -> list[str]:
    pairs = store.pairs(first, second)
    a, b = store.tokens(first), store.tokens(second)
    same_window = a.window[pairs.row_source] == b.window[pairs.row_target]
    same_end = a.byte_end[pairs.row_source] == b.byte_end[pairs.row_target]
    if bool((same_window & same_end).all()):
        return []
    return [f"pairs of {first} and {second}: {int((~(same_window & same_end)).sum())} do not end at the same byte"]

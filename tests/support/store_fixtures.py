"""Synthetic stores through the writer's own functions: no torch, no models, states that are plain random numbers.

The order of the steps is that of an extraction, and every step may be repeated, so a killed writer can be run again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featstore.store import Tokens, open_store
from featstore.store.format.elements import Encoded, column_scale_of, parse_format
from featstore.store.format.shards import parse_layout
from featstore.store.format.version import FORMAT_VERSION
from featstore.store.read.portable import store_files
from featstore.store.read.records import TOKEN_COLUMNS
from featstore.store.read.store import open_files
from featstore.store.write.index import sink_mask, write_pairs
from featstore.store.write.row_writer import RowArrays, RowWriter, write_groups
from featstore.store.write.writer import StoreWriter, exclusive
from featstore.text.splits import SPLITS, split_of
from featstore.text.windows import windows as cut_windows

MODELS = ("a", "b")
SINK_THRESHOLD = 5.0


@dataclass(frozen=True)
class Recipe:
    """What to write."""

    form: str = "bfloat16"
    layout: str = "archive"
    shard_rows: int = 512
    documents: int = 12
    document_bytes: int = 260
    window_bytes: int = 64
    width: int = 8
    layers: tuple[int, ...] = (0, 3)
    seed: int = 0
    state_seed: int = 0
    #: Roles of a window's parts, one after the other; without, the store has no such column.
    roles: tuple[int, ...] = ()


def texts(recipe: Recipe) -> list[bytes]:
    rng = np.random.default_rng(recipe.seed)
    letters = np.frombuffer(b"abcdefgh   \n", np.uint8)
    return [rng.choice(letters, recipe.document_bytes - d % 7).tobytes() for d in range(recipe.documents)]


def token_table(recipe: Recipe, model: str, windows: list[tuple[int, int, int]]) -> dict[str, np.ndarray]:
    """Random cuts of every window; model b begins each window with a special token, and repeats some ends."""
    rng = np.random.default_rng((recipe.seed, MODELS.index(model)))
    columns: dict[str, list[int]] = {"id": [], "byte_end": [], "window": [], "special": []}
    for number, (_, start, end) in enumerate(windows):
        length = end - start
        ends = sorted({*rng.integers(1, length + 1, length // 2).tolist(), length})
        if model == "b":
            ends = sorted(ends + ends[::5])
        for i, byte_end in enumerate([0, *ends] if model == "b" else ends):
            columns["id"].append(int(rng.integers(1000)))
            columns["byte_end"].append(byte_end)
            columns["window"].append(number)
            columns["special"].append(model == "b" and i == 0)
    kinds = {"id": np.int32, "byte_end": np.int32, "window": np.int32, "special": bool}
    made = {name: np.array(values, kinds[name]) for name, values in columns.items()}
    if recipe.roles:
        parts = np.array(recipe.roles)[made["byte_end"] * len(recipe.roles) // (recipe.window_bytes + 1)]
        made["role"] = np.where(made["special"], 0, parts).astype(np.uint8)
    return made


def messages(recipe: Recipe, windows: list[tuple[int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Document, role, start and end of the parts of every window whose roles :func:`token_table` writes."""
    count, size = len(recipe.roles), recipe.window_bytes + 1
    found = []
    for document, start, end in windows:
        for place, role in enumerate(recipe.roles):
            # The ends e of this part are those for which e * count // size is its place.
            first, last = max(-(-place * size // count) - 1, 0), -(-(place + 1) * size // count) - 1
            if start + first < min(start + last, end):
                found.append((document, role, start + first, min(start + last, end)))
    return found


def states(recipe: Recipe, model: str, layer: int, rows: int) -> np.ndarray:
    """float32 (rows, width); every 50th row is a sink, another one in each layer."""
    rng = np.random.default_rng((recipe.state_seed, MODELS.index(model), layer))
    values = rng.standard_normal((rows, recipe.width)).astype(np.float32)
    values[layer::50] *= 40
    return values


def column_scale(recipe: Recipe, model: str, layer: int, rows: int) -> np.ndarray | None:
    """float32 (width,) as the pilot would freeze it, None where the format has none."""
    form = parse_format(recipe.form)
    return column_scale_of(states(recipe, model, layer, rows)[:100]) if form.column_scaled else None


def stored_states(recipe: Recipe, model: str, layer: int, rows: int) -> Encoded:
    scale = column_scale(recipe, model, layer, rows)
    return parse_format(recipe.form).encode(states(recipe, model, layer, rows), scale)


def decoded_states(recipe: Recipe, model: str, layer: int, rows: int) -> np.ndarray:
    """float32 (rows, width) as a reader must give them."""
    encoded = stored_states(recipe, model, layer, rows)
    scale = column_scale(recipe, model, layer, rows)
    return parse_format(recipe.form).decode(encoded.stored, encoded.row_scale, scale)


def write_store(path: Path, recipe: Recipe | None = None) -> Path:
    """Write a complete store, or go on with one."""
    recipe = recipe or Recipe()
    with exclusive(path):
        _write(StoreWriter(path), recipe)
    return path


def _write(writer: StoreWriter, recipe: Recipe) -> None:
    raw = texts(recipe)
    windows = [(d, *cut) for d, text in enumerate(raw) for cut in cut_windows(text, recipe.window_bytes)]
    ids = [hashlib.sha256(text).digest() for text in raw]
    split = split_of(ids)
    attributes: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "complete": False,
        "models": list(MODELS),
        "corpus": {"documents": len(raw), "windows": len(windows), "bytes": sum(map(len, raw))},
        "window_bytes": recipe.window_bytes,
        "split": {"documents": dict(zip(SPLITS, np.bincount(split, minlength=3).tolist(), strict=True))},
        "mask": {"sink_threshold": SINK_THRESHOLD},
    }
    if (writer.attributes() or {}).get("featstore", {}).get("complete"):
        return
    writer.group("", {"featstore": attributes})
    for group in ("models", "corpus", "corpus/document", "corpus/window", "corpus/message", "pairs"):
        writer.group(group, {})
    if not writer.has("corpus"):
        table = np.array(windows, np.int64)
        said = np.array(messages(recipe, windows), np.int64).reshape(-1, 4)
        columns = ("document", np.int32), ("role", np.uint8), ("start", np.int64), ("end", np.int64)
        told = {f"corpus/message/{name}": said[:, i].astype(kind) for i, (name, kind) in enumerate(columns)}
        writer.vectors(
            "corpus",
            {
                "corpus/text": np.frombuffer(b"".join(raw), np.uint8),
                "corpus/document/start": np.cumsum([0, *map(len, raw)]).astype(np.int64),
                "corpus/document/id": np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 32),
                "corpus/document/split": split,
                "corpus/window/document": table[:, 0].astype(np.int32),
                "corpus/window/start": table[:, 1],
                "corpus/window/end": table[:, 2],
                **(told if recipe.roles else {}),
            },
        )
    for model in MODELS:
        _write_model(writer, recipe, model, windows)
    for model in MODELS:
        unit = f"models/{model}/sinks"
        if not writer.has(unit):
            writer.vectors(unit, {f"models/{model}/tokens/sink": sink_mask(writer.view, model, SINK_THRESHOLD)})
    write_pairs(writer, *MODELS, "end")
    writer.seal({"featstore": {**attributes, "complete": True}})


def _write_model(writer: StoreWriter, recipe: Recipe, model: str, windows: list[tuple[int, int, int]]) -> None:
    columns = token_table(recipe, model, windows)
    rows = len(columns["id"])
    form = parse_format(recipe.form)
    write_groups(writer, model, form)
    values = {
        "depth": max(recipe.layers),
        "width": recipe.width,
        "rows": rows,
        "layers": list(recipe.layers),
        "layer_0": "stored",
    }
    writer.group(f"models/{model}", {"featstore": values})
    if not writer.has(f"models/{model}/tokens"):
        writer.vectors(f"models/{model}/tokens", {f"models/{model}/tokens/{k}": v for k, v in columns.items()})
    scales = {k: column_scale(recipe, model, k, rows) for k in recipe.layers} if form.column_scaled else {}
    for layer in recipe.layers:
        if not writer.has(f"models/{model}/pilot-{layer}"):
            wide = states(recipe, model, layer, rows).astype(np.float64)
            arrays = {
                f"models/{model}/origin/{layer}": wide[:100].mean(axis=0).astype(np.float32),
                f"models/{model}/median_norm/{layer}": np.array([np.median(np.linalg.norm(wide, axis=1))]),
            }
            if form.column_scaled:
                arrays[f"models/{model}/column_scale/{layer}"] = scales[layer]
            writer.vectors(f"models/{model}/pilot-{layer}", arrays)
    arrays = RowArrays(rows, recipe.width, recipe.layers, recipe.shard_rows, form, parse_layout(recipe.layout), scales)
    target = RowWriter(writer, model, arrays)
    for start in range(0, rows, 100):
        end = min(start + 100, rows)
        for layer in target.missing(start, end):
            target.put(start, layer, stored_states(recipe, model, layer, rows).part(start, end))
        target.advance(end)


def write_quickly(path: Path, recipe: Recipe | None = None) -> Path:
    """The same store without waiting for the disk: for tests that no power cut will hit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        return write_store(path, recipe)


def tree_bytes(root: Path) -> dict[str, bytes]:
    """Content of every file of a directory, hidden ones too."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def rowless(path: Path) -> Path:
    """Take the rows out of a store, as an extraction with --moments-only leaves it."""
    store = open_files(store_files(path))
    with exclusive(path):
        writer = StoreWriter(path)
        for unit in list(writer.unit_names()):
            if "/rows-" in unit:
                writer.drop(unit)
        for name in store.models:
            norms = (file for file in sorted((path / "models" / name / "norm").rglob("*")) if "/c/" in file.as_posix())
            writer.commit(
                f"models/{name}/norms", {file.relative_to(path).as_posix(): file.read_bytes() for file in norms}
            )
            writer.group(f"models/{name}", {"featstore": store.model(name).attributes | {"states": "moments"}})
        for kind in ("resid", "row_scale"):
            for array in path.glob(f"models/*/{kind}/*"):
                if array.is_dir():
                    shutil.rmtree(array)
        writer.seal(writer.attributes() or {})
    return path


def give_roles(path: Path, role_of: Callable[[Tokens], np.ndarray]) -> Path:
    """Say of a complete store who wrote what: the column of each model's tokens is made from the others."""
    tokens = {name: store.tokens(name) for store in [open_store(path)] for name in store.models}
    with exclusive(path):
        writer = StoreWriter(path)
        for name, own in tokens.items():
            base = f"models/{name}/tokens"
            columns = {column: getattr(own, column) for column in TOKEN_COLUMNS}
            columns["role"] = np.where(own.special, 0, role_of(own)).astype(np.uint8)
            writer.drop(base)
            writer.vectors(base, {f"{base}/{column}": values for column, values in columns.items()})
        writer.seal(writer.attributes() or {})
    return path

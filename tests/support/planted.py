"""A real feature store of rows we chose, written without any model: what `extract` writes, with a known answer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from featstore.store import Store, open_store
from featstore.store.conversion.pilot_rows import origin_of
from featstore.store.format.elements import Encoded, parse_format
from featstore.store.format.shards import parse_layout
from featstore.store.format.version import FORMAT_VERSION
from featstore.store.write.index import loud_rows, write_pairs
from featstore.store.write.row_writer import RowArrays, RowWriter, write_groups
from featstore.store.write.writer import StoreWriter, exclusive
from featstore.text.splits import SPLITS

Rows = NDArray[Any]
SHARD_ROWS = 2048
TRAIN, VAL, TEST = 0, 1, 2


@dataclass(frozen=True)
class Planted:
    """A planted store and the rows it was made from, still in float64.

    Attributes:
        path: The store.
        x: Rows of model ``a`` by layer, one for every pair.
        y: Rows of model ``b`` by layer.
        split: Split of every pair.
        document: Document of every pair.
    """

    path: Path
    x: dict[int, Rows]
    y: dict[int, Rows]
    split: NDArray[np.uint8]
    document: NDArray[np.int32]

    @property
    def store(self) -> Store:
        return open_store(self.path)


def document_splits(documents: int) -> NDArray[np.uint8]:
    """Of every ten documents one is a test document and one a validation document, as in a real store."""
    return np.array([{0: TEST, 5: VAL}.get(d % 10, TRAIN) for d in range(documents)], dtype=np.uint8)


def splits_of(n: int, documents: int = 20) -> NDArray[np.uint8]:
    """The split of each of n rows."""
    return document_splits(documents)[np.arange(n) * documents // n]


def plant(
    path: Path,
    x: Rows | Mapping[int, Rows],
    y: Rows | Mapping[int, Rows],
    *,
    documents: int = 20,
    depths: tuple[int, int] = (8, 8),
    form: str = "float32",
    sink_threshold: float = 5.0,
    splits: Sequence[int] | None = None,
    document: NDArray[np.integer[Any]] | None = None,
    role: NDArray[np.integer[Any]] | None = None,
    tokens: NDArray[np.integer[Any]] | None = None,
) -> Planted:
    """Write a store of models ``a`` and ``b`` whose i-th ordinary rows are a pair.

    Model ``b`` has a special token of random size before every document, as tokenizers with a start token do, so that
    the rows of a pair have different numbers in the two models. A single array is layer 1 of its model.

    Args:
        path: Where; must not exist.
        x: ``(n, d)`` rows of model ``a``, or by layer.
        y: The same of model ``b``.
        documents: How many documents the rows are cut into, in order and of equal length.
        depths: Depth each model claims to have.
        form: Element format.
        sink_threshold: Multiple of the median norm beyond which a row is a sink.
        splits: Split of each document; :func:`document_splits` if not given.
        document: Document of every row, non-decreasing, instead of equal lengths.
        role: Role of every row; without, the store has no such column.
        tokens: Token id of every row, in either model; its place among all of its model's rows modulo 256 if not given.
    """
    with pytest.MonkeyPatch.context() as patch:
        # No power cut will hit a test.
        patch.setattr(os, "fsync", lambda _: None)
        return _plant(path, x, y, documents, depths, form, sink_threshold, splits, document, role, tokens)


def _plant(
    path: Path,
    x: Rows | Mapping[int, Rows],
    y: Rows | Mapping[int, Rows],
    documents: int,
    depths: tuple[int, int],
    form: str,
    sink_threshold: float,
    splits: Sequence[int] | None,
    given: NDArray[np.integer[Any]] | None,
    role: NDArray[np.integer[Any]] | None,
    tokens: NDArray[np.integer[Any]] | None,
) -> Planted:
    sides = [side if isinstance(side, Mapping) else {1: side} for side in (x, y)]
    n = len(next(iter(sides[0].values())))
    document = (np.arange(n) * documents // n if given is None else given).astype(np.int32)
    document_split = document_splits(documents) if splits is None else np.array(splits, dtype=np.uint8)
    lengths = np.bincount(document, minlength=documents)
    counts = np.bincount(document_split, minlength=3).tolist()
    rng = np.random.default_rng(99)
    # One byte a token, every fifth a space; documents differ, or their ids would not.
    text = np.array([97 + i * 7 % 26 if i % 5 else 32 for i in range(n)], dtype=np.uint8)
    ids = [hashlib.sha256(str(d).encode()).digest() for d in range(documents)]
    with exclusive(path):
        writer = StoreWriter(path)
        attributes = {
            "format_version": FORMAT_VERSION,
            "complete": False,
            "models": ["a", "b"],
            "corpus": {"source": {"kind": "planted"}, "documents": documents, "windows": documents, "bytes": n},
            "window_bytes": int(lengths.max()),
            "split": {"rule": "planted", "documents": dict(zip(SPLITS, counts, strict=True))},
            "mask": {"sink_threshold": sink_threshold},
            "site_convention": "planted",
            "plan": "planted",
        }
        writer.group("", {"featstore": attributes})
        for group in ("models", "corpus", "corpus/document", "corpus/window", "pairs"):
            writer.group(group, {})
        writer.vectors(
            "corpus",
            {
                "corpus/text": text,
                "corpus/document/start": np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
                "corpus/document/id": np.frombuffer(b"".join(ids), dtype=np.uint8).reshape(-1, 32),
                "corpus/document/split": document_split,
                "corpus/window/document": np.arange(documents, dtype=np.int32),
                "corpus/window/start": np.zeros(documents, dtype=np.int64),
                "corpus/window/end": lengths.astype(np.int64),
            },
        )
        for name, layers, depth, starts in (("a", sides[0], depths[0], False), ("b", sides[1], depths[1], True)):
            _write_model(writer, name, layers, lengths, depth, starts, form, rng, role, tokens)
        store = writer.view
        for name in ("a", "b"):
            writer.vectors(
                # Model a has no start token, and keeps its first rows: all that is planted is compared.
                f"models/{name}/sinks",
                {f"models/{name}/tokens/sink": loud_rows(store, name, sink_threshold)},
            )
        for policy in ("end", "word"):
            write_pairs(writer, "a", "b", policy)
        writer.seal({"featstore": {**attributes, "complete": True}})
    return Planted(path, dict(sides[0]), dict(sides[1]), document_split[document], document)


def _write_model(
    writer: StoreWriter,
    name: str,
    layers: Mapping[int, Rows],
    lengths: NDArray[np.int64],
    depth: int,
    starts: bool,
    form: str,
    rng: np.random.Generator,
    role: NDArray[np.integer[Any]] | None,
    tokens: NDArray[np.integer[Any]] | None,
) -> None:
    n, width = next(iter(layers.values())).shape
    # Where each document begins among the rows; a start token goes before it.
    special = np.zeros(n + (len(lengths) if starts else 0), dtype=bool)
    if starts:
        special[np.concatenate(([0], np.cumsum(lengths + 1)[:-1]))] = True
    window = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths + starts)
    ends = np.concatenate([np.r_[[0] * starts, 1 : length + 1] for length in lengths]).astype(np.int32)
    roles = {}
    if role is not None:
        column = np.zeros(len(special), dtype=np.uint8)
        column[~special] = role
        roles = {f"models/{name}/tokens/role": column}
    ids = np.arange(len(special), dtype=np.int32) % 256
    if tokens is not None:
        ids[~special] = tokens
    base = f"models/{name}"
    write_groups(writer, name, parse_format(form))
    writer.group(
        base,
        {
            "featstore": {
                "reference": "planted",
                "revision": None,
                "family": "planted",
                "depth": depth,
                "width": width,
                "vocabulary": max(256, int(ids.max()) + 1),
                "config_sha256": "0" * 64,
                "tokenizer_sha256": "0" * 64,
                "rows": len(special),
                "layers": sorted(layers),
                "layer_0": "stored",
                "format": form,
                "layout": "hot",
                "shard_rows": SHARD_ROWS,
                "attention": "sdpa",
            }
        },
    )
    writer.vectors(
        f"{base}/tokens",
        {
            f"{base}/tokens/id": ids,
            f"{base}/tokens/byte_end": ends,
            f"{base}/tokens/window": window,
            f"{base}/tokens/special": special,
            **roles,
        },
    )
    kind = parse_format(form)
    arrays = RowArrays(len(special), width, tuple(sorted(layers)), SHARD_ROWS, kind, parse_layout("hot"))
    rows = RowWriter(writer, name, arrays)
    for layer in sorted(layers):
        full = np.empty((len(special), width), dtype=np.float32)
        full[~special] = layers[layer]
        full[special] = rng.normal(scale=30.0, size=(int(special.sum()), width))
        if np.isfinite(full).all():
            stored = kind.encode(full)
        else:  # what no extraction stores: a store that another program spoiled
            stored = Encoded(full.astype(kind.storage), np.linalg.norm(full, axis=1).astype(np.float32))
        # As an extraction does, from the first rows alone.
        pilot = slice(0, max(len(special) // 4, 1))
        median = np.median(stored.norms[pilot])
        ordinary = kind.decode(stored.stored)[pilot][stored.norms[pilot] <= 5 * median]
        vectors = {
            f"{base}/origin/{layer}": origin_of(ordinary, float(median)),
            f"{base}/median_norm/{layer}": np.array([median], dtype=np.float64),
        }
        writer.vectors(f"{base}/pilot-{layer}", vectors)
        rows.put(0, layer, stored)
    rows.advance(len(special))


def rotation(d: int, seed: int, dy: int | None = None) -> NDArray[np.float64]:
    """A seeded semi-orthogonal ``(d, dy)`` matrix, independent of the solvers under test."""
    dy = d if dy is None else dy
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(max(d, dy), min(d, dy))))[0]
    return q if d >= dy else q.T


def spectrum_rows(n: int, d: int, seed: int, *, decay: float = 0.0, mean: float = 0.0) -> NDArray[np.float64]:
    """Gaussian rows whose k-th standard deviation is ``(k + 1) ** -decay``, in a random basis, about a common mean."""
    rng = np.random.default_rng(seed)
    scale = np.arange(1, d + 1, dtype=np.float64) ** -decay
    return (rng.normal(size=(n, d)) * scale) @ rotation(d, seed + 1000) + mean * rng.normal(size=d)


def leaky(path: Path, name: str, **spoil: int) -> Planted:
    """A planted map with noise; the targets of one split may be replaced by something else of the same size."""
    x = spectrum_rows(4000, 32, 1, decay=1.0)
    y = x @ rotation(32, 2) + 0.1 * np.random.default_rng(5).normal(size=x.shape)
    splits = [TRAIN] * 14 + [VAL] * 3 + [TEST] * 3
    split = np.repeat(splits, 200)
    for which in spoil.values():
        y[split == which] = 0.4 * np.random.default_rng(6).normal(size=(int((split == which).sum()), 32))
    return plant(path / f"{name}.zarr", x, y, splits=splits)


def trained(planted: Planted, out: Path, type_: str, **options: Any) -> dict[str, Any]:
    """The metrics of `align train` on a planted store; options are those of `Settings` and `LoopSettings`."""
    from align.runs.train import train
    from align.settings import LoopSettings, Settings

    own = {name: options.pop(name) for name in list(options) if name in Settings.__dataclass_fields__}
    if type_ == "reduced-rank":
        options = {"skip": "none", **options}
    return train(Settings(str(planted.path), type_, loop=LoopSettings(**options), **own), out, quiet=True)


def only(result: dict[str, Any]) -> dict[str, Any]:
    """The entry of the one layer pair of a run."""
    [entry] = result["pairs"].values()
    return dict(entry)

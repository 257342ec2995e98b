"""A store with the metadata of very many rows, and hardly any bytes: files that would hold the same are one file.

Every shard of a layer is the same few rows again, every chunk of a column that repeats itself is the same file, linked
to all its places (hard links: a store takes no others). What opens, plans, selects, verifies and scans meets as many
units, files, rows and pairs as a corpus like Wikitext-103 would give, in documents of the length of its articles.

The text is windows of :data:`WINDOW_TOKENS` tokens of :data:`TOKEN_BYTES` bytes. Model ``a`` reads it as it is, model
``b`` with a special token in place of the first, so that all tokens but the first of each window pair. Every 50th row
is a sink.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.runtime.provenance import json_text
from featstore.store.format import documents
from featstore.store.format.elements import FORMATS, Encoded
from featstore.store.format.shards import LAYOUTS, encode_shard
from featstore.store.format.shards import file_checksum as checksum_of
from featstore.store.format.version import FORMAT_VERSION, MANIFEST
from featstore.store.write.content import VECTOR_CHUNK, padded_chunk
from featstore.store.write.row_writer import RowArrays, rows_unit, write_groups
from featstore.store.write.writer import StoreWriter, exclusive
from featstore.text.splits import SPLITS, split_of

MODELS = ("a", "b")
WINDOW_TOKENS = 64
TOKEN_BYTES = 5
#: As for other synthetic stores: multiples of the median norm.
THRESHOLD = 5.0
#: Names that a file may have on common file systems are some 65,000.
_MOST_LINKS = 30_000


@dataclass(frozen=True)
class Size:
    """How many rows, and how they lie on disk.

    Attributes:
        rows: Of each model; a multiple of a document's rows.
        layers: Of each model.
        width: Of every layer.
        shard_rows: Rows of a shard.
        windows: Of each document.
        vector_rows: Entries of a chunk of the small arrays; a multiple of a shard's rows and a document's.
    """

    rows: int = 96 << 20
    layers: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    width: int = 8
    shard_rows: int = 16_384
    windows: int = 64
    vector_rows: int = VECTOR_CHUNK

    @property
    def document_rows(self) -> int:
        """Rows of a document."""
        return self.windows * WINDOW_TOKENS

    @property
    def units(self) -> int:
        """Units of rows, which most are."""
        return len(MODELS) * len(self.layers) * -(-self.rows // self.shard_rows)


#: For tests: the same shape, some eighty units.
SMALL = Size(rows=8 * 4096, layers=(0, 1), shard_rows=1024, windows=16, vector_rows=4096)


def simulate(path: Path, size: Size | None = None) -> Path:
    """Write such a store, complete.

    Args:
        path: Where; must not exist.
        size: How large; by default all of Wikitext-103.
    """
    return finish(begin(path, size), size)


def begin(path: Path, size: Size | None = None) -> Path:
    """Write all of such a store but the last shard of every layer, the pairs and the seal.

    Args:
        path: Where; must not exist.
        size: How large.
    """
    with _unhurried(path) as writer:
        _begin(writer, size or Size())
    return path


def finish(path: Path, size: Size | None = None) -> Path:
    """Write what :func:`begin` left.

    Args:
        path: The store.
        size: As it was.
    """
    size = size or Size()
    with _unhurried(path) as writer:
        last = row_arrays(size).shards - 1
        for model in MODELS:
            for layer in size.layers:
                _link_rows(writer, size, model, layer, range(last, last + 1))
        _write_pairs(writer, size)
        root = (writer.attributes() or {})["featstore"]
        writer.seal({"featstore": {**root, "complete": True}})
    return path


@contextmanager
def _unhurried(path: Path) -> Iterator[StoreWriter]:
    """A writer that does not wait for the disk: no power cut will hit what it writes."""
    fsync, os.fsync = os.fsync, lambda _: None
    try:
        with exclusive(path):
            yield StoreWriter(path)
    finally:
        os.fsync = fsync


def row_arrays(size: Size) -> RowArrays:
    """What the rows of either model look like on disk."""
    return RowArrays(size.rows, size.width, size.layers, size.shard_rows, FORMATS["bfloat16"], LAYOUTS["hot"])


def rows_of(size: Size, model: str, layer: int) -> Encoded:
    """The rows that every shard of a layer holds."""
    rng = np.random.default_rng((MODELS.index(model), layer))
    values = rng.standard_normal((size.shard_rows, size.width)).astype(np.float32)
    values[::50] *= 40
    return FORMATS["bfloat16"].encode(values)


def _begin(writer: StoreWriter, size: Size) -> None:
    windows = size.rows // WINDOW_TOKENS
    count = windows // size.windows
    ids = [np.random.default_rng(number).bytes(32) for number in range(count)]
    split = split_of(ids)
    window_bytes = WINDOW_TOKENS * TOKEN_BYTES
    held = dict(zip(SPLITS, np.bincount(split, minlength=3).tolist(), strict=True))
    root: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "complete": False,
        "models": list(MODELS),
        "corpus": {"documents": count, "windows": windows, "bytes": windows * window_bytes},
        "window_bytes": window_bytes,
        "split": {"documents": held},
        "mask": {"sink_threshold": THRESHOLD},
    }
    writer.group("", {"featstore": root})
    for group in ("models", "corpus", "corpus/document", "corpus/window", "corpus/message", "pairs"):
        writer.group(group, {})
    _write_corpus(writer, size, ids, split)
    within = np.arange(size.vector_rows) % WINDOW_TOKENS
    for model in MODELS:
        _write_model(writer, size, model, within)


def _write_corpus(writer: StoreWriter, size: Size, ids: list[bytes], split: NDArray[np.uint8]) -> None:
    number = np.arange(size.rows // WINDOW_TOKENS)
    start = number % size.windows * (WINDOW_TOKENS * TOKEN_BYTES)
    record = _Record(writer)
    length = size.document_rows * TOKEN_BYTES
    text = np.frombuffer(b"abcd " * -(-VECTOR_CHUNK // 5), np.uint8)[:VECTOR_CHUNK]
    record.same("corpus/text", text, len(number) * WINDOW_TOKENS * TOKEN_BYTES)
    for name, values in {
        "document/start": np.arange(len(ids) + 1, dtype=np.int64) * length,
        "document/id": np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 32),
        "document/split": split,
        "window/document": (number // size.windows).astype(np.int32),
        "window/start": start.astype(np.int64),
        "window/end": (start + WINDOW_TOKENS * TOKEN_BYTES).astype(np.int64),
        "message/document": np.zeros(0, np.int32),
        "message/role": np.zeros(0, np.uint8),
        "message/start": np.zeros(0, np.int64),
        "message/end": np.zeros(0, np.int64),
    }.items():
        record.every(f"corpus/{name}", values, VECTOR_CHUNK)
    record.commit("corpus")


def _write_model(writer: StoreWriter, size: Size, model: str, within: NDArray[np.int64]) -> None:
    base, arrays = f"models/{model}", row_arrays(size)
    special = (within == 0) & (model == "b")
    write_groups(writer, model, arrays.form)
    attributes = {
        "depth": max(size.layers),
        "width": size.width,
        "rows": size.rows,
        "layers": list(size.layers),
        "format": arrays.form.name,
        "layout": arrays.layout.name,
        "shard_rows": size.shard_rows,
        "vocabulary": 1000,
    }
    writer.group(base, {"featstore": attributes})
    record = _Record(writer)
    for name, values in {
        "id": (np.arange(len(within)) * 7919 % 1000).astype(np.int32),
        "byte_end": np.where(special, 0, (within + 1) * TOKEN_BYTES).astype(np.int32),
        "special": special,
        "exact": np.ones(len(within), bool),
        "role": np.zeros(len(within), np.uint8),
    }.items():
        record.same(f"{base}/tokens/{name}", values, size.rows)
    other = writer.path / "models" / MODELS[0] / "tokens/window"
    record.runs(f"{base}/tokens/window", size, np.int32, None if model == MODELS[0] else other)
    record.commit(f"{base}/tokens")
    loud = np.zeros(size.shard_rows, bool)
    for layer in size.layers:
        rows = rows_of(size, model, layer)
        median = float(np.median(rows.norms))
        loud |= rows.norms > THRESHOLD * median
        pilot = {
            f"{base}/origin/{layer}": arrays.form.decode(rows.stored).mean(axis=0),
            f"{base}/median_norm/{layer}": np.array([median]),
        }
        writer.vectors(f"{base}/pilot-{layer}", pilot)
        _link_rows(writer, size, model, layer, range(arrays.shards - 1))
    begins = (within == 0) & ~special & (model == "a")
    record = _Record(writer)
    record.same(f"{base}/tokens/sink", np.tile(loud, len(within) // len(loud)) | begins, size.rows)
    record.commit(f"{base}/sinks")


def _link_rows(writer: StoreWriter, size: Size, model: str, layer: int, shards: range) -> None:
    arrays, base, rows = row_arrays(size), f"models/{model}", rows_of(size, model, layer)
    writer.describe(arrays.documents(model, layer, min(shards.stop * size.shard_rows, size.rows)))
    states = encode_shard(rows.stored, size.shard_rows, arrays.layout)
    norms = padded_chunk(rows.norms, size.shard_rows)
    says = [{"bytes": len(data), "crc32": checksum_of(data)} for data in (states, norms)]
    files = _Files(writer.path)
    folder = writer.path / MANIFEST / rows_unit(model, layer, 0)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        names = (f"{base}/resid/{layer}/c/{shard}/0", f"{base}/norm/{layer}/c/{shard}")
        for name, data in zip(names, (states, norms), strict=True):
            files.put(name, data)
        unit = rows_unit(model, layer, shard)
        entry = {"unit": unit, "files": dict(zip(names, says, strict=True)), "rows": size.shard_rows}
        (writer.path / MANIFEST / f"{unit}.json").write_text(json_text(entry))


def _write_pairs(writer: StoreWriter, size: Size) -> None:
    per = WINDOW_TOKENS - 1
    pairs, base = size.rows // WINDOW_TOKENS * per, "pairs/a__b"
    coverage = {"a": pairs / size.rows, "b": 1.0}
    writer.group(base, {})
    writer.group(f"{base}/end", {"featstore": {"policy": "end", "pairs": pairs, "coverage": coverage}})
    record = _Record(writer)
    for side in MODELS:
        array = f"{base}/end/row_{side}"
        record.describe(array, (pairs,), np.dtype(np.int64), size.vector_rows)
        for chunk, first in enumerate(range(0, pairs, size.vector_rows)):
            number = np.arange(first, min(first + size.vector_rows, pairs))
            rows = number // per * WINDOW_TOKENS + number % per + 1
            made = None if side == "a" else writer.path / base / "end/row_a/c" / str(chunk)
            record.put(f"{array}/c/{chunk}", lambda r=rows: padded_chunk(r, size.vector_rows), made)
    record.commit(f"{base}/end")


class _Files:
    """Files that are written once and linked wherever the same bytes stand."""

    def __init__(self, root: Path) -> None:
        self.root, self.first = root, dict[bytes, tuple[Path, int]]()

    def put(self, name: str, data: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        held, links = self.first.get(data, (None, 0))
        if held is None or links == _MOST_LINKS:
            path.write_bytes(data)
            self.first[data] = path, 1
        else:
            os.link(held, path)
            self.first[data] = held, links + 1


class _Record:
    """The files of one unit of small arrays."""

    def __init__(self, writer: StoreWriter) -> None:
        self.writer, self.files, self.known = writer, dict[str, Any](), dict[int, dict[str, Any]]()

    def describe(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], chunk: int) -> None:
        self.writer.describe({name: documents.plain_document(shape, dtype.name, chunk)})

    def put(self, name: str, made: Any, same_as: Path | None = None) -> None:
        path = self.writer.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if same_as is not None:
            os.link(same_as, path)
        else:
            path.write_bytes(made())
        # One file under several names is summed once.
        key = path.stat().st_ino
        if key not in self.known:
            data = path.read_bytes()
            self.known[key] = {"bytes": len(data), "crc32": checksum_of(data)}
        self.files[name] = self.known[key]

    def same(self, name: str, chunk: NDArray[Any], length: int) -> None:
        """An array that is the same chunk again and again."""
        self.describe(name, (length,), chunk.dtype, len(chunk))
        first = self.writer.path / name / "c/0"
        self.put(f"{name}/c/0", lambda: padded_chunk(chunk, len(chunk)))
        for number in range(1, -(-length // len(chunk))):
            self.put(f"{name}/c/{number}", None, first)

    def every(self, name: str, values: NDArray[Any], chunk: int) -> None:
        """An array as it is."""
        chunk = max(min(len(values), chunk), 1)
        self.describe(name, values.shape, values.dtype, chunk)
        for number, at in enumerate(range(0, len(values), chunk)):
            part = values[at : at + chunk]
            self.put(f"{name}/c/{number}{'/0' * (values.ndim - 1)}", lambda p=part: padded_chunk(p, chunk))

    def runs(self, name: str, size: Size, dtype: Any, same_as: Path | None) -> None:
        """The windows of all rows."""
        self.describe(name, (size.rows,), np.dtype(dtype), size.vector_rows)
        for number, first in enumerate(range(0, size.rows, size.vector_rows)):
            made = None if same_as is None else same_as / "c" / str(number)
            rows = np.arange(first, first + size.vector_rows) // WINDOW_TOKENS
            self.put(f"{name}/c/{number}", lambda r=rows: padded_chunk(r.astype(dtype), size.vector_rows), made)

    def commit(self, unit: str) -> None:
        entry = {"unit": unit, "files": self.files}
        path = self.writer.path / MANIFEST / f"{unit}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json_text(entry))

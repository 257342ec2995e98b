"""Open a feature store and read it: rows, masks, pairs, text.

Only numpy and zarr are needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore import formats
from featstore.errors import (
    CorruptDataError,
    LayerRangeError,
    PairingError,
    StoreFormatError,
    StoreNotFoundError,
    StoreStateError,
)
from featstore.pairs import Pairs, check_policy
from featstore.provenance import digest, parse_json, read_json
from featstore.rows import RowReader, read_vector
from featstore.writer import FORMAT_VERSION, MANIFEST, METADATA_UNIT, read_entry

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")


def open_store(path: str | Path, *, allow_incomplete: bool = False) -> Store:
    """Open a store for reading.

    Args:
        path: The store's directory.
        allow_incomplete: Accept a store whose extraction has not finished.

    Raises:
        StoreNotFoundError: Nothing there.
        StoreFormatError: Not a feature store, or of a newer format.
        StoreStateError: Unfinished.
        CorruptDataError: Its metadata is damaged.
    """
    root = Path(path)
    if not root.exists():
        raise StoreNotFoundError(f"no store at {str(root)!r}; create one with `featstore extract --store {root}`")
    document = root / "zarr.json"
    if not document.is_file():
        raise StoreFormatError(f"{str(root)!r} is not a feature store: it has no zarr.json")
    attributes = read_json(document).get("attributes")
    own = attributes.get("featstore") if isinstance(attributes, dict) else None
    if not isinstance(own, dict):
        raise StoreFormatError(f"{str(root)!r} is a Zarr node but not a feature store; give the path of a store")
    version = own.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise CorruptDataError(f"{document} has format version {version!r}; restore it or extract again")
    if version > FORMAT_VERSION:
        raise StoreFormatError(
            f"{str(root)!r} has format version {version}, this featstore reads up to {FORMAT_VERSION}; upgrade it"
        )
    if not own.get("complete") and not allow_incomplete:
        raise StoreStateError(
            f"{str(root)!r} is unfinished; run the same `featstore extract` command again to complete it"
        )
    return Store(root, own)


def _sealed_documents(path: Path, attributes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Checksums of a complete store's metadata documents, once the root's own attributes have passed theirs."""
    where = path / MANIFEST / f"{METADATA_UNIT}.json"
    if not where.is_file():
        raise CorruptDataError(f"{where} is missing; restore it or extract again")
    entry = read_entry(where, METADATA_UNIT)
    try:
        intact = entry.get("attributes") == digest({"featstore": attributes})
    except (ValueError, RecursionError):  # what strict JSON cannot carry was never written
        intact = False
    if not intact:
        raise CorruptDataError(f"{path / 'zarr.json'} is not the document that the manifest records; restore it")
    files: dict[str, dict[str, Any]] = entry["files"]
    return files


def _field(document: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    value = document.get(key)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise CorruptDataError(f"{where}: {key!r} is {value!r}, not usable; restore the document or extract again")
    return value


@dataclass(frozen=True)
class StoredModel:
    """One model's attributes in a store.

    Attributes:
        name: Short name.
        depth: Number of blocks.
        width: Hidden width.
        rows: Token states.
        layers: Layers stored.
        attributes: All recorded attributes.
    """

    name: str
    depth: int
    width: int
    rows: int
    layers: tuple[int, ...]
    attributes: dict[str, Any]

    @classmethod
    def parse(cls, name: str, attributes: Any, where: str) -> StoredModel:
        """Validate a model group's attributes.

        Args:
            name: Short name.
            attributes: The ``featstore`` attribute of the group.
            where: Named in errors.

        Raises:
            CorruptDataError: Something is missing or of the wrong type.
        """
        if not isinstance(attributes, dict):
            raise CorruptDataError(f"{where} lacks its featstore attributes; restore it or extract again")
        layers = _field(attributes, "layers", list, where)
        depth = _field(attributes, "depth", int, where)
        if not layers or not all(isinstance(k, int) and 0 <= k <= depth for k in layers):
            raise CorruptDataError(f"{where}: layers {layers!r} do not fit a depth of {depth}")
        return cls(
            name,
            depth,
            _field(attributes, "width", int, where),
            _field(attributes, "rows", int, where),
            tuple(layers),
            attributes,
        )


@dataclass(frozen=True)
class Tokens:
    """One model's token table.

    Attributes:
        id: int32 ``(n,)``.
        byte_end: int32 ``(n,)``, within the window.
        window: int32 ``(n,)``.
        special: bool ``(n,)``.
        sink: bool ``(n,)``, norm beyond the threshold at any stored layer.
    """

    id: NDArray[np.int32]
    byte_end: NDArray[np.int32]
    window: NDArray[np.int32]
    special: NDArray[np.bool_]
    sink: NDArray[np.bool_]


@dataclass(frozen=True)
class StoredCorpus:
    """The text the models read.

    Attributes:
        text: uint8 bytes of all documents.
        document_start: int64 ``(documents + 1,)``.
        document_id: uint8 ``(documents, 32)``.
        document_split: uint8 ``(documents,)``.
        window_document: int32 ``(windows,)``.
        window_start: int64 ``(windows,)``, within the document.
        window_end: int64 ``(windows,)``.
    """

    text: NDArray[np.uint8]
    document_start: NDArray[np.int64]
    document_id: NDArray[np.uint8]
    document_split: NDArray[np.uint8]
    window_document: NDArray[np.int32]
    window_start: NDArray[np.int64]
    window_end: NDArray[np.int64]

    def window_text(self, window: int) -> str:
        """The text of a window.

        Args:
            window: Window number.
        """
        base = self.document_start[self.window_document[window]]
        return self.text[base + self.window_start[window] : base + self.window_end[window]].tobytes().decode()

    @property
    def window_offset(self) -> NDArray[np.int64]:
        """Where each window begins in ``text``."""
        return self.document_start[self.window_document] + self.window_start

    @property
    def window_split(self) -> NDArray[np.uint8]:
        """Split of each window's document."""
        return self.document_split[self.window_document]


class Store:
    """A complete feature store, read only. Made by :func:`open_store`.

    Every metadata document is compared with its checksum in the manifest before it is believed: a changed shape or data
    type would otherwise give wrong numbers without an error.
    """

    def __init__(self, path: Path, attributes: dict[str, Any]) -> None:
        self.path = path
        self.attributes = attributes
        self._sealed = _sealed_documents(path, attributes) if attributes.get("complete") else None
        where = str(path / "zarr.json")
        names = _field(attributes, "models", list, where)
        for name in names:
            if not isinstance(name, str) or not _SAFE_NAME.match(name):
                raise CorruptDataError(
                    f"{where} names a model {name!r}, which is not a safe path; do not trust this store"
                )
        self.models: tuple[str, ...] = tuple(names)
        self._readers: dict[tuple[str, int], RowReader] = {}

    def model(self, name: str) -> StoredModel:
        """A model's attributes.

        Args:
            name: Short name.

        Raises:
            StoreStateError: No such model in this store.
        """
        if name not in self.models:
            raise StoreStateError(f"no model {name!r} in {self.path}; it holds {', '.join(self.models)}")
        return self._stored[name]

    @cached_property
    def _stored(self) -> dict[str, StoredModel]:
        result = {}
        for name in self.models:
            attributes = self._document(f"models/{name}").get("attributes")
            own = attributes.get("featstore") if isinstance(attributes, dict) else None
            result[name] = StoredModel.parse(name, own, str(self.path / "models" / name / "zarr.json"))
        return result

    def _document(self, name: str) -> dict[str, Any]:
        """The metadata of a group or array, as it was when the store was sealed."""
        path = self.path / name / "zarr.json"
        if not path.is_file():
            raise CorruptDataError(f"{path} is missing; run the same `featstore extract` command again")
        data = path.read_bytes()
        if self._sealed is not None:
            record = self._sealed.get(f"{name}/zarr.json")
            if record is None or record["crc32"] != formats.file_checksum(data):
                raise CorruptDataError(f"{path} is not the document that the manifest records; restore it")
        return parse_json(data, str(path))

    def _has(self, name: str) -> bool:
        """Whether a group or array is there; in a sealed store what the manifest does not record is not."""
        if self._sealed is not None:
            return f"{name}/zarr.json" in self._sealed
        return (self.path / name / "zarr.json").is_file()

    def _vector(self, name: str) -> NDArray[Any]:
        return read_vector(self.path / name, self._document(name))

    def layer(self, model: str, layer: int) -> int:
        """Return a layer if the store holds it.

        Args:
            model: Model name.
            layer: Layer number.

        Raises:
            LayerRangeError: It does not.
        """
        held = self.model(model).layers
        if layer not in held:
            raise LayerRangeError(
                f"layer {layer} of {model!r} is not in {self.path}; it holds {', '.join(map(str, held))}"
            )
        return layer

    def rows(self, model: str, layer: int) -> RowReader:
        """The states of one layer.

        Args:
            model: Model name.
            layer: A stored layer.
        """
        key = (model, self.layer(model, layer))
        if key not in self._readers:
            name = f"models/{model}/resid/{layer}"
            self._readers[key] = RowReader(self.path / name, self._document(name))
        return self._readers[key]

    def norms(self, model: str, layer: int) -> NDArray[np.float32]:
        """Euclidean norm of every stored row.

        Args:
            model: Model name.
            layer: A stored layer.

        Returns:
            float32 ``(n,)``.
        """
        return self._vector(f"models/{model}/norm/{self.layer(model, layer)}")

    def origin(self, model: str, layer: int) -> NDArray[np.float64]:
        """The pilot's mean state, a fixed origin for accumulating moments without cancellation.

        Args:
            model: Model name.
            layer: A stored layer.

        Returns:
            float64 ``(width,)``.
        """
        return self._vector(f"models/{model}/origin/{self.layer(model, layer)}").astype(np.float64)

    def median_norms(self, model: str) -> dict[str, float]:
        """The pilot's median norm at every stored layer, against which sinks are told.

        Args:
            model: Model name.

        Returns:
            Median by layer, the layer as text.
        """
        layers = self.model(model).layers
        medians = self._vector(f"models/{model}/tokens/median_norm")
        return {str(k): float(v) for k, v in zip(layers, medians, strict=True)}

    def tokens(self, model: str) -> Tokens:
        """A model's token table.

        Args:
            model: Model name.
        """
        self.model(model)
        if model not in self._tokens:
            names = ("id", "byte_end", "window", "special", "sink")
            self._tokens[model] = Tokens(*(self._vector(f"models/{model}/tokens/{name}") for name in names))
        return self._tokens[model]

    @cached_property
    def _tokens(self) -> dict[str, Tokens]:
        return {}

    @cached_property
    def corpus(self) -> StoredCorpus:
        """Documents, windows and text."""
        return StoredCorpus(
            self._vector("corpus/text"),
            self._vector("corpus/document/start"),
            self._vector("corpus/document/id"),
            self._vector("corpus/document/split"),
            self._vector("corpus/window/document"),
            self._vector("corpus/window/start"),
            self._vector("corpus/window/end"),
        )

    def pairs(self, source: str, target: str, policy: str = "end") -> Pairs:
        """The pairs of two models, or of a model with itself (every ordinary token with itself: the ceiling).

        Args:
            source: Model name.
            target: Model name.
            policy: ``end`` or ``word``.

        Raises:
            PairingError: The store has no index for these models and policy.
        """
        check_policy(policy)
        tokens_a, tokens_b = self.tokens(source), self.tokens(target)
        if source == target:
            row_a = row_b = np.flatnonzero(~tokens_a.special).astype(np.int64)
        else:
            first, second = sorted((source, target), key=self.models.index)
            base = f"pairs/{first}__{second}/{policy}"
            if not self._has(f"{base}/row_a"):
                raise PairingError(
                    f"{self.path} has no {policy!r} pairs of {first} and {second}; "
                    f"make them with `featstore pair {self.path} --policy {policy}`"
                )
            row_a, row_b = self._vector(f"{base}/row_a"), self._vector(f"{base}/row_b")
            if source != first:
                row_a, row_b = row_b, row_a
        window = tokens_a.window[row_a]
        document = self.corpus.window_document[window]
        ordinary = [max(int((~t.special).sum()), 1) for t in (tokens_a, tokens_b)]
        return Pairs(
            source,
            target,
            row_a,
            row_b,
            self.corpus.document_split[document],
            document,
            tokens_a.sink[row_a] | tokens_b.sink[row_b],
            (len(row_a) / ordinary[0], len(row_b) / ordinary[1]),
        )

    @cached_property
    def manifest(self) -> dict[str, dict[str, Any]]:
        """Every committed file with its size and checksum, by path.

        Raises:
            CorruptDataError: An entry is damaged or points outside the store.
        """
        files: dict[str, dict[str, Any]] = {}
        root = self.path / MANIFEST
        for path in sorted(root.rglob("*.json")):
            files.update(read_entry(path, path.relative_to(root).with_suffix("").as_posix())["files"])
        return files

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the manifest's arrays: two stores with equal fingerprints hold equal data.

        Metadata documents are left out, since they also say where the text lay, and so are pair indexes, which follow
        from the tokens: adding one does not make an adapter foreign.
        """
        arrays = {
            name: record
            for name, record in self.manifest.items()
            if not name.endswith("zarr.json") and not name.startswith("pairs/")
        }
        return digest(arrays)

"""Open a feature store and read it, on disk or elsewhere: rows, masks, pairs, text.

Only numpy and zarr are needed.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import (
    ContradictionError,
    CorruptDataError,
    FeatstoreError,
    LayerRangeError,
    OldStoreWarning,
    PairingError,
    StoreFormatError,
    StoreStateError,
)
from featstore.runtime.extras import extras_named
from featstore.runtime.provenance import digest, parse_json
from featstore.runtime.schema import parse, shown
from featstore.store.format.attributes import PairAttributes, RootAttributes
from featstore.store.format.index import INDEX, FileIndex
from featstore.store.format.packed import PackedArray, unpack
from featstore.store.format.shards import file_checksum
from featstore.store.format.version import (
    FORMAT_VERSION,
    MANIFEST,
    METADATA_UNIT,
    PACKED_VERSION,
    REBUILDING,
    old_store,
    rebuild_command,
)
from featstore.store.read.columns import OfRows, RowSet, StoredColumn, get_bits, pieces, set_bits
from featstore.store.read.contents import corpus_problems, pair_problems, pilot_problems, token_problems
from featstore.store.read.files import LocalFiles, StoreFiles, parse_entry
from featstore.store.read.pairs import LARGE, Pairs, check_policy
from featstore.store.read.portable import Location, store_files
from featstore.store.read.recorded import announced_problems, entry_problems, sealed_problems, size_problems
from featstore.store.read.records import TOKEN_COLUMNS, StoredCorpus, StoredModel, Tokens
from featstore.store.read.rows import RowReader
from featstore.store.read.shown import html_table, one_line
from featstore.store.read.structure import Arrays, check_structure, own_attributes
from featstore.store.read.tables import TableReader
from featstore.store.read.vectors import column_of, vector_of

if TYPE_CHECKING:
    import pandas as pd

#: Bytes of text from which it is read window by window.
LARGE_TEXT = 1 << 27


def open_store(path: Location, *, allow_incomplete: bool = False, portable: bool = False) -> Store:
    """Open a store for reading.

    A directory is mapped. Anything else is read through zarr-python: the same numbers, without views. A store of an
    older format version is read as well, with an :class:`featstore.errors.OldStoreWarning`.

    Args:
        path: The store's directory, a URL such as ``s3://bucket/wt103.zarr``, or an open zarr-python store. A URL takes
            its settings from the environment (``AWS_ENDPOINT_URL``, ``AWS_REGION`` and the like); for any others, build
            the zarr-python store.
        allow_incomplete: Accept a store whose extraction has not finished, and check documents only when they are
            needed: one that is being added to does not agree with itself yet.
        portable: Read a directory through zarr-python, too.

    Raises:
        StoreNotFoundError: Nothing there.
        StoreAccessError: It cannot be reached.
        StoreFormatError: Not a feature store, or of a newer format.
        StoreStateError: Unfinished.
        CorruptDataError: Its metadata is damaged.
        MissingPackageError: The package that speaks the URL's protocol is not installed.
    """
    store = open_files(store_files(path, portable=portable), allow_incomplete=allow_incomplete)
    if store.complete and not allow_incomplete:
        store.arrays  # noqa: B018 - every document is read and checked now
    if store.version < FORMAT_VERSION:
        # At one place, whoever called: Python then shows a line once a process for each store.
        warnings.warn(old_store(store.path, store.version), OldStoreWarning, stacklevel=1)
    return store


def open_files(files: StoreFiles, *, allow_incomplete: bool = False) -> Store:
    """Open a store whose files have been found; an older format version is not announced.

    Args:
        files: The store's files.
        allow_incomplete: Accept a store whose extraction has not finished.

    Raises:
        FeatstoreError: As :func:`open_store`.
    """
    where = repr(str(files.location))
    document = files.read("zarr.json")
    if document is None:
        raise StoreFormatError(
            f"{where} is not a feature store: it has no zarr.json; name a directory that `featstore extract` made"
        )
    node = parse_json(document, f"{files.location}/zarr.json")
    own = own_attributes(node)
    if not isinstance(own, dict):
        raise StoreFormatError(f"{where} is a Zarr node but not a feature store; give the path of a store")
    version = own.get("format_version")
    if type(version) is not int or version < 1:
        raise CorruptDataError(
            f"{files.location}/zarr.json has format version {shown(version)}; restore it or extract again"
        )
    if version > PACKED_VERSION:
        raise StoreFormatError(
            f"{where} has format version {version}, this featstore reads up to {PACKED_VERSION}; upgrade it"
        )
    if node.get("zarr_format") != 3 or node.get("node_type") != "group":
        raise CorruptDataError(f"{files.location}/zarr.json is no Zarr group of format 3; restore it or extract again")
    if own.get(REBUILDING) and not allow_incomplete:
        raise StoreStateError(f"{where} is half rebuilt; run {rebuild_command(files.location)} again to complete it")
    if not own.get("complete") and not allow_incomplete:
        raise StoreStateError(f"{where} is unfinished; run the same `featstore extract` command again to complete it")
    return Store(files, own, file_checksum(document))


def _reopen(origin: Any, portable: bool, checksum: str) -> Store:
    """Open in this process what was open in another, which has announced an older version."""
    if isinstance(origin, str):
        return _reopened(origin, portable, checksum)
    return open_files(store_files(origin), allow_incomplete=True)


@lru_cache(maxsize=16)
def _reopened(origin: str, portable: bool, checksum: str) -> Store:
    """A store for all the tasks of a worker; a store that has been sealed anew since is another."""
    del checksum
    return open_files(store_files(origin, portable=portable), allow_incomplete=True)


def _sealed_entry(files: StoreFiles, attributes: dict[str, Any]) -> dict[str, Any]:
    """Checksums of a complete store's metadata documents, once the root's own attributes have passed theirs."""
    name = f"{MANIFEST}/{METADATA_UNIT}.json"
    where, data = f"{files.location}/{name}", files.read(name)
    if data is None:
        raise CorruptDataError(f"{where} is missing; restore it or extract again")
    entry = parse_entry(data, where, METADATA_UNIT)
    try:
        intact = entry.get("attributes") == digest({"featstore": attributes})
    except (ValueError, RecursionError):  # what strict JSON cannot carry was never written
        intact = False
    if not intact:
        raise CorruptDataError(f"{files.location}/zarr.json is not the document that the manifest records; restore it")
    return entry


class Store:
    """A complete feature store, read only. Made by :func:`open_store`.

    Every metadata document is compared with its checksum in the manifest before it is believed: a changed shape or data
    type would otherwise give wrong numbers without an error.

    A store may be pickled: what travels is its place, not its content.

    >>> import featstore
    >>> store = featstore.open_store("wt103.zarr")
    >>> store
    <Store wt103.zarr: llama 3 layers of ... x 48, mistral 3 layers of ... x 32>
    >>> store.rows("llama", 2)[:1000].mean(axis=0).shape
    (48,)
    >>> pairs = store.pairs("llama", "mistral").select(split=0)
    >>> x, y = store.rows("llama", 2)[pairs.row_source], store.rows("mistral", 2)[pairs.row_target]
    >>> len(x) == len(y) == len(pairs)
    True
    >>> store.to_pandas().groupby("model").layer.max().to_dict()
    {'llama': 3, 'mistral': 4}

    Attributes:
        path: The directory as a Path; where there is none, the URL as text. For messages: what needs files takes
            :attr:`directory`.
        files: The store's files, wherever they are.
        attributes: The root's attributes.
        models: Short names, in store order.
        version: Format version of what is there.
    """

    def __init__(self, files: StoreFiles, attributes: dict[str, Any], checksum: str) -> None:
        self.files = files
        self.path: Any = files.location
        self.attributes = attributes
        self._checksum = checksum
        #: What the root says, typed; :attr:`attributes` has the same and what this version does not know.
        self.root = parse(RootAttributes, attributes, f"{self.path}/zarr.json", "restore it; do not trust this store")
        self._units = _sealed_entry(files, attributes) if self.root.complete else None
        self._sealed: dict[str, dict[str, Any]] | None = None if self._units is None else self._units["files"]
        self._documents: dict[str, dict[str, Any]] = {}
        self.models: tuple[str, ...] = self.root.models
        self.version = int(attributes["format_version"])
        self._readers: dict[tuple[str, int], RowReader | TableReader] = {}

    @property
    def complete(self) -> bool:
        """Whether the store is sealed: its documents and its manifest are as they were recorded then."""
        return self._sealed is not None

    @cached_property
    def arrays(self) -> Arrays:
        """Every array of a complete store as its document describes it, by path; all documents are checked for this.

        Raises:
            CorruptDataError: A document is damaged, is missing, or contradicts others.
        """
        if self._sealed is None:
            raise StoreStateError(f"{self.path} is unfinished; what it will hold is not known yet")
        found = self.files.read_all([f"{name}/zarr.json" for name in self.groups_and_arrays])
        for name in self.groups_and_arrays:
            self._documents[name] = self._parsed(name, found[f"{name}/zarr.json"])
        return check_structure(str(self.path), self.root, self._documents)

    @cached_property
    def groups_and_arrays(self) -> tuple[str, ...]:
        """Paths of all groups and arrays below the root that a complete store has."""
        files = () if self._sealed is None else self._sealed
        return tuple(name.removesuffix("/zarr.json") for name in files if name.endswith("/zarr.json"))

    @property
    def directory(self) -> Path:
        """The directory of a store on this machine.

        Raises:
            StoreStateError: It is somewhere else.
        """
        if not isinstance(self.path, Path):
            raise StoreStateError(f"{self.path} is not a directory on this machine; copy the store here for that")
        return self.path

    def require_current(self) -> None:
        """Refuse to add to a store of an older format version: what is there and what would be added differ.

        Raises:
            StoreStateError: It is of an older version, or half way from one.
        """
        command = rebuild_command(self.path)
        if self.attributes.get(REBUILDING):
            raise StoreStateError(f"{self.path} is half rebuilt; run {command} again to complete it")
        if self.version < FORMAT_VERSION and not self.attributes.get("complete"):
            raise StoreStateError(
                f"{self.path} is unfinished and has format version {self.version}, this featstore writes "
                f"{FORMAT_VERSION}; remove it, or choose another --store"
            )
        if self.version < FORMAT_VERSION:
            raise StoreStateError(
                f"{self.path} has format version {self.version}, this featstore writes {FORMAT_VERSION}; run {command} "
                "first, which derives token tables and pairs again, without running a model"
            )

    def __repr__(self) -> str:
        try:
            models = [vars(self.model(name)) for name in self.models]
        except FeatstoreError as error:
            # Whoever looks at a damaged store in a debugger wants to see that, and no second error.
            return f"<Store {self.path}: {', '.join(self.models)}; {error}>"
        return one_line(self.path, models, complete=bool(self.attributes.get("complete")))

    def _repr_html_(self) -> str:
        return html_table(str(self.path), self.layer_records())

    def layer_records(self) -> list[dict[str, Any]]:
        """What the store holds of every layer: model, layer, rows, width, and how its states are kept.

        Returns:
            One record for every model and layer, in store order. ``states`` is ``rows``, ``table`` (layer 0, one row
            for every token id) or ``moments`` (sums alone).
        """
        return [
            {
                "model": name,
                "layer": layer,
                "depth": model.depth,
                "rows": model.rows,
                "width": model.width,
                "states": self._states(name, layer),
                "format": model.attributes.get("format"),
                "layout": model.attributes.get("layout"),
            }
            for name, model in ((name, self.model(name)) for name in self.models)
            for layer in model.layers
        ]

    def _states(self, model: str, layer: int) -> str:
        if layer == 0 and self.has(f"models/{model}/embedding/state"):
            return "table"
        return "rows" if self.has_rows(model, layer) else "moments"

    def to_pandas(self) -> pd.DataFrame:
        """:meth:`layer_records` as a table: a row for every model and layer."""
        with extras_named():
            import pandas as pd

        return pd.DataFrame(self.layer_records())

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.files.origin, not isinstance(self.files, LocalFiles), self._checksum)

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
            own = own_attributes(self.document(f"models/{name}"))
            result[name] = StoredModel.parse(name, own, f"{self.path}/models/{name}/zarr.json")
        return result

    def document(self, name: str) -> dict[str, Any]:
        """The metadata of a group or array, as it was when the store was sealed.

        Args:
            name: Path within the store.

        Raises:
            CorruptDataError: Missing, or not what the manifest records.
        """
        if name in self._documents:
            return self._documents[name]
        return self._parsed(name, self.files.read(f"{name}/zarr.json"))

    def _parsed(self, name: str, data: bytes | None) -> dict[str, Any]:
        """A document, once it has passed its checksum in a sealed store."""
        path = f"{self.path}/{name}/zarr.json"
        if data is None:
            raise CorruptDataError(f"{path} is missing; run the same `featstore extract` command again")
        if self._sealed is not None:
            record = self._sealed.get(f"{name}/zarr.json")
            if record is None or record["crc32"] != file_checksum(data):
                raise CorruptDataError(f"{path} is not the document that the manifest records; restore it")
        return parse_json(data, path)

    def has(self, name: str) -> bool:
        """Whether a group or array is there; in a sealed store what the manifest does not record is not.

        Args:
            name: Path within the store.
        """
        if self._sealed is not None:
            return f"{name}/zarr.json" in self._sealed
        return self.files.read(f"{name}/zarr.json") is not None

    def has_rows(self, model: str, layer: int) -> bool:
        """Whether the states of a layer are here, and not their moments alone.

        Args:
            model: Model name.
            layer: A layer the store lists.
        """
        base = f"models/{model}"
        return self.has(f"{base}/resid/{layer}") or (layer == 0 and self.has(f"{base}/embedding/state"))

    def entry(self, unit: str) -> dict[str, Any] | None:
        """The manifest entry of a unit, None where there is none.

        Args:
            unit: Name of the unit.

        Raises:
            CorruptDataError: It is damaged or points outside the store.
        """
        name = f"{MANIFEST}/{unit}.json"
        data = self.files.read(name)
        return None if data is None else parse_entry(data, f"{self.path}/{name}", unit)

    def vector(self, name: str) -> NDArray[Any]:
        """A small array, whole.

        Args:
            name: Path within the store.

        Raises:
            CorruptDataError: Missing or damaged.
        """
        return vector_of(lambda file: self.files.read(f"{name}/{file}"), self.document(name), f"{self.path}/{name}")

    def packed(self, name: str, *, half: bool) -> NDArray[np.uint32]:
        """A packed array of sums, whole.

        Args:
            name: Path within the store.
            half: Whether it is symmetric, and the tiles below its diagonal left out.

        Returns:
            uint32 ``(dx, dy)``, as :func:`featstore.store.format.packed.sums_of` takes it.

        Raises:
            CorruptDataError: Missing or damaged.
        """
        array, file = PackedArray.parse(self.document(name), f"{self.path}/{name}"), PackedArray.file(0)
        return unpack(self.files.read(f"{name}/{file}"), array, f"{self.path}/{name}/{file}", half)

    def _column(self, name: str) -> StoredColumn:
        """A small array of one dimension, of which what is asked for is read."""
        return column_of(lambda file: self.files.read(f"{name}/{file}"), self.document(name), f"{self.path}/{name}")

    def layer(self, model: str, layer: int) -> int:
        """Return a layer if the store holds it.

        Args:
            model: Model name.
            layer: Layer number.

        Raises:
            LayerRangeError: It does not.
        """
        held = self.model(model).layers
        # 2.0 equals 2 and would name another directory.
        number = operator.index(layer) if hasattr(layer, "__index__") else None
        if number not in held:
            named = repr(layer) if number is None else number
            raise LayerRangeError(
                f"layer {named} of {model!r} is not in {self.path}; it holds {', '.join(map(str, held))}"
            )
        return number

    def rows(self, model: str, layer: int) -> RowReader | TableReader:
        """The states of one layer.

        Args:
            model: Model name.
            layer: A stored layer.

        Raises:
            LayerRangeError: The store does not hold it.
            StoreStateError: No such model, or a store of moments alone.
            CorruptDataError: Its metadata is damaged.
        """
        key = (model, self.layer(model, layer))
        if key not in self._readers:
            self._readers[key] = self._open_rows(*key)
        return self._readers[key]

    def _open_rows(self, model: str, layer: int) -> RowReader | TableReader:
        if self.model(model).attributes.get("states") == "moments" and not self.has_rows(model, layer):
            raise StoreStateError(
                f"{self.path} holds no rows of layer {layer} of {model!r}, only moments; extract again without "
                "--moments-only"
            )
        base = f"models/{model}"
        columns = f"{base}/column_scale/{layer}"
        scale = self.vector(columns) if self.has(columns) else None
        table = f"{base}/embedding"
        if layer == 0 and self.has(f"{table}/id"):
            name, scales = f"{table}/state", f"{table}/row_scale"
        else:
            name, scales = f"{base}/resid/{layer}", f"{base}/row_scale/{layer}"
        row_scales = (scales, self.document(scales)) if self.has(scales) else None
        rows = self.files.rows((name, self.document(name)), row_scales, scale)
        return TableReader(rows, self._table_index(model)) if name.startswith(table) else rows

    def _table_index(self, model: str) -> NDArray[np.int64]:
        """Where in the layer 0 table each token's row is."""
        ids = self.vector(f"models/{model}/embedding/id")
        tokens = self.columns(model, "id")["id"]
        place = np.minimum(np.searchsorted(ids, tokens), max(len(ids) - 1, 0))
        if not len(ids) or not np.array_equal(ids[place], tokens):
            raise CorruptDataError(f"the layer 0 table of {model} in {self.path} lacks tokens; run `featstore verify`")
        return place

    def norms(self, model: str, layer: int) -> NDArray[np.float32]:
        """Euclidean norm of every stored row.

        Args:
            model: Model name.
            layer: A stored layer.

        Returns:
            float32 ``(n,)``.
        """
        if self.layer(model, layer) == 0 and self.has(f"models/{model}/embedding/id"):
            norms: NDArray[np.float32] = self.vector(f"models/{model}/embedding/norm")[self._table_index(model)]
            return norms
        name = f"models/{model}/norm/{layer}"
        column: Any = self._column(name) if self.model(model).rows >= LARGE else self.vector(name)
        return column  # type: ignore[no-any-return]

    def origin(self, model: str, layer: int) -> NDArray[np.float64]:
        """The mean of the pilot's ordinary states, a fixed origin for accumulating moments without cancellation.

        Args:
            model: Model name.
            layer: A stored layer.

        Returns:
            float64 ``(width,)``.
        """
        return self.vector(f"models/{model}/origin/{self.layer(model, layer)}").astype(np.float64)

    def median_norms(self, model: str) -> dict[str, float]:
        """The pilot's median norm at every stored layer, against which sinks are told.

        Args:
            model: Model name.

        Returns:
            Median by layer, the layer as text.
        """
        layers = self.model(model).layers
        return {str(k): float(self.vector(f"models/{model}/median_norm/{k}")[0]) for k in layers}

    def tokens(self, model: str) -> Tokens:
        """A model's token table.

        Args:
            model: Model name.
        """
        self.model(model)
        if model not in self._tokens:
            table = Tokens(**self.columns(model, *TOKEN_COLUMNS, "sink"))
            self._check_tokens(model, table)
            self._tokens[model] = table
        return self._tokens[model]

    def _check_tokens(self, model: str, table: Tokens) -> None:
        """Refuse a table that contradicts the text, and a mask that was told by other figures than are recorded."""
        held = self.model(model)
        self._refuse(token_problems(model, held.rows, table, self.corpus, held.attributes.get("vocabulary")))
        for layer in held.layers:
            pilot = (self.vector(f"models/{model}/{name}/{layer}") for name in ("median_norm", "origin"))
            self._refuse(pilot_problems(model, layer, *pilot))
        basis = (self.entry(f"models/{model}/sinks") or {}).get("basis") if self.complete else None
        expected = f"{held.attributes.get('tokens_sha256')} {list(held.layers)} {float(self.root.mask.sink_threshold)}"
        if basis is not None and not basis.startswith(expected):
            self._refuse([f"{model}: the sink mask was made by another threshold, of other layers or tokens"])

    def _refuse(self, problems: Iterable[str]) -> None:
        """Raise the first problem."""
        for line in problems:
            raise ContradictionError(self.path, line)

    def columns(self, model: str, *names: str) -> dict[str, NDArray[Any]]:
        """Some columns of a model's token table; an unfinished store lacks ``sink``.

        Args:
            model: Model name.
            names: Columns.
        """
        base, rows = f"models/{model}/tokens", self.model(model).rows
        # Stores of version 1 do not say which ends are exact (to them all were), nor know of roles.
        absent = {"exact": (1, np.bool_), "role": (0, np.uint8)}
        read: Callable[[str], Any] = self._column if rows >= LARGE else self.vector
        return {
            name: read(f"{base}/{name}")
            if name not in absent or self.has(f"{base}/{name}")
            else np.full(rows, *absent[name])
            for name in names
        }

    @cached_property
    def _tokens(self) -> dict[str, Tokens]:
        return {}

    @cached_property
    def corpus(self) -> StoredCorpus:
        """Documents, windows and text."""
        needs = {f"message_{name}": "corpus/message/document" for name in ("document", "role", "start", "end")}
        needs |= {
            f"{name}{part}": "corpus/message/rest_start"
            for name in ("message_rest", "document_tools")
            for part in ("", "_start")
        }
        vectors: dict[str, Any] = {
            # Of a text that is long nobody needs more at a time than a window.
            name: (self._column if name == "text" and self.root.corpus.bytes >= LARGE_TEXT else self.vector)(
                f"corpus/{name.replace('_', '/', 1)}"
            )
            for name in (member.name for member in fields(StoredCorpus))
            # Stores of version 1 know of no messages, and what is beside a text only conversations have.
            if name not in needs or self.has(needs[name])
        }
        found = StoredCorpus(**vectors)
        counts = self.root.split.documents
        self._refuse(corpus_problems(found, (counts.train, counts.val, counts.test) if self.complete else None))
        return found

    def pairs(self, source: str, target: str, policy: str = "end") -> Pairs:
        """The pairs of two models, or of a model with itself (every ordinary token with itself: the ceiling).

        Args:
            source: Model name.
            target: Model name.
            policy: ``end``, ``word`` or ``byte``.

        Raises:
            PairingError: The store has no index for these models and policy.
        """
        check_policy(policy)
        tokens_a, tokens_b = self.tokens(source), self.tokens(target)
        if max(self.model(name).rows for name in (source, target)) >= LARGE:
            return self._large_pairs(source, target, policy)
        if source == target:
            row_a = row_b = np.flatnonzero(~tokens_a.special).astype(np.int64)
        else:
            first, second = sorted((source, target), key=self.models.index)
            row_a, row_b = self.pair_index(first, second, policy)
            what = f"pairs of {first} and {second}" + f" ({policy})" * (policy != "end")
            self._refuse(pair_problems(what, row_a, row_b, self.tokens(first), self.tokens(second)))
            if source != first:
                row_a, row_b = row_b, row_a
        window = tokens_a.window[row_a]
        document = self.corpus.window_unit[window]
        ordinary = [max(int((~t.special).sum()), 1) for t in (tokens_a, tokens_b)]
        coverage = (len(row_a) / ordinary[0], len(row_b) / ordinary[1])
        if source != target:
            self._check_pairs((source, target), policy, coverage)
        return Pairs(
            source,
            target,
            row_a,
            row_b,
            self.corpus.document_split[document],
            document,
            tokens_a.sink[row_a] | tokens_b.sink[row_b],
            # The same in both: they have read the same bytes.
            tokens_a.role[row_a],
            tokens_a.id[row_a],
            coverage,
        )

    def _large_pairs(self, source: str, target: str, policy: str) -> Pairs:
        """What :meth:`pairs` gives, in columns that are made when they are looked at."""
        tables = self.tokens(source), self.tokens(target)
        counts = [self.model(name).rows for name in (source, target)]
        ordinary = [
            max(sum(int((~t.special[at]).sum()) for at in pieces(n)), 1) for t, n in zip(tables, counts, strict=True)
        ]
        sinks = RowSet.empty(counts[0])
        if source == target:
            bits = RowSet.empty(counts[0])
            for at in pieces(counts[0]):
                set_bits(bits, np.flatnonzero(~tables[0].special[at]) + at.start)
                set_bits(sinks, np.flatnonzero(tables[0].sink[at]) + at.start)
            rows = (RowSet(bits), RowSet(bits))
        else:
            first, second = sorted((source, target), key=self.models.index)
            stored: dict[str, Any] = dict(zip((first, second), self.pair_columns(first, second, policy), strict=True))
            what = f"pairs of {first} and {second}" + f" ({policy})" * (policy != "end")
            self._refuse(pair_problems(what, stored[first], stored[second], self.tokens(first), self.tokens(second)))
            rows = RowSet.of(counts[0], stored[source]), RowSet.of(counts[1], stored[target])
            for at in pieces(len(stored[source])):
                here = stored[source][at]
                set_bits(sinks, here[tables[0].sink[here] | tables[1].sink[stored[target][at]]])
        unit, split, of = self.corpus.window_unit, self.corpus.document_split, tables[0]
        columns: dict[str, Any] = {
            "split": OfRows(rows[0], lambda r: split[unit[of.window[r]]], np.uint8),
            "document": OfRows(rows[0], lambda r: unit[of.window[r]], np.int32),
            "sink": OfRows(rows[0], lambda r: get_bits(sinks, r), bool),
            "role": OfRows(rows[0], lambda r: of.role[r], np.uint8),
            "token": OfRows(rows[0], lambda r: of.id[r], np.int32),
        }
        coverage = (len(rows[0]) / ordinary[0], len(rows[1]) / ordinary[1])
        if source != target:
            self._check_pairs((source, target), policy, coverage)
        sides: dict[str, Any] = {"row_source": rows[0], "row_target": rows[1]}
        return Pairs(source=source, target=target, coverage=coverage, **sides, **columns)

    def _check_pairs(self, names: tuple[str, str], policy: str, coverage: tuple[float, float]) -> None:
        """Refuse an index of which something else is recorded than what it holds."""
        if not self.complete:
            return
        first, second = sorted(names, key=self.models.index)
        unit = f"pairs/{first}__{second}/{policy}"
        what = f"pairs of {first} and {second}" + f" ({policy})" * (policy != "end")
        recorded = parse(PairAttributes, own_attributes(self.document(unit)), f"{self.path}/{unit}/zarr.json")
        if not np.allclose([recorded.coverage.get(name, -1) for name in names], coverage):
            self._refuse([f"{what}: the recorded coverage is not that of the tokens"])
        basis = (self.entry(unit) or {}).get("basis")
        if basis is not None and basis != " ".join(
            str(self.model(name).attributes.get("tokens_sha256")) for name in (first, second)
        ):
            self._refuse([f"{what}: the index was made of other tokens"])

    def pair_index(self, first: str, second: str, policy: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The pair index of two models: rows of the one and of the other, in document order.

        Args:
            first: Model earlier in store order.
            second: The other.
            policy: ``end``, ``word`` or ``byte``.

        Raises:
            PairingError: The store has no index for these models and policy.
        """
        base = self._pair_base(first, second, policy)
        return self.vector(f"{base}/row_a"), self.vector(f"{base}/row_b")

    def pair_columns(self, first: str, second: str, policy: str) -> tuple[StoredColumn, StoredColumn]:
        """What :meth:`pair_index` gives, of which what is asked for is read.

        Args:
            first: Model earlier in store order.
            second: The other.
            policy: ``end``, ``word`` or ``byte``.

        Raises:
            PairingError: The store has no index for these models and policy.
        """
        base = self._pair_base(first, second, policy)
        return self._column(f"{base}/row_a"), self._column(f"{base}/row_b")

    def _pair_base(self, first: str, second: str, policy: str) -> str:
        base = f"pairs/{first}__{second}/{policy}"
        if not self.has(f"{base}/row_a"):
            raise PairingError(
                f"{self.path} has no {policy!r} pairs of {first} and {second}; "
                f"make them with `featstore pair {self.path} --policy {policy}`"
            )
        return base

    @cached_property
    def manifest(self) -> Mapping[str, Mapping[str, Any]]:
        """Every committed file with its size and checksum, by path.

        Of a complete store they are those that were sealed, by the sorted index where there is one and by the entries
        otherwise; they are all files that its arrays announce, of the sizes that are on disk. Checksums of files are
        compared where files are read, and by `featstore verify`.

        Raises:
            CorruptDataError: An entry is damaged, points outside the store, or contradicts documents or disk.
        """
        index = self.index
        files = self.recorded_files if index is None else index.without(f"{MANIFEST}/")
        if self._units is not None:
            if index is None:
                self._refuse(entry_problems(self._units["units"], self.entries))
            else:
                self._refuse(
                    sealed_problems(self._units["units"], self._units["files"], index, self.files.manifest_sizes())
                )
            self._refuse(announced_problems(self.arrays, files))
            self._refuse(size_problems(files, self.files.size))
        return files

    @property
    def sealed_index(self) -> str | None:
        """CRC-32 of the sorted index that the store was sealed with; None where there was none."""
        return None if self._units is None else self._units.get("index")

    @cached_property
    def index(self) -> FileIndex | None:
        """The sorted index of a complete store's files, the entries of its manifest among them.

        None where there is none, as in stores from before, or another than was sealed, as after a crash between two
        writes of a seal: then the entries are read.

        Raises:
            CorruptDataError: It is the one that was sealed, and is no index.
        """
        checksum = self.sealed_index
        data = None if checksum is None else self.files.read(INDEX)
        if data is None or file_checksum(data) != checksum:
            return None
        return FileIndex.parse(data, f"{self.path}/{INDEX}")

    @cached_property
    def entries(self) -> dict[str, bytes]:
        """The manifest's documents as they lie there, by unit."""
        return self.files.manifest()

    @cached_property
    def recorded_files(self) -> dict[str, dict[str, Any]]:
        """What :attr:`manifest` holds, compared with nothing yet.

        Raises:
            CorruptDataError: An entry is damaged or points outside the store.
        """
        files: dict[str, dict[str, Any]] = {}
        for unit, data in self.entries.items():
            files.update(parse_entry(data, f"{self.path}/{MANIFEST}/{unit}.json", unit)["files"])
        return files

    @property
    def sealed_units(self) -> dict[str, str]:
        """Checksum of every entry of the manifest when the store was sealed, by unit; none of an unfinished store."""
        return {} if self._units is None else self._units["units"]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the manifest's text, tokens and states: stores with equal fingerprints hold equal data."""
        return self.fingerprint_of({name: self.model(name).layers for name in self.models})

    def rebuilt_since(self, fingerprint: str) -> bool | None:
        """Whether a rebuild has changed anything that is read since the store had a fingerprint.

        Args:
            fingerprint: As :attr:`fingerprint` was at some time.

        Returns:
            None where no rebuild began from that fingerprint, or the store has got other data since.
        """
        past = [one for one in self.attributes.get("rebuilt", ()) if isinstance(one, dict)]
        begun = [number for number, one in enumerate(past) if one.get("fingerprint_before") == fingerprint]
        if not begun:
            return None
        if any(bool(one.get("changed", True)) for one in past[begun[-1] :]):
            return True
        return False if past[-1].get("fingerprint_after") == self.fingerprint else None

    def fingerprint_of(self, layers: Mapping[str, Sequence[int]]) -> str:
        """SHA-256 over the text, and the tokens and states of some layers.

        Metadata documents are left out, since they also say where the text lay; so is what follows from the rest (sink
        masks, pair indexes, moments), and so are other models and layers: adding one does not make a run foreign.

        Args:
            layers: Layers by model.
        """
        prefixes = ["corpus/"]
        for name, chosen in layers.items():
            base = f"models/{name}"
            prefixes += [f"{base}/tokens/{column}/" for column in TOKEN_COLUMNS]
            prefixes += [f"{base}/{kind}/{k}/" for k in chosen for kind in ("resid", "norm")] + [
                f"{base}/embedding/"
            ] * (0 in chosen)
        arrays = {
            name: dict(record)
            for name, record in self.manifest.items()
            if name.startswith(tuple(prefixes)) and not name.endswith("zarr.json")
        }
        return digest(arrays)

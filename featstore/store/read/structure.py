"""Whether the metadata documents of a store describe one store: every array there, of the right type and shape.

All is told from documents alone, in time linear in their number and before an array is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import Any

from featstore.errors import CorruptDataError
from featstore.runtime.schema import parse
from featstore.store.format.attributes import ModelAttributes, PairAttributes, RootAttributes
from featstore.store.format.documents import data_types, dimension_names
from featstore.store.format.elements import BY_DATA_TYPE
from featstore.store.format.packed import PackedArray
from featstore.store.format.plain import Plain
from featstore.store.format.version import PACKED
from featstore.store.read.geometry import Geometry
from featstore.store.read.pairs import POLICIES
from featstore.store.read.records import TOKEN_COLUMNS

#: An array on disk: rows in shards, packed sums, or plain chunks.
Array = Plain | Geometry | PackedArray
#: By path.
Arrays = Mapping[str, Array]

#: Columns that stores from before lack.
_LATER_COLUMNS = ("exact", "role")
_SHARDED = tuple(BY_DATA_TYPE)


def check_structure(where: str, root: RootAttributes, documents: Mapping[str, dict[str, Any]]) -> Arrays:
    """Refuse documents that do not describe one complete store.

    Args:
        where: The store, named in errors.
        root: The root's attributes.
        documents: Every other document, by path.

    Returns:
        The arrays that this version knows.

    Raises:
        CorruptDataError: Something is missing or contradicts the rest; the message names the first such thing.
    """
    arrays: dict[str, Array] = {}
    for name, document in documents.items():
        if _node(document, f"{where}/{name}") == "array" and (types := data_types(name)):
            kind = Geometry if types == _SHARDED else PackedArray if name.endswith(f"/{PACKED}") else Plain
            arrays[name] = kind.parse(document, f"{where}/{name}")
            names = document.get("dimension_names")
            if names is not None and tuple(names) != dimension_names(name, len(document["shape"])):
                raise _damage(where, name, f"its dimensions are called {', '.join(map(repr, names))[:80]}")
    wrong = next(_contradictions(where, root, documents, arrays), None)
    if wrong is not None:
        raise _damage(where, *wrong)
    return arrays


def _damage(where: str, name: str, what: str) -> CorruptDataError:
    return CorruptDataError(f"{where}/{name}/zarr.json: {what}; restore the store or extract again")


def _node(document: dict[str, Any], where: str) -> str:
    kind = document.get("node_type")
    sound = document.get("zarr_format") == 3 and kind in ("array", "group")
    if not sound or not isinstance(document.get("attributes", {}), dict):
        raise CorruptDataError(f"{where}/zarr.json is no Zarr group or array of format 3; restore it or extract again")
    return str(kind)


def own_attributes(document: dict[str, Any]) -> Any:
    """A group's ``featstore`` attribute, None where it has none.

    Args:
        document: The group's ``zarr.json``.
    """
    attributes = document.get("attributes")
    return attributes.get("featstore") if isinstance(attributes, dict) else None


#: An array's path and what is wrong with it.
_Wrong = tuple[str, str]


def _contradictions(
    where: str, root: RootAttributes, documents: Mapping[str, dict[str, Any]], arrays: Arrays
) -> Iterator[_Wrong]:
    def need(name: str, *shape: int) -> Iterator[_Wrong]:
        if name not in arrays:
            yield name, "there is no such array"
        elif arrays[name].shape != shape:
            yield name, f"shape {list(arrays[name].shape)}, expected {list(shape)}"

    def group(name: str, kind: type[Any]) -> Any:
        if name not in documents:
            raise _damage(where, name, "there is no such group")
        return parse(kind, own_attributes(documents[name]), f"{where}/{name}/zarr.json")

    models = {name: group(f"models/{name}", ModelAttributes) for name in root.models}
    above = {name.rpartition("/")[0] for name in documents} - {""}
    for name in sorted(above - documents.keys()):
        yield name, "there is no such group"
    yield from _of_corpus(root, arrays, need)
    for name, model in models.items():
        yield from _of_model(name, model, arrays, need)
    for first, second in combinations(models, 2):
        for policy in POLICIES:
            base = f"pairs/{first}__{second}/{policy}"
            if policy != POLICIES[0] and f"{base}/row_a" not in arrays and base not in documents:
                continue
            recorded: PairAttributes = group(base, PairAttributes)
            if recorded.policy != policy or set(recorded.coverage) != {first, second}:
                yield base, f"it says to hold the {recorded.policy} pairs of {' and '.join(recorded.coverage)}"
            yield from need(f"{base}/row_a", recorded.pairs)
            yield from need(f"{base}/row_b", recorded.pairs)
    yield from _of_moments(models, arrays)


_Need = Callable[..., Iterator[_Wrong]]


def _of_corpus(root: RootAttributes, arrays: Arrays, need: _Need) -> Iterator[_Wrong]:
    text = root.corpus
    yield from need("corpus/text", text.bytes)
    yield from need("corpus/document/start", text.documents + 1)
    yield from need("corpus/document/id", text.documents, 32)
    yield from need("corpus/document/split", text.documents)
    for column in ("document", "start", "end"):
        yield from need(f"corpus/window/{column}", text.windows)
    messages = arrays.get("corpus/message/document")
    if messages is None:
        return  # version 1 knows of none
    for column in ("document", "role", "start", "end"):
        yield from need(f"corpus/message/{column}", messages.shape[0])
    if "corpus/message/rest_start" in arrays:
        yield from need("corpus/message/rest_start", messages.shape[0] + 1)
        yield from need("corpus/document/tools_start", text.documents + 1)
        for name in ("corpus/message/rest", "corpus/document/tools"):
            yield from need(name, *(arrays[name].shape[:1] if name in arrays else (0,)))
    elif text.form == "messages":
        yield "corpus/message/rest_start", "the documents are messages, and there is no such array"


def _of_model(name: str, model: ModelAttributes, arrays: Arrays, need: _Need) -> Iterator[_Wrong]:
    base = f"models/{name}"
    if any(layer > model.depth for layer in model.layers):
        yield base, f"layers {list(model.layers)} do not fit a depth of {model.depth}"
    for column in (*TOKEN_COLUMNS, "sink"):
        if column not in _LATER_COLUMNS or f"{base}/tokens/{column}" in arrays:
            yield from need(f"{base}/tokens/{column}", model.rows)
    for layer in model.layers:
        table = f"{base}/embedding"
        tabled = layer == 0 and f"{table}/id" in arrays
        rows, scales = (f"{table}/state", f"{table}/row_scale") if tabled else (
            f"{base}/resid/{layer}", f"{base}/row_scale/{layer}"
        )  # fmt: skip
        count = arrays[f"{table}/id"].shape[0] if tabled else model.rows
        yield from need(f"{table}/norm" if tabled else f"{base}/norm/{layer}", count)
        yield from need(f"{base}/origin/{layer}", model.width)
        yield from need(f"{base}/median_norm/{layer}", 1)
        if rows not in arrays and model.states == "moments":
            continue
        yield from need(rows, count, model.width)
        states = arrays.get(rows)
        if isinstance(states, Geometry):
            yield from _of_states(model, rows, states, tabled)
            if states.form.row_scaled:
                yield from need(scales, count)
                held = arrays.get(scales)
                if isinstance(held, Plain) and held.chunk != states.shard_rows:
                    yield scales, f"chunks of {held.chunk}, expected those of its shards, {states.shard_rows}"
            if states.form.column_scaled:
                yield from need(f"{base}/column_scale/{layer}", model.width)


def _of_states(model: ModelAttributes, rows: str, states: Geometry, tabled: bool) -> Iterator[_Wrong]:
    recorded = (model.format, model.layout, None if tabled else model.shard_rows)
    actual = (states.form.name, states.layout.name, None if tabled else states.shard_rows)
    for says, has, what in zip(recorded, actual, ("format", "layout", "shards of rows"), strict=True):
        if says is not None and says != has:
            yield rows, f"{what} {has}, the model's attributes say {says}"


def _of_moments(models: Mapping[str, ModelAttributes], arrays: Arrays) -> Iterator[_Wrong]:
    """Blocks have the widths of their layers; blocks of other layers, and other units, nobody reads."""
    width = {f"{name}.{layer}": model.width for name, model in models.items() for layer in model.layers}
    sites = {f"{x}__{y}": (width[x], width[y]) for x in width for y in width}
    for name, array in arrays.items():
        if not name.startswith("moments/"):
            continue
        block, _, part = name.rpartition("/")
        if (widths := sites.get(block.rpartition("/")[2])) is None:
            continue
        x, y = widths
        # Sums are packed, with a third row of roots beside, or float64 as in stores from before.
        product = PACKED if f"{block}/{PACKED}" in arrays else "product"
        rows = 3 if product == PACKED else 2
        expected = {product: (x, y), "x": (rows, x), "y": (rows, y), "totals": (4,)}.get(part)
        if expected is not None and array.shape != expected:
            yield name, f"shape {list(array.shape)}, expected {list(expected)}"
        lost = [each for each in (product, "x", "y", "totals") if f"{block}/{each}" not in arrays]
        if lost:
            yield f"{block}/{lost[0]}", "there is no such array"

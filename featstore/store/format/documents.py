"""The ``zarr.json`` documents that describe what is on disk to every Zarr v3 reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from featstore.store.format.elements import BY_DATA_TYPE, Format
from featstore.store.format.shards import BLOSC_BLOCK, Layout

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC = {"name": "crc32c"}

#: Data types that the Zarr v3 core specification has and a store uses: every reader knows them.
CORE_TYPES = frozenset(
    ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "float16", "float32", "float64")
)

#: Dimension names by the last parts of an array's path, the longest that fits. No name has two lengths in one group or
#: in a group and one above it: xarray takes a group, or the whole tree, for datasets.
_DIMENSIONS = {
    "corpus/text": ("byte",),
    "document/start": ("document_edge",),
    "document/tools": ("tools_byte",),
    "document/tools_start": ("document_edge",),
    "document/id": ("document", "digest_byte"),
    "document/*": ("document",),
    "window/*": ("window",),
    "message/rest": ("rest_byte",),
    "message/rest_start": ("message_edge",),
    "message/*": ("message",),
    "tokens/*": ("row",),
    "resid/*": ("row", "width"),
    "norm/*": ("row",),
    "row_scale/*": ("row",),
    "median_norm/*": ("layer",),
    "origin/*": ("width",),
    "column_scale/*": ("width",),
    "embedding/state": ("entry", "width"),
    "embedding/*": ("entry",),
    "*/row_a": ("pair",),
    "*/row_b": ("pair",),
    "*/product": ("width_x", "width_y"),
    "*/correlation": ("width_x", "width_y"),
    "*/x": ("sum", "width_x"),
    "*/y": ("sum", "width_y"),
    "*/totals": ("total",),
}

#: Data types by the last parts of a path, as dimension names are looked up. Readers take no other: bytes of one type
#: mean numbers in every other type of the same size, too.
_TYPES = {
    "corpus/text": ("uint8",),
    "document/start": ("int64",),
    "document/id": ("uint8",),
    "document/split": ("uint8",),
    "document/tools": ("uint8",),
    "document/tools_start": ("int64",),
    "window/document": ("int32",),
    "window/*": ("int64",),
    "message/document": ("int32",),
    "message/role": ("uint8",),
    "message/rest": ("uint8",),
    "message/*": ("int64",),
    "tokens/role": ("uint8",),
    "tokens/special": ("bool",),
    "tokens/exact": ("bool",),
    "tokens/sink": ("bool",),
    "tokens/*": ("int32",),
    "resid/*": tuple(BY_DATA_TYPE),
    "embedding/state": tuple(BY_DATA_TYPE),
    "embedding/id": ("int32",),
    "embedding/*": ("float32",),
    "norm/*": ("float32",),
    "row_scale/*": ("float32",),
    "column_scale/*": ("float32",),
    "median_norm/*": ("float64",),
    "origin/*": ("float32", "float64"),
    "*/row_a": ("int64",),
    "*/row_b": ("int64",),
    "*/product": ("float64",),
    "*/correlation": ("uint32",),
    "*/x": ("float64",),
    "*/y": ("float64",),
    "*/totals": ("float64",),
}


def _zarr_array(shape: tuple[int, ...], data_type: str, grid: tuple[int, ...], codecs: list[Any]) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(grid)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": False if data_type == "bool" else 0.0 if "float" in data_type else 0,
        "codecs": codecs,
        "attributes": {},
    }


def rows_document(rows: int, width: int, shard_rows: int, form: Format, layout: Layout) -> dict[str, Any]:
    """The ``zarr.json`` of a sharded ``(rows, width)`` array.

    Args:
        rows: Rows that exist.
        width: Hidden width.
        shard_rows: Rows of a shard.
        form: Element format.
        layout: Inner chunking and codec.
    """
    inner = _blosc_codecs(form.storage.itemsize) if layout.compressed else [_BYTES, _CRC]
    sharding = _sharding((layout.chunk_rows, width), inner)
    return _zarr_array((rows, width), form.data_type, (shard_rows, width), [sharding])


def tiled_document(
    shape: tuple[int, int], data_type: str, shard: tuple[int, int], tile: tuple[int, int]
) -> dict[str, Any]:
    """The ``zarr.json`` of an array of compressed tiles, of which some may be missing.

    Args:
        shape: Of the array.
        data_type: Name of an integer type of the core specification.
        shard: Rows and columns of a file.
        tile: Rows and columns of a tile.
    """
    inner = _blosc_codecs(int("".join(filter(str.isdigit, data_type))) // 8)
    return _zarr_array(shape, data_type, shard, [_sharding(tile, inner)])


def _blosc_codecs(typesize: int) -> list[Any]:
    blosc = {
        "name": "blosc",
        "configuration": {
            "cname": "zstd",
            "clevel": 1,
            "shuffle": "shuffle",
            "typesize": typesize,
            "blocksize": BLOSC_BLOCK,
        },
    }
    return [_BYTES, blosc, _CRC]


def _sharding(chunk: tuple[int, int], inner: list[Any]) -> dict[str, Any]:
    return {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": list(chunk),
            "codecs": inner,
            "index_codecs": [_BYTES, _CRC],
            "index_location": "end",
        },
    }


def vector_document(array: NDArray[Any], chunk_rows: int) -> dict[str, Any]:
    """The ``zarr.json`` of a small array stored as plain checksummed chunks along its first axis.

    Args:
        array: Any boolean, integer or float array.
        chunk_rows: Chunk length along the first axis.
    """
    return plain_document(array.shape, array.dtype.name, chunk_rows)


def dimension_names(path: str, axes: int) -> tuple[str, ...]:
    """Names of an array's dimensions, for readers that need some, such as xarray.

    Args:
        path: The array's path within the store.
        axes: Number of its dimensions.

    Returns:
        As many names; for an array that this module does not know, names after the array itself.
    """
    for pattern in _patterns(path):
        names = _DIMENSIONS.get(pattern, ())
        if len(names) == axes:
            return names
    return tuple(f"{path.rpartition('/')[2]}_{axis}" for axis in range(axes))


def _patterns(path: str) -> tuple[str, str, str]:
    """What an array may be known as, the longest first."""
    parent, name = path.split("/")[-2:] if "/" in path else ("", path)
    return f"{parent}/{name}", f"{parent}/*", f"*/{name}"


def data_types(path: str) -> tuple[str, ...]:
    """Data types that an array may have; none for one that this module does not know.

    Args:
        path: The array's path within the store, or one that ends so.
    """
    return next((_TYPES[pattern] for pattern in _patterns(path) if pattern in _TYPES), ())


def plain_document(shape: tuple[int, ...], data_type: str, chunk_rows: int) -> dict[str, Any]:
    """The ``zarr.json`` of an array stored as plain checksummed chunks along its first axis.

    Args:
        shape: Of the array.
        data_type: Name of a type of the core specification.
        chunk_rows: Chunk length along the first axis.
    """
    # With a byte order even for single bytes, where it means nothing: the zarrita package of PyPI asks for one.
    return _zarr_array(shape, data_type, (chunk_rows, *shape[1:]), [_BYTES, _CRC])


def difference(document: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """The first member that keeps an array's document from meaning what it should; None for none.

    Args:
        document: As found.
        expected: As this version writes it. Version 1 wrote ``bytes`` without a byte order for single bytes.
    """
    for key, value in expected.items():
        if key == "attributes":
            if not isinstance(document.get(key, {}), dict):
                return key
        elif document.get(key) != value and not (key == "codecs" and _of_single_bytes(document) == value):
            return key
    free = {"dimension_names", "storage_transformers"}
    names = document.get("dimension_names")
    if names is not None and not (isinstance(names, list) and len(names) == len(expected["shape"])):
        return "dimension_names"
    if names is not None and not all(isinstance(name, str) for name in names):
        return "dimension_names"
    if document.get("storage_transformers", []) != []:
        return "storage_transformers"
    return next((key for key in document if key not in expected and key not in free), None)


def _of_single_bytes(document: Mapping[str, Any]) -> Any:
    codecs = document.get("codecs")
    if document.get("data_type") in ("bool", "uint8", "int8") and isinstance(codecs, list):
        return [_BYTES if codec == {"name": "bytes"} else codec for codec in codecs]
    return None


def named(path: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """An array's document with the names of its dimensions; a group's as it is.

    Args:
        path: The path within the store.
        document: Its ``zarr.json``.
    """
    if document.get("node_type") != "array":
        return dict(document)
    return {**document, "dimension_names": list(dimension_names(path, len(document["shape"])))}


def upgraded(document: Mapping[str, Any]) -> dict[str, Any]:
    """An array's document of format version 1 as this version writes it, but for the names of its dimensions.

    Args:
        document: Its ``zarr.json``.
    """
    codecs = [_BYTES if codec == {"name": "bytes"} else codec for codec in document["codecs"]]
    return {**document, "codecs": codecs}


def consolidated(documents: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Consolidated metadata, as the root's document carries it.

    A reader that does not know one data type in it refuses the whole store, so arrays of other types than
    :data:`CORE_TYPES` are left out; their own documents stay where they are. A group says that it lists no more than
    this, as in what zarr-python writes: of one that lists nothing zarr-python would look for members in the store.

    Args:
        documents: Documents of all groups and arrays below the root, by path.
    """
    held = {}
    for name, document in documents.items():
        if document["node_type"] == "group":
            held[name] = document | {"consolidated_metadata": _inline({})}
        elif document["data_type"] in CORE_TYPES:
            held[name] = document
    return _inline(held)


def _inline(held: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "inline", "must_understand": False, "metadata": held}


def group_document(attributes: dict[str, Any]) -> dict[str, Any]:
    """The ``zarr.json`` of a group.

    Args:
        attributes: JSON attributes.
    """
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}

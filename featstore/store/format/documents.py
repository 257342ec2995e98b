"""The ``zarr.json`` documents that describe what is on disk to every Zarr v3 reader."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from featstore.store.format.elements import Format
from featstore.store.format.shards import BLOSC_BLOCK, Layout

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC = {"name": "crc32c"}


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
    blosc = {
        "name": "blosc",
        "configuration": {
            "cname": "zstd",
            "clevel": 1,
            "shuffle": "shuffle",
            "typesize": form.storage.itemsize,
            "blocksize": BLOSC_BLOCK,
        },
    }
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [layout.chunk_rows, width],
            "codecs": [_BYTES, blosc, _CRC] if layout.compressed else [_BYTES, _CRC],
            "index_codecs": [_BYTES, _CRC],
            "index_location": "end",
        },
    }
    return _zarr_array((rows, width), form.data_type, (shard_rows, width), [sharding])


def vector_document(array: NDArray[Any], chunk_rows: int) -> dict[str, Any]:
    """The ``zarr.json`` of a small array stored as plain checksummed chunks along its first axis.

    Args:
        array: Any boolean, integer or float array.
        chunk_rows: Chunk length along the first axis.
    """
    single = array.dtype.itemsize == 1
    first = {"name": "bytes"} if single else _BYTES
    return _zarr_array(array.shape, array.dtype.name, (chunk_rows, *array.shape[1:]), [first, _CRC])


def group_document(attributes: dict[str, Any]) -> dict[str, Any]:
    """The ``zarr.json`` of a group.

    Args:
        attributes: JSON attributes.
    """
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}

"""What the ``zarr.json`` of a rows array says: its size, element format and layout, checked before it is believed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from featstore.store.format import documents
from featstore.store.format.elements import BY_DATA_TYPE, Format
from featstore.store.format.plain import chunk_shape, damaged, sizes
from featstore.store.format.shards import CRC_BYTES, Layout

#: Widest rows that are read: some twenty times those of the largest models.
MOST_COLUMNS = 2**20
#: Most chunks of a shard, all of whose places are read at once; a shard of 16,384 rows has 64.
MOST_CHUNKS = 2**17
#: Most bytes of a decoded chunk, as of blosc: a compressed file may announce far more than it has.
MOST_CHUNK_BYTES = 2**31 - 1
_INDEX_ENTRY = 16
#: A blosc frame begins with so many bytes.
_BLOSC_HEADER = 16


@dataclass(frozen=True)
class Geometry:
    """What the ``zarr.json`` of a rows array says, checked.

    Attributes:
        rows: Rows that exist.
        width: Hidden width.
        shard_rows: Rows of a shard.
        form: Element format.
        layout: Inner chunking and codec.
    """

    rows: int
    width: int
    shard_rows: int
    form: Format
    layout: Layout

    @classmethod
    def parse(cls, document: dict[str, Any], where: str) -> Geometry:
        """Read the geometry from a document.

        Args:
            document: The array's ``zarr.json``.
            where: The array's path, named in errors.

        Raises:
            CorruptDataError: It is not such a document.
        """
        shape, shard, data_type = (
            sizes(document, "shape", where),
            chunk_shape(document, where),
            document.get("data_type"),
        )
        form = BY_DATA_TYPE.get(data_type) if isinstance(data_type, str) else None
        if form is None:
            raise damaged(where, f"data type {data_type!r} is not {', '.join(BY_DATA_TYPE)}")
        if len(shape) != 2 or not 1 <= shape[1] <= MOST_COLUMNS or not shard or shard[0] < 1:
            raise damaged(
                where, f"shape {list(shape)} with shards {list(shard)} is not rows of 1 to {MOST_COLUMNS} values"
            )
        layout = _layout(document, where)
        if shard[0] % layout.chunk_rows or shard[0] // layout.chunk_rows > MOST_CHUNKS:
            raise damaged(where, f"shards of {shard[0]} rows are not up to {MOST_CHUNKS} chunks of {layout.chunk_rows}")
        if layout.chunk_rows * shape[1] * form.storage.itemsize > MOST_CHUNK_BYTES:
            raise damaged(where, f"a chunk of {layout.chunk_rows} rows of {shape[1]} values is larger than any is")
        wrong = documents.difference(document, documents.rows_document(shape[0], shape[1], shard[0], form, layout))
        if wrong is not None:
            raise damaged(where, f"{wrong!r} is not what this format has there")
        return cls(shape[0], shape[1], shard[0], form, layout)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width."""
        return self.rows, self.width

    @property
    def files(self) -> int:
        """Number of shard files."""
        return -(-self.rows // self.shard_rows)

    @staticmethod
    def file(number: int) -> str:
        """Path of a shard file within the array.

        Args:
            number: Of the shard.
        """
        return f"c/{number}/0"

    def least_bytes(self, number: int) -> int:
        """Fewest bytes that a shard's file can have: its index, and something of every chunk that holds rows.

        Args:
            number: Of the shard.
        """
        held = min(self.rows - number * self.shard_rows, self.shard_rows)
        chunk = self.layout.chunk_rows * self.width * self.form.storage.itemsize
        each = (_BLOSC_HEADER if self.layout.compressed else chunk) + CRC_BYTES
        index = _INDEX_ENTRY * (self.shard_rows // self.layout.chunk_rows) + CRC_BYTES
        return index + -(-held // self.layout.chunk_rows) * each


def _layout(document: dict[str, Any], where: str) -> Layout:
    """The inner chunks, by the codecs within the shard."""
    codecs = document.get("codecs")
    inner = (
        codecs[0].get("configuration") if isinstance(codecs, list) and codecs and isinstance(codecs[0], dict) else None
    )
    chunk = sizes(inner, "chunk_shape", where)
    held = inner.get("codecs") if isinstance(inner, dict) else None
    if not chunk or chunk[0] < 1 or not isinstance(held, list):
        raise damaged(where, "its codecs are not those of a shard")
    compressed = any(isinstance(codec, dict) and codec.get("name") == "blosc" for codec in held)
    return Layout("archive" if compressed else "hot", chunk[0], compressed=compressed)

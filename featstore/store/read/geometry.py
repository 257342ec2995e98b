"""What the ``zarr.json`` of a rows array says: its size, element format and layout, checked before it is believed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from featstore.errors import CorruptDataError
from featstore.store.format import documents, shards
from featstore.store.format.elements import BY_DATA_TYPE, Format


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
    layout: shards.Layout

    @classmethod
    def parse(cls, document: dict[str, Any], where: str) -> Geometry:
        """Read the geometry from a document.

        Args:
            document: The array's ``zarr.json``.
            where: Named in errors.

        Raises:
            CorruptDataError: It is not such a document.
        """
        try:
            form = BY_DATA_TYPE[document["data_type"]]
            rows, width = (int(v) for v in document["shape"])
            shard_rows = int(document["chunk_grid"]["configuration"]["chunk_shape"][0])
            inner = document["codecs"][0]["configuration"]
            compressed = any(codec["name"] == "blosc" for codec in inner["codecs"])
            layout = shards.Layout(
                "archive" if compressed else "hot", int(inner["chunk_shape"][0]), compressed=compressed
            )
            expected = documents.rows_document(rows, width, shard_rows, form, layout)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise CorruptDataError(f"{where} is damaged ({error!r}); extract again") from error
        positive = min(rows + 1, width, shard_rows, layout.chunk_rows) > 0
        if not positive or shard_rows % layout.chunk_rows or document["codecs"] != expected["codecs"]:
            raise CorruptDataError(f"{where} describes an array this format does not have; extract again")
        return cls(rows, width, shard_rows, form, layout)

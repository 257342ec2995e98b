"""How a model's rows are stored: element format, layout and shard length, parsed once and passed together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from featstore.store.format.elements import Format
from featstore.store.format.shards import Layout


@dataclass(frozen=True)
class Encoding:
    """How the rows of a model are stored.

    Attributes:
        form: Element format.
        layout: Inner chunking and codec.
        shard_rows: Rows of a shard.
    """

    form: Format
    layout: Layout
    shard_rows: int

    def keeps_values_of(self, other: Encoding) -> bool:
        """Whether rows converted from another encoding read exactly as before, whatever they hold.

        Args:
            other: What they were stored as.
        """
        return self.form.name in (other.form.name, "float32")

    def to_dict(self) -> dict[str, Any]:
        """As recorded in a model's attributes."""
        return {"format": self.form.name, "layout": self.layout.name, "shard_rows": self.shard_rows}

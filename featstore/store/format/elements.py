"""What ``--format`` means: how float32 rows become stored elements and back.

``int8`` and ``fp8`` keep a scale for every row, so that one loud token does not cost the others their digits; ``int8``
first divides every column by a scale that the pilot froze, because a few columns of a residual stream are a hundred
times louder than the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import NonFiniteStateError, SpecError
from featstore.store.format.dtypes import bfloat16_bits, bfloat16_values, e4m3_bits, e4m3_values


@dataclass(frozen=True)
class Encoded:
    """Rows as they are stored.

    Attributes:
        stored: ``(rows, width)`` of the format's storage type.
        norms: float32 ``(rows,)``, Euclidean norm of what the stored values decode to.
        row_scale: float32 ``(rows,)`` where the format has one, else None.
    """

    stored: NDArray[Any]
    norms: NDArray[np.float32]
    row_scale: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.stored)

    def part(self, first: int, end: int) -> Encoded:
        """A run of the rows, as views.

        Args:
            first: First row.
            end: Row after the last.
        """
        scale = None if self.row_scale is None else self.row_scale[first:end]
        return Encoded(self.stored[first:end], self.norms[first:end], scale)


@dataclass(frozen=True)
class Format:
    """How one element is stored.

    Attributes:
        name: Value of ``--format``.
        data_type: Zarr's name of it.
        storage: numpy type of the stored array (unsigned payloads for bfloat16 and fp8).
        largest: For formats with a scale per row, the stored magnitude that a row's largest value gets; else None.
        column_scaled: Whether columns are divided by a scale first.
    """

    name: str
    data_type: str
    storage: np.dtype[Any]
    largest: float | None = None
    column_scaled: bool = False

    @property
    def row_scaled(self) -> bool:
        """Whether every row has a scale of its own."""
        return self.largest is not None

    def bytes_per_row(self, width: int) -> int:
        """Bytes of one token state with its norm and scale, uncompressed.

        Args:
            width: Hidden width.
        """
        return width * self.storage.itemsize + 4 + 4 * self.row_scaled

    def encode(self, values: NDArray[np.float32], column_scale: NDArray[np.float32] | None = None) -> Encoded:
        """Round float32 rows to the stored type.

        Args:
            values: float32 ``(rows, width)``.
            column_scale: float32 ``(width,)``, positive; needed by ``int8``, ignored by the others.

        Raises:
            NonFiniteStateError: NaN or infinity, or a finite value that float16 cannot hold; the message names the row.
        """
        values = np.asarray(values, dtype=np.float32)
        bad = np.flatnonzero(~np.isfinite(values).all(axis=-1))
        if bad.size:
            raise NonFiniteStateError(f"row {bad[0]} holds NaN or infinity; check the model, or use --dtype float32")
        scale = None
        if self.largest is not None:
            if self.column_scaled:
                values = values / _needed(column_scale)
            scale = np.abs(values).max(axis=-1) / np.float32(self.largest)
            values = (values / np.where(scale > 0, scale, np.float32(1))[:, None]).astype(np.float32, copy=False)
        with np.errstate(over="ignore"):
            stored = self._round(values)
        if self.name == "float16":
            bad = np.flatnonzero(np.isinf(stored).any(axis=-1))
            if bad.size:
                raise NonFiniteStateError(
                    f"row {bad[0]} holds {np.abs(values[bad[0]]).max():.4g}, more than float16 can (65504); "
                    "use --format bfloat16"
                )
        norms = np.linalg.norm(self.decode(stored, scale, column_scale), axis=-1).astype(np.float32)
        return Encoded(stored, norms, scale)

    def _round(self, values: NDArray[np.float32]) -> NDArray[Any]:
        if self.name == "bfloat16":
            return bfloat16_bits(values)
        if self.name == "fp8":
            return e4m3_bits(values)
        if self.name == "int8":
            return np.clip(np.rint(values), -127, 127).astype(np.int8)
        return values.astype(self.storage)

    def decode(
        self,
        stored: NDArray[Any],
        row_scale: NDArray[np.float32] | None = None,
        column_scale: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Widen stored rows to float32; exact but for the multiplication with the scales.

        Args:
            stored: ``(rows, width)`` of the storage type.
            row_scale: float32 ``(rows,)``, for ``int8`` and ``fp8``.
            column_scale: float32 ``(width,)``, for ``int8``.
        """
        if self.name == "bfloat16":
            return bfloat16_values(stored)
        values = e4m3_values(stored) if self.name == "fp8" else stored.astype(np.float32)
        if self.row_scaled:
            values *= _needed(row_scale)[:, None]
        if self.column_scaled:
            values *= _needed(column_scale)
        return values


def column_scale_of(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """The column scales that ``int8`` freezes: each column's root mean square.

    Args:
        rows: float32 ``(rows, width)``, ordinary rows of the pilot.

    Returns:
        float32 ``(width,)``, positive.
    """
    scale = np.sqrt(np.square(rows, dtype=np.float64).mean(axis=0)).astype(np.float32)
    return np.where(scale > 0, scale, np.float32(1))


def _needed(scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
    if scale is None:
        raise SpecError("rows of a scaled format need their scales; read them through the store")
    return scale


FORMATS = {
    "bfloat16": Format("bfloat16", "bfloat16", np.dtype("<u2")),
    "float16": Format("float16", "float16", np.dtype("<f2")),
    "float32": Format("float32", "float32", np.dtype("<f4")),
    "int8": Format("int8", "int8", np.dtype("i1"), largest=127.0, column_scaled=True),
    "fp8": Format("fp8", "float8_e4m3fn", np.dtype("u1"), largest=448.0),
}
BY_DATA_TYPE = {form.data_type: form for form in FORMATS.values()}


def parse_format(name: str) -> Format:
    """Look up ``--format``.

    Args:
        name: As typed.

    Raises:
        SpecError: No such format.
    """
    if name not in FORMATS:
        raise SpecError(f"format {name!r}: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]

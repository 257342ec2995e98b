"""Number types that numpy lacks: their bits, their values, and the zarr-python data types that carry them.

``bfloat16`` and ``float8_e4m3fn`` are data types of the Zarr v3 extension registry and of tensorstore that zarr-python
3.1 does not implement. The classes below teach it: on disk the registered name, in memory the payload as an unsigned
integer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from zarr.core.dtype import UInt8, UInt16, data_type_registry
from zarr.core.dtype.common import DataTypeValidationError


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to the nearest bfloat16, ties to even, as 16-bit payloads.

    Args:
        values: float32 of any shape; NaN stays NaN, overflow becomes infinity as IEEE 754 has it.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    # Rounding may carry a NaN's payload away; keep it a quiet NaN.
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def bfloat16_values(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen bfloat16 payloads to float32; exact.

    Args:
        bits: uint16 of any shape.
    """
    # In two steps: a shift that widens goes through numpy's casting buffer, at 2.5 times the cost for wide rows.
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


@cache
def _e4m3_table() -> NDArray[np.float32]:
    """Value of each of the 256 payloads: sign, 4 exponent bits (bias 7), 3 mantissa bits; all ones is NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[(code & 0x7F) == 0x7F] = np.nan
    return np.where(code & 0x80, -size, size).astype(np.float32)


def e4m3_bits(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round float32 to the nearest float8 e4m3fn, ties to even, as payloads (Micikevicius et al., arXiv 2209.05433).

    Args:
        values: float32 of any shape; NaN stays NaN, what lies beyond 448 becomes 448.
    """
    finite = _e4m3_table()[:0x7F]
    between = (finite[1:] + finite[:-1]) / 2
    size = np.abs(np.asarray(values, dtype=np.float32))
    code = np.searchsorted(between, size, side="left")
    # Half-way between an odd payload and the next: the even one is above.
    tie = (code < len(between)) & (size == between[np.minimum(code, len(between) - 1)]) & (code % 2 == 1)
    code = np.where(np.isnan(size), 0x7F, code + tie)
    return (code | (np.signbit(values).astype(np.int64) << 7)).astype(np.uint8)


def e4m3_values(bits: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Widen float8 e4m3fn payloads to float32; exact.

    Args:
        bits: uint8 of any shape.
    """
    return _e4m3_table()[bits]


class _NamedFloat:
    """What the data types below share: a registered name on disk, unsigned integer payloads in memory."""

    _zarr_v3_name: ClassVar[str]
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def _bits(values: NDArray[np.float32]) -> NDArray[Any]:
        raise NotImplementedError

    @staticmethod
    def _values(bits: Any) -> NDArray[np.float32]:
        raise NotImplementedError

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        """Never chosen for a plain integer array: the name must be asked for."""
        raise DataTypeValidationError(f"{cls._zarr_v3_name} is not inferred from numpy {dtype}; name it explicitly")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data == cls._zarr_v3_name:
            return cls()
        raise DataTypeValidationError(f"{data!r} is not {cls._zarr_v3_name!r}")

    def to_json(self, zarr_format: Any) -> Any:
        """The name on disk; Zarr v2 has none for this type."""
        if zarr_format == 3:
            return self._zarr_v3_name
        raise ValueError(f"Zarr v2 has no {self._zarr_v3_name}; use zarr_format=3")

    def from_json_scalar(self, data: Any, *, zarr_format: Any) -> Any:
        """A fill value: a number, or 'NaN', 'Infinity', '-Infinity', or the payload as '0x....'."""
        del zarr_format
        if isinstance(data, str) and data.startswith("0x"):
            return self._bits(np.zeros(1, np.float32)).dtype.type(int(data, 16))
        names = {"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf}
        if isinstance(data, bool) or not (isinstance(data, (int, float)) or data in names):
            raise TypeError(f"fill value {data!r} is not a {self._zarr_v3_name} number")
        return self._bits(np.array([names.get(data, data)], dtype=np.float32))[0]

    def to_json_scalar(self, data: Any, *, zarr_format: Any) -> Any:
        """The fill value as a number, or its name where JSON has no number for it."""
        del zarr_format
        value = float(self._values(np.array([data], dtype=self._bits(np.zeros(1, np.float32)).dtype))[0])
        if np.isfinite(value):
            return value
        return "NaN" if np.isnan(value) else "Infinity" if value > 0 else "-Infinity"


@dataclass(frozen=True, kw_only=True)
class BFloat16(_NamedFloat, UInt16):
    """zarr-python data type for ``bfloat16``, held in memory as uint16 payloads."""

    _zarr_v3_name: ClassVar[Literal["bfloat16"]] = "bfloat16"
    _bits = staticmethod(bfloat16_bits)
    _values = staticmethod(bfloat16_values)


@dataclass(frozen=True, kw_only=True)
class Float8E4M3(_NamedFloat, UInt8):
    """zarr-python data type for ``float8_e4m3fn``, held in memory as uint8 payloads."""

    _zarr_v3_name: ClassVar[Literal["float8_e4m3fn"]] = "float8_e4m3fn"
    _bits = staticmethod(e4m3_bits)
    _values = staticmethod(e4m3_values)


def register() -> None:
    """Teach zarr-python the data types; repeating it is harmless."""
    data_type_registry.register("bfloat16", BFloat16)
    data_type_registry.register("float8_e4m3fn", Float8E4M3)

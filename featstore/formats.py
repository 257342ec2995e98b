"""How rows become bytes: element formats, chunk codecs, shard files, and the zarr documents that describe them.

Everything here is a pure function of arrays. A shard is one Zarr v3 ``sharding_indexed`` file: its inner chunks one
after another, then an index of (offset, length) pairs, then a crc32c of the index. In the *hot* layout an inner chunk
is the plain little-endian array followed by its crc32c, so a reader can map the file and view the rows without a copy.

``bfloat16`` is a data type in the Zarr v3 extension registry that zarr-python 3.1 does not implement. The class below
teaches it: on disk ``"bfloat16"``, in memory the 16-bit payload as uint16 (numpy has no bfloat16).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from zarr.core.dtype import UInt16, data_type_registry
from zarr.core.dtype.common import DataTypeValidationError

from featstore.errors import CorruptDataError, NonFiniteStateError, SpecError

CRC_BYTES = 4
_MISSING = np.uint64(2**64 - 1)


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
    wide = np.left_shift(bits, np.uint32(16), dtype=np.uint32)
    return wide.view(np.float32)


@dataclass(frozen=True, kw_only=True)
class BFloat16(UInt16):
    """zarr-python data type for ``bfloat16``, held in memory as uint16 payloads."""

    _zarr_v3_name: ClassVar[Literal["bfloat16"]] = "bfloat16"
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        """Never chosen for a plain uint16 array: the name must be asked for."""
        raise DataTypeValidationError(f"bfloat16 is not inferred from numpy {dtype}; name it explicitly")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data == cls._zarr_v3_name:
            return cls()
        raise DataTypeValidationError(f"{data!r} is not 'bfloat16'")

    def to_json(self, zarr_format: Any) -> Any:
        """The name on disk; Zarr v2 has none for this type."""
        if zarr_format == 3:
            return self._zarr_v3_name
        raise ValueError("Zarr v2 has no bfloat16; use zarr_format=3")

    def from_json_scalar(self, data: Any, *, zarr_format: Any) -> Any:
        """A fill value: a number, or 'NaN', 'Infinity', '-Infinity', or the payload as '0x....'."""
        del zarr_format
        if isinstance(data, str) and data.startswith("0x"):
            return np.uint16(int(data, 16))
        names = {"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf}
        if isinstance(data, bool) or not (isinstance(data, (int, float)) or data in names):
            raise TypeError(f"fill value {data!r} is not a bfloat16 number")
        return bfloat16_bits(np.array([names.get(data, data)], dtype=np.float32))[0]

    def to_json_scalar(self, data: object, *, zarr_format: Any) -> Any:
        """The fill value as a number, or its name where JSON has no number for it."""
        del zarr_format
        value = float(bfloat16_values(np.array([data], dtype=np.uint16))[0])
        if np.isfinite(value):
            return value
        return "NaN" if np.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def register() -> None:
    """Teach zarr-python the data type; repeating it is harmless."""
    data_type_registry.register("bfloat16", BFloat16)


@dataclass(frozen=True)
class Format:
    """How one element is stored.

    Attributes:
        name: Value of ``--format`` and of the zarr ``data_type``.
        storage: numpy type of the stored array (uint16 payloads for bfloat16).
    """

    name: str
    storage: np.dtype[Any]

    def encode(self, values: NDArray[np.float32]) -> NDArray[Any]:
        """Round float32 rows to the stored type.

        Args:
            values: float32 ``(rows, width)``.

        Raises:
            NonFiniteStateError: float16 cannot hold a finite value; the message names the row.
        """
        if self.name == "bfloat16":
            return bfloat16_bits(values)
        with np.errstate(over="ignore"):
            stored = values.astype(self.storage)
        if self.name == "float16":
            bad = np.flatnonzero((np.isinf(stored) & np.isfinite(values)).any(axis=-1))
            if bad.size:
                raise NonFiniteStateError(
                    f"row {bad[0]} holds {np.abs(values[bad[0]]).max():.4g}, more than float16 can (65504); "
                    "use --format bfloat16"
                )
        return stored

    def decode(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Widen stored rows to float32; exact for every format here.

        Args:
            stored: Array of the storage type.
        """
        return bfloat16_values(stored) if self.name == "bfloat16" else stored.astype(np.float32)


FORMATS = {
    "bfloat16": Format("bfloat16", np.dtype("<u2")),
    "float16": Format("float16", np.dtype("<f2")),
    "float32": Format("float32", np.dtype("<f4")),
}


@dataclass(frozen=True)
class Layout:
    """How rows are grouped into inner chunks and whether those are compressed.

    Attributes:
        name: Value of ``--layout``.
        chunk_rows: Rows of an inner chunk.
        compressed: blosc zstd, level 1, byte shuffle, 512 KiB blocks: the best ratio measured for its decode speed.
    """

    name: str
    chunk_rows: int
    compressed: bool


LAYOUTS = {
    "hot": Layout("hot", 1024, compressed=False),
    "archive": Layout("archive", 256, compressed=True),
}
_BLOSC_BLOCK = 512 * 1024


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


def parse_layout(name: str) -> Layout:
    """Look up ``--layout``.

    Args:
        name: As typed.

    Raises:
        SpecError: No such layout.
    """
    if name not in LAYOUTS:
        raise SpecError(f"layout {name!r}: choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) of a buffer.

    Args:
        data: Any contiguous buffer.
    """
    # google_crc32c accepts bytes only, and hashes at memory speed: the copy is the price of the interface.
    return int(google_crc32c.value(bytes(data)))


def file_checksum(data: bytes) -> str:
    """CRC-32 of a whole file, as the manifest records it, in hexadecimal.

    Not CRC-32C: a file that is made of chunks followed by their own CRC-32C has a CRC-32C that depends on their lengths
    alone, so that it would neither tell two files apart nor notice that they changed places.

    Args:
        data: The file's content.
    """
    return f"{zlib.crc32(data):08x}"


def seal(data: bytes) -> bytes:
    """Append the little-endian crc32c that the zarr codec of that name expects.

    Args:
        data: An encoded chunk or shard index.
    """
    return data + crc32c(data).to_bytes(CRC_BYTES, "little")


def unseal(data: memoryview, what: str) -> memoryview:
    """Check and strip a trailing crc32c.

    Args:
        data: Bytes followed by their checksum.
        what: Named in the error.

    Raises:
        CorruptDataError: The checksum does not match.
    """
    body, tail = data[:-CRC_BYTES], data[-CRC_BYTES:]
    if len(data) < CRC_BYTES or crc32c(body) != int.from_bytes(tail, "little"):
        raise CorruptDataError(f"checksum mismatch in {what}; run `featstore verify` to see how far the damage goes")
    return body


def _blosc(typesize: int) -> Any:
    from numcodecs import Blosc

    return Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE, blocksize=_BLOSC_BLOCK, typesize=typesize)


def encode_chunk(rows: NDArray[Any], layout: Layout) -> bytes:
    """Encode one inner chunk, checksum included.

    Args:
        rows: ``(chunk_rows, width)`` of a storage type.
        layout: Chooses the codec.
    """
    plain = np.ascontiguousarray(rows)
    return seal(_blosc(plain.itemsize).encode(plain) if layout.compressed else plain.tobytes())


def decode_chunk(data: memoryview, dtype: np.dtype[Any], layout: Layout, what: str) -> NDArray[Any]:
    """Decode one inner chunk to a flat array; a view of ``data`` in the hot layout.

    Args:
        data: Encoded bytes with their checksum.
        dtype: Storage type.
        layout: Chooses the codec.
        what: Named in errors.

    Raises:
        CorruptDataError: Checksum or compressed stream is damaged.
    """
    body = unseal(data, what)
    if not layout.compressed:
        return np.frombuffer(body, dtype)
    # The decoder believes the length in the blosc header and would read past the end of a shorter buffer.
    if int.from_bytes(body[12:16], "little") != len(body):
        raise CorruptDataError(f"{what} does not decompress (its header does not fit its {len(body)} bytes)")
    try:
        return np.frombuffer(_blosc(dtype.itemsize).decode(body), dtype)
    except (RuntimeError, ValueError) as error:
        raise CorruptDataError(f"{what} does not decompress ({error})") from error


def encode_shard(rows: NDArray[Any], shard_rows: int, layout: Layout) -> bytes:
    """Encode a whole shard file.

    Args:
        rows: ``(m, width)`` of a storage type, 1 <= m <= shard_rows; the last inner chunk is padded with zeros, whole
            inner chunks beyond the rows are recorded as missing.
        shard_rows: Rows of a full shard, a multiple of the layout's chunk rows.
        layout: Inner chunking and codec.
    """
    count = shard_rows // layout.chunk_rows
    index = np.full((count, 2), _MISSING, dtype="<u8")
    parts: list[bytes] = []
    offset = 0
    for i in range(-(-len(rows) // layout.chunk_rows)):
        chunk = rows[i * layout.chunk_rows : (i + 1) * layout.chunk_rows]
        if len(chunk) < layout.chunk_rows:
            padded = np.zeros((layout.chunk_rows, rows.shape[1]), dtype=rows.dtype)
            padded[: len(chunk)] = chunk
            chunk = padded
        encoded = encode_chunk(chunk, layout)
        index[i] = offset, len(encoded)
        offset += len(encoded)
        parts.append(encoded)
    return b"".join((*parts, seal(index.tobytes())))


def decode_index(data: memoryview, chunks: int, what: str) -> list[tuple[int, int] | None]:
    """Read the index at the end of a shard file.

    Args:
        data: The whole file.
        chunks: Inner chunks of a full shard.
        what: Named in errors.

    Returns:
        For each inner chunk its (offset, length), or None where it is missing.

    Raises:
        CorruptDataError: Too short, checksum wrong, or a range that leaves the file.
    """
    size = 16 * chunks + CRC_BYTES
    if len(data) < size:
        raise CorruptDataError(f"{what} has {len(data)} bytes, too few for its index of {size}; the file is truncated")
    index = np.frombuffer(unseal(data[-size:], f"the index of {what}"), "<u8").reshape(-1, 2)
    limit = len(data) - size
    ranges: list[tuple[int, int] | None] = []
    for offset, length in index:
        if offset == _MISSING and length == _MISSING:
            ranges.append(None)
        elif int(offset) + int(length) > limit:
            raise CorruptDataError(f"the index of {what} points outside the file; the file is damaged")
        else:
            ranges.append((int(offset), int(length)))
    return ranges


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
            "blocksize": _BLOSC_BLOCK,
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
    return _zarr_array((rows, width), form.name, (shard_rows, width), [sharding])


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

"""Rows to bytes and back: rounding against torch, shards against their definition, damage against the checksums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from featstore.errors import CorruptDataError, NonFiniteStateError, SpecError
from featstore.extraction.forward import pack, unpacked
from featstore.store.format.dtypes import BFloat16, Float8E4M3, bfloat16_bits, bfloat16_values, e4m3_bits, e4m3_values
from featstore.store.format.elements import FORMATS, Encoded, Format, column_scale_of, parse_format
from featstore.store.format.shards import (
    CRC_BYTES,
    HOT_ALIGNMENT,
    Layout,
    crc32c,
    decode_chunk,
    decode_index,
    encode_chunk,
    encode_shard,
    parse_layout,
    seal,
    unseal,
)

ALL_PAYLOADS = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def torch_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def same_bits(ours: np.ndarray, theirs: np.ndarray, values: np.ndarray) -> None:
    nan = np.isnan(values)
    np.testing.assert_array_equal(ours[~nan], theirs[~nan])
    # Which NaN it is, is nobody's business; that it is one, is.
    assert np.isnan(bfloat16_values(ours[nan])).all()


class TestBfloat16:
    def test_widening_equals_torch_for_every_payload(self):
        theirs = torch.from_numpy(ALL_PAYLOADS.view(np.int16)).view(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(bfloat16_values(ALL_PAYLOADS).view(np.uint32), theirs.view(np.uint32))

    def test_every_payload_survives_the_round_trip(self):
        values = bfloat16_values(ALL_PAYLOADS)
        nan = np.isnan(values)
        assert nan.sum() == 2 * 127
        same_bits(bfloat16_bits(values), ALL_PAYLOADS, values)

    @pytest.mark.parametrize("low", [0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    def test_rounding_equals_torch_above_every_payload(self, low):
        """Just above, just below, at and just beyond the tie, for every sign, exponent and mantissa."""
        values = ((ALL_PAYLOADS.astype(np.uint32) << 16) | low).view(np.float32)
        same_bits(bfloat16_bits(values), torch_bits(values), values)

    def test_rounding_equals_torch_for_random_floats(self):
        rng = np.random.default_rng(0)
        values = rng.integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
        assert np.isnan(values).any()
        same_bits(bfloat16_bits(values), torch_bits(values), values)

    @given(hnp.arrays(np.float32, (4, 3), elements=st.floats(width=32)))
    def test_rounding_equals_torch(self, values):
        same_bits(bfloat16_bits(values), torch_bits(values), values)

    def test_the_cases_that_go_wrong(self):
        names = {
            1.0: 0x3F80,
            1.00390625: 0x3F80,  # tie: to even, down
            1.01171875: 0x3F82,  # tie: to even, up
            -0.0: 0x8000,
            3.4e38: 0x7F80,  # rounds to infinity
            float("inf"): 0x7F80,
            float("-inf"): 0xFF80,
            1e-45: 0x0000,  # the smallest subnormal
            9.2e-41: 0x0001,
        }
        assert bfloat16_bits(np.array([*names], np.float32)).tolist() == [*names.values()]

    def test_a_nan_whose_payload_is_all_in_the_low_bits_stays_a_nan(self):
        values = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
        assert np.isnan(bfloat16_values(bfloat16_bits(values))).all()

    def test_a_view_that_is_not_contiguous(self):
        values = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2]
        np.testing.assert_array_equal(bfloat16_bits(values), torch_bits(values.copy()))

    @pytest.mark.parametrize(
        ("fill", "payload"), [(0.0, 0), (1, 0x3F80), ("NaN", 0x7FC0), ("Infinity", 0x7F80), ("0x3f80", 0x3F80)]
    )
    def test_fill_values_of_the_zarr_data_type(self, fill, payload):
        scalar = BFloat16().from_json_scalar(fill, zarr_format=3)
        assert int(scalar) == payload
        assert BFloat16().from_json_scalar(BFloat16().to_json_scalar(scalar, zarr_format=3), zarr_format=3) == scalar

    @pytest.mark.parametrize("fill", [None, True, "one", [0]])
    def test_what_is_no_fill_value_is_refused(self, fill):
        with pytest.raises(TypeError):
            BFloat16().from_json_scalar(fill, zarr_format=3)


class TestFloat8:
    def test_widening_equals_torch_for_every_payload(self):
        payloads = np.arange(256, dtype=np.uint8)
        theirs = torch.from_numpy(payloads).view(torch.float8_e4m3fn).float().numpy()
        np.testing.assert_array_equal(e4m3_values(payloads), theirs)

    def test_rounding_equals_torch_between_and_at_every_payload(self):
        finite = np.sort(e4m3_values(np.arange(0x7F, dtype=np.uint8)))
        middle = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
        near = [middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9)), finite]
        values = np.concatenate([*near, *(-part for part in near)])
        theirs = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        np.testing.assert_array_equal(e4m3_bits(values), theirs)

    @given(hnp.arrays(np.float32, 50, elements=st.floats(-448, 448, width=32)))
    def test_rounding_equals_torch(self, values):
        theirs = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        np.testing.assert_array_equal(e4m3_bits(values), theirs)

    def test_what_is_too_large_becomes_the_largest_and_nan_stays(self):
        bits = e4m3_bits(np.array([449, 1e9, np.inf, -np.inf, np.nan], np.float32))
        np.testing.assert_array_equal(e4m3_values(bits), np.array([448, 448, 448, -448, np.nan], np.float32))

    def test_fill_values_of_the_zarr_data_type(self):
        kind = Float8E4M3()
        assert kind.to_json(zarr_format=3) == "float8_e4m3fn"
        for value, payload in ((0.0, 0), (1.5, 0x3C), (-448.0, 0xFE), ("NaN", 0x7F), ("0x3c", 0x3C)):
            scalar = kind.from_json_scalar(value, zarr_format=3)
            assert scalar.dtype == np.uint8
            assert scalar == payload
        assert kind.to_json_scalar(np.uint8(0x3C), zarr_format=3) == 1.5


#: Largest error of an ordinary row, relative to its norm.
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 0.0, "int8": 0.011, "fp8": 0.04}


def scaled(form: Format, values: np.ndarray) -> tuple[Encoded, np.ndarray | None]:
    """Rows encoded with the column scale that their own pilot would have frozen."""
    scale = column_scale_of(values) if form.column_scaled else None
    return form.encode(values, scale), scale


def from_torch(form: Format, values: torch.Tensor, scale: np.ndarray | None = None) -> Encoded:
    packed = pack(values, form, None if scale is None else torch.from_numpy(scale))
    return unpacked(form, packed.tensors(), lambda i: f"here, row {i}")


def residual_stream(rows: int, width: int, seed: int) -> np.ndarray:
    """Rows as they are: a few columns a hundred times louder than the rest, and rows of different loudness."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, width)) * rng.uniform(0.5, 20, (rows, 1))
    values[:, ::50] *= 100
    return values.astype(np.float32)


@pytest.mark.parametrize("name", FORMATS)
class TestFormats:
    """One contract for every format."""

    def test_a_row_comes_back_within_the_formats_rounding(self, name):
        form, values = FORMATS[name], residual_stream(200, 300, seed=1)
        encoded, scale = scaled(form, values)
        assert encoded.stored.dtype == form.storage
        assert (encoded.row_scale is not None) == form.row_scaled
        back = form.decode(encoded.stored, encoded.row_scale, scale)
        assert back.dtype == np.float32
        quiet = np.arange(300) % 50 != 0
        error = np.linalg.norm((back - values)[:, quiet], axis=1) / np.linalg.norm(values[:, quiet], axis=1)
        if name == "fp8":  # without column scales the loud columns set the row's scale
            error = np.linalg.norm(back - values, axis=1) / np.linalg.norm(values, axis=1)
        assert np.median(error) <= ROUNDING[name]

    def test_storing_what_was_stored_changes_nothing(self, name):
        form = FORMATS[name]
        encoded, scale = scaled(form, residual_stream(60, 40, seed=2))
        back = form.decode(encoded.stored, encoded.row_scale, scale)
        np.testing.assert_array_equal(form.encode(back, scale).stored, encoded.stored)

    def test_norms_are_those_of_what_is_stored(self, name):
        form = FORMATS[name]
        encoded, scale = scaled(form, residual_stream(60, 40, seed=3))
        back = form.decode(encoded.stored, encoded.row_scale, scale)
        assert encoded.norms.dtype == np.float32
        np.testing.assert_allclose(encoded.norms, np.linalg.norm(back.astype(np.float64), axis=1), rtol=1e-6)

    def test_torch_on_any_device_stores_the_same_bits(self, name):
        form, values = FORMATS[name], residual_stream(200, 70, seed=4)
        ours, scale = scaled(form, values)
        theirs = from_torch(form, torch.from_numpy(values), scale)
        np.testing.assert_array_equal(theirs.stored, ours.stored)
        assert theirs.stored.dtype == form.storage
        np.testing.assert_allclose(theirs.norms, ours.norms, rtol=1e-6)
        if form.row_scaled:
            np.testing.assert_array_equal(theirs.row_scale, ours.row_scale)

    def test_a_row_of_zeros_stays_one(self, name):
        form = FORMATS[name]
        encoded, scale = scaled(form, np.zeros((3, 5), np.float32))
        np.testing.assert_array_equal(form.decode(encoded.stored, encoded.row_scale, scale), 0)
        again = from_torch(form, torch.zeros(3, 5), scale)
        np.testing.assert_array_equal(again.stored, encoded.stored)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_states_that_are_not_numbers_are_never_stored(self, name, bad):
        form, values = FORMATS[name], np.ones((5, 3), np.float32)
        values[2, 2] = bad
        with pytest.raises(NonFiniteStateError, match="here, row 2 holds NaN or infinity; try --dtype float32"):
            from_torch(form, torch.from_numpy(values), np.ones(3, np.float32))
        with pytest.raises(NonFiniteStateError, match="row 2 holds NaN or infinity"):
            form.encode(values, np.ones(3, np.float32))

    def test_a_model_in_bfloat16_is_stored_from_its_own_values(self, name):
        values = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        scale = np.ones(5, np.float32)
        ours = FORMATS[name].encode(values.float().numpy(), scale)
        np.testing.assert_array_equal(from_torch(FORMATS[name], values, scale).stored, ours.stored)


class TestFormatsApart:
    def test_float16_overflow_names_the_row_and_the_value(self):
        values = np.ones((5, 3), np.float32)
        values[3, 1] = -70_000
        message = r"row 3 holds 7e\+04, more than float16 can.*use --format bfloat16"
        with pytest.raises(NonFiniteStateError, match=message):
            FORMATS["float16"].encode(values)
        with pytest.raises(NonFiniteStateError, match=f"here, {message}"):
            from_torch(FORMATS["float16"], torch.from_numpy(values))
        values[3, 1] = 65_504
        from_torch(FORMATS["float16"], torch.from_numpy(values))
        np.testing.assert_array_equal(FORMATS["float16"].encode(values).stored[3, 1], np.float16(65_504))

    def test_a_bfloat16_models_infinity_is_not_taken_for_float16s(self):
        values = torch.ones(2, 2, dtype=torch.bfloat16)
        values[1, 0] = torch.inf
        with pytest.raises(NonFiniteStateError, match="row 1 holds NaN or infinity"):
            from_torch(FORMATS["float16"], values)

    def test_column_scales_let_quiet_columns_keep_their_digits(self):
        form, values = FORMATS["int8"], residual_stream(300, 100, seed=5)
        quiet = np.arange(100) % 50 != 0

        def error(scale: np.ndarray) -> float:
            encoded = form.encode(values, scale)
            back = form.decode(encoded.stored, encoded.row_scale, scale)
            return float(np.linalg.norm((back - values)[:, quiet]) / np.linalg.norm(values[:, quiet]))

        assert error(column_scale_of(values)) < 0.1 * error(np.ones(100, np.float32))

    def test_column_scales_are_positive_whatever_the_column(self):
        np.testing.assert_array_equal(column_scale_of(np.array([[0, 3], [0, -3]], np.float32)), [1, 3])

    def test_scaled_formats_ask_for_their_scales(self):
        with pytest.raises(SpecError, match="need their scales"):
            FORMATS["int8"].encode(np.ones((1, 2), np.float32))
        with pytest.raises(SpecError, match="need their scales"):
            FORMATS["fp8"].decode(np.ones((1, 2), np.uint8))

    @pytest.mark.parametrize("parse", [parse_format, parse_layout])
    def test_unknown_names_are_quoted_with_the_choices(self, parse):
        with pytest.raises(
            SpecError, match=r"'fp4': choose one of (bfloat16, float16, float32, int8, fp8|hot, archive)"
        ):
            parse("fp4")


SMALL = {
    "hot": Layout("hot", 4, compressed=False),
    "archive": Layout("archive", 4, compressed=True),
}


def decode_all(data: memoryview, layout: Layout) -> None:
    """Decode every chunk of a shard of four chunks of bfloat16 rows."""
    for at, length in filter(None, decode_index(data, 4, "it")):
        decode_chunk(data[at : at + length], np.dtype("<u2"), layout, "it")


class TestShards:
    @given(
        st.sampled_from([*SMALL]),
        st.sampled_from([*FORMATS]),
        st.integers(1, 16),
        st.integers(1, 5),
        st.integers(0, 2**32 - 1),
    )
    def test_decoding_gives_the_rows_back(self, layout, form, rows, width, seed):
        layout, dtype = SMALL[layout], FORMATS[form].storage
        raw = np.random.default_rng(seed).integers(0, 256, (rows, width, dtype.itemsize), dtype=np.uint8)
        values = raw.view(dtype)[..., 0]
        data = memoryview(encode_shard(values, 16, layout))
        index = decode_index(data, 4, "it")
        present = -(-rows // 4)
        assert [place is not None for place in index] == [True] * present + [False] * (4 - present)
        parts = [
            decode_chunk(data[at : at + length], dtype, layout, "it").reshape(4, width)
            for at, length in (place for place in index if place)
        ]
        decoded = np.concatenate(parts)
        assert decoded[:rows].tobytes() == values.tobytes()
        assert not decoded[rows:].tobytes().strip(b"\0")
        # Every byte is under a checksum, or a zero before a hot chunk, which begins where a page does.
        end = 0
        for at, length in filter(None, index):
            gap = 0 if layout.compressed else -end % HOT_ALIGNMENT
            assert at == end + gap
            assert not data[end:at].tobytes().strip(b"\0")
            end = at + length
        assert end + 4 * 16 + CRC_BYTES == len(data)

    def test_a_hot_chunk_is_a_view_of_the_file(self):
        rows = np.arange(8, dtype="<f4").reshape(4, 2)
        data = memoryview(encode_shard(rows, 4, SMALL["hot"]))
        ((at, length),) = decode_index(data, 1, "it")
        chunk = decode_chunk(data[at : at + length], np.dtype("<f4"), SMALL["hot"], "it")
        assert chunk.base is not None
        assert np.shares_memory(chunk, np.frombuffer(data, np.uint8))
        assert not chunk.flags.writeable

    def test_compression_shrinks_real_looking_states(self):
        rows = bfloat16_bits(np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32))
        assert len(encode_chunk(rows, parse_layout("archive"))) < 0.8 * rows.nbytes

    @pytest.mark.parametrize("layout", SMALL)
    def test_any_flipped_byte_is_noticed(self, layout):
        rows = np.arange(24, dtype="<u2").reshape(12, 2)
        whole = encode_shard(rows, 16, SMALL[layout])
        gaps = set(range(len(whole) - 4 * 16 - CRC_BYTES))
        for first, length in filter(None, decode_index(memoryview(whole), 4, "it")):
            gaps -= set(range(first, first + length))
        for at in sorted(set(range(len(whole))) - gaps):
            data = memoryview(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
            with pytest.raises(CorruptDataError, match="checksum mismatch in"):
                decode_all(data, SMALL[layout])

    def test_a_truncated_file_is_noticed(self):
        whole = encode_shard(np.ones((16, 2), "<u2"), 16, SMALL["hot"])
        for size in range(0, len(whole), 7):
            with pytest.raises(CorruptDataError, match="it"):
                decode_index(memoryview(whole[:size]), 4, "it")

    def test_an_index_that_points_outside_is_refused(self):
        for entry in ((0, 100), (2**63, 2**63), (2**64 - 1, 5), (5, 2**64 - 1)):
            data = bytes(50) + seal(np.array([entry], "<u8").tobytes())
            with pytest.raises(CorruptDataError, match="points outside the file"):
                decode_index(memoryview(data), 1, "it")

    def test_a_sealed_chunk_that_does_not_decompress_is_refused(self):
        whole = encode_chunk(np.ones((4, 2), "<u2"), SMALL["archive"])[:-CRC_BYTES]
        for body in (b"", b"not blosc", b"not blosc at all, but longer", whole[:10], whole[:20], whole + b"x"):
            with pytest.raises(CorruptDataError, match="it does not decompress"):
                decode_chunk(memoryview(seal(body)), np.dtype("<u2"), SMALL["archive"], "it")

    @given(st.binary(max_size=50))
    def test_seal_and_unseal(self, data):
        assert bytes(unseal(memoryview(seal(data)), "it")) == data
        with pytest.raises(CorruptDataError):
            unseal(memoryview(seal(data)[1:]), "it")

    def test_the_checksum_is_castagnolis(self):
        assert crc32c(b"123456789") == 0xE3069283

"""Sums as 24-bit correlations: what is stored, what comes back, and what is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from featstore.errors import CorruptDataError
from featstore.store.format.packed import ONE, PackedArray, grid, most_bytes, pack, packed_document, sums_of, unpack

SHAPES = [(1, 1), (5, 7), (256, 256), (257, 300), (40, 600)]


def sums(dx: int, dy: int, *, own: bool = False) -> tuple[Any, tuple[Any, Any]]:
    rng = np.random.default_rng(dx)
    x = rng.standard_normal((900, dx)) * np.logspace(-3, 3, dx)
    y = x if own else rng.standard_normal((900, dy)) + x[:, :1]
    return x.T @ y, (np.linalg.norm(x, axis=0), np.linalg.norm(y, axis=0))


def read(data: bytes | None, shape: tuple[int, int], *, half: bool) -> Any:
    return unpack(data, PackedArray.parse(packed_document(shape), "correlation"), "file", half)


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_come_back_to_half_a_unit_of_their_roots(shape: tuple[int, int]) -> None:
    product, roots = sums(*shape)
    back = sums_of(read(pack(product, roots, half=False), shape, half=False), roots)
    assert back.dtype == np.float64
    assert (np.abs(back - product) / np.outer(*roots)).max() <= 0.5001 / ONE


@pytest.mark.parametrize("width", [1, 7, 256, 300, 600])
def test_a_symmetric_product_is_stored_half(width: int) -> None:
    product, roots = sums(width, width, own=True)
    data = pack(product, roots, half=True)
    back = sums_of(read(data, (width, width), half=True), roots)
    np.testing.assert_array_equal(back, back.T)
    np.testing.assert_allclose(np.diag(back), np.diag(product), rtol=1e-12)
    assert (np.abs(back - product) / np.outer(*roots)).max() <= 0.5001 / ONE
    assert len(data) <= most_bytes((width, width), half=True) * 1.1 + 1000
    tiles = grid((width, width))[0]
    if tiles > 1:
        assert len(data) < 0.9 * len(pack(product, roots, half=False))
        with pytest.raises(CorruptDataError, match="lacks other tiles"):
            read(data, (width, width), half=False)


def test_a_column_that_never_leaves_its_origin_stays_zero() -> None:
    product, roots = sums(6, 6, own=True)
    product[2], product[:, 2], roots[0][2] = 0, 0, 0
    back = sums_of(read(pack(product, roots, half=True), (6, 6), half=True), roots)
    assert (back[2] == 0).all()
    assert np.isfinite(back).all()


def test_a_sum_that_its_roots_do_not_allow_is_refused() -> None:
    product, roots = sums(6, 6, own=True)
    with pytest.raises(ValueError, match="larger than the roots"):
        pack(product * 3, roots, half=True)
    product[1, 1] = np.nan
    with pytest.raises(ValueError, match="larger than the roots"):
        pack(product, roots, half=True)


@pytest.mark.parametrize("half", [False, True])
def test_other_readers_see_the_numbers_and_zeros_for_what_is_left_out(tmp_path: Path, half: bool) -> None:
    product, roots = sums(300, 300, own=True)
    file = tmp_path / "correlation" / "c" / "0" / "0"
    file.parent.mkdir(parents=True)
    file.write_bytes(pack(product, roots, half=half))
    (tmp_path / "correlation" / "zarr.json").write_text(json.dumps(packed_document((300, 300))))
    found = zarr.open_array(tmp_path / "correlation", mode="r")[:]
    ours = read(file.read_bytes(), (300, 300), half=half)
    upper = np.triu_indices(300)
    np.testing.assert_array_equal(found[upper], ours[upper])
    assert (found[256:, :256] == 0).all() == half
    # As the format's document says it.
    whole = np.triu(found) + np.triu(found, 1).T
    np.testing.assert_array_equal(whole, ours)
    back = (whole.astype(np.float64) - 2**23) / 2**23 * roots[0][:, None] * roots[1]
    np.testing.assert_allclose(back, sums_of(ours, roots), rtol=1e-12)


def test_damage_is_found() -> None:
    product, roots = sums(300, 300, own=True)
    data = pack(product, roots, half=True)
    for place in (10, len(data) // 2, len(data) - 3):
        spoiled = bytearray(data)
        spoiled[place] ^= 1
        with pytest.raises(CorruptDataError, match=r"checksum|decompress"):
            read(bytes(spoiled), (300, 300), half=True)
    with pytest.raises(CorruptDataError, match="is missing"):
        read(None, (300, 300), half=True)
    with pytest.raises(CorruptDataError, match="truncated"):
        read(data[:20], (300, 300), half=True)


@pytest.mark.parametrize(
    "change",
    [{"shape": [0, 3]}, {"shape": [3]}, {"shape": [2**40, 2**20]}, {"data_type": "int32"}, {"fill_value": 1}],
)
def test_another_document_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CorruptDataError, match=r"correlation/zarr.json is damaged"):
        PackedArray.parse(packed_document((3, 3)) | change, "correlation")

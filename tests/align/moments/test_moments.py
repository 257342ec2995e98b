"""Moments: each term by its definition, merging, moving the origin, and what the origin is for."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.moments.scatter import (
    Moments,
    about,
    centered,
    end_to_end,
    means,
    merge,
    moments_of,
    moved,
    moved_block,
    paired_with_itself,
    raw,
)
from featstore.errors import FitError
from featstore.store.moments import sums as module
from featstore.store.moments.sums import Block, BlockSums, assemble

seeds = st.integers(0, 2**32 - 1)
widths = st.integers(1, 6)


def pairs(seed: int, n: int, dx: int, dy: int) -> tuple[Any, Any, Any, Any]:
    """Rows with a mean, and origins near it."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dx)) + 3.0
    y = rng.standard_normal((n, dy)) - 2.0
    return x, y, 3.0 + 0.3 * rng.standard_normal(dx), -2.0 + 0.3 * rng.standard_normal(dy)


def assert_same(got: Moments, want: Moments, rtol: float = 1e-10) -> None:
    for field in dataclasses.fields(Moments):
        a, b = np.asarray(getattr(got, field.name)), np.asarray(getattr(want, field.name))
        # Sums cancel, so the scale of a term is that of its summands: n x a power of the spread.
        atol = rtol * (np.abs(b).max(initial=0.0) + 100.0 * want.n)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=field.name)


def test_every_term_by_its_definition() -> None:
    x, y, ox, oy = pairs(0, 23, 4, 3)
    m = moments_of(x, y, ox, oy)
    xs, ys = x - ox, y - oy
    rows = list(zip(xs, ys, strict=True))
    assert m.n == 23
    want = {
        "sx": sum(p for p, _ in rows),
        "sy": sum(q for _, q in rows),
        "gx": sum(np.outer(p, p) for p, _ in rows),
        "gy": sum(np.outer(q, q) for _, q in rows),
        "c": sum(np.outer(p, q) for p, q in rows),
        "a": sum(p @ p for p, _ in rows),
        "b": sum(q @ q for _, q in rows),
        "d": sum((p @ p) * (q @ q) for p, q in rows),
        "aa": sum((p @ p) ** 2 for p, _ in rows),
        "bb": sum((q @ q) ** 2 for _, q in rows),
        "ux": sum(p * (q @ q) for p, q in rows),
        "uy": sum(q * (p @ p) for p, q in rows),
        "vx": sum(p * (p @ p) for p, _ in rows),
        "vy": sum(q * (q @ q) for _, q in rows),
    }
    for name, value in want.items():
        np.testing.assert_allclose(getattr(m, name), value, rtol=1e-12, err_msg=name)


@settings(max_examples=30, deadline=None)
@given(seeds, widths, widths, st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_parts_merge_to_the_whole(seed: int, dx: int, dy: int, sizes: list[int]) -> None:
    x, y, ox, oy = pairs(seed, sum(sizes), dx, dy)
    cuts = np.cumsum(sizes)[:-1]
    parts = [moments_of(p, q, ox, oy) for p, q in zip(np.split(x, cuts), np.split(y, cuts), strict=True)]
    whole = moments_of(x, y, ox, oy)
    assert_same(merge(*parts), whole)
    assert_same(merge(parts[-1], *parts[:-1]), whole)


@settings(max_examples=30, deadline=None)
@given(seeds, widths, widths, st.integers(0, 40))
def test_moving_the_origin_is_summing_about_the_other_one(seed: int, dx: int, dy: int, n: int) -> None:
    x, y, ox, oy = pairs(seed, n, dx, dy)
    rng = np.random.default_rng(seed + 1)
    px, py = rng.standard_normal(dx), rng.standard_normal(dy)
    there = moved(moments_of(x, y, ox, oy), px, py)
    assert_same(there, moments_of(x, y, px, py))
    assert_same(moved(there, ox, oy), moments_of(x, y, ox, oy), rtol=1e-9)


@settings(max_examples=30, deadline=None)
@given(seeds, widths, widths, st.integers(1, 40))
def test_a_block_moves_in_place_as_moments_do(seed: int, dx: int, dy: int, n: int) -> None:
    x, y, ox, oy = pairs(seed, n, dx, dy)
    m = moments_of(x, y, ox, oy)
    there = moved(m, *means(m))
    product = m.c.copy()
    block = Block(n, product, np.stack([m.sx, m.ux]), np.stack([m.sy, m.uy]), np.array([m.a, m.b, m.d]))
    found = moved_block(block, m.sx / n, m.sy / n)
    assert found.product is product
    np.testing.assert_allclose(found.product, there.c, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.x, [there.sx, there.ux], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.y, [there.sy, there.uy], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.totals, [there.a, there.b, there.d], rtol=1e-9, atol=1e-9)
    block = Block(n, m.c.copy(), block.x, block.y, block.totals)
    centred = moved_block(block, m.sx / n, m.sy / n, centred=(True, False))
    assert not centred.x[0].any()
    np.testing.assert_array_equal(centred.y, found.y)


def test_moments_about_a_centre_are_not_copied_for_it() -> None:
    x, y, ox, oy = pairs(5, 20, 4, 3)
    m = moments_of(x, y, ox, oy)
    here, there = about(m, ox, oy), about(m, ox + 1, oy)
    assert here.gx is m.gx
    assert here.c is m.c
    assert there.gy is m.gy
    assert there.gx is not m.gx
    assert there.c is not m.c


def test_one_side_with_itself() -> None:
    x, y, ox, oy = pairs(3, 17, 4, 3)
    m = moments_of(x, y, ox, oy)
    assert_same(paired_with_itself(m, "x"), moments_of(x, x, ox, ox))
    assert_same(paired_with_itself(m, "y"), moments_of(y, y, oy, oy))
    with pytest.raises(FitError, match="'z'"):
        paired_with_itself(m, "z")


def test_scatter_about_the_mean_zero_and_elsewhere() -> None:
    x, y, ox, oy = pairs(4, 31, 3, 2)
    m = moments_of(x, y, ox, oy)
    whole = np.cov(np.hstack([x, y]).T, ddof=0) * 31
    c = centered(m)
    np.testing.assert_allclose(c.mean_x, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(c.mean_y, y.mean(0), rtol=1e-12)
    np.testing.assert_allclose(c.gx, whole[:3, :3], atol=1e-10)
    np.testing.assert_allclose(c.gy, whole[3:, 3:], atol=1e-10)
    np.testing.assert_allclose(c.c, whole[:3, 3:], atol=1e-10)
    r = raw(m)
    assert not r.mean_x.any()
    assert not r.mean_y.any()
    np.testing.assert_allclose(r.gx, x.T @ x, rtol=1e-11)
    np.testing.assert_allclose(r.c, x.T @ y, rtol=1e-11)
    e = about(m, np.ones(3), np.full(2, 5.0))
    np.testing.assert_allclose(e.c, (x - 1).T @ (y - 5), rtol=1e-11)
    np.testing.assert_allclose(e.gy, (y - 5).T @ (y - 5), rtol=1e-11)


def test_float32_rows_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", 16)
    x, y, ox, oy = pairs(5, 100, 5, 4)
    x32, y32 = x.astype(np.float32), y.astype(np.float32)
    exact = moments_of(x32.astype(np.float64), y32.astype(np.float64), ox, oy)
    m = moments_of(x32, y32, ox, oy)
    assert m.gx.dtype == m.sx.dtype == np.float64
    assert_same(m, exact, rtol=1e-6)
    assert not np.array_equal(m.gx, exact.gx), "float32 rows should be multiplied in float32"


def test_a_float32_origin_would_shift_the_sums() -> None:
    # 1000 +- 5 with an origin between two float32 numbers: the recorded origin must be the one
    # that was subtracted, or every later move is off by n times the difference.
    rng = np.random.default_rng(6)
    x = (1000 + 5 * rng.standard_normal((4000, 2))).astype(np.float32)
    origin = np.full(2, 1000.00002)
    m = moments_of(x, x, origin, origin)
    error = np.abs(m.sx / m.n - (x.astype(np.float64) - origin).mean(0))
    assert error.max() < 1e-7


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
def test_other_types_are_cast(dtype: type) -> None:
    rng = np.random.default_rng(7)
    x = rng.integers(-9, 9, (12, 3)).astype(dtype)
    m = moments_of(x, x, np.zeros(3), np.zeros(3))
    np.testing.assert_array_equal(m.gx, x.astype(np.float64).T @ x.astype(np.float64))


def test_no_rows_merge_like_any_part() -> None:
    x, y, ox, oy = pairs(8, 9, 2, 3)
    empty = moments_of(x[:0], y[:0], ox, oy)
    whole = moments_of(x, y, ox, oy)
    assert_same(merge(empty, whole), whole, rtol=0)
    with pytest.raises(FitError, match="no pairs"):
        means(empty)
    with pytest.raises(FitError, match="no pairs"):
        centered(empty)
    assert raw(empty).n == 0


def test_different_origins_do_not_merge() -> None:
    x, y, ox, oy = pairs(9, 9, 2, 3)
    here = moments_of(x, y, ox, oy)
    for other in (moments_of(x, y, ox + 1e-12, oy), moments_of(x, y, ox, oy + 1e-12)):
        with pytest.raises(FitError, match="different origins"):
            merge(here, other)
    with pytest.raises(FitError, match="different origins"):
        merge(here, moments_of(x[:, :1], y, ox[:1], oy))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_bad_row_is_named(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", 4)
    x = np.ones((10, 2), dtype=np.float32)
    y = x.copy()
    y[6, 1] = bad
    with pytest.raises(FitError, match="row 6"):
        moments_of(x, y, np.zeros(2), np.zeros(2))


def test_shapes_are_checked() -> None:
    x = np.ones((3, 2))
    with pytest.raises(FitError, match=r"\(4, 2\)"):
        moments_of(x, np.ones((4, 2)), np.zeros(2), np.zeros(2))
    with pytest.raises(FitError, match=r"\(3,\)"):
        moments_of(x, np.ones(3), np.zeros(2), np.zeros(1))
    with pytest.raises(FitError, match="origin_y"):
        moments_of(x, x, np.zeros(2), np.zeros(3))
    m = moments_of(x, x, np.zeros(2), np.zeros(2))
    with pytest.raises(FitError, match="new_origin_x"):
        moved(m, np.zeros(3), np.zeros(2))
    with pytest.raises(FitError, match="not finite"):
        about(m, np.array([0, np.nan]), np.zeros(2))


@settings(max_examples=20, deadline=None)
@given(seeds, st.lists(widths, min_size=1, max_size=4), widths, st.integers(1, 40))
def test_layers_end_to_end_are_the_rows_concatenated(seed: int, several: list[int], dy: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    rows = {k: rng.standard_normal((n, w)) + k for k, w in enumerate([*several, dy])}
    origins = {k: k + 0.3 * rng.standard_normal(v.shape[1]) for k, v in rows.items()}
    y = len(several)
    sums = BlockSums(origins, [(k, j) for k in rows for j in rows], dtype=np.float64)
    sums.add(rows)
    blocks = sums.blocks()
    cross = end_to_end([blocks[k, y] for k in range(y)])
    own = end_to_end([end_to_end([blocks[k, j] for k in range(y)]).swapped for j in range(y)])
    x, origin = (np.concatenate([part[k] for k in range(y)], axis=-1) for part in (rows, origins))
    got = assemble(origin, origins[y], cross, own, blocks[y, y])
    assert_same(got, moments_of(x, rows[y], origin, origins[y]))
    assert_same(paired_with_itself(got, "x"), moments_of(x, x, origin, origin))


def test_blocks_that_do_not_belong_together_are_not_laid_end_to_end() -> None:
    rng = np.random.default_rng(0)
    found = []
    for n in (5, 6, 6):
        sums = BlockSums({k: np.zeros(2) for k in "xy"}, [("x", "y")], dtype=np.float64)
        sums.add({k: rng.standard_normal((n, 2)) for k in "xy"})
        found.append(sums.blocks()["x", "y"])
    for wrong in (found[:2], found[1:]):
        with pytest.raises(FitError, match="different rows"):
            end_to_end(wrong)
    with pytest.raises(FitError, match="no blocks"):
        end_to_end([])

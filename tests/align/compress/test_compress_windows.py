"""The parts of a compress map without torch: layout of latents, windows, rates and baselines against hand counts."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.compress.baselines import fit_baselines, pca_features, strided_features
from align.compress.layout import Layout, candidates, containing, group_ends, groups_of, to_bfloat16
from align.compress.pack import BEFORE, pack
from align.compress.rate import rate_card, rate_of
from align.compress.score import score_windows
from align.compress.start import choose_start, source_basis
from align.compress.windows import Window, Windows
from align.layers import LayerPair
from align.scoring.rows import batches_of
from featstore.errors import FitError
from tests.support.planted import TEST, TRAIN, VAL, Planted, plant, rotation, spectrum_rows

PAIR = LayerPair("a", (1,), "b", 1)


def window(ends_x: list[int], ends_y: list[int], *, pairs: list[tuple[int, int]] | None = None) -> Window:
    x = np.arange(1, len(ends_x) + 1, dtype=np.float32)[:, None] * np.array([1.0, 10.0, 100.0], np.float32)
    paired = np.array(pairs or [], dtype=np.int64).reshape(-1, 2)
    ends = (np.array(side, dtype=np.int32) for side in (ends_x, ends_y))
    y, tokens = np.zeros((len(ends_y), 2), np.float32), np.zeros(len(x), np.int32)
    return Window(0, x, y, tokens, *ends, paired[:, 0], paired[:, 1])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    x = spectrum_rows(1200, 12, 1, decay=0.5)
    y = x @ rotation(12, 2) + 0.1 * np.random.default_rng(3).normal(size=x.shape)
    x[750] *= 100  # an attention sink, in a train document
    return plant(tmp_path_factory.mktemp("windows") / "s.zarr", x, y, documents=20)


def windows_of(planted: Planted, split: int, **options: Any) -> Windows:
    pairs = planted.store.pairs("a", "b").select(keep_sinks=bool(options.get("keep_sinks")))
    return Windows(planted.store, PAIR, pairs, split, **options)


# The layout.


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("stride", [1, 2, 7, 100])
@pytest.mark.parametrize(("latents", "dim"), [(1, 2), (4, 8), (32, 64), (7, 3)])
def test_every_token_is_in_one_group_and_no_latent_overflows(
    latents: int, dim: int, stride: int, positions: bool
) -> None:
    layout = Layout(latents, dim, stride, positions)
    for tokens in (1, 2, 5, 31, 32, 33, 260):
        groups = groups_of(layout, tokens)
        assert groups.first[0] == 0
        assert groups.stop[-1] == tokens
        assert np.array_equal(groups.first[1:], groups.stop[:-1])
        assert (groups.stop > groups.first).all()
        assert (groups.coordinates >= 1).all()
        # By latent, counted by hand: the segment a group lies in.
        edges = [m * tokens // latents for m in range(latents + 1)]
        for start, end in pairwise(edges):
            own = (groups.first >= start) & (groups.first < end)
            assert (groups.stop[own] <= end).all()
            assert int((groups.coordinates[own] + positions).sum()) <= dim
            room = own.sum() < dim // (1 + positions)
            assert not room or ((groups.stop - groups.first)[own] <= stride).all()


def test_a_layout_by_hand() -> None:
    groups = groups_of(Layout(2, 8, 2, positions=True), 7)
    # Segments of 3 and 4 tokens, two groups each: 8 numbers are 2 ends and 2 * 3 coordinates.
    assert groups.first.tolist() == [0, 1, 3, 5]
    assert groups.stop.tolist() == [1, 3, 5, 7]
    assert groups.coordinates.tolist() == [3, 3, 3, 3]
    assert groups_of(Layout(2, 8, 1, positions=False), 7).coordinates.tolist() == [2] * 7


def test_the_receiver_knows_where_groups_end() -> None:
    ends = np.array([3, 4, 9, 200, 1300])
    sent, nominal = Layout(1, 16, 1, positions=True), Layout(1, 16, 1, positions=False)
    groups = groups_of(sent, 5)
    known = group_ends(sent, groups, ends)
    assert known[:4].tolist() == [3, 4, 9, 200]
    # 1100 bytes in one step is 1104 in bfloat16.
    assert known[4] == 1304
    assert group_ends(nominal, groups_of(nominal, 5), ends).tolist() == [260, 520, 780, 1040, 1300]
    # An error does not travel: the sender counts from where the receiver is.
    far = np.arange(1, 40) * 301
    known = group_ends(Layout(1, 80, 1, positions=True), groups_of(Layout(1, 80, 1, positions=True), 39), far)
    assert np.abs(known - far).max() <= 1


def test_a_position_lies_in_the_group_that_ends_there_or_next() -> None:
    known = np.array([3, 4, 9], dtype=np.float32)
    assert containing(known, np.array([1, 3, 4, 5, 9, 12])).tolist() == [0, 0, 1, 2, 2, 2]


def test_bfloat16_is_torchs() -> None:
    import torch

    values = np.random.default_rng(0).normal(size=1000).astype(np.float32) * np.logspace(-8, 8, 1000, dtype=np.float32)
    values = np.concatenate([values, np.array([0, 256, 257, 258, 259, -257, 1e-30], np.float32)])
    assert np.array_equal(to_bfloat16(values), torch.from_numpy(values).bfloat16().float().numpy())


def test_layouts_that_cannot_be_meant() -> None:
    for wrong in ((0, 4, 1, True), (4, 0, 1, False), (4, 4, 0, True)):
        with pytest.raises(FitError, match="must be at least 1"):
            Layout(*wrong)
    with pytest.raises(FitError, match="no room beside a position"):
        Layout(4, 1, 1, positions=True)
    with pytest.raises(FitError, match="without source tokens"):
        groups_of(Layout(4, 4, 1, positions=True), 0)
    assert {layout.stride for layout in candidates(4, 8, 20)} == {1, 2, 4, 5}
    assert [layout.positions for layout in candidates(30, 1, 20)] == [False]


def test_groups_and_neighbours_of_a_batch() -> None:
    layout = Layout(2, 8, 2, positions=True)
    one = (np.ones((7, 3), np.float32), np.arange(1, 8) * 2, np.array([1, 2, 9, 14]))
    packed = pack(layout, [one, (one[0][:2], one[1][:2], one[2][:1])])
    assert packed.member[0].tolist() == [[0, 0], [1, 2], [3, 4], [5, 6]]
    assert packed.has[0].tolist() == [[True, False], [True, True], [True, True], [True, True]]
    assert packed.ends[0].tolist() == [2, 6, 10, 14]
    assert packed.near[0, :, BEFORE].tolist() == [0, 0, 2, 3]
    assert packed.seen[0].tolist() == [[False, False, True, True]] * 2 + [[True] * 4, [True, True, True, False]]
    assert packed.before_y[0].tolist() == [0, 1, 2, 9]
    assert packed.groups[1].tolist() == [True, True, False, False]
    assert not packed.x[1, 2:].any()
    assert not packed.seen[1, 1:].any()


# Windows.


def test_windows_hold_the_rows_that_were_planted(small: Planted) -> None:
    for split in (TRAIN, VAL, TEST):
        windows = windows_of(small, split)
        assert windows.numbers.tolist() == sorted(set(small.document[small.split == split].tolist()))
        assert windows.left_out == 0
        for found in windows:
            own = (small.document == found.number) & (np.arange(1200) != 750)
            np.testing.assert_array_equal(found.x, small.x[1][own].astype(np.float32))
            # The target has no sink there, so its row stays; a pair it is not.
            target = small.document == found.number
            np.testing.assert_array_equal(found.y, small.y[1][target].astype(np.float32))
            assert found.ends_y.tolist() == list(range(1, 61))
            np.testing.assert_array_equal(found.ends_x[found.paired_x], found.ends_y[found.paired_y])
            assert len(found.paired_x) == own.sum()


def test_pairs_are_in_the_order_of_the_linear_maps(small: Planted) -> None:
    for split in (TRAIN, TEST):
        pairs = small.store.pairs("a", "b").select(split)
        rows = list(batches_of(small.store, PAIR, pairs).blocks())
        windows = windows_of(small, split)
        assert windows.paired() == len(pairs)
        for side, name in (("x", "paired_x"), ("y", "paired_y")):
            ours = np.concatenate([getattr(w, side)[getattr(w, name)] for w in windows])
            np.testing.assert_array_equal(ours, np.concatenate([getattr(block, side) for block in rows]))


def test_kept_sinks_are_there(small: Planted) -> None:
    counts = [windows_of(small, TRAIN, keep_sinks=keep).sizes()[0].sum() for keep in (False, True)]
    assert counts == [int((small.split == TRAIN).sum()) - 1, int((small.split == TRAIN).sum())]
    masked = small.store.pairs("a", "b").select()
    assert Windows(small.store, PAIR, masked, TRAIN, keep_sinks=True).paired() == counts[0]


def test_targets_of_other_roles_are_left_out_and_all_sources_read(tmp_path: Path) -> None:
    x, y = (spectrum_rows(400, 6, seed) for seed in (1, 2))
    x[45] *= 1000
    # Of every window of twenty tokens the user wrote the first half; of the last document all.
    role = np.where(np.arange(400) % 20 < 10, 2, 3)
    role[380:] = 2
    planted = plant(tmp_path / "s.zarr", x, y, splits=[TRAIN] * 10 + [VAL] * 5 + [TEST] * 5, role=role)
    pairs = planted.store.pairs("a", "b").select(roles="assistant")
    for split, numbers in ((TRAIN, range(10)), (TEST, range(15, 19))):
        windows = Windows(planted.store, PAIR, pairs, split, roles=("assistant",))
        assert windows.numbers.tolist() == list(numbers)
        for found in windows:
            own = np.arange(20 * found.number, 20 * found.number + 20)
            np.testing.assert_array_equal(found.x, x[own[own != 45]].astype(np.float32))
            np.testing.assert_array_equal(found.y, y[own[10:]].astype(np.float32))
            assert found.ends_y.tolist() == list(range(11, 21))
            assert found.paired_y.tolist() == list(range(10))
            np.testing.assert_array_equal(found.ends_x[found.paired_x], found.ends_y)
    assert windows.left_out == 1


def test_a_window_of_sinks_alone_is_left_out(tmp_path: Path) -> None:
    x, y = (spectrum_rows(400, 6, seed) for seed in (1, 2))
    x[380:] *= 1000
    planted = plant(tmp_path / "s.zarr", x, y, splits=[TRAIN] * 10 + [VAL] * 5 + [TEST] * 5)
    windows = windows_of(planted, TEST)
    assert windows.numbers.tolist() == [15, 16, 17, 18]
    assert windows.left_out == 1
    assert windows_of(planted, TEST, keep_sinks=True).left_out == 0


def test_a_split_without_windows_is_refused(tmp_path: Path) -> None:
    x = spectrum_rows(200, 6, 1)
    planted = plant(tmp_path / "s.zarr", x, x, splits=[TRAIN] * 15 + [VAL] * 5)
    with pytest.raises(FitError, match="the test split has no window with tokens of both models; extract more"):
        windows_of(planted, TEST)


def test_the_order_is_a_function_of_seed_and_epoch(small: Planted) -> None:
    windows = windows_of(small, TRAIN)

    def order(seed: int, epoch: int) -> list[int]:
        return [w.number for batch in windows.shuffled(3, seed, epoch, 12) for w in batch]

    first = order(0, 1)
    assert first == order(0, 1)
    assert len({tuple(order(*key)) for key in ((0, 1), (0, 2), (1, 1))}) == 3
    n = len(windows)
    # Six batches are a round over sixteen windows; each round is over all of them.
    assert n == 16
    assert sorted(first[:n]) == sorted(first[n:]) == windows.numbers.tolist()
    assert first[:n] != first[n:]


def test_memory_is_bounded(small: Planted) -> None:
    one = windows_of(small, TRAIN)
    size = next(iter(one)).x.nbytes * 2
    few = windows_of(small, TRAIN, memory=3 * size)
    for a, b in zip(one, few, strict=True):
        np.testing.assert_array_equal(a.x, b.x)
    assert len(one._kept) == 16
    assert len(few._kept) == 3
    assert few._held == sum(w.x.nbytes + w.y.nbytes for w in few._kept.values())
    assert [w.number for w in one.some(300)] == [one.numbers[i * 16 // 5] for i in range(5)]
    assert len(list(one.some(10**6))) == 16


def test_several_source_layers_lie_side_by_side(tmp_path: Path) -> None:
    x, more, y = (spectrum_rows(400, 6, seed) for seed in (1, 2, 3))
    planted = plant(tmp_path / "s.zarr", {1: x, 2: more}, y)
    pairs = planted.store.pairs("a", "b").select()
    windows = Windows(planted.store, LayerPair("a", (1, 2), "b", 1), pairs, TEST)
    assert (windows.width_x, windows.width_y) == (12, 6)
    first = next(iter(windows))
    np.testing.assert_array_equal(first.x, np.hstack([x[:20], more[:20]]).astype(np.float32))


# Rates.


def test_rates_by_hand(small: Planted) -> None:
    rate = rate_of(windows_of(small, TRAIN), 4, 6)
    sent = asdict(rate)
    # Sixty tokens of a byte each, a vocabulary of 256, width 12; one token of sixteen windows is a sink.
    assert sent == {
        "windows": 16,
        "latent_bytes": 48.0,
        "text_bytes": 60.0,
        "token_id_bytes": 60.0,
        "raw_bytes": (60 - 1 / 16) * 24,
        "side_bytes": 64.0,
        "source_tokens": 60 - 1 / 16,
        "target_tokens": 60.0,
    }
    assert rate_card(rate)["latent_bytes_per_text_byte"] == 0.8
    for wrong in ((0, 4), (4, 0)):
        with pytest.raises(FitError, match="both must be at least 1"):
            rate_of(windows_of(small, TRAIN), *wrong)


# Baselines.


def test_pca_keeps_what_the_rate_allows() -> None:
    own = window([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], pairs=[(0, 0), (3, 3), (4, 4)])
    z = own.x
    # 12 numbers for 5 tokens are 2 coordinates each.
    assert pca_features(12, 3)(z, own).tolist() == [[1, 10, 0], [4, 40, 0], [5, 50, 0]]
    # 2 numbers for 5 tokens: tokens 0 and 3 keep one, and lend it to those behind them.
    assert pca_features(2, 3)(z, own).tolist() == [[1, 0, 0], [4, 0, 0], [4, 0, 0]]
    assert pca_features(1000, 3)(z, own).tolist() == z[[0, 3, 4]].tolist()


def test_strided_takes_the_last_sample_at_or_before() -> None:
    own = window([2, 4, 6, 8, 10, 12], [1, 4, 5, 9, 10, 12])
    # Two samples in the middle of the halves: tokens 1 and 4, which end at 4 and 10.
    assert strided_features(2, 2)(own.x, own).tolist() == [[2, 20]] * 4 + [[5, 50]] * 2
    assert strided_features(10, 1)(own.x, own)[:, 0].tolist() == [1, 2, 2, 4, 5, 6]


def test_baselines_with_all_coordinates_are_the_ridge_map(small: Planted) -> None:
    train, val, test = (windows_of(small, split) for split in (TRAIN, VAL, TEST))
    basis, mean = source_basis(train)
    codecs = fit_baselines(train, val, 60, 12, basis, mean.astype(np.float32))
    pairs = small.store.pairs("a", "b").select(TRAIN)
    zero = small.store.rows("b", 1)[pairs.row_target].mean(0)
    scored = score_windows(test, codecs, zero)
    for name in ("pca", "strided"):
        assert scored[name][0]["r2"] > 0.9, name
    assert scored["pca"][0]["all_positions"] is None
    assert scored["strided"][0]["all_positions"] is not None
    few = score_windows(test, fit_baselines(train, val, 10, 12, basis, mean.astype(np.float32)), zero)
    assert 0.1 < few["pca"][0]["r2"] < 0.8
    assert few["strided"][0]["r2"] < few["pca"][0]["r2"]
    with pytest.raises(FitError, match="both must be at least 1"):
        fit_baselines(train, val, 0, 4, basis, mean.astype(np.float32))


# The start.


def test_directions_are_principal_and_of_unit_variance(small: Planted) -> None:
    train = windows_of(small, TRAIN)
    basis, mean = source_basis(train, inputs=4)
    x = np.concatenate([w.x for w in train])
    np.testing.assert_allclose(mean, x.mean(0), atol=1e-5)
    z = (x - mean) @ basis
    variance, total = z.var(0), np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]
    np.testing.assert_allclose(variance, total[:4] / (total[:4] + 0.05 * total.mean()), rtol=1e-3)
    assert np.abs(np.corrcoef(z.T) - np.eye(4)).max() < 1e-3


def test_the_layout_follows_the_data(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    shared = np.repeat(rng.normal(size=(40, 8)), 30, axis=0)
    noise = rng.normal(size=(1200, 8))
    # The target is the same throughout a window, and the source that under noise; or it differs from token to token.
    for name, x, y, latents, stride in (("same", shared + 2 * noise, shared, 2, 15), ("apart", noise, noise, 30, 1)):
        planted = plant(tmp_path / f"{name}.zarr", x, y, documents=40)
        start = choose_start(windows_of(planted, TRAIN), windows_of(planted, VAL), latents, 8)
        assert start.layout.stride == stride, name
        assert start.val_r2 > 0.3


def test_no_torch_is_needed_here() -> None:
    names = ("layout", "windows", "start", "rate", "baselines", "score", "pack", "report")
    imports = "; ".join(f"import align.compress.{name}" for name in names)
    code = f"import sys; {imports}; sys.exit(3 * ('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Floors and ceilings of measures: what is replaced, by what, and what that shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest

from align.similarity.measures.base import Measure, Resampling, Result, Tick, Wanted
from align.similarity.measures.controls import ceilings, floors, halves, noise, rounded, shuffled
from align.similarity.measures.predictability import RidgeR2
from align.similarity.measures.shape import angular_distance, procrustes_distance
from align.similarity.measures.subspace import svcca
from featstore.errors import FitError, NonFiniteStateError, SpecError
from featstore.store.format.elements import FORMATS
from tests.support.planted import rotation, spectrum_rows

MEASURES: list[Measure] = [svcca(0.9), procrustes_distance(), angular_distance(), RidgeR2()]


class Recorder:
    """A measure that keeps what it was given and says which layers it compared."""

    name = "recorder"
    title = "Recorder"
    closer: Literal["higher", "lower"] = "higher"
    symmetric = False
    bounds: tuple[float | None, float | None] = (None, None)

    def __init__(self) -> None:
        self.calls: list[tuple[list[Any], list[tuple[int, int]], Resampling | None]] = []

    def __call__(
        self, layers: Sequence[Any], wanted: Wanted, draws: Resampling | None, tick: Tick
    ) -> dict[tuple[int, int], Result]:
        self.calls.append((list(layers), list(wanted), draws))
        tick(0.25)
        tick(0.75)
        mean = float(layers[0][:, 0].mean())
        return {pair: Result(mean + pair[0] + 10 * pair[1], draws=np.zeros(3)) for pair in wanted}


def models(n: int = 400, *, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Two layers of width 8 and three of width 6 that share a state."""
    state = spectrum_rows(n, 8, seed, decay=0.5)
    xs = [(state @ rotation(8, k)).astype(np.float32) for k in range(2)]
    return xs, [(state @ rotation(8, 10 + k, 6) + 0.1 * k).astype(np.float32) for k in range(3)]


def test_floors_replace_the_second_model_alone_and_ask_for_the_cross_block() -> None:
    xs, ys = models()
    recorder, done = Recorder(), []
    document = np.arange(400) // 7
    found = floors(recorder, xs, ys, seed=3, document=document, tick=done.append)
    assert sum(done) == pytest.approx(1)
    assert list(found) == ["shuffled", "noise"]
    for layers, wanted, draws in recorder.calls:
        assert all(a is b for a, b in zip(layers[:2], xs, strict=True))
        assert wanted == [(i, 2 + j) for i in range(2) for j in range(3)]
        assert draws is not None
        assert draws.counts.shape == (0, 58)
        assert np.array_equal(draws.document, document)
        assert all(a.shape == b.shape and a.dtype == np.float32 for a, b in zip(layers[2:], ys, strict=True))
    mean = float(xs[0][:, 0].mean())
    assert [[one.value for one in row] for row in found["noise"]] == [
        [mean + i + 10 * (2 + j) for j in range(3)] for i in range(2)
    ]
    assert all(one.draws is None for table in found.values() for row in table for one in row)
    floors(recorder, xs, ys)
    assert recorder.calls[-1][2] is None
    for a, b in zip(recorder.calls[0][0][2:], shuffled(ys, 3), strict=True):
        assert np.array_equal(a, b)
    for a, b in zip(recorder.calls[1][0][2:], noise(ys, 3), strict=True):
        assert np.array_equal(a, b)


def test_shuffled_rows_are_the_same_rows_in_one_order_for_all_layers() -> None:
    _, ys = models()
    first, second = shuffled(ys, 1), shuffled(ys, 1)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    order = [int(np.flatnonzero((ys[0] == row).all(axis=1))[0]) for row in first[0]]
    assert sorted(order) == list(range(400))
    assert np.mean(np.array(order) == np.arange(400)) < 0.05
    assert all(np.array_equal(a, y[order]) for a, y in zip(first, ys, strict=True))
    assert not np.array_equal(first[0], shuffled(ys, 2)[0])


def test_noise_has_the_covariance_and_mean_of_the_rows_and_nothing_of_their_order() -> None:
    _, ys = models(3000)
    ys = [y + np.float32(2) for y in ys]
    found = noise(ys, 5)
    both, theirs = np.hstack(found), np.hstack(ys)
    scale = np.abs(np.cov(theirs.T)).max()
    # Between layers, too: their common covariance is of rank 8.
    assert np.abs(np.cov(both.T) - np.cov(theirs.T)).max() < 0.12 * scale
    assert np.trace(np.cov(both.T)) == pytest.approx(np.trace(np.cov(theirs.T)), rel=0.05)
    assert np.abs(both.mean(axis=0) - theirs.mean(axis=0)).max() < 0.1 * math.sqrt(scale)
    assert np.abs(np.corrcoef(both.T, theirs.T)[:18, 18:]).max() < 0.1
    assert np.array_equal(both, np.hstack(noise(ys, 5)))
    assert not np.array_equal(both, np.hstack(noise(ys, 6)))
    # Later blocks of rows have numbers of their own.
    assert np.abs(np.corrcoef(both[:500, 0], both[512:1012, 0])[0, 1]) < 0.2


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_a_planted_relation_lies_between_floor_and_ceiling(measure: Measure) -> None:
    xs, ys = models()
    ys = [(y + 0.3 * np.random.default_rng(k).normal(size=y.shape)).astype(np.float32) for k, y in enumerate(ys)]
    document = np.arange(400) // 10
    low = floors(measure, xs, ys, document=document)
    high = ceilings(measure, xs, ys, "bfloat16", document=document, twice=(xs, ys))
    value = measure([*xs, *ys], [(0, 2)], None, lambda _: None)[0, 2].value
    sign = 1 if measure.closer == "higher" else -1
    assert sign * low["shuffled"][0][0].value < sign * low["noise"][0][0].value + 0.2
    assert sign * low["noise"][0][0].value < sign * value < sign * high["rounding"][0][0].value
    assert sign * high["rounding"][1][2].value <= sign * high["twice"][1][2].value
    best = 1.0 if measure.closer == "higher" else 0.0
    assert high["twice"][0][1].value == pytest.approx(best, abs=1e-5)
    assert high["rounding"][0][1].value == pytest.approx(best, abs=0.01)
    assert high["rounding"][0][1].value != high["twice"][0][1].value


def test_ceilings_set_every_layer_against_its_own_other_version() -> None:
    xs, ys = models()
    recorder, done = Recorder(), []
    again = ([x + np.float32(1) for x in xs], [y + np.float32(1) for y in ys])
    origins = ([np.full(8, 50.0)] * 2, [np.full(6, 3.0)] * 3)
    found = ceilings(recorder, xs, ys, "float16", origins=origins, twice=again, seed=4, tick=done.append)
    assert sum(done) == pytest.approx(1)
    assert {name: [len(side) for side in table] for name, table in found.items()} == {
        "rounding": [2, 3],
        "twice": [2, 3],
    }
    assert [call[1] for call in recorder.calls] == [[(0, 2), (1, 3)], [(0, 3), (1, 4), (2, 5)]] * 2
    for call, side in zip(recorder.calls, (xs, ys, xs, ys), strict=True):
        assert all(a is b for a, b in zip(call[0][: len(side)], side, strict=True))
    assert recorder.calls[3][0][3] is again[1][0]
    expected = rounded(ys[1], "float16", origin=origins[1][1], seed=5)
    assert np.array_equal(recorder.calls[1][0][4], expected)
    ceilings(recorder, xs, ys, "float16", tick=done.append)
    assert sum(done) == pytest.approx(2)


@pytest.mark.parametrize("form", ["bfloat16", "float16"])
@pytest.mark.parametrize("shift", [0.0, 700.0])
def test_stored_rows_are_moved_within_what_the_store_rounds_to_them(form: str, shift: float) -> None:
    kind, rng = FORMATS[form], np.random.default_rng(6)
    # Spread over several steps, as wide as they are: 4 at 700 in bfloat16.
    true = (rng.normal(size=(600, 20)) * np.logspace(*((1, 2) if shift else (-3, 1)), 20) + shift).astype(np.float32)
    true[0, :4] = [0.0, -0.0, 1.0, -2.0]
    stored = kind.decode(kind.encode(true).stored)
    origin = np.full(20, shift, dtype=np.float32)
    moved = rounded((stored - origin).astype(np.float32), form, origin=origin, seed=1) + origin
    same = kind.encode(moved).stored == kind.encode(stored).stored
    # Ties and float32 rounding at the very edge of a step aside.
    assert same.mean() > 0.998
    assert np.mean(moved != stored) > 0.95
    # As far as the store itself moved them, in either direction.
    ours, theirs = (moved - stored)[1:], (true - stored)[1:]
    for column in (slice(0, 10), slice(10, 20)):
        assert np.sqrt(np.mean(ours[:, column] ** 2)) == pytest.approx(
            np.sqrt(np.mean(theirs[:, column] ** 2)), rel=0.1
        )
    assert abs(np.mean(np.sign(ours))) < 0.05
    assert np.array_equal(moved, rounded(stored - origin, form, origin=origin, seed=1) + origin)
    assert not np.array_equal(moved, rounded(stored - origin, form, origin=origin, seed=2) + origin)


def test_zero_and_steps_of_two_sizes_are_moved_to_both_sides() -> None:
    rows = np.tile(np.array([[0.0, 1.0, -1.0]], dtype=np.float32), (4000, 1))
    moved = rounded(rows, "bfloat16")
    # Below 1 a bfloat16 step is 2^-8, above 2^-7.
    assert -(2**-9) <= moved[:, 1].min() - 1 < -0.9 * 2**-9
    assert 0.9 * 2**-8 < moved[:, 1].max() - 1 <= 2**-8
    assert -(2**-8) <= moved[:, 2].min() + 1 < -0.9 * 2**-8
    assert 0.9 * 2**-9 < moved[:, 2].max() + 1 <= 2**-9
    assert moved[:, 0].min() < 0 < moved[:, 0].max()
    assert np.abs(moved[:, 0]).max() < 1e-38


@pytest.mark.parametrize("form", ["bfloat16", "float16", "int8", "fp8"])
def test_rows_that_the_format_changes_are_encoded_once(form: str) -> None:
    kind = FORMATS[form]
    rows = np.random.default_rng(7).normal(size=(200, 16)).astype(np.float32) * np.float32(3)
    from featstore.store.format.elements import column_scale_of

    scale = column_scale_of(rows) if kind.column_scaled else None
    encoded = kind.encode(rows, scale)
    expected = kind.decode(encoded.stored, encoded.row_scale, scale)
    assert np.array_equal(rounded(rows, kind), expected)
    assert not np.array_equal(expected, rows)


def test_scaled_rows_that_hold_the_format_already_are_moved_within_a_step() -> None:
    rng = np.random.default_rng(8)
    # Elements of int8 whose scales come out the same again: the largest one, which only moves inwards.
    rows = np.where(rng.random((500, 16)) < 0.5, np.float32(127), np.float32(-127))
    moved = rounded(rows, "int8")
    assert np.abs(moved - rows).max() <= 0.5
    assert np.abs(moved - rows).mean() == pytest.approx(1 / 8, abs=0.01)
    assert np.abs(moved).max() <= 127
    kind = FORMATS["fp8"]
    encoded = kind.encode(rng.normal(size=(500, 16)).astype(np.float32))
    stored = kind.decode(encoded.stored, encoded.row_scale)
    share = np.abs(rounded(stored, "fp8") - stored) / np.abs(stored)
    assert 0.02 < share.mean() < 0.04
    assert share[np.abs(stored) > 0.1].max() <= 1 / 16


def test_float32_rows_are_their_own_rounding() -> None:
    rows = np.random.default_rng(9).normal(size=(30, 4)).astype(np.float32)
    assert np.array_equal(rounded(rows, "float32"), rows)


def test_halves_keep_documents_whole_and_report_the_largest_difference() -> None:
    xs, ys = models()
    document = np.repeat(np.arange(50), 8)
    recorder, done = Recorder(), []
    found = halves(recorder, xs, ys, document=document, tick=done.append)
    assert sum(done) == pytest.approx(1)
    (first, wanted, draws), (second, _, _) = recorder.calls
    assert wanted == [(i, 2 + j) for i in range(2) for j in range(3)]
    assert len(first[0]) == len(second[0]) == 200
    assert draws is not None
    assert draws.counts.shape == (0, 25)
    rows = [int(np.flatnonzero((xs[0] == row).all(axis=1))[0]) for part in (first, second) for row in part[0]]
    assert sorted(rows) == list(range(400))
    assert not set(document[rows[:200]]) & set(document[rows[200:]])
    apart = abs(first[0][:, 0].mean() - second[0][:, 0].mean())
    assert found.largest.value == pytest.approx(apart, rel=1e-6)
    assert found.largest.facts is not None
    assert (found.largest.facts["rows_first"], found.largest.facts["undefined"]) == (200, 0)
    halves(recorder, xs, ys)
    assert np.array_equal(recorder.calls[-2][0][0], xs[0][:200])
    assert recorder.calls[-1][2] is None


def test_the_largest_difference_names_its_layers() -> None:
    xs, ys = models(600)
    ys[2][300:] = np.random.default_rng(0).normal(size=(300, 6))
    found = halves(angular_distance(), xs, ys)
    assert found.largest.facts is not None
    assert found.largest.facts["layer_y"] == 2
    i = int(found.largest.facts["layer_x"])
    apart = abs(found.first[i][2].value - found.second[i][2].value)
    assert found.largest.value == pytest.approx(apart)
    assert apart > 0.5


def test_halves_of_what_is_undefined_say_why() -> None:
    xs, ys = models(100)
    found = halves(svcca(1.0), xs, ys)
    assert math.isnan(found.largest.value)
    assert "50 rows" in str(found.largest.reason)


def test_what_does_not_fit_is_refused() -> None:
    xs, ys = models(100)
    measure = angular_distance()
    for call in (floors, halves):
        with pytest.raises(FitError, match=r"layers of [0-9]+, [0-9]+ rows"):
            call(measure, xs, [y[:90] for y in ys])
        with pytest.raises(FitError, match="0 and 3 layers"):
            call(measure, [], ys)
        with pytest.raises(FitError, match="99 document labels"):
            call(measure, xs, ys, document=np.zeros(99, dtype=np.int64))
    with pytest.raises(FitError, match="single document"):
        halves(measure, xs, ys, document=np.zeros(100, dtype=np.int64))
    with pytest.raises(SpecError, match="float12"):
        ceilings(measure, xs, ys, "float12")
    with pytest.raises(FitError, match=r"origins of \[1, 3\] layers"):
        ceilings(measure, xs, ys, "bfloat16", origins=([xs[0][0]], [y[0] for y in ys]))
    with pytest.raises(FitError, match="another shape"):
        ceilings(measure, xs, ys, "bfloat16", twice=([x[:50] for x in xs], ys))
    with pytest.raises(NonFiniteStateError, match="row 0"):
        rounded(np.full((1, 1), 1e6, dtype=np.float32), "float16")


def test_halves_of_uneven_documents_are_of_about_equal_rows() -> None:
    xs, ys = models(303)
    # Every second document is long: alternating would put 300 rows against 3.
    document = np.repeat(np.arange(6), [100, 1, 100, 1, 100, 1])
    facts = halves(Recorder(), xs, ys, document=document).largest.facts
    assert facts is not None
    assert facts["rows_first"] + facts["rows_second"] == 303
    assert {facts["rows_first"], facts["rows_second"]} == {200, 103}


def test_layers_that_are_stored_alike_are_moved_apart() -> None:
    kind = FORMATS["bfloat16"]
    rows = kind.decode(kind.encode(np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)).stored)
    recorder = Recorder()
    ceilings(recorder, [rows, rows], [rows], "bfloat16")
    given = recorder.calls[0][0]
    assert not np.array_equal(given[2], given[3])


def test_rows_about_any_origin_are_known_as_stored() -> None:
    # What was taken off and is put back comes back with the rounding of float32, which is no rounding of the store's.
    kind, rng = FORMATS["bfloat16"], np.random.default_rng(1)
    stored = kind.decode(kind.encode(rng.normal(size=(200, 8)).astype(np.float32)).stored)
    origin = rng.normal(size=8).astype(np.float32)
    rows = stored - origin
    assert (rows + origin != stored).any()
    step = np.abs(stored) * 2**-8
    assert (np.abs(rounded(rows, "bfloat16", origin=origin) - rows) > 0.1 * step).mean() > 0.7


def test_the_largest_element_is_moved_to_both_sides() -> None:
    moved = rounded(np.full((2000, 1), 65504, dtype=np.float32), "float16")
    # Its step is 32, and there is no next element.
    assert 65504 - 16 <= moved.min() < 65504 - 14
    assert 65504 + 14 < moved.max() <= 65504 + 16


def test_pairs_of_layers_that_are_undefined_on_a_half_are_counted() -> None:
    class Partly(Recorder):
        def __call__(self, *args: Any) -> dict[tuple[int, int], Result]:
            found = super().__call__(*args)
            return found | {pair: Result(math.nan, "no") for pair in found if pair == (1, 3)}

    xs, ys = models(100)
    found = halves(Partly(), xs, ys)
    assert found.largest.facts is not None
    assert found.largest.facts["undefined"] == 1
    assert math.isfinite(found.largest.value)


def test_column_scales_are_those_of_the_rows_with_their_origin() -> None:
    from featstore.store.format.elements import column_scale_of

    kind, rows = FORMATS["int8"], np.random.default_rng(2).normal(size=(60, 4)).astype(np.float32)
    origin = np.full(4, 40.0, dtype=np.float32)
    scale = column_scale_of(rows + origin)
    encoded = kind.encode(rows + origin, scale)
    expected = kind.decode(encoded.stored, encoded.row_scale, scale) - origin
    np.testing.assert_array_equal(rounded(rows, kind, origin=origin), expected)


def test_a_second_reading_of_other_widths_is_refused() -> None:
    xs, ys = models(100)
    with pytest.raises(FitError, match="another shape"):
        ceilings(angular_distance(), xs, ys, "bfloat16", twice=([x[:, :5] for x in xs], ys))

"""The streamed scan: the naive formulas, the same bits whoever works on it and dies, in the memory it planned."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import align.similarity.scan.planning as planning_module
import align.similarity.scan.streaming as streaming
import align.similarity.scan.worker as worker
from align.execution.cluster import Cluster
from align.execution.processes import Processes
from align.execution.threads import Threads
from align.moments.scatter import means, moments_of, moved
from align.similarity.scan.checkpoint import Kept, discard, read_blocks, write_block
from align.similarity.scan.partials import Adder, Partial, Rows, UnusableRow, nothing, terms_of
from align.similarity.scan.planning import SLOTS, Selection, Site, plan
from align.similarity.scan.streaming import stream
from align.similarity.scan.terms import Terms, similarity
from align.similarity.scan.worker import sum_run
from align.solvers.row_effects import Documents
from featstore.errors import (
    CorruptDataError,
    FitError,
    NonFiniteStateError,
    PairingError,
    SpecError,
    StoreAccessError,
    StoreStateError,
    WorkersError,
)
from featstore.store import Store, open_store
from featstore.store.inspect.summary import ranks_of
from tests.support import ROOT
from tests.support.planted import Planted, plant, spectrum_rows

SITES = [Site("a", 0, source=True), Site("a", 1, source=True), Site("a", 2, source=True),
         Site("b", 0, source=False), Site("b", 2, source=False)]  # fmt: skip
N = 700
ROWS: dict[str, Any] = {"estimator": "debiased-rows", "quiet": True}


def hsic1(x: Any, y: Any) -> float:
    """Song et al. (2012), as printed: zero diagonals, all n x n terms."""
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    n, one = len(k), np.ones(len(k))
    total = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return float((total - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3)))


def stored(x: Any) -> Any:
    """What float32 makes of rows, centred: HSIC does not depend on where the origin is, but its rounding does."""
    x = np.asarray(x, np.float32).astype(np.float64)
    return x - x.mean(0)


def naive(layers: list[Any], hsic: Callable[[Any, Any], float]) -> np.ndarray:
    layers = [stored(x) for x in layers]
    own = [hsic(x, x) for x in layers]
    return np.array([[hsic(x, y) / math.sqrt(own[i] * own[j]) for j, y in enumerate(layers)]
                     for i, x in enumerate(layers)])  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    rng = np.random.default_rng(0)
    core = rng.normal(size=(N, 12))

    def mix(width: int, noise: float, mean: float = 0.0) -> Any:
        rows = core @ rng.normal(size=(12, width)) + noise * rng.normal(size=(N, width))
        return rows + mean * rows.std() * rng.normal(size=width)

    x = {0: mix(20, 3.0), 1: mix(20, 1.0, mean=10.0), 2: spectrum_rows(N, 20, 5, decay=2.0)}
    y = {0: mix(28, 2.0, mean=10.0), 2: mix(28, 0.5)}
    return plant(tmp_path_factory.mktemp("streaming") / "s.zarr", x, y)


def layers_of(planted: Planted) -> list[Any]:
    return [*planted.x.values(), *planted.y.values()]


def selection_of(planted: Planted, *, keep_sinks: bool = False) -> Selection:
    return Selection(str(planted.path), planted.store.fingerprint, "a", "b", "end", keep_sinks)


@pytest.fixture(scope="module")
def executor() -> Iterator[Any]:
    with Threads(2) as threads:
        yield threads


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many runs of several cuts each, in a small store."""
    monkeypatch.setattr(planning_module, "CUT_ROWS", 16)
    monkeypatch.setattr(planning_module, "_LONGEST_RUN", 64)
    monkeypatch.setattr(streaming, "CHECKPOINT_SECONDS", 0.0)
    # No power cut will hit a test.
    monkeypatch.setattr(os, "fsync", lambda _: None)


def scanned(planted: Planted, executor: Any, **options: Any) -> Terms:
    """Over all pairs of rows, unless told otherwise: sums by document have a file of their own."""
    return stream(
        selection_of(planted), SITES, executor=executor, quiet=True, **{"estimator": "debiased-rows", **options}
    )


def bits(terms: Terms) -> list[Any]:
    return [value.tobytes() if isinstance(value, np.ndarray) else value for value in vars(terms).values()]


class Ticks(list[float]):
    """Stands in for the progress display; may do something at a given tick."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = 0, act: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.total = 0.0

        @contextmanager
        def progress(label: str, total: float, unit: str, *, quiet: bool) -> Iterator[Callable[[float], None]]:
            self.total = total
            assert unit == "rows"

            def tick(done: float) -> None:
                self.append(done)
                if len(self) == at:
                    act()

            yield tick

        monkeypatch.setattr(streaming, "progress", progress)


# What comes out ------------------------------------------------------------------------------------------------------


def test_every_pair_of_layers_equals_the_naive_formulas(planted: Planted, executor: Any) -> None:
    terms = scanned(planted, executor)
    assert terms.n == N
    assert terms.batched is None
    values, reasons = similarity(terms, "debiased-rows")
    assert reasons == {}
    np.testing.assert_allclose(values, naive(layers_of(planted), hsic1), atol=1e-6)
    np.testing.assert_array_equal(values, values.T)
    np.testing.assert_allclose(np.diag(values), 1, atol=1e-12)
    values, _ = similarity(terms, "biased")
    np.testing.assert_allclose(values, naive(layers_of(planted), lambda x, y: float(((x.T @ y) ** 2).sum())), atol=1e-6)


@pytest.mark.parametrize("memory", [260_000, 90_000])
def test_groups_runs_and_cuts_do_not_matter(planted: Planted, executor: Any, short: None, memory: int) -> None:
    widths = [20, 20, 20, 28, 28]
    cuts = plan(widths, N, memory=memory)
    assert len(cuts.groups) > 1
    assert len(cuts.runs) > 8
    terms = scanned(planted, executor, memory=memory)
    np.testing.assert_allclose(similarity(terms, "debiased-rows")[0], naive(layers_of(planted), hsic1), atol=1e-6)
    whole = scanned(planted, executor)
    for name in ("fro", "d", "a", "mean", "effective_rank", "participation_ratio"):
        np.testing.assert_allclose(getattr(terms, name), getattr(whole, name), rtol=1e-6)


def test_whole_numbers_give_the_same_figures_in_any_cut(
    tmp_path: Path, executor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No product is rounded, so neither a row left out nor one taken twice could hide.
    rng = np.random.default_rng(0)
    x, y = (rng.integers(-4, 5, size=(400, 6)).astype(float) for _ in range(2))
    planted = plant(tmp_path / "s.zarr", {0: x}, {0: y + x})
    monkeypatch.setattr("featstore.store.Store.origin", lambda *_: np.zeros(6))
    found = []
    for cut, run in ((4096, 4096), (61, 61), (7, 21)):
        monkeypatch.setattr(planning_module, "CUT_ROWS", cut)
        monkeypatch.setattr(planning_module, "_LONGEST_RUN", run)
        terms = stream(
            selection_of(planted), [SITES[0], SITES[3]], executor=executor, estimator="debiased-rows", quiet=True
        )
        found.append(json.dumps([terms.fro.tolist(), terms.d.tolist(), terms.a.tolist()]))
    assert len(set(found)) == 1


def test_terms_far_from_the_origin_are_those_of_moments_moved_to_the_mean() -> None:
    rng = np.random.default_rng(3)
    # Eighths: their float32 products and sums are exact, so that what is left to see is the formulas.
    x, y = (rng.integers(-16, 17, size=(60, w)).astype(np.float32) / 8 for w in (5, 7))
    far = tuple(rng.integers(4, 17, size=w).astype(np.float32) / sign for w, sign in ((5, 8), (7, -8)))
    blocks = {}
    for name, rows, widths in (("xx", [x], [[5]]), ("yy", [y], [[7]]), ("xy", [x, y], [[5], [7]])):
        adder = Adder(widths[0], widths[1] if len(widths) > 1 else None, 60)
        # About an origin that is not the mean: what moving it takes must show.
        adder.add([r + o for r, o in zip(rows, far if name != "yy" else far[1:], strict=False)])
        blocks[name] = terms_of(adder.total, widths, [np.full(w[0], 3.0) for w in widths[:1]], ranks=True)
    m = moments_of((x + far[0]).astype(float), (y + far[1]).astype(float), np.zeros(5), np.zeros(7))
    m = moved(m, *means(m))
    for name, c, d in (("xx", m.gx, m.aa), ("yy", m.gy, m.bb), ("xy", m.c, m.d)):
        assert blocks[name]["fro"][0, 0] == pytest.approx(float((c**2).sum()), rel=1e-12)
        assert blocks[name]["d"][0, 0] == pytest.approx(d, rel=1e-12)
    assert blocks["xx"]["a"][0] == pytest.approx(m.a, rel=1e-12)
    assert blocks["yy"]["a"][0] == pytest.approx(m.b, rel=1e-12)
    assert blocks["xx"]["mean"][0] == pytest.approx(
        np.linalg.norm(3 + (x + far[0]).mean(0, dtype=np.float64)), rel=1e-12
    )
    assert "a" not in blocks["xy"]


def test_ranks_are_those_of_the_rows(planted: Planted, executor: Any, short: None) -> None:
    terms = scanned(planted, executor, memory=260_000)
    expected = np.array([ranks_of(np.asarray(x, np.float32)) for x in layers_of(planted)])
    np.testing.assert_allclose(terms.effective_rank, expected[:, 0], rtol=1e-5)
    np.testing.assert_allclose(terms.participation_ratio, expected[:, 1], rtol=1e-5)
    assert np.isnan(scanned(planted, executor, ranks=False).effective_rank).all()


def test_states_that_do_not_vary_are_undefined_with_a_reason(
    tmp_path: Path, executor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = spectrum_rows(300, 8, 1)
    planted = plant(tmp_path / "s.zarr", {0: x, 1: np.full((300, 8), 3.3)}, {0: x})
    sites = [SITES[0], SITES[1], SITES[3]]
    # About an origin that is not their value, what is left of such rows is rounding.
    whole = Store.origin
    monkeypatch.setattr(Store, "origin", lambda *site: whole(*site) + 0.1)
    terms = stream(selection_of(planted), sites, executor=executor, estimator="minibatch", batch=50, quiet=True)
    for estimator in ("debiased-rows", "biased", "minibatch"):
        values, reasons = similarity(terms, estimator)
        assert np.isnan(values[1]).all()
        assert np.isnan(values[:, 1]).all()
        assert values[0, 2] == pytest.approx(1)
        assert set(reasons) == {(0, 1), (1, 1), (1, 2)}
        assert reasons[1, 2] == "the first set of states does not vary"
        assert reasons[0, 1] == "the second set of states does not vary"
    assert math.isnan(terms.effective_rank[1])
    assert math.isnan(terms.participation_ratio[1])


def test_sinks_are_in_only_where_they_are_kept(tmp_path: Path, executor: Any) -> None:
    x = spectrum_rows(300, 8, 1)
    x[5::30] *= 1000
    planted = plant(tmp_path / "s.zarr", {0: x}, {0: x})
    found = [
        stream(selection_of(planted, keep_sinks=k), SITES[:1], executor=executor, quiet=True).n for k in (False, True)
    ]
    assert found == [290, 300]


def test_rows_of_other_roles_are_left_out(tmp_path: Path, executor: Any) -> None:
    x = spectrum_rows(300, 8, 1)
    planted = plant(tmp_path / "s.zarr", {0: x}, {0: x}, role=np.arange(300) // 10 % 2 + 2)
    terms = stream(replace(selection_of(planted), roles=("assistant",)), SITES[:1], executor=executor, quiet=True)
    assert terms.n == 150
    alone = plant(tmp_path / "alone.zarr", {0: x[np.arange(300) // 10 % 2 == 1]}, {0: x[:150]}, documents=10)
    expected = stream(selection_of(alone), SITES[:1], executor=executor, quiet=True)
    np.testing.assert_allclose(terms.effective_rank, expected.effective_rank, rtol=1e-6)


# Batches -------------------------------------------------------------------------------------------------------------


def test_minibatch_cka_equals_its_formula_over_dealt_rows(planted: Planted, executor: Any) -> None:
    terms = scanned(planted, executor, estimator="minibatch", batch=64, seed=3)
    assert (terms.batches, terms.batch_rows) == (10, 640)
    order = np.random.default_rng((3, 0)).permutation(N)[:640].reshape(10, 64)
    expected = naive(layers_of(planted), lambda x, y: float(np.mean([hsic1(x[b], y[b]) for b in order])))
    np.testing.assert_allclose(similarity(terms, "minibatch")[0], expected, atol=1e-6)
    # The exact figures come from the same pass.
    np.testing.assert_allclose(similarity(terms, "debiased-rows")[0], naive(layers_of(planted), hsic1), atol=1e-6)
    other = scanned(planted, executor, estimator="minibatch", batch=64, seed=4)
    assert (other.batched != terms.batched).all()


def test_one_batch_of_all_rows_is_the_exact_figure(planted: Planted, executor: Any) -> None:
    terms = scanned(planted, executor, estimator="minibatch", batch=N)
    found = similarity(terms, "minibatch")[0]
    # Batches are multiplied in float64; only taking the origin off rounds their rows once more.
    np.testing.assert_allclose(found, naive(layers_of(planted), hsic1), rtol=0, atol=2e-9)
    # The exact figure is made of float32 products, and as near to the formula as everywhere here.
    np.testing.assert_allclose(found, similarity(terms, "debiased-rows")[0], rtol=0, atol=1e-6)


def test_a_batch_with_an_outlier_keeps_its_digits() -> None:
    rng = np.random.default_rng(4)
    x, y = (rng.normal(size=(40, width)) for width in (5, 7))
    y[:, :5] += x
    x[0], y[0] = 1000 * x[0], 1000 * y[0]
    x32, y32 = x.astype(np.float32), y.astype(np.float32)
    adder = Adder([5], [7], 40)
    adder.add_batches([x32, y32], 40, rng.permutation(40))
    # float32 products would leave 1e-7 of it.
    assert adder.total.batched[0, 0] == pytest.approx(hsic1(stored(x32), stored(y32)), rel=1e-10)


def test_batches_are_dealt_within_cuts_whatever_the_groups(
    planted: Planted, executor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning_module, "BLOCK_ROWS", 100)
    memory = 400_000
    assert len(plan([20, 20, 20, 28, 28], N, memory=memory, batch=30).groups) > 1
    terms = scanned(planted, executor, estimator="minibatch", batch=30, memory=memory)
    # Cuts of 90 rows: seven whole ones, and 70 rows with two batches.
    assert (terms.batches, terms.batch_rows) == (23, 690)
    deals = [np.random.default_rng((0, k)).permutation(min(90, N - 90 * k)) + 90 * k for k in range(8)]
    batches = [deal[i : i + 30] for deal in deals for i in range(0, len(deal) - 29, 30)]
    expected = naive(layers_of(planted), lambda x, y: float(np.mean([hsic1(x[b], y[b]) for b in batches])))
    np.testing.assert_allclose(similarity(terms, "minibatch")[0], expected, atol=1e-6)


def test_batches_without_structure_are_undefined() -> None:
    one = np.ones((2, 2))
    terms = Terms(100, one, 0.01 * one, np.ones(2), np.ones(2), np.ones(2), np.diag([1.0, -1.0]), 2, 100)
    values, reasons = similarity(terms, "minibatch")
    assert values[0, 0] == 1
    assert math.isnan(values[0, 1])
    assert reasons[0, 1] == "mean self-HSIC over batches of the second set of states is not positive"


# Sums ----------------------------------------------------------------------------------------------------------------


def random_parts() -> list[Partial]:
    rng = np.random.default_rng(1)
    parts = []
    for n in (5, 80, 17, 33, 64, 2, 41):
        adder = Adder([4, 6], [5], 80)
        rows: list[Rows] = [rng.normal(size=(n, w)).astype(np.float32) for w in (10, 5)]
        adder.add(rows)
        adder.add_batches(rows, 16, np.arange(n))
        parts.append(adder.total)
    return parts


def merged(parts: list[Partial]) -> Partial:
    total = nothing([4, 6], [5])
    for part in parts:
        total.include(part)
    return total


def test_parts_add_up_in_any_order_and_in_one_order_to_the_same_bits() -> None:
    parts = random_parts()
    first = merged(parts)
    assert first.n == 242
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = merged([parts[i] for i in rng.permutation(len(parts))])
        again = merged(parts)
        for name, value in first.arrays.items():
            assert np.abs(other.arrays[name] - value).max() <= 1e-12 * np.abs(value).max(), name
            assert again.arrays[name].tobytes() == value.tobytes()


def test_parts_of_other_layers_do_not_add() -> None:
    with pytest.raises(FitError, match="they are of other layers"):
        nothing([4, 6], [5]).include(nothing([4, 6], [4]))
    with pytest.raises(FitError, match="they are of other layers"):
        nothing([4, 6], [5]).include(nothing([10], [5]))


@pytest.mark.parametrize("spoil", [math.nan, math.inf, -math.inf, 1e19])
def test_the_first_unusable_row_is_named(spoil: float) -> None:
    rows = np.random.default_rng(0).normal(size=(200, 10)).astype(np.float32)
    rows[130, 7] = rows[170, 1] = spoil
    with pytest.raises(UnusableRow) as caught:
        Adder([4, 6], None, 200).add([rows])
    assert (caught.value.row, caught.value.group, caught.value.index) == (130, 0, 1)


# Plans and memory ----------------------------------------------------------------------------------------------------


def test_a_plan_takes_the_fewest_groups_that_fit() -> None:
    widths, n = [4096] * 10, 1_000_000
    single = plan(widths, n)
    assert single.memory <= 2 << 30
    assert single.slots >= 1
    last = 99
    for gib in (3, 8, 24, 64, 400):
        cuts = plan(widths, n, memory=gib << 30)
        assert [i for group in cuts.groups for i in group] == list(range(10))
        assert cuts.memory <= gib << 30
        assert cuts.slots >= SLOTS or len(cuts.groups) == 10
        assert len(cuts.groups) <= last
        last = len(cuts.groups)
    assert last == 1
    assert plan(widths, n, memory=400 << 30).blocks == [(0, 0)]


def test_a_plan_covers_every_row_once() -> None:
    for n in (4, 4096, 5000, 64_000, 3_000_001):
        cuts = plan([64, 64], n)
        assert cuts.run % cuts.cut == 0
        assert [start for start, _ in cuts.runs] == [0, *(stop for _, stop in cuts.runs[:-1])]
        assert cuts.runs[-1][1] == n
        assert cuts.run <= 65_536
    assert len(plan([64], 64_000).runs) >= 8
    assert plan([64], 64_000, batch=100).cut == 16_300


def test_too_little_memory_says_how_much_it_takes() -> None:
    with pytest.raises(SpecError, match=r"100 MB of memory are too few for layers of width 4096; allow at least (\d+)"):
        plan([4096, 64], 1_000_000, memory=100_000_000)
    with pytest.raises(SpecError, match="batches of 3 rows: choose 4 to 16384"):
        plan([64], 1000, batch=3)


@pytest.mark.thorough
def test_memory_stays_within_the_plan_and_is_flat_in_rows(
    tmp_path: Path, executor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning_module, "CUT_ROWS", 256)
    monkeypatch.setattr(planning_module, "_LONGEST_RUN", 512)
    monkeypatch.setattr(streaming, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    memory, peaks = 24_000_000, []
    for n in (4_000, 8_000):
        x = np.random.default_rng(n).normal(size=(n, 192)).astype(np.float32)
        planted = plant(tmp_path / f"{n}.zarr", dict.fromkeys(range(4), x), {0: x, 2: x}, form="bfloat16")
        sites = [Site("a", k, source=True) for k in range(4)] + SITES[3:]
        selection = selection_of(planted)
        cuts = plan([192] * 6, n, memory=memory)
        assert cuts.memory <= memory
        assert len(cuts.groups) > 1
        # The store and its pairs are opened once, and are not what is bounded here.
        worker.opened_by_worker(selection)
        tracemalloc.start()
        try:
            stream(selection, sites, executor=executor, checkpoint=tmp_path / f"c{n}", memory=memory, quiet=True)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert peaks[-1] < cuts.memory + 3_000_000
    assert peaks[1] < 1.25 * peaks[0] + 1_000_000
    assert peaks[0] > 3_000_000


def test_blas_keeps_to_one_thread_until_the_last_task_is_done() -> None:
    def threads() -> set[int]:
        return {info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"}

    with threadpool_limits(2):
        before = threads()
        limit = worker.OneThread()
        with limit:
            with limit:
                assert threads() == {1}
            assert threads() == {1}
        assert threads() == before == {2}


# Bits, deaths, checkpoints -------------------------------------------------------------------------------------------


def test_the_same_bits_on_any_number_of_threads(planted: Planted, executor: Any, short: None) -> None:
    first = bits(scanned(planted, executor, estimator="minibatch", batch=40))
    for width in (1, 5):
        with Threads(width) as other:
            assert bits(scanned(planted, other, estimator="minibatch", batch=40)) == first


@pytest.mark.thorough
def test_a_worker_killed_in_the_middle_does_not_touch_the_bits(
    planted: Planted, executor: Any, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bits(scanned(planted, executor, memory=260_000))
    with Processes(2) as others:
        pid = others.submit(os.getpid).result()
        assert pid != os.getpid()
        ticks = Ticks(monkeypatch, 5, lambda: os.kill(pid, signal.SIGKILL))
        assert bits(scanned(planted, others, memory=260_000)) == expected
        assert pid not in {others.submit(os.getpid).result() for _ in range(4)}
        assert len(ticks) > 20
        assert sum(ticks) == pytest.approx(N)


CHILD = """
    import os, signal, sys
    from pathlib import Path
    import pytest
    import align.similarity.scan.planning as planning
    import align.similarity.scan.streaming as streaming
    from align.execution.threads import Threads
    from tests.align.similarity.test_streaming import ROWS, SITES, Ticks
    from featstore.store import open_store

    def main():
        store, kept, at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planning, "CUT_ROWS", 16)
            patch.setattr(planning, "_LONGEST_RUN", 64)
            patch.setattr(os, "fsync", lambda _: None)
            patch.setattr(streaming, "CHECKPOINT_SECONDS", 0.0)
            Ticks(patch, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
            selection = planning.Selection(store, open_store(store).fingerprint, "a", "b", "end", False)
            with Threads() as executor:
                streaming.stream(selection, SITES, executor=executor, checkpoint=kept, memory=260_000, **ROWS)

    if __name__ == "__main__":
        main()
"""


def test_a_killed_process_goes_on_to_the_same_bits(
    planted: Planted, executor: Any, short: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = bits(scanned(planted, executor, memory=260_000))
    script, kept = tmp_path / "child.py", tmp_path / "kept"
    script.write_text(textwrap.dedent(CHILD))
    done = subprocess.run(
        [sys.executable, str(script), str(planted.path), str(kept), "20"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    runs = len(plan([20, 20, 20, 28, 28], N, memory=260_000).runs)
    blocks = {int(path.stem.partition("-")[2]) for path in kept.glob("block-*.npz")}
    assert blocks == set(range(20 // runs + 1))
    started = []
    whole = worker._summed
    monkeypatch.setattr(worker, "_summed", lambda *a: (started.append(a[2]), whole(*a))[1])
    ticks = Ticks(monkeypatch)
    assert bits(scanned(planted, executor, memory=260_000, checkpoint=kept)) == expected
    # The twentieth tick came after its write: 20 tasks are there, and none of them is done again.
    total = len(plan([20, 20, 20, 28, 28], N, memory=260_000).blocks) * runs
    assert len(started) == total - 20
    assert sum(ticks) == pytest.approx(N)
    assert len(ticks) == len(blocks) + total - 20
    # A finished scan reads nothing at all.
    started.clear()
    assert bits(scanned(planted, executor, memory=260_000, checkpoint=kept)) == expected
    assert not started


def test_a_checkpoint_of_another_scan_is_refused(planted: Planted, executor: Any, short: None, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    scanned(planted, executor, checkpoint=kept)
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    with pytest.raises(StoreStateError, match=r"of another scan: keep_sinks is False there and True here; remove it"):
        stream(selection_of(planted, keep_sinks=True), SITES, executor=executor, checkpoint=kept, **ROWS)
    # The same rows, and yet another question.
    with pytest.raises(StoreStateError, match=r"of another scan: roles is None there and \['text'\] here; remove it"):
        stream(replace(selection_of(planted), roles=("text",)), SITES, executor=executor, checkpoint=kept, **ROWS)
    with pytest.raises(StoreStateError, match="of another scan: groups is"):
        scanned(planted, executor, checkpoint=kept, memory=260_000)
    with pytest.raises(StoreStateError, match="batch is None there and 50 here"):
        scanned(planted, executor, checkpoint=kept, estimator="minibatch", batch=50)
    with pytest.raises(StoreStateError, match="documents is None there and"):
        scanned(planted, executor, checkpoint=kept, estimator="debiased")
    with pytest.raises(StoreStateError, match="layers is"):
        stream(selection_of(planted), SITES[::-1], executor=executor, checkpoint=kept, **ROWS)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before


def test_a_checkpoint_of_another_store_is_refused(planted: Planted, executor: Any, short: None, tmp_path: Path) -> None:
    scanned(planted, executor, checkpoint=tmp_path / "kept")
    # The same text and as many rows, in which one number differs.
    x = {k: v.copy() for k, v in planted.x.items()}
    x[1][600, 3] += 1
    other = plant(tmp_path / "s.zarr", x, planted.y)
    with pytest.raises(StoreStateError, match="of another scan: store is"):
        stream(selection_of(other), SITES, executor=executor, checkpoint=tmp_path / "kept", quiet=True)


def test_damaged_checkpoints_are_refused_and_finished_ones_removed(tmp_path: Path) -> None:
    identity = {"n": 3}
    write_block(tmp_path, 0, Kept(2, False, {"gram": np.eye(50)}), identity)
    write_block(tmp_path, 1, Kept(1, True, {"fro": np.eye(2)}), identity)
    found = read_blocks(tmp_path, identity)
    assert [(k, v.runs, v.complete) for k, v in found.items()] == [(0, 2, False), (1, 1, True)]
    np.testing.assert_array_equal(found[0].arrays["gram"], np.eye(50))
    file = tmp_path / "block-0000.npz"
    good = file.read_bytes()
    for bad in (good[:200], b"", good.replace(np.float64(1).tobytes(), np.float64(2).tobytes(), 1)):
        file.write_bytes(bad)
        with pytest.raises(CorruptDataError, match=r"block-0000.npz is not the state of a scan .*; remove it"):
            read_blocks(tmp_path, identity)
    file.write_bytes((tmp_path / "block-0001.npz").read_bytes())
    with pytest.raises(CorruptDataError, match="holds block 1"):
        read_blocks(tmp_path, identity)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".block-0000.npz.abc.part").write_text("half")
    discard(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "notes.txt").unlink()
    discard(tmp_path)
    assert not tmp_path.exists()
    discard(tmp_path)
    assert read_blocks(tmp_path, identity) == {}


# Bad input -----------------------------------------------------------------------------------------------------------


def test_too_few_pairs_are_refused(tmp_path: Path, executor: Any) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 4))
    planted = plant(tmp_path / "s.zarr", {0: rows}, {0: rows}, documents=3)
    with pytest.raises(PairingError, match="3 pairs of a and b: CKA needs at least 4; extract more text"):
        stream(selection_of(planted), SITES[:1], executor=executor, quiet=True)


def test_what_cannot_be_meant_is_refused(planted: Planted, executor: Any) -> None:
    with pytest.raises(PairingError, match="700 pairs of a and b: one batch has 701"):
        scanned(planted, executor, estimator="minibatch", batch=701)
    with pytest.raises(SpecError, match="estimator 'hsic': choose one of debiased, debiased-rows, biased, minibatch"):
        scanned(planted, executor, estimator="hsic")
    with pytest.raises(SpecError, match="this scan made no batches"):
        similarity(scanned(planted, executor), "minibatch")
    for sites in ([], [SITES[0], SITES[0]]):
        with pytest.raises(SpecError, match="no layers to compare, or one is named twice"):
            stream(selection_of(planted), sites, executor=executor, quiet=True)


def test_the_first_row_that_is_not_finite_is_named(tmp_path: Path, executor: Any, short: None) -> None:
    x, y = (np.random.default_rng(s).normal(size=(300, 6)) for s in (0, 1))
    bad = y.copy()
    # Model b has a token more before every document of 15 rows.
    bad[137, 2] = bad[250, 0] = np.nan
    planted = plant(tmp_path / "s.zarr", {0: x}, {0: y, 2: bad})
    sites = [SITES[0], *SITES[3:]]
    where = r"row 147 of layer 2 of 'b' \(pair 137\) in .*s.zarr holds NaN, infinity or a value too large to square"
    for _ in range(3):
        with pytest.raises(NonFiniteStateError, match=where):
            stream(selection_of(planted), sites, executor=executor, quiet=True)


def test_layers_of_unequal_length_are_refused(planted: Planted, executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Store.rows

    def rows(store: Store, model: str, layer: int) -> Any:
        reader = whole(store, model, layer)
        if (model, layer) == ("b", 2):
            monkeypatch.setattr(reader, "rows", 700)
        return reader

    monkeypatch.setattr(Store, "rows", rows)
    with pytest.raises(CorruptDataError, match=r"layer 2 of 'b' in .* has 700 rows, its model 720"):
        scanned(planted, executor)


def test_models_without_pairs_are_refused(planted: Planted, executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Store.has
    monkeypatch.setattr(Store, "has", lambda store, name: not name.startswith("pairs/") and whole(store, name))
    with pytest.raises(PairingError, match="has no 'end' pairs of a and b"):
        scanned(planted, executor)


def test_a_worker_that_cannot_read_the_store_says_so(
    planted: Planted, executor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker.opened_by_worker.cache_clear()
    run = planning_module.Run((tuple(SITES[:1]),), 0, 16, 16, None, 0)
    away = Selection(str(tmp_path / "away.zarr"), planted.store.fingerprint, "a", "b", "end", keep_sinks=False)
    with pytest.raises(StoreAccessError, match=r"a worker cannot open .*away.zarr .*same place on every machine"):
        executor.submit(sum_run, away, run).result()
    other = Selection(str(planted.path), "0" * 64, "a", "b", "end", keep_sinks=False)
    with pytest.raises(StoreStateError, match="is not the store that was asked for"):
        sum_run(other, run)
    monkeypatch.setattr(worker, "_states", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(StoreAccessError, match=r"a worker cannot read .*Permission denied"):
        scanned(planted, executor)


class Losing:
    """Workers of which a task's are lost, in one way; the others go on."""

    width = 1

    def __init__(self, error: Exception) -> None:
        self.error, self.cancelled = error, 0

    def submit(self, *_: object) -> Losing:
        return self

    def result(self) -> None:
        raise self.error

    def cancel(self) -> None:
        self.cancelled += 1
        raise WorkersError("the Dask scheduler went away")


def test_lost_workers_are_one_line_that_says_what_is_kept(planted: Planted, short: None, tmp_path: Path) -> None:
    for kept, more in ((tmp_path / "kept", f"; what is summed so far is kept in {tmp_path / 'kept'}"), (None, "")):
        losing = Losing(WorkersError("workers died"))
        with pytest.raises(WorkersError) as caught:
            scanned(planted, losing, checkpoint=kept)
        assert str(caught.value) == f"workers died{more}"
        # Eight were handed in, and seven of them nobody waits for.
        assert losing.cancelled == 1


def test_what_nobody_waits_for_does_not_begin(planted: Planted, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    go = threading.Event()

    def summed(store: Any, pairs: Any, run: Any) -> Any:
        begun.append(run.start)
        # The first fails; whatever begins after it goes on until the scan has ended.
        if len(begun) > 1:
            go.wait(60)
        raise FitError("this run fails")

    monkeypatch.setattr(worker, "_summed", summed)
    with Threads(1) as one:
        with pytest.raises(FitError, match="this run fails"):
            scanned(planted, one, memory=260_000)
        go.set()
        assert one.submit(len, "done").result() == 4
    assert len(begun) <= 2


def test_a_scheduler_that_goes_away_in_the_middle_is_one_clear_line(
    planted: Planted, short: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from distributed import Client, LocalCluster

    options = {"n_workers": 1, "processes": False, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        Ticks(monkeypatch, 3, cluster.close)
        with pytest.raises(WorkersError, match=r"the Dask scheduler went away .*; start it and run again; .* kept in "):
            scanned(planted, Cluster(client), checkpoint=tmp_path / "kept")


def test_the_store_is_opened_as_the_workers_do(planted: Planted) -> None:
    store, pairs = worker.opened(selection_of(planted))
    assert store.fingerprint == open_store(planted.path).fingerprint
    assert len(pairs) == N


def test_a_scan_of_100_million_rows_is_some_thousand_tasks():
    # As many documents and paired rows as all of Wikitext-103 has, six layers of two models.
    documents = Documents(np.full(24_576, 4032, np.int64))
    cuts = plan([4096] * 12, int(documents.sizes.sum()), documents=documents, memory=16 << 30)
    # A task for every block and run, and a pass before that finds the means.
    assert len(cuts.spans) * (len(cuts.blocks) + 1) == 16_896
    assert cuts.slots < 10

"""The scan over documents: dense least squares, long and short documents in pieces, the same bits after a death."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import align.similarity.scan.documents as documents_module
import align.similarity.scan.planning as planning_module
import align.similarity.scan.streaming as streaming
import align.similarity.scan.worker as worker
from align.execution.threads import Threads
from align.metrics import debiased_cka
from align.similarity.scan.documents import DocumentAdder, close, terms_between
from align.similarity.scan.planning import Selection, Site, plan
from align.similarity.scan.streaming import stream
from align.similarity.scan.terms import Terms, similarity
from align.solvers.row_effects import Documents
from featstore.errors import SpecError
from featstore.store import Store
from tests.support.planted import Planted, plant
from tests.support.residuals import cosine_of_kernels, unequal_documents, without_row_effects

SITES = [Site("a", 0, source=True), Site("a", 1, source=True), Site("b", 0, source=False), Site("b", 2, source=False)]
#: One as long as many others together, one longer than a cut, many short ones; and pairs that have singular equations.
LENGTHS = {"many": (3, 120, 9, 1, 40, 17, 2, 25, 8, 1, 1, 70, 5), "half": (60, 20, 30, 10), "two": (90, 56)}


@pytest.fixture(scope="module")
def executor() -> Iterator[Any]:
    with Threads(2) as threads:
        yield threads


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Origins of which nothing is rounded."""
    monkeypatch.setattr(Store, "origin", lambda store, model, layer: np.zeros(store.model(model).width))


def planted_in(path: Path, sizes: tuple[int, ...], *, widths: tuple[int, ...] = (6, 6, 8, 8)) -> Planted:
    """Halves of whole numbers whose mean is zero: no float32 product is rounded, only results are."""
    rng = np.random.default_rng(len(sizes))
    document = np.repeat(np.arange(len(sizes)), sizes)
    layers = []
    common = rng.integers(-3, 4, size=(len(document), 5))
    for width in widths:
        topic = rng.integers(-2, 3, size=(len(sizes), width))[document]
        rows = common @ rng.integers(-1, 2, size=(5, width)) + topic + rng.integers(-4, 5, size=(len(document), width))
        half = len(rows) // 2
        rows[half:] = -rows[rng.permutation(half)]
        layers.append(rows / 2)
    return plant(path, dict(enumerate(layers[:2])), {0: layers[2], 2: layers[3]}, document=document,
                 documents=len(sizes), sink_threshold=1e9)  # fmt: skip


def selection_of(planted: Planted) -> Selection:
    return Selection(str(planted.path), planted.store.fingerprint, "a", "b", "end", keep_sinks=True)


def layers_of(planted: Planted) -> list[Any]:
    return [np.asarray(rows) for rows in (*planted.x.values(), *planted.y.values())]


def dense(planted: Planted) -> Any:
    layers = [rows - rows.mean(axis=0) for rows in layers_of(planted)]
    return np.array([[cosine_of_kernels(x @ x.T, y @ y.T, planted.document) for y in layers] for x in layers])


def scanned(planted: Planted, executor: Any, **options: Any) -> Terms:
    return stream(selection_of(planted), SITES, executor=executor, quiet=True, **options)


@pytest.mark.parametrize(
    ("case", "kernels", "cut", "run"),
    [
        ("many", 1, 4096, 65536),
        ("many", 20, 4096, 65536),
        ("many", 1000, 4096, 65536),
        ("many", 20, 50, 50),
        ("many", 10, 16, 48),
        ("half", 20, 4096, 65536),
        ("half", 10, 16, 48),
        ("two", 1000, 4096, 65536),
        ("two", 10, 16, 48),
    ],
)
def test_every_pair_of_layers_is_least_squares(
    tmp_path: Path,
    executor: Any,
    monkeypatch: pytest.MonkeyPatch,
    exact: None,
    case: str,
    kernels: int,
    cut: int,
    run: int,
) -> None:
    monkeypatch.setattr(planning_module, "CUT_ROWS", cut)
    monkeypatch.setattr(planning_module, "_LONGEST_RUN", run)
    monkeypatch.setattr(documents_module, "longest_kernel", lambda p, q: kernels)
    planted = planted_in(tmp_path / "s.zarr", LENGTHS[case])
    values, reasons = similarity(scanned(planted, executor))
    assert reasons == {}
    np.testing.assert_allclose(values, dense(planted), rtol=0, atol=1e-9)
    np.testing.assert_array_equal(values, values.T)
    layers = layers_of(planted)
    assert values[1, 2] == pytest.approx(debiased_cka(layers[1], layers[2], planted.document)[0], abs=1e-9)


@pytest.mark.parametrize("memory", [None, 70_000])
def test_groups_do_not_matter(
    tmp_path: Path, executor: Any, monkeypatch: pytest.MonkeyPatch, exact: None, memory: int | None
) -> None:
    monkeypatch.setattr(planning_module, "CUT_ROWS", 30)
    monkeypatch.setattr(planning_module, "_LONGEST_RUN", 60)
    planted = planted_in(tmp_path / "s.zarr", LENGTHS["many"])
    options = {} if memory is None else {"memory": memory}
    cuts = plan([6, 6, 8, 8], sum(LENGTHS["many"]), documents=Documents(np.array(LENGTHS["many"])), **options)
    assert (len(cuts.groups) > 1) == (memory is not None)
    terms = scanned(planted, executor, correct_features=True, **options)
    np.testing.assert_allclose(similarity(terms)[0], dense(planted), rtol=0, atol=1e-9)
    layers = [rows - rows.mean(axis=0) for rows in layers_of(planted)]
    values, reasons = similarity(terms, correct_features=True)
    np.testing.assert_array_equal(np.diag(values), 1)
    for (i, x), (j, y) in ((p, q) for p in enumerate(layers) for q in enumerate(layers) if p[0] < q[0]):
        expected, reason = debiased_cka(x, y, planted.document, correct_features=True)
        assert reasons.get((i, j)) == reason
        assert values[i, j] == pytest.approx(expected, abs=1e-9, nan_ok=True)
    for k, rows in enumerate(layers):
        kernels = [without_row_effects(np.outer(z, z), planted.document) for z in rows.T]
        pairs = sum(np.sum(a * b) for a in kernels for b in kernels if a is not b) * len(kernels) / (len(kernels) - 1)
        assert terms.corrected is not None
        assert terms.corrected[k] == pytest.approx(pairs, rel=1e-9)


def test_rows_far_from_the_origin_and_in_any_order(
    tmp_path: Path, executor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    labels = unequal_documents(rng, 30)
    topics = rng.normal(size=(30, 8))[labels]
    x, y = (topics + rng.normal(size=(len(labels), 8)) + mean for mean in (30.0, -5.0))
    x[:, 3] *= 50
    planted = plant(tmp_path / "s.zarr", {0: x}, {0: y}, document=labels, documents=30, sink_threshold=1e9)
    x32, y32 = (rows.astype(np.float32).astype(np.float64) for rows in (x, y))
    whole = worker.opened
    for document in (labels, np.where(labels % 7 == 6, labels - 4, labels)):
        # Answers to one prompt are of one document, and lie apart.
        def opened(selection: Selection, document: Any = document) -> Any:
            store, pairs = whole(selection)
            return store, replace(pairs, document=document.astype(np.int32))

        monkeypatch.setattr(worker, "opened", opened)
        worker.opened_by_worker.cache_clear()
        worker.by_document.cache_clear()
        terms = stream(selection_of(planted), [SITES[0], SITES[2]], executor=executor, quiet=True)
        assert similarity(terms)[0][0, 1] == pytest.approx(debiased_cka(x32, y32, document)[0], abs=1e-6)
        assert terms.mean[0] == pytest.approx(np.linalg.norm(x32.mean(axis=0)), rel=1e-6)
        assert terms.a[1] == pytest.approx(np.sum((y32 - y32.mean(axis=0)) ** 2), rel=1e-5)


def test_a_single_document_is_undefined(tmp_path: Path, executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning_module, "CUT_ROWS", 16)
    planted = planted_in(tmp_path / "s.zarr", (70,))
    values, reasons = similarity(scanned(planted, executor))
    assert np.isnan(values).all()
    assert "all 70 are of one" in reasons[0, 1]
    assert np.isfinite(similarity(scanned(planted, executor), "biased")[0]).all()
    assert np.isfinite(similarity(scanned(planted, executor, estimator="debiased-rows"), "debiased-rows")[0]).all()
    with pytest.raises(SpecError, match="not made for 'debiased-rows'"):
        similarity(scanned(planted, executor), "debiased-rows")
    with pytest.raises(SpecError, match="not made for 'debiased'"):
        similarity(scanned(planted, executor, estimator="debiased-rows"))


def test_a_plan_by_document_covers_every_row_once() -> None:
    sizes = np.random.default_rng(0).integers(1, 200_000, 60) // np.array([1, 50, 1000] * 20) + 1
    cuts = plan([64, 64], int(sizes.sum()), documents=Documents(sizes))
    ends = set(np.cumsum(sizes).tolist())
    assert [span.start for span in cuts.spans] == [0, *(span.stop for span in cuts.spans[:-1])]
    assert cuts.spans[-1].stop == sizes.sum()
    for span in cuts.spans:
        assert 0 < span.stop - span.start <= cuts.run
        assert not span.last or span.stop in ends
        assert (span.document is None) or sizes[span.document] > cuts.cut
    pieces = [span for span in cuts.spans if not (span.first and span.last)]
    assert len(pieces) > 3


def test_a_document_in_pieces_is_the_whole_document() -> None:
    rng = np.random.default_rng(2)
    documents = Documents(np.array([7, 40, 6]))
    x, y = (rng.integers(-4, 5, size=(53, w)).astype(np.float32) for w in (5, 6))
    found = []
    for pieces in (False, True):
        adder = DocumentAdder([2, 3], [6], documents, 64)
        adder.add([x[:7], y[:7]], 0, 1)
        if pieces:
            one = DocumentAdder([2, 3], [6], documents, 64)
            for at in range(7, 47, 8):
                one.add_piece([x[at : at + 8], y[at : at + 8]])
            close(one.total, [[2, 3], [6]], documents, 1)
            adder.total.include(one.total)
        else:
            adder.add([x[7:47], y[7:47]], 1, 2)
        adder.add([x[47:], y[47:]], 2, 3)
        found.append(adder.total)
    for name, value in found[0].arrays.items():
        np.testing.assert_allclose(getattr(found[1], name), value, rtol=1e-12, atol=1e-9, err_msg=name)
    terms = terms_between(found[0], [[2, 3], [6]], [], documents, ranks=False)
    assert set(terms) == {"counts", "fro", "hsic"}


class TestDeath:
    @pytest.fixture(autouse=True)
    def _short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(planning_module, "CUT_ROWS", 16)
        monkeypatch.setattr(planning_module, "_LONGEST_RUN", 32)
        monkeypatch.setattr(streaming, "CHECKPOINT_SECONDS", 0.0)
        monkeypatch.setattr(os, "fsync", lambda _: None)

    def test_the_same_bits_on_any_number_of_threads(self, tmp_path: Path, executor: Any) -> None:
        planted = planted_in(tmp_path / "s.zarr", LENGTHS["many"])
        first = bits(scanned(planted, executor, memory=70_000))
        for width in (1, 5):
            with Threads(width) as other:
                assert bits(scanned(planted, other, memory=70_000)) == first

    @pytest.mark.parametrize("after", [3, 17])
    def test_a_scan_that_died_goes_on_to_the_same_bits(
        self, tmp_path: Path, executor: Any, monkeypatch: pytest.MonkeyPatch, after: int
    ) -> None:
        planted = planted_in(tmp_path / "s.zarr", LENGTHS["many"])
        expected = bits(scanned(planted, executor, memory=70_000, correct_features=True))
        written: list[Any] = []
        whole = streaming.write_block

        def dying(directory: Path, block: int, kept: Any, identity: Any) -> None:
            whole(directory, block, kept, identity)
            written.append((block, kept.runs, [name for name in kept.arrays if name.startswith("open_")]))
            if len(written) == after:
                raise KeyboardInterrupt

        monkeypatch.setattr(streaming, "write_block", dying)
        with pytest.raises(KeyboardInterrupt):
            scanned(planted, executor, memory=70_000, correct_features=True, checkpoint=tmp_path / "kept")
        # Once in the middle of a document.
        assert bool(written[-1][2]) == (after == 3)
        assert (
            bits(scanned(planted, executor, memory=70_000, correct_features=True, checkpoint=tmp_path / "kept"))
            == expected
        )
        again = [number for number, *_ in written[after:]]
        assert again
        assert min(again) >= written[after - 1][0]


def bits(terms: Terms) -> list[Any]:
    return [value.tobytes() if isinstance(value, np.ndarray) else value for value in vars(terms).values()]

"""Many closed forms at once are the same closed forms, and a run keeps to its memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.closed_form import fit_all as module
from align.closed_form.fit import Fit, Solver
from align.closed_form.fit_all import fit_all
from align.layers import LayerPair
from align.moments.scan import Scan, memory_of, scan
from featstore.errors import FitError
from tests.support.planted import Planted, plant, rotation, spectrum_rows, trained

LAYERS = (1, 2, 4)
PAIRS = [LayerPair("a", (i,), "b", j) for i in LAYERS for j in LAYERS]
FITS = {"rotation": Fit("procrustes"), "path": Fit("affine"), "few": Fit("reduced-rank", rank=4)}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    core = spectrum_rows(3000, 24, 0, decay=0.5)
    noise = np.random.default_rng(1)

    def side(seed: int) -> dict[int, Any]:
        return {k: core @ rotation(24, seed + k) + 0.1 * noise.standard_normal(core.shape) for k in LAYERS}

    return plant(tmp_path_factory.mktemp("all") / "s.zarr", side(10), side(20))


@pytest.fixture(scope="module")
def moments(planted: Planted) -> dict[str, Scan]:
    return scan(planted.store, planted.store.pairs("a", "b").select(), PAIRS)


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_they_are_the_fits_one_by_one(moments: dict[str, Scan], monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    done: list[float] = []
    found = fit_all(FITS, PAIRS[::-1], moments, tick=done.append)
    assert list(found) == [pair.key for pair in PAIRS[::-1]]
    assert sum(done) == len(PAIRS)
    for pair in PAIRS:
        assert list(found[pair.key]) == list(FITS)
        for name, fit in FITS.items():
            alone = Solver().fit(fit, pair, moments[pair.key])
            together = found[pair.key][name]
            assert together.options.keys() == alone.options.keys()
            for option, value in alone.options.items():
                same = value if isinstance(value, str) else pytest.approx(value, rel=1e-6)
                assert together.options[option] == same, option
            for part, tensor in alone.tensors.items():
                np.testing.assert_allclose(together.tensors[part], tensor, rtol=1e-5, atol=1e-6)


def test_threads_are_as_many_as_fit_into_memory(moments: dict[str, Scan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    wide = 24 * 24 * 8 * 12
    counts = []
    for memory in (10 * wide, 2 * wide, 2 * wide - 1, 0):
        monkeypatch.setattr(module, "MEMORY", memory)
        counts.append(module._threads(PAIRS, moments))
    assert counts == [8, 2, 1, 1]


def test_a_fit_that_is_refused_is_refused(moments: dict[str, Scan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(FitError, match="rank 25"):
        fit_all({"": Fit("reduced-rank", rank=25)}, PAIRS, moments)


def test_no_layer_pairs_are_no_maps() -> None:
    assert fit_all(FITS, [], {}) == {}


@pytest.mark.parametrize("type_", ["procrustes", "lora"])
def test_a_run_in_groups_is_the_run_at_once(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type_: str
) -> None:
    options: dict[str, Any] = {"layer_map": "1:2,2:2,4:1"}
    if type_ == "lora":
        options |= {"epochs": 1, "rank": 4}
    trained(planted, tmp_path / "whole", type_, **options)
    one = memory_of(planted.store, [LayerPair("a", (1,), "b", 2)])
    scanned: list[int] = []

    def counted(store: Any, pairs: Any, wanted: Any, **rest: Any) -> dict[str, Scan]:
        assert memory_of(store, wanted) <= one
        scanned.append(len(wanted))
        return scan(store, pairs, wanted, **rest)

    monkeypatch.setattr("align.runs.train.MEMORY", one)
    monkeypatch.setattr("align.runs.train.scan", counted)
    trained(planted, tmp_path / "groups", type_, **options)
    assert scanned == [1, 1, 1]
    whole, groups = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "groups"))
    assert whole["pairs"] == groups["pairs"]

"""`align cka`: all layers of two models compared, equal to naive formulas, with floors, ceilings and other measures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import align
from align.execution.threads import Threads
from align.kernels.reference import cka, rbf_gram
from align.metrics import debiased_cka
from align.results import read_similarity_documents
from align.similarity.compare import Comparison
from align.similarity.measures.by_name import parse_measures
from align.similarity.measures.controls import floors, halves
from align.similarity.measures.names import MEASURES
from align.similarity.sample import Sample, affordable_rows, draw
from align.similarity.words import best_partners, describe
from featstore.errors import PairingError, SpecError
from featstore.runtime.console import jsonable
from tests.support.commands import call, strict_json
from tests.support.planted import Planted, plant, rotation, spectrum_rows
from tests.support.residuals import cosine_of_kernels

LAYERS = {"a": (0, 1, 2), "b": (0, 2)}


def hsic1(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741 - the field's names
    """Song et al. 2012, as printed: zero diagonals, all n x n terms."""
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    one = np.ones(n)
    total = (
        np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    )
    return float(total / (n * (n - 3)))


def naive_debiased(x: np.ndarray, y: np.ndarray, document: Any = None) -> float:
    # Rounding to what is stored comes first: the store's float32 is not the question here.
    x, y = (side.astype(np.float32).astype(np.float64) for side in (x, y))
    # HSIC does not depend on where the origin is, but its rounding does.
    x, y = x - x.mean(0), y - y.mean(0)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    if document is not None:
        return cosine_of_kernels(k, l, document)
    return hsic1(k, l) / math.sqrt(hsic1(k, k) * hsic1(l, l))


def naive_biased(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x.T @ y).ravel() @ (x.T @ y).ravel() / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y))


def related(n: int = 700, seed: int = 0) -> tuple[dict[int, Any], dict[int, Any]]:
    """Layers of two models that share more or less; one of them far from the origin, one very anisotropic."""
    rng = np.random.default_rng(seed)
    core = rng.normal(size=(n, 12))

    def mix(width: int, noise: float, mean: float = 0.0) -> Any:
        rows = core @ rng.normal(size=(12, width)) + noise * rng.normal(size=(n, width))
        return rows + mean * rows.std() * rng.normal(size=width)

    return (
        {0: mix(20, 3.0), 1: mix(20, 1.0, mean=10.0), 2: spectrum_rows(n, 20, 5, decay=2.0)},
        {0: mix(28, 2.0, mean=10.0), 2: mix(28, 0.5)},
    )


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("cka") / "s.zarr", *related())


def compared(planted: Planted, **options: Any) -> dict[str, Any]:
    wanted: dict[str, Any] = {"models": ("a", "b"), "layers": LAYERS, "quiet": True, **options}
    with Threads(2) as threads:
        return Comparison(planted.path, **wanted).run(threads)


@pytest.fixture(scope="module")
def result(planted: Planted) -> dict[str, Any]:
    return compared(planted)


def test_every_pair_of_layers_equals_the_naive_formula(planted: Planted, result: dict[str, Any]) -> None:
    x, y = planted.x, planted.y
    for i, one in enumerate(LAYERS["a"]):
        for j, two in enumerate(LAYERS["b"]):
            assert result["cross"][i][j] == pytest.approx(naive_debiased(x[one], y[two], planted.document), abs=1e-6)
        for j, two in enumerate(LAYERS["a"]):
            assert result["within"]["a"][i][j] == pytest.approx(
                naive_debiased(x[one], x[two], planted.document), abs=1e-6
            )
    for i, one in enumerate(LAYERS["b"]):
        for j, two in enumerate(LAYERS["b"]):
            assert result["within"]["b"][i][j] == pytest.approx(
                naive_debiased(y[one], y[two], planted.document), abs=1e-6
            )
    assert result["n"] == 700
    assert result["estimator"] == result["unmasked"]["estimator"] == "debiased"
    assert (result["documents"], result["effective_documents"]) == (20, pytest.approx(20))
    assert result["reasons"] == {}
    assert result["layers"] == {"a": [0, 1, 2], "b": [0, 2]}


def test_the_biased_estimator_equals_its_own_formula(planted: Planted) -> None:
    biased = compared(planted, estimator="biased")
    for i, one in enumerate(LAYERS["a"]):
        for j, two in enumerate(LAYERS["b"]):
            assert biased["cross"][i][j] == pytest.approx(naive_biased(planted.x[one], planted.y[two]), abs=1e-6)
    assert biased["estimator"] == "biased"


def test_a_layer_is_like_itself_and_matrices_are_symmetric(result: dict[str, Any]) -> None:
    for name in ("a", "b"):
        table = np.array(result["within"][name])
        np.testing.assert_array_equal(table, table.T)
        np.testing.assert_allclose(np.diag(table), 1, atol=1e-9)


def test_a_rotation_scores_one_and_independence_nothing(tmp_path: Path) -> None:
    x = spectrum_rows(3000, 24, 1, decay=0.5, mean=4.0)
    planted = plant(tmp_path / "s.zarr", {0: x}, {0: 3 * x @ rotation(24, 2) + 7, 1: spectrum_rows(3000, 24, 8)})
    cross = compared(planted, layers={"a": (0,), "b": (0, 1)})["cross"]
    assert cross[0][0] == pytest.approx(1, abs=1e-6)
    assert abs(cross[0][1]) < 0.05


def test_the_floor_is_the_same_states_with_their_pairing_destroyed(result: dict[str, Any], planted: Planted) -> None:
    floor = result["null"]
    assert np.abs(np.array(floor["cross"])).max() < 0.02
    assert np.array(floor["cross"]).shape == (3, 2)
    assert floor["n"] == 700
    assert floor["method"] == "shuffled pairs"
    order = np.random.default_rng(0)
    chosen = np.sort(order.choice(700, 700, replace=False))
    shuffled = planted.y[0][order.permutation(len(chosen))]
    assert floor["cross"][0][0] == pytest.approx(naive_debiased(planted.x[0], shuffled), abs=1e-6)


def test_the_floor_follows_its_seed(planted: Planted, result: dict[str, Any]) -> None:
    other = compared(planted, seed=1)
    assert other["null"]["cross"][0][0] != result["null"]["cross"][0][0]
    np.testing.assert_array_equal(other["cross"], result["cross"])


def test_sinks_decide_unless_they_are_masked(tmp_path: Path) -> None:
    # Independent states, but the same twenty rows are huge in both: unmasked CKA sees nothing else.
    x, y = spectrum_rows(2000, 16, 1), spectrum_rows(2000, 16, 2)
    at = np.arange(700, 2000, 65)
    x[at] = y[at] = 1000.0 * spectrum_rows(len(at), 16, 3)
    planted = plant(tmp_path / "s.zarr", {0: x}, {0: y})
    layers = {"a": (0,), "b": (0,)}
    masked = compared(planted, layers=layers)
    assert masked["masked_rows"] == len(at)
    assert masked["n"] == 2000 - len(at)
    assert masked["unmasked"]["n"] == 2000
    assert abs(masked["cross"][0][0]) < 0.02
    assert masked["unmasked"]["cross"][0][0] > 0.99
    rest = np.delete(np.arange(2000), at)
    assert masked["cross"][0][0] == pytest.approx(naive_debiased(x[rest], y[rest], planted.document[rest]), abs=1e-6)
    kept = compared(planted, layers=layers, keep_sinks=True)
    assert kept["keep_sinks"] is True
    assert kept["masked_rows"] == masked["masked_rows"]
    np.testing.assert_array_equal(kept["cross"], masked["unmasked"]["cross"])
    np.testing.assert_array_equal(kept["masked"]["cross"], masked["cross"])


def test_one_model_alone(planted: Planted, result: dict[str, Any]) -> None:
    alone = compared(planted, models=("a", "a"), layers={"a": (0, 1, 2)})
    np.testing.assert_allclose(alone["cross"], result["within"]["a"], atol=1e-9)
    assert alone["models"] == ["a", "a"]
    assert list(alone["within"]) == ["a"]


def test_fewer_than_four_pairs_are_refused(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 4))
    planted = plant(tmp_path / "s.zarr", {0: rows}, {0: rows}, documents=3)
    with pytest.raises(PairingError, match="3 pairs of a and b: CKA needs at least 4"):
        compared(planted, layers={"a": (0,), "b": (0,)})


def test_four_pairs_are_enough(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(4, 4))
    planted = plant(tmp_path / "s.zarr", {0: rows}, {0: rows}, documents=4)
    assert compared(planted, layers={"a": (0,), "b": (0,)})["cross"][0][0] == pytest.approx(1, abs=0.01)


def test_an_unknown_estimator_is_refused(planted: Planted) -> None:
    with pytest.raises(SpecError, match="estimator 'hsic': choose one of debiased, debiased-rows, biased, minibatch"):
        compared(planted, estimator="hsic")
    with pytest.raises(SpecError, match="--kernel 'cosine': choose one of linear, rbf"):
        compared(planted, kernel="cosine")
    with pytest.raises(SpecError, match="minibatch is of the linear kernel"):
        compared(planted, kernel="rbf", estimator="minibatch")
    for options in ({"kernel": "rbf"}, {"estimator": "debiased-rows"}):
        with pytest.raises(SpecError, match="--correct-features is of --estimator debiased"):
            compared(planted, correct_features=True, **options)


def test_states_that_do_not_vary_are_null_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = spectrum_rows(300, 8, 1)
    planted = plant(tmp_path / "s.zarr", {0: x, 1: np.full((300, 8), 3.0)}, {0: x, 1: x})
    out = tmp_path / "out"
    outcome = call(capsys, "align", "cka", "--store", planted.path, "--out", out, "--json")
    assert outcome.json["cross"][1] == [None, None]
    saved = strict_json((out / "cka.json").read_text())
    assert saved["cross"][0][0] == pytest.approx(1)
    assert saved["within"]["a"][1][1] is None
    assert saved["reasons"]["a:1 b:0"] == "the first set of states does not vary"
    assert saved["null"]["cross"][1] == [None, None]
    assert (out / "cka.png").stat().st_size > 1000
    text = call(capsys, "align", "cka", "--store", planted.path, "--out", out)
    assert text.code == 0
    assert "undefined: a:1 b:0: the first set of states does not vary" in text.out


def test_the_command_writes_json_and_heatmaps(
    planted: Planted, result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = call(capsys, "align", "cka", "--store", planted.path, "--out", tmp_path, "--json").json
    saved = strict_json((tmp_path / "cka.json").read_text())
    assert {**saved, "files": None, "out": None} == {**shown, "files": None, "out": None}
    assert shown["files"] == ["cka.json", "cka_documents.json", "cka.html", "cka.png", "cka.svg"]
    assert not (tmp_path / "checkpoints").exists(), "what the scan kept goes when the result is written"
    assert "<script" in (tmp_path / "cka.html").read_text()
    np.testing.assert_array_equal(saved["cross"], result["cross"])
    assert (tmp_path / "cka.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "cka.png").stat().st_size > 5000
    assert "<svg" in (tmp_path / "cka.svg").read_text()


def test_the_command_takes_layers_and_models(
    planted: Planted, result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("align", "cka", "--store", planted.path, "--out", tmp_path, "--json")
    shown = call(capsys, *base, "--layers", "0,2").json
    assert shown["layers"] == {"a": [0, 2], "b": [0, 2]}
    np.testing.assert_allclose(shown["cross"], np.array(result["cross"])[[0, 2]], atol=1e-9)
    turned = call(capsys, *base, "--models", "b, a", "--layers", "0").json
    assert turned["models"] == ["b", "a"]
    assert turned["cross"][0][0] == pytest.approx(result["cross"][0][0], abs=1e-9)


@pytest.mark.thorough
def test_workers_in_other_processes_give_the_same_bits(
    planted: Planted,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = call(capsys, "align", "cka", "--store", planted.path, "--out", tmp_path / "own", "--json").json
    # The store is named relative to where the command runs.
    monkeypatch.chdir(planted.path.parent)
    base = ("align", "cka", "--store", planted.path.name, "--out", tmp_path / "theirs", "--json")
    theirs = call(capsys, *base, "--workers", 2).json
    for name in ("cross", "within", "null", "unmasked", "n"):
        assert theirs[name] == own[name], name


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nowhere", "127.0.0.1:x"])
def test_a_scheduler_that_does_not_answer_is_one_clear_line(
    planted: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.execution.cluster.SCHEDULER_SECONDS", 0.5)
    line = call(
        capsys, "align", "cka", "--store", planted.path, "--out", tmp_path / "out", "--scheduler", address
    ).refusal
    assert line.startswith(f"align: --scheduler {address}: no Dask scheduler answers there")
    assert not (tmp_path / "out").exists()


def test_the_best_partner_of_a_layer() -> None:
    table = {
        "models": ["a", "b"],
        "layers": {"a": [0, 8, 16], "b": [0, 4]},
        "cross": [[0.2, 0.9], [0.5, None], [None, None]],
    }
    assert best_partners(table) == {"0": {"layer": 4, "cka": 0.9}, "8": {"layer": 0, "cka": 0.5}}


def test_every_row_its_own_document_is_asked_for_by_name(planted: Planted) -> None:
    found = compared(planted, estimator="debiased-rows", permutations=0)
    assert found["estimator"] == "debiased-rows"
    assert found["cross"][0][0] == pytest.approx(naive_debiased(planted.x[0], planted.y[0]), abs=1e-6)
    corrected = compared(planted, correct_features=True, permutations=0)
    assert corrected["correct_features"] is True
    x, y = planted.x[0].astype(np.float32), planted.y[2].astype(np.float32)
    expected, _ = debiased_cka(x, y, planted.document, correct_features=True)
    assert corrected["cross"][0][1] == pytest.approx(expected, abs=1e-5)


def test_minibatch_is_an_estimate_of_the_same(planted: Planted, result: dict[str, Any]) -> None:
    found = compared(planted, estimator="minibatch")
    assert (found["batches"], found["batch_rows"]) == (2, 512)
    np.testing.assert_allclose(found["cross"], result["cross"], atol=0.1)
    assert not np.array_equal(found["cross"], result["cross"])


@pytest.mark.parametrize("estimator", ["debiased", "biased"])
def test_the_rbf_kernel_equals_its_formula(planted: Planted, estimator: str) -> None:
    found = compared(planted, kernel="rbf", estimator=estimator, max_rows=300)
    assert (found["kernel"], found["n"]) == ("rbf", 300)
    store = planted.store
    sample = draw(store, store.pairs("a", "b").select(), (LAYERS["a"], LAYERS["b"]), max_rows=300, memory=1 << 30)
    for i, one in enumerate(LAYERS["a"]):
        for j, two in enumerate(LAYERS["b"]):
            grams = [
                rbf_gram(rows[k].astype(np.float64), found["sigmas"][name])
                for rows, k, name in ((sample.xs, i, f"a:{one}"), (sample.ys, j, f"b:{two}"))
            ]
            expected = cka(*grams, estimator) if estimator == "biased" else cosine_of_kernels(*grams, sample.document)
            assert found["cross"][i][j] == pytest.approx(expected, abs=5e-6)
    assert np.abs(found["null"]["cross"]).max() < (0.03 if estimator == "debiased" else 0.4)
    assert found["null"]["kernel"] == "rbf"


def test_effective_ranks_are_those_of_the_covariance(planted: Planted, result: dict[str, Any]) -> None:
    for name, rows in (("a", planted.x), ("b", planted.y)):
        for layer, states in rows.items():
            values = np.linalg.eigvalsh(np.cov(states.T))
            share = np.maximum(values, 1e-300) / values.sum()
            found = result["effective_rank"][name][str(layer)]
            assert found["entropy"] == pytest.approx(float(np.exp(-(share * np.log(share)).sum())), rel=1e-4)
            assert found["participation"] == pytest.approx(float(1 / np.square(share).sum()), rel=1e-4)


@pytest.fixture(scope="module")
def measured(planted: Planted) -> dict[str, Any]:
    return compared(planted, measures=parse_measures("all"), draws=50, max_rows=500)


def test_every_measure_has_its_floors_ceilings_and_intervals(measured: dict[str, Any]) -> None:
    assert tuple(measured["measures"]) == MEASURES
    assert measured["sample"] == {"rows": 500, "of": 700, "documents": 20, "draws": 50, "seed": 0}
    json.loads(json.dumps(jsonable(measured), allow_nan=False))
    for name, block in measured["measures"].items():
        cross = np.array(block["cross"])
        assert cross.shape == (3, 2), name
        assert np.isfinite(cross).all(), (name, block["reasons"])
        assert {key: np.array(value).shape for key, value in block["within"].items()} == {"a": (3, 3), "b": (2, 2)}
        sign = 1 if block["closer"] == "higher" else -1
        # The second layers share most; nothing is as close as that to rows of other pairs, or to noise.
        for floor in ("shuffled", "noise"):
            far = np.array(block["floors"][floor]["cross"])
            assert far.shape == (3, 2), name
            assert sign * far[1, 1] < sign * cross[1, 1], (name, floor)
        ceiling = block["ceilings"]["rounding"]
        assert [len(ceiling[model]) for model in ("a", "b")] == [3, 2]
        assert sign * ceiling["a"][1] >= sign * cross[1, 1] - 1e-6, name
        assert np.array(block["ceilings"]["halves"]["cross"]).shape == (3, 2)
        assert block["ceilings"]["twice"] is None
        assert "no second reading of 'a'" in block["ceilings"]["reasons"]["twice"]
        documents = block["permutations"]["documents"]
        if name in ("cka", "rbf-cka", "ridge-r2"):
            low, high = block["ci95"]["cross"][1][1]
            assert low <= cross[1, 1] <= high, name
            assert "excess" not in documents
        else:
            # Biased by how many rows there are: an interval of what is above the floor alone.
            assert block["ci95"]["cross"][1][1] is None
            assert "excess_ci95" in block["ci95"]["reason"]
            low, high = documents["excess_ci95"][1][1]
            assert low <= documents["excess"][1][1] <= high, name
            assert documents["excess"][1][1] == pytest.approx((documents["value"] - documents["mean"])[1, 1])
            assert sign * low > 0
        assert documents["p_max"][1][1] == 1 / 40, name
        assert ("reverse" in block) == (not block["symmetric"])
        if block["symmetric"]:
            np.testing.assert_array_equal(block["within"]["a"], np.transpose(block["within"]["a"]))


def test_one_way_measures_go_both_ways(measured: dict[str, Any], planted: Planted) -> None:
    turned = compared(planted, models=("b", "a"), measures=parse_measures("ridge-r2"), draws=50, max_rows=500)
    there, back = measured["measures"]["ridge-r2"], turned["measures"]["ridge-r2"]
    np.testing.assert_allclose(np.transpose(there["reverse"]), back["cross"], atol=0.02)
    np.testing.assert_allclose(there["cross"], np.transpose(back["reverse"]), atol=0.02)
    assert not np.allclose(there["cross"], there["reverse"], atol=0.02)
    sample = sampled(planted, 500)
    [measure] = parse_measures("ridge-r2")
    want = floors(measure, sample.ys, sample.xs, document=sample.document)["shuffled"]
    np.testing.assert_allclose(
        there["floors"]["shuffled"]["reverse"], np.transpose([[one.value for one in row] for row in want]), atol=1e-9
    )


def sampled(planted: Planted, rows: int) -> Sample:
    pairs = planted.store.pairs("a", "b").select()
    return draw(planted.store, pairs, (LAYERS["a"], LAYERS["b"]), max_rows=rows, memory=1 << 30)


def test_a_sample_is_the_same_rows_of_every_layer_about_their_origins(planted: Planted) -> None:
    sample, store = sampled(planted, 90), planted.store
    assert (sample.n, sample.of) == (90, 700)
    assert len(np.unique(sample.document)) > 10
    for model, rows, origins, numbers in (
        ("a", sample.xs, sample.origins[0], sample.pairs.row_source),
        ("b", sample.ys, sample.origins[1], sample.pairs.row_target),
    ):
        for k, one, origin in zip(LAYERS[model], rows, origins, strict=True):
            np.testing.assert_array_equal(origin, store.origin(model, k).astype(np.float32))
            np.testing.assert_allclose(one + origin, store.rows(model, k)[numbers], rtol=1e-6, atol=1e-4)
    assert np.abs(sample.origins[0][1]).max() > 5, "of a layer whose mean is 10 sigma, the origin is what it is about"


def test_the_halves_are_compared_with_each_other(measured: dict[str, Any], planted: Planted) -> None:
    sample = sampled(planted, 500)
    [measure] = parse_measures("rsa")
    two = halves(measure, sample.xs, sample.ys, document=sample.document)
    found = measured["measures"]["rsa"]["ceilings"]["halves"]
    for i in range(3):
        for j in range(2):
            apart = abs(two.first[i][j].value - two.second[i][j].value)
            assert found["cross"][i][j] == pytest.approx(apart, abs=1e-9)
    assert found["largest"] == pytest.approx(np.max(found["cross"]))
    assert sum(found["rows"].values()) == 500


def test_the_sampled_cka_is_the_one_over_all_rows_where_the_sample_is_all(planted: Planted) -> None:
    found = compared(planted, measures=parse_measures("cka"), draws=20)
    assert found["sample"]["rows"] == 700
    np.testing.assert_allclose(found["measures"]["cka"]["cross"], found["cross"], atol=2e-6)
    np.testing.assert_allclose(found["measures"]["cka"]["within"]["b"], found["within"]["b"], atol=2e-6)


def test_one_model_alone_is_measured(planted: Planted, measured: dict[str, Any]) -> None:
    alone = compared(planted, models=("a", "a"), layers={"a": LAYERS["a"]}, measures=parse_measures("pwcca"), draws=5)
    block = alone["measures"]["pwcca"]
    assert np.array(block["cross"]).shape == (3, 3)
    np.testing.assert_array_equal(block["cross"], block["within"]["a"])
    assert list(block["within"]) == ["a"]
    assert "reverse" not in block


def test_a_second_reading_is_the_ceiling(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    # Read twice by the same arithmetic, states are the same.
    monkeypatch.setattr(Comparison, "_read_again", lambda _, model: model)
    found = compared(planted, measures=parse_measures("cka,angular-distance"), draws=5)
    for name, same in (("cka", 1.0), ("angular-distance", 0.0)):
        ceilings = found["measures"][name]["ceilings"]
        assert "twice" not in ceilings["reasons"]
        np.testing.assert_allclose(ceilings["twice"]["a"], [same] * 3, atol=1e-3)
        np.testing.assert_allclose(ceilings["twice"]["b"], [same] * 2, atol=1e-3)


def test_what_does_not_fit_into_memory_is_refused(planted: Planted) -> None:
    assert affordable_rows([100, 100], 5000, 12 * 200 * 300) == 300
    assert affordable_rows([100, 100], 5000, 1 << 30) == 5000
    with pytest.raises(SpecError, match=r"holds 100 rows of 2 layers; give at least 600\.00 kB|holds 100 rows"):
        affordable_rows([100, 100], 5000, 12 * 200 * 100)
    with pytest.raises(SpecError, match="--max-rows 3"):
        affordable_rows([100], 3, 1 << 30)
    found = compared(planted, measures=parse_measures("rsa"), draws=5, max_rows=40)
    assert found["sample"]["rows"] == 40


@pytest.mark.parametrize(
    ("text", "words"),
    [("svcca,cosine", "'cosine' is none of"), ("rsa,rsa", "every measure once"), ("", "'' is none of")],
)
def test_measures_that_do_not_parse_are_refused(text: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        parse_measures(text)


def test_the_command_measures(planted: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ("align", "cka", "--store", planted.path, "--out", tmp_path)
    outcome = call(capsys, *base, "--measures", "cka,mutual-knn,angular-distance", "--max-rows", "300", "--draws", "20")
    assert outcome.code == 0
    assert "over 300 of 700 pairs from 20 documents" in outcome.out
    for name in ("mutual-knn", "angular-distance"):
        assert any(line.split()[:2] == [name, "a:1"] and "b:2" in line for line in outcome.out.splitlines()), name
    assert "cka.html" in outcome.out
    assert (tmp_path / "measures.png").stat().st_size > 5000
    saved = strict_json((tmp_path / "cka.json").read_text())
    assert sorted(saved["measures"]) == ["angular-distance", "cka", "mutual-knn"]
    for option, words in (
        (("--measures", "dot"), "'dot' is none of"),
        (("--memory", "1k", "--measures", "cka"), "too few for layers"),
        (("--workers", "0"), "--workers 0: must be at least 1"),
    ):
        assert words in call(capsys, *base, *option).refusal


def test_every_measure_is_written_without_each_document(planted: Planted, tmp_path: Path) -> None:
    found = align.cka(planted.path, layers="0,2", measures="cka,svcca,ridge-r2", draws=30, quiet=True, out=tmp_path)
    assert "cka_documents.json" in found.files
    sums = read_similarity_documents(tmp_path)
    assert sum(sums.rows) == found.sample.rows
    assert len(sums.documents) == len(sums.rows) == 20
    values = np.array(sums.measures["cka"].values["a:2 b:2"])
    assert values.shape == (20,)
    assert abs(values.mean() - found.measures["cka"].cross[1][1]) < 0.02
    # The jackknife's standard error is about that behind the interval.
    low, high = found.measures["cka"].ci95.cross[1][1]
    jackknife = np.sqrt(19 / 20 * np.square(values - values.mean()).sum())
    assert 0.5 < jackknife / ((high - low) / 2 / 2.09) < 2
    assert set(sums.to_pandas().measure) == {"main", "cka", "svcca", "ridge-r2"}


def test_the_main_figure_has_the_jackknife_s_interval_over_documents(planted: Planted, tmp_path: Path) -> None:
    found = align.cka(planted.path, layers="0,2", permutations=3, quiet=True, out=tmp_path)
    main = read_similarity_documents(tmp_path).main
    assert main is not None
    assert found.ci95 is not None
    assert (main.kernel, main.reason, found.ci95.reason) == ("linear", None, None)
    assert (found.ci95.rows, found.ci95.of, found.ci95.documents) == (700, 700, 20)
    assert sum(main.rows) == 700
    x, y, document = planted.x[2], planted.y[2], planted.document
    want = [debiased_cka(x[document != d], y[document != d], document[document != d])[0] for d in main.documents]
    np.testing.assert_allclose(main.values["a:2 b:2"], want, atol=1e-5)
    spread = np.sqrt(19 / 20 * np.square(want - np.mean(want)).sum())
    reach = stats.t(main.effective_documents - 1).ppf(0.975) * spread
    value = found.cross[1][1]
    assert found.ci95.cross[1][1] == pytest.approx((value - reach, value + reach), abs=1e-4)
    assert found.ci95.within["b"][1][1] == pytest.approx((1.0, 1.0), abs=1e-5)
    assert set(read_similarity_documents(tmp_path).to_pandas().measure) == {"main"}
    table = found.to_pandas()
    assert (table.cka_low[3], table.cka_high[3]) == found.ci95.cross[1][1]
    text = describe(found.content())
    assert "jackknife over 20 documents of 700 of 700 pairs" in text
    assert "over 700 of 700 rows" in (tmp_path / "cka.html").read_text()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"permutations": 0}, "--permutations 0"),
        ({"permutations": 3, "estimator": "biased"}, "--estimator biased"),
        ({"permutations": 3, "correct_features": True}, "--correct-features"),
    ],
)
def test_a_main_figure_without_intervals_says_why(planted: Planted, options: dict[str, Any], why: str) -> None:
    found = align.cka(planted.path, layers="2", quiet=True, **options)
    assert found.ci95 is not None
    assert why in (found.ci95.reason or "")
    assert f"no 95 % intervals: {why}" in describe(found.content())


def test_the_gaussian_kernel_has_intervals_too(planted: Planted) -> None:
    found = align.cka(planted.path, layers="2", kernel="rbf", permutations=3, quiet=True)
    assert found.ci95 is not None
    low, high = found.ci95.cross[0][0]
    assert (low + high) / 2 == pytest.approx(found.cross[0][0])
    assert 0 < high - low < 1

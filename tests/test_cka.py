"""CKA over a store: equal to the naive n x n formula, whatever the blocks, the groups and the workers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import call, strict_json
from planted import Planted, plant, rotation, spectrum_rows

import align.cka
from align.cka import Site, accumulate, add, best_partners, compare_layers, groups
from align.plots import plot_heatmaps
from featstore.console import jsonable
from featstore.errors import PairingError, SpecError

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


def naive_debiased(x: np.ndarray, y: np.ndarray) -> float:
    # Rounding to what is stored comes first: the store's float32 is not the question here.
    x, y = (side.astype(np.float32).astype(np.float64) for side in (x, y))
    # HSIC does not depend on where the origin is, but its rounding does.
    x, y = x - x.mean(0), y - y.mean(0)
    k, l = x @ x.T, y @ y.T  # noqa: E741
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


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from distributed import Client

    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0") as client:
        yield client


def compared(planted: Planted, **options: Any) -> dict[str, Any]:
    wanted = {"models": ("a", "b"), "layers": LAYERS, "quiet": True, **options}
    return compare_layers(planted.path, **wanted)


@pytest.fixture(scope="module")
def result(planted: Planted, client: Any) -> dict[str, Any]:
    return compared(planted)


def test_every_pair_of_layers_equals_the_naive_formula(planted: Planted, result: dict[str, Any]) -> None:
    x, y = planted.x, planted.y
    for i, one in enumerate(LAYERS["a"]):
        for j, two in enumerate(LAYERS["b"]):
            assert result["cross"][i][j] == pytest.approx(naive_debiased(x[one], y[two]), abs=1e-6)
        for j, two in enumerate(LAYERS["a"]):
            assert result["within"]["a"][i][j] == pytest.approx(naive_debiased(x[one], x[two]), abs=1e-6)
    for i, one in enumerate(LAYERS["b"]):
        for j, two in enumerate(LAYERS["b"]):
            assert result["within"]["b"][i][j] == pytest.approx(naive_debiased(y[one], y[two]), abs=1e-6)
    assert result["n"] == 700
    assert result["estimator"] == "debiased"
    assert result["reasons"] == {}
    assert result["layers"] == {"a": [0, 1, 2], "b": [0, 2]}


def test_the_biased_estimator_equals_its_own_formula(planted: Planted, client: Any) -> None:
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


def test_a_rotation_scores_one_and_independence_nothing(tmp_path: Path, client: Any) -> None:
    x = spectrum_rows(3000, 24, 1, decay=0.5, mean=4.0)
    planted = plant(tmp_path / "s.zarr", {0: x}, {0: 3 * x @ rotation(24, 2) + 7, 1: spectrum_rows(3000, 24, 8)})
    cross = compared(planted, layers={"a": (0,), "b": (0, 1)})["cross"]
    assert cross[0][0] == pytest.approx(1, abs=1e-6)
    assert abs(cross[0][1]) < 0.05


def test_wide_layers_in_groups_give_the_same(
    planted: Planted, result: dict[str, Any], client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in (1, 30, 45):
        monkeypatch.setattr(align.cka, "groups", partial(groups, limit=limit))
        grouped = compared(planted)
        np.testing.assert_allclose(grouped["cross"], result["cross"], atol=1e-7)
        for name in ("a", "b"):
            np.testing.assert_allclose(grouped["within"][name], result["within"][name], atol=1e-7)


def test_groups_hold_every_site_once_within_the_limit() -> None:
    sites = [Site("a", k, source=True) for k in range(5)] + [Site("b", k, source=False) for k in range(3)]
    for limit in (1, 10, 25, 1000):
        parts = groups(sites, {"a": 10, "b": 15}, limit)
        assert [site for part in parts for site in part] == sites
        for part in parts:
            assert len(part) == 1 or sum({"a": 10, "b": 15}[site.model] for site in part) <= limit


@pytest.mark.parametrize("rows", [50, 256])
def test_the_block_size_does_not_matter(
    planted: Planted, result: dict[str, Any], client: Any, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    # More blocks than one merge takes, so that the tree has two levels.
    monkeypatch.setattr(align.cka, "BLOCK_ROWS", rows)
    blocks = compared(planted)
    # Products within a block are float32; what they lose differs from cut to cut.
    np.testing.assert_allclose(blocks["cross"], result["cross"], atol=2e-8)


def test_whole_numbers_give_the_same_bits_in_any_blocks(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing is rounded, so nothing may differ: neither a row left out nor one taken twice could hide.
    rng = np.random.default_rng(0)
    x, y = (rng.integers(-4, 5, size=(400, 6)).astype(float) for _ in range(2))
    planted = plant(tmp_path / "s.zarr", {0: x}, {0: y + x})
    monkeypatch.setattr("featstore.store.Store.origin", lambda *_: np.zeros(6))
    texts = []
    for rows in (4096, 400, 61, 7):
        monkeypatch.setattr(align.cka, "BLOCK_ROWS", rows)
        texts.append(json.dumps(jsonable(compared(planted, layers={"a": (0,), "b": (0,)}))))
    assert len(set(texts)) == 1


def test_a_rerun_gives_the_same_bits(planted: Planted, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align.cka, "BLOCK_ROWS", 64)
    texts = {json.dumps(jsonable(compared(planted))) for _ in range(3)}
    assert len(texts) == 1


def test_sums_add_up_in_any_cut() -> None:
    rng = np.random.default_rng(1)
    p, q = ([rng.integers(-3, 4, size=(30, w)).astype(np.float32) for w in (4, 5)] for _ in range(2))
    whole = accumulate(p, q)
    parts = add([accumulate([x[a:b] for x in p], [x[a:b] for x in q]) for a, b in ((0, 1), (1, 17), (17, 30))])
    own, both = accumulate(p, None), accumulate(p, p)
    for one, two in ((whole, parts), (own, both)):
        assert one.n == two.n == 30
        np.testing.assert_array_equal(one.gram, two.gram)
        np.testing.assert_array_equal(one.products, two.products)
        for name in ("sums", "norms", "cross"):
            for left, right in zip(getattr(one, name), getattr(two, name), strict=True):
                np.testing.assert_array_equal(left, right)


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


def test_the_floor_follows_its_seed(planted: Planted, result: dict[str, Any], client: Any) -> None:
    other = compared(planted, seed=1)
    assert other["null"]["cross"][0][0] != result["null"]["cross"][0][0]
    np.testing.assert_array_equal(other["cross"], result["cross"])


def test_sinks_decide_unless_they_are_masked(tmp_path: Path, client: Any) -> None:
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
    assert masked["cross"][0][0] == pytest.approx(naive_debiased(x[rest], y[rest]), abs=1e-6)
    kept = compared(planted, layers=layers, keep_sinks=True)
    assert kept["keep_sinks"] is True
    assert kept["masked_rows"] == masked["masked_rows"]
    np.testing.assert_array_equal(kept["cross"], masked["unmasked"]["cross"])
    np.testing.assert_array_equal(kept["masked"]["cross"], masked["cross"])


def test_one_model_alone(planted: Planted, result: dict[str, Any], client: Any) -> None:
    alone = compared(planted, models=("a", "a"), layers={"a": (0, 1, 2)})
    np.testing.assert_allclose(alone["cross"], result["within"]["a"], atol=1e-9)
    assert alone["models"] == ["a", "a"]
    assert list(alone["within"]) == ["a"]


def test_fewer_than_four_pairs_are_refused(tmp_path: Path, client: Any) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 4))
    planted = plant(tmp_path / "s.zarr", {0: rows}, {0: rows}, documents=3)
    with pytest.raises(PairingError, match="3 pairs of a and b: CKA needs at least 4"):
        compared(planted, layers={"a": (0,), "b": (0,)})


def test_four_pairs_are_enough(tmp_path: Path, client: Any) -> None:
    rows = np.random.default_rng(0).normal(size=(4, 4))
    planted = plant(tmp_path / "s.zarr", {0: rows}, {0: rows}, documents=4)
    assert compared(planted, layers={"a": (0,), "b": (0,)})["cross"][0][0] == pytest.approx(1, abs=0.01)


def test_an_unknown_estimator_is_refused(planted: Planted) -> None:
    with pytest.raises(SpecError, match="estimator 'hsic': choose one of debiased, biased"):
        compared(planted, estimator="hsic")


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
    assert shown["files"] == ["cka.json", "cka.png", "cka.svg"]
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


def test_workers_in_other_processes_give_the_same_bits(
    planted: Planted,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from distributed import LocalCluster

    own = call(capsys, "align", "cka", "--store", planted.path, "--out", tmp_path / "own", "--json").json
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0") as cluster:
        # The store is named relative to where the command runs, which is not where the workers do.
        monkeypatch.chdir(planted.path.parent)
        theirs = call(
            capsys,
            *("align", "cka", "--store", planted.path.name, "--out", tmp_path / "theirs", "--json"),
            *("--scheduler", cluster.scheduler_address),
        ).json
        from distributed import Client

        with Client(cluster) as client:
            assert len(set(client.run(os.getpid).values()) - {os.getpid()}) == 2
    for name in ("cross", "within", "null", "unmasked", "n"):
        assert theirs[name] == own[name], name


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nowhere", "127.0.0.1:x"])
def test_a_scheduler_that_does_not_answer_is_one_clear_line(
    planted: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.resources.SCHEDULER_SECONDS", 0.5)
    line = call(
        capsys, "align", "cka", "--store", planted.path, "--out", tmp_path / "out", "--scheduler", address
    ).refusal
    assert line.startswith(f"align: --scheduler {address}: no Dask scheduler answers there")
    assert not (tmp_path / "out").exists()


def test_heatmaps_are_the_same_from_run_to_run(result: dict[str, Any], tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        assert plot_heatmaps(jsonable(result), tmp_path / name) == ["cka.png", "cka.svg"]
    for name in ("cka.svg", "cka.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_best_partner_of_a_layer() -> None:
    table = {
        "models": ["a", "b"],
        "layers": {"a": [0, 8, 16], "b": [0, 4]},
        "cross": [[0.2, 0.9], [0.5, None], [None, None]],
    }
    assert best_partners(table) == {"0": {"layer": 4, "cka": 0.9}, "8": {"layer": 0, "cka": 0.5}}

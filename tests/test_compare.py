"""The leaderboard: what it shows of each run, in which order, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import call
from planted import Planted, plant, rotation, spectrum_rows, trained

from align.compare import compare_runs, describe
from featstore.errors import AdapterError, CorruptDataError


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    x = {k: spectrum_rows(1500, 16, k) for k in (1, 2)}
    return plant(tmp_path_factory.mktemp("compare") / "s.zarr", x, {k: 0.5 * x[k] @ rotation(16, k) for k in (1, 2)})


@pytest.fixture(scope="module")
def runs(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("runs")
    trained(planted, base / "procrustes", "procrustes")
    trained(planted, base / "affine", "affine", layers="1")
    trained(planted, base / "lora", "lora", layers="1", rank=2, epochs=1, lr=1e-6)
    return {name: base / name for name in ("procrustes", "affine", "lora")}


def test_rows_are_sorted_by_pair_and_then_by_r2(runs: dict[str, Path]) -> None:
    rows = compare_runs(list(runs.values()))["rows"]
    assert [row["pair"] for row in rows] == ["a:1->b:1"] * 3 + ["a:2->b:2"]
    assert rows[0]["type"] == "affine"
    r2 = [row["r2"] for row in rows[:3]]
    assert r2 == sorted(r2, reverse=True)


def test_a_row_holds_the_runs_own_figures(runs: dict[str, Path]) -> None:
    for row in compare_runs(list(runs.values()))["rows"]:
        entry = json.loads((Path(row["run"]) / "metrics.json").read_text())["pairs"][row["pair"]]
        for name in ("r2", "r2_median_dim", "cosine_centered", "retrieval_top1", "cka_debiased", "n"):
            assert row[name] == entry["test"][name]
        for name in ("mean", "identity", "random_rotation", "shuffled"):
            assert row["baselines"][name] == entry["baselines"][name]["r2"]
        closed = entry["baselines"]["closed_form"]
        assert row["baselines"]["closed_form"] == (closed and closed["r2"])
        assert row["warnings"] == [warning["code"] for warning in entry["warnings"]]
    trainable = {row["type"]: row["trainable"] for row in compare_runs(list(runs.values()))["rows"]}
    assert trainable == {"procrustes": 256, "affine": 256 + 16, "lora": 2 * (16 + 16)}


def test_people_get_one_line_a_row(runs: dict[str, Path]) -> None:
    result = compare_runs(list(runs.values()))
    lines = describe(result).splitlines()
    assert len(lines) == 1 + 4
    [lora] = [line for line in lines if " lora " in line]
    assert "closed_form" in lora
    assert "[few-rows" not in lora
    assert "loses-to-closed-form" in lora


def test_a_run_without_figures_comes_last(runs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("metrics.json", "adapter.json"):
        (tmp_path / name).write_text((runs["affine"] / name).read_text())
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    metrics["pairs"]["a:1->b:1"]["test"]["r2"] = None
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    result = compare_runs([tmp_path, runs["lora"]])
    assert [row["r2"] is None for row in result["rows"]] == [False, True]
    assert " - " in describe(result)


@pytest.mark.parametrize("missing", ["metrics.json", "adapter.json", None])
def test_a_directory_without_a_finished_run_is_refused(
    runs: dict[str, Path], tmp_path: Path, missing: str | None
) -> None:
    for name in ("metrics.json", "adapter.json"):
        if missing is not None and name != missing:
            (tmp_path / name).write_text((runs["affine"] / name).read_text())
    with pytest.raises(AdapterError, match=r"no finished run in .*make one with `align train`"):
        compare_runs([runs["affine"], tmp_path])


def test_a_damaged_run_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "adapter.json").write_text((runs["affine"] / "adapter.json").read_text())
    for text, error in (("{", CorruptDataError), ('{"pairs": 3}', AdapterError), ('{"type": "x"}', AdapterError)):
        (tmp_path / "metrics.json").write_text(text)
        with pytest.raises(error):
            compare_runs([tmp_path])


def test_the_command(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = call(capsys, "align", "compare", *runs.values(), "--json").json
    assert shown == json.loads(json.dumps(compare_runs(list(runs.values()))))
    text = call(capsys, "align", "compare", *runs.values())
    assert "a:1->b:1" in text.out
    assert str(tmp_path) in call(capsys, "align", "compare", tmp_path).refusal

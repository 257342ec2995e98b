"""The leaderboard: what it shows of each run, what it calls better, what it keeps apart and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.runs.plots import plot_rate_distortion
from align.sweeps.compare import compare_runs, describe
from featstore.errors import AdapterError, CorruptDataError
from featstore.store.moments.stored import add_moments
from tests.support.commands import call
from tests.support.planted import Planted, plant, rotation, spectrum_rows, trained
from tests.support.store_fixtures import rowless


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


def test_people_get_one_line_a_row_and_its_warnings_below(runs: dict[str, Path]) -> None:
    lines = describe(compare_runs(list(runs.values()))).splitlines()
    assert [line for line in lines if line.startswith(("a:1->b:1, ", "a:2->b:2, "))] == [
        "a:1->b:1, 150 test rows",
        "a:2->b:2, 150 test rows",
    ]
    [at] = [i for i, line in enumerate(lines) if line.startswith("  lora ")]
    assert lines[at].split()[:3] == ["lora", "lora", "64"]
    assert lines[at + 1].startswith("    warnings: loses-to-closed-form")
    assert sum(line.startswith("  procrustes ") for line in lines) == 2


def test_a_run_without_figures_comes_last(runs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("metrics.json", "adapter.json"):
        (tmp_path / name).write_text((runs["affine"] / name).read_text())
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    metrics["pairs"]["a:1->b:1"]["test"]["r2"] = None
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    result = compare_runs([tmp_path, runs["lora"]])
    assert [row["r2"] is None for row in result["rows"]] == [False, True]
    assert result["rows"][1]["versus_best"]["difference"] is None
    assert " - " in describe(result)


def test_a_run_of_a_store_that_holds_moments_only_is_compared(
    planted: Planted, runs: dict[str, Path], tmp_path: Path
) -> None:
    store = Path(shutil.copytree(planted.path, tmp_path / "store.zarr"))
    add_moments(store, quiet=True)
    rowless(store)
    trained(replace(planted, path=store), tmp_path / "run", "affine", layers="1")
    [row] = compare_runs([tmp_path / "run"])["rows"]
    assert row["r2"] is not None
    assert row["r2_ci95"] is None
    assert "holds moments only" in row["reasons"]["r2_ci95"]
    # Beside a run with rows: no interval of the difference, and why.
    both = compare_runs([tmp_path / "run", runs["affine"]])["rows"]
    assert {row["run"] for row in both} == {str(tmp_path / "run"), str(runs["affine"])}


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


# Runs of known sums: what the table says of them follows from these alone.

PAIR = "a:1->b:1"
DOCUMENTS = 60
RNG = np.random.default_rng(3)
#: Documents differ a lot in how much there is to explain, and in how much of it any map explains.
SST = RNG.uniform(50, 150, DOCUMENTS)
HARD = RNG.uniform(0.1, 0.7, DOCUMENTS)


def write_run(
    out: Path,
    sse: Any,
    *,
    sst: Any = SST,
    closed: Any = None,
    documents: bool = True,
    numbers: Any = range(DOCUMENTS),
    n: int = 10,
    store: str = "s.zarr",
    rate: dict[str, Any] | None = None,
    **place: Any,
) -> Path:
    """A run directory whose R2 are those of the sums; `place` says on which rows."""
    out.mkdir(parents=True)

    def block(errors: Any) -> dict[str, Any]:
        return {"r2": 1 - float(np.sum(errors) / np.sum(sst)), "n": n * len(sst)}

    entry: dict[str, Any] = {"test": block(sse), "baselines": {"mean": {"r2": 0.0}}, "warnings": [], "reasons": {}}
    sums = {"map": list(sse), "mean": list(sst)}
    if closed is not None:
        entry["baselines"]["closed_form"] = {**block(closed), "name": "affine ridge"}
        sums["closed_form"] = list(closed)
    if rate is not None:
        entry["rate_distortion"] = rate
    where = {"fingerprint": "f" * 64, "pair_policy": "end", "keep_sinks": False, "sink_threshold": 5.0, **place}
    card = {
        "pairs": [{"key": PAIR, "parameters": {"trainable": 272, "shipped": 288}}],
        "store": {"path": store, "fingerprint": where["fingerprint"]},
        "pair_policy": where["pair_policy"],
        # A run of a former version does not say.
        **({"roles": where["roles"]} if "roles" in where else {}),
        "mask": {"keep_sinks": where["keep_sinks"], "sink_threshold": where["sink_threshold"]},
    }
    of = {"documents": list(numbers), "n": [n] * len(sst), "sst": list(sst), "sse": sums}
    (out / "metrics.json").write_text(json.dumps({"type": "affine", "pairs": {PAIR: entry}}))
    (out / "adapter.json").write_text(json.dumps(card))
    if documents:
        (out / "documents.json").write_text(json.dumps({"pairs": {PAIR: of}}))
    return out


def resampled(statistic: Any, draws: int = 4000) -> tuple[float, float]:
    """Quantiles of a statistic of resampled documents, one resample after another."""
    rng = np.random.default_rng(11)
    values = [statistic(rng.integers(0, DOCUMENTS, DOCUMENTS)) for _ in range(draws)]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def test_r2_has_the_interval_of_resampled_documents(tmp_path: Path) -> None:
    [row] = compare_runs([write_run(tmp_path / "run", HARD * SST)])["rows"]
    want = resampled(lambda at: 1 - (HARD * SST)[at].sum() / SST[at].sum())
    assert row["r2_ci95"] == pytest.approx(want, abs=0.004)
    assert row["r2_ci95"][0] < row["r2"] < row["r2_ci95"][1]
    assert row["shipped"] == 288
    assert row["reasons"] == {}


def test_an_interval_that_the_run_wrote_is_kept(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", HARD * SST)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["pairs"][PAIR]["test"]["r2_ci95"] = [0.25, 0.75]
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert compare_runs([run])["rows"][0]["r2_ci95"] == [0.25, 0.75]


def test_a_small_difference_that_every_document_shows_is_clear(tmp_path: Path) -> None:
    """The intervals of the two R2 overlap almost wholly; that of their difference leaves out zero."""
    worse = (HARD + 0.01) * SST
    result = compare_runs([write_run(tmp_path / "worse", worse), write_run(tmp_path / "better", HARD * SST)])
    best, other = result["rows"]
    assert best["run"].endswith("better")
    assert best["versus_best"] is None
    assert other["r2_ci95"][1] > best["r2_ci95"][0]
    versus = other["versus_best"]
    assert versus["run"] == best["run"]
    assert versus["difference"] == pytest.approx(-0.01)
    assert versus["ci95"] == pytest.approx([-0.01, -0.01], abs=1e-9)
    assert versus["verdict"] == "worse"
    assert "  highest R2: better; better than worse" in describe(result).splitlines()


def test_a_difference_that_some_documents_make_is_not(tmp_path: Path) -> None:
    noise = RNG.normal(0.004, 0.1, DOCUMENTS)
    sse = [HARD * SST, np.maximum(HARD + noise, 0.01) * SST]
    result = compare_runs([write_run(tmp_path / name, each) for name, each in zip("xy", sse, strict=True)])
    best, other = sorted(sse, key=np.sum)
    want = resampled(lambda at: best[at].sum() / SST[at].sum() - other[at].sum() / SST[at].sum())
    versus = result["rows"][1]["versus_best"]
    assert versus["ci95"] == pytest.approx(want, abs=0.003)
    assert versus["ci95"][0] < versus["difference"] < 0 < versus["ci95"][1]
    assert versus["verdict"] == "no clear difference"
    [sentence] = [line for line in describe(result).splitlines() if "highest R2" in line]
    assert "; no clear difference to" in sentence
    assert "better than" not in sentence


@pytest.mark.parametrize(("shift", "verdict"), [(0.01, "better"), (-0.01, "worse"), (0.0, "no clear difference")])
def test_the_difference_to_the_closed_form_is_paired_as_well(tmp_path: Path, shift: float, verdict: str) -> None:
    [row] = compare_runs([write_run(tmp_path / "run", HARD * SST, closed=(HARD + shift) * SST)])["rows"]
    assert row["closed_form"]["name"] == "affine ridge"
    assert row["versus_closed_form"]["difference"] == pytest.approx(shift)
    assert row["versus_closed_form"]["ci95"] == pytest.approx([shift, shift], abs=1e-9)
    assert row["versus_closed_form"]["verdict"] == verdict


def test_each_r2_keeps_its_own_zero(tmp_path: Path) -> None:
    # Another choice of train rows has another mean, and so other sums about it.
    runs = [write_run(tmp_path / "x", HARD * SST), write_run(tmp_path / "y", HARD * SST, sst=0.9 * SST)]
    versus = compare_runs(runs)["rows"][1]["versus_best"]
    share = (HARD * SST).sum() / SST.sum()
    assert versus["difference"] == pytest.approx(share - share / 0.9)
    assert versus["ci95"][0] < versus["difference"] < versus["ci95"][1] < 0


def test_a_run_from_before_there_were_sums_has_a_reason_instead(tmp_path: Path) -> None:
    old = write_run(tmp_path / "old", HARD * SST + 1, closed=HARD * SST, documents=False)
    result = compare_runs([old, write_run(tmp_path / "new", HARD * SST)])
    row = result["rows"][1]
    assert row["run"] == str(old)
    assert row["r2_ci95"] is None
    for versus in (row["versus_best"], row["versus_closed_form"]):
        assert versus["difference"] < 0
        assert (versus["ci95"], versus["verdict"]) == (None, "unknown")
    assert set(row["reasons"]) == {"r2_ci95", "versus_best.ci95", "versus_closed_form.ci95"}
    text = describe(result)
    assert text.count("no interval: the run has no documents.json: it was made by an earlier version") == 1
    assert "no interval beside old" in text
    assert "better than" not in text


@pytest.mark.parametrize(
    "place",
    [
        {"fingerprint": "e" * 64},
        {"pair_policy": "word"},
        {"keep_sinks": True},
        {"sink_threshold": 8.0},
        {"roles": ["user"]},
    ],
    ids=lambda place: next(iter(place)),
)
def test_figures_of_other_rows_are_kept_apart(tmp_path: Path, place: dict[str, Any]) -> None:
    runs = [
        write_run(tmp_path / "low", 0.9 * SST),
        write_run(tmp_path / "other", 0.1 * SST, store="other.zarr", **place),
        write_run(tmp_path / "high", 0.5 * SST, store="moved.zarr"),
    ]
    result = compare_runs(runs)
    assert [(Path(row["run"]).name, row["set"]) for row in result["rows"]] == [("high", 1), ("low", 1), ("other", 2)]
    assert [row["versus_best"] and Path(row["versus_best"]["run"]).name for row in result["rows"]] == [
        None,
        "high",
        None,
    ]
    assert [each["set"] for each in result["sets"]] == [1, 2]
    assert {**result["sets"][0], "set": 2, **place} == result["sets"][1]
    text = describe(result)
    assert "a:1->b:1, 600 test rows, set 2" in text
    assert "not compared" in text
    assert "set 1: moved.zarr, s.zarr (ffffffffffff), pairs end, sinks masked beyond 5.0 x" in text


@pytest.mark.parametrize("change", [{"numbers": range(1, DOCUMENTS + 1)}, {"n": 11}], ids=["documents", "rows"])
def test_other_documents_are_no_pairs(tmp_path: Path, change: dict[str, Any]) -> None:
    runs = [write_run(tmp_path / "x", 0.1 * SST), write_run(tmp_path / "y", 0.2 * SST, **change)]
    row = compare_runs(runs)["rows"][1]
    assert row["versus_best"]["verdict"] == "unknown"
    assert row["reasons"]["versus_best.ci95"].startswith("scored on other test rows than")
    assert row["r2_ci95"] is not None


def test_one_document_makes_no_interval(tmp_path: Path) -> None:
    [row] = compare_runs([write_run(tmp_path / "run", [1.0], sst=[2.0], numbers=[7])])["rows"]
    assert row["r2_ci95"] is None
    assert "at least 3 test documents, not 1" in row["reasons"]["r2_ci95"]


def test_a_spoiled_file_of_sums_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", HARD * SST)
    good = json.loads((run / "documents.json").read_text())
    short = {**good["pairs"][PAIR], "sst": [1.0]}
    for bad in ({}, {"pairs": {PAIR: {}}}, {"pairs": {PAIR: short}}, {"pairs": 3}):
        (run / "documents.json").write_text(json.dumps(bad))
        with pytest.raises(AdapterError, match="is damaged"):
            compare_runs([run])
    (run / "documents.json").write_text(json.dumps({"pairs": {}}))
    assert "says nothing of a:1->b:1" in compare_runs([run])["rows"][0]["reasons"]["r2_ci95"]


def test_lines_stay_short_and_runs_of_one_name_stay_apart(tmp_path: Path) -> None:
    name = "a-name-that-somebody-thought-would-say-everything-there-is-to-say-about-a-run"
    runs = [
        write_run(tmp_path / where / name, (HARD + k) * SST, closed=(HARD + 9) * SST) for k, where in enumerate("xy")
    ]
    result = compare_runs(runs)
    for row in result["rows"]:
        row["warnings"] = ["few-rows", "no-better-than-controls", "retrieval-at-chance", "near-singular"] * 3
    lines = describe(result).splitlines()
    assert max(map(len, lines)) <= 140
    assert [line.split()[0][:2] for line in lines if " affine " in line and "…" in line] == ["x/", "y/"]


def test_compressed_runs_get_a_table_of_their_own(tmp_path: Path) -> None:
    def rate(size: float) -> dict[str, Any]:
        others = {"text_bytes": 500.0, "token_id_bytes": 200.0, "raw_bytes": 1e5, "side_bytes": 100.0}
        r2 = {"compress": 0.5, "pca": 0.4, "strided": None}
        return {
            "latents": 8,
            "latent_dim": 16,
            "bytes_per_window": size,
            "bytes_per_text_byte": size / 500,
            **others,
            "r2": r2,
        }

    runs = [write_run(tmp_path / f"r{size:g}", HARD * SST, rate=rate(size)) for size in (512.0, 128.0, 256.0)]
    result = compare_runs([*runs, write_run(tmp_path / "plain", HARD * SST)])
    assert [row["bytes_per_window"] for row in result["rate_distortion"]] == [128.0, 256.0, 512.0]
    assert result["rate_distortion"][0]["run"] == str(runs[1])
    assert result["rate_distortion"][0]["r2"]["pca"] == 0.4
    lines = describe(result).splitlines()
    assert [line.split()[1] for line in lines if line.lstrip().startswith("8x16")] == ["128", "256", "512"]
    assert "8x16" not in describe(compare_runs([tmp_path / "plain"]))
    assert plot_rate_distortion(result["rate_distortion"][:1], tmp_path) == [], "one rate is no curve"
    assert not (tmp_path / "rate_distortion.png").exists()
    assert plot_rate_distortion(result["rate_distortion"], tmp_path) == ["rate_distortion.png"]
    assert (tmp_path / "rate_distortion.png").stat().st_size > 10_000

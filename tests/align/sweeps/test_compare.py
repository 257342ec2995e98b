"""The leaderboard: what it shows of each run, what it calls better, what it keeps apart and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student

from align.runs.plots import plot_rate_distortion
from align.sweeps.compare import compare_runs
from align.sweeps.table import describe
from featstore.errors import AdapterError, SpecError
from featstore.store.moments.writing import add_moments
from tests.support.commands import call
from tests.support.planted import Planted, plant, rotation, spectrum_rows, trained
from tests.support.store_fixtures import rowless


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    x = {k: spectrum_rows(1500, 16, k) for k in (1, 2)}
    # A change of rank 2 to a scaled rotation, which a map that was hardly trained misses.
    change = {k: 0.2 * rotation(16, k + 5, 2) @ rotation(2, k + 7, 16) * 4 for k in (1, 2)}
    y = {k: 0.5 * x[k] @ rotation(16, k) + x[k] @ change[k] for k in (1, 2)}
    return plant(tmp_path_factory.mktemp("compare") / "s.zarr", x, y, documents=40)


@pytest.fixture(scope="module")
def runs(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("runs")
    trained(planted, base / "procrustes", "procrustes")
    trained(planted, base / "affine", "affine", layers="1")
    trained(planted, base / "lora", "lora", layers="1", rank=2, epochs=1, lr=1e-6)
    return {name: base / name for name in ("procrustes", "affine", "lora")}


def test_rows_are_sorted_by_pair_and_then_by_validation(runs: dict[str, Path]) -> None:
    result = compare_runs(list(runs.values()))
    rows = result["rows"]
    assert [row["pair"] for row in rows] == ["a:1->b:1"] * 3 + ["a:2->b:2"]
    val = [json.loads((Path(r["run"]) / "metrics.json").read_text())["pairs"][r["pair"]]["val"]["r2"] for r in rows]
    assert [row["val_r2"] for row in rows] == val
    assert val[:3] == sorted(val[:3], reverse=True)
    # Where there is a choice, validation makes it, and its test figure is quoted.
    best = rows[0]
    told = {"pair": "a:1->b:1", "set": 1, **{name: best[name] for name in ("run", "val_r2", "r2", "r2_ci95")}}
    assert result["chosen"] == [told]
    assert f"validation chooses {Path(best['run']).name}: test R2 {best['r2']:.3f}" in describe(result)


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
        "a:1->b:1, 152 test rows",
        "a:2->b:2, 152 test rows",
    ]
    [at] = [i for i, line in enumerate(lines) if line.split()[:2] == ["lora", "lora"]]
    assert lines[at].split()[:3] == ["lora", "lora", "64"]
    assert lines[at + 1].startswith("    warnings: loses-to-closed-form")
    assert sum(line.split()[:2] == ["procrustes", "procrustes"] for line in lines) == 2
    # Each difference that was judged stands below, with what is said of it.
    said = [line for line in lines if " - procrustes: R2 " in line or " - its optimum, " in line]
    assert [line.split()[0] for line in said if "optimum" not in line] == ["affine", "lora"]
    assert all(" adjusted " in line for line in said)


def test_a_run_without_figures_is_compared_with_nothing(runs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("metrics.json", "adapter.json"):
        (tmp_path / name).write_text((runs["affine"] / name).read_text())
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    metrics["pairs"]["a:1->b:1"]["test"]["r2"] = None
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    result = compare_runs([runs["lora"], tmp_path])
    [row] = [row for row in result["rows"] if row["r2"] is None]
    assert (row["versus_reference"]["difference"], row["versus_reference"]["verdict"]) == (None, "unknown")
    assert row["reasons"]["versus_reference.ci95"] == "R2 is undefined"
    assert ": R2 -, no test" in describe(result)


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
    for text in ("{", '{"pairs": 3}', '{"type": "x"}', '{"type": "x", "pairs": {"a:2->b:1": {"test": {}}}}'):
        (tmp_path / "metrics.json").write_text(text)
        with pytest.raises(AdapterError, match=r"metrics\.json.*; the run is damaged: restore it or train it again$"):
            compare_runs([tmp_path])


def test_the_command(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = call(capsys, "align", "compare", *runs.values(), "--json").json
    assert shown == json.loads(json.dumps(compare_runs(list(runs.values()))))
    text = call(capsys, "align", "compare", *runs.values())
    assert "a:1->b:1" in text.out
    assert str(tmp_path) in call(capsys, "align", "compare", tmp_path).refusal
    named = call(capsys, "align", "compare", *runs.values(), "--json", "--reference", runs["affine"]).json
    assert named["reference"] == {"run": str(runs["affine"]), "baseline": None, "named": True}
    refused = call(capsys, "align", "compare", *runs.values(), "--reference", "best").refusal
    assert "--reference 'best' is neither among the runs nor a baseline of theirs; name one of" in refused
    assert "closed_form, identity, mean" in refused


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
    val: float | None = None,
    **place: Any,
) -> Path:
    """A run directory whose R2 are those of the sums; `place` says on which rows."""
    out.mkdir(parents=True)

    def block(errors: Any) -> dict[str, Any]:
        return {"r2": 1 - float(np.sum(errors) / np.sum(sst)), "n": n * len(sst)}

    entry: dict[str, Any] = {"test": block(sse), "baselines": {"mean": {"r2": 0.0}}, "warnings": [], "reasons": {}}
    if val is not None:
        entry["val"] = {"r2": val}
    sums = {"map": list(sse), "mean": list(sst)}
    if closed is not None:
        entry["baselines"]["closed_form"] = {**block(closed), "name": "affine ridge"}
        sums["closed_form"] = list(closed)
    if rate is not None:
        entry["rate_distortion"] = rate
    where = {"fingerprint": "f" * 64, "pair_policy": "end", "keep_sinks": False, "sink_threshold": 5.0, **place}
    source, target = ({"model": name, "layer": 1, "width": 16} for name in "ab")
    card = {
        "format": 1,
        "pairs": [{"key": PAIR, "source": source, "target": target, "parameters": {"trainable": 272, "shipped": 288}}],
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


def by_hand(first: Any, second: Any = None, sst: Any = SST) -> tuple[float, float]:
    """The interval of R2, or of its difference to another, as a regression through the origin has it."""

    def influence(sse: Any) -> Any:
        share = sst / sst.sum()
        return -(sse - sse.sum() / sst.sum() * sst) / sst.sum() / np.sqrt(1 - share)

    parts = influence(first) - (0.0 if second is None else influence(second))
    value = (0.0 if second is None else second.sum() / sst.sum()) + (second is None) - first.sum() / sst.sum()
    freedom = 1 / np.square(sst / sst.sum()).sum() - 1
    half = student.ppf(0.975, freedom) * np.sqrt(np.square(parts).sum())
    return float(value - half), float(value + half)


def test_r2_has_an_interval_over_documents(tmp_path: Path) -> None:
    [row] = compare_runs([write_run(tmp_path / "run", HARD * SST)])["rows"]
    assert row["r2_ci95"] == pytest.approx(by_hand(HARD * SST))
    assert row["r2_ci95"][0] < row["r2"] < row["r2_ci95"][1]
    assert row["shipped"] == 288
    assert row["reasons"] == {}


def test_an_interval_that_the_run_wrote_is_kept(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", HARD * SST)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["pairs"][PAIR]["test"]["r2_ci95"] = [0.25, 0.75]
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert compare_runs([run])["rows"][0]["r2_ci95"] == [0.25, 0.75]


def rows_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {Path(row["run"]).name: row for row in result["rows"]}


def test_a_small_difference_that_every_document_shows_is_clear(tmp_path: Path) -> None:
    """The intervals of the two R2 overlap almost wholly; that of their difference leaves out zero."""
    worse = (HARD + 0.01) * SST
    result = compare_runs([write_run(tmp_path / "first", HARD * SST), write_run(tmp_path / "second", worse)])
    first, second = rows_of(result).values()
    assert first["versus_reference"] is None
    assert second["r2_ci95"][1] > first["r2_ci95"][0]
    versus = second["versus_reference"]
    assert (versus["run"], versus["baseline"]) == (first["run"], None)
    assert versus["difference"] == pytest.approx(-0.01)
    assert versus["ci95"] == pytest.approx([-0.01, -0.01], abs=1e-9)
    assert versus["verdict"] == "worse"
    assert versus["p"] == versus["p_adjusted"] < 1e-6
    assert "second - first: R2 -0.010 [-0.010, -0.010], p " in describe(result)
    assert ": worse" in describe(result)


def test_a_difference_that_some_documents_make_is_not(tmp_path: Path) -> None:
    noise = RNG.normal(0.004, 0.1, DOCUMENTS)
    first, second = HARD * SST, np.maximum(HARD + noise, 0.01) * SST
    result = compare_runs([write_run(tmp_path / "x", first), write_run(tmp_path / "y", second)])
    versus = rows_of(result)["y"]["versus_reference"]
    assert versus["ci95"] == pytest.approx(by_hand(second, first))
    assert versus["ci95"][0] < 0 < versus["ci95"][1]
    assert versus["verdict"] == "no clear difference"
    assert ": no clear difference" in describe(result)
    assert "better" not in describe(result).replace("Better and worse are by", "")


def test_the_reference_is_the_run_named_first_or_by_name(tmp_path: Path) -> None:
    """Not the one with the highest test R2: figures that choose what they are compared with find a worse one."""
    made = {"low": 0.6, "high": 0.2, "mid": 0.4}
    runs = [write_run(tmp_path / name, (share + 0.01 * HARD) * SST) for name, share in made.items()]
    rows = rows_of(compare_runs(runs))
    assert {n: r["versus_reference"] and r["versus_reference"]["verdict"] for n, r in rows.items()} == {
        "low": None,
        "high": "better",
        "mid": "better",
    }
    named = compare_runs(runs, str(tmp_path / "." / "mid"))
    assert named["reference"] == {"run": str(tmp_path / "mid"), "baseline": None, "named": True}
    verdicts = {n: r["versus_reference"] and r["versus_reference"]["verdict"] for n, r in rows_of(named).items()}
    assert verdicts == {"low": "worse", "high": "better", "mid": None}
    assert "reference: the run mid. Better and worse are by p values adjusted for all 2 differences" in describe(named)
    assert "reference: the run named first that has the layer pair; --reference names" in describe(compare_runs(runs))


def test_the_reference_may_be_a_baseline_of_each_run(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "x", HARD * SST, closed=(HARD + 0.01) * SST),
        write_run(tmp_path / "y", (HARD + 1.5) * SST),
    ]
    result = compare_runs(runs, "mean")
    assert result["reference"] == {"run": None, "baseline": "mean", "named": True}
    assert result["tests"] == 3
    rows = rows_of(result)
    assert [rows[n]["versus_reference"]["verdict"] for n in "xy"] == ["better", "worse"]
    assert rows["x"]["versus_reference"]["difference"] == pytest.approx(rows["x"]["r2"])
    assert "x - mean of its own: R2 +" in describe(result)
    # Of the optimum itself there is one difference, not the same one twice.
    result = compare_runs(runs, "closed_form")
    rows = rows_of(result)
    assert (result["tests"], rows["x"]["versus_closed_form"], rows["y"]["versus_reference"]) == (1, None, None)
    assert rows["x"]["versus_reference"]["verdict"] == "better"
    assert rows["y"]["reasons"]["versus_reference"] == "the run has no baseline 'closed_form'"
    assert "not compared: the run has no baseline 'closed_form' (y)" in describe(result)
    with pytest.raises(SpecError, match=r"--reference 'token' is neither .* or one of closed_form, mean$"):
        compare_runs(runs, "token")


def test_p_values_are_adjusted_for_the_whole_table(tmp_path: Path) -> None:
    """What would be clear alone is not among many: a difference of p near 0.01, and eight that show nothing."""
    rng = np.random.default_rng(5)
    noise = rng.normal(0, 0.02, (9, DOCUMENTS))
    noise -= (noise @ SST / SST.sum())[:, None]
    first = write_run(tmp_path / "first", HARD * SST)
    weak = write_run(tmp_path / "weak", (HARD + noise[0] - 0.0067) * SST)
    alone = rows_of(compare_runs([first, weak]))["weak"]["versus_reference"]
    assert alone["verdict"] == "better"
    assert 0.05 / 9 < alone["p"] == alone["p_adjusted"] < 0.05
    crowd = [write_run(tmp_path / f"x{i}", (HARD + noise[i]) * SST) for i in range(1, 9)]
    result = compare_runs([first, weak, *crowd])
    versus = rows_of(result)["weak"]["versus_reference"]
    assert result["tests"] == 9
    assert versus["p"] == alone["p"]
    assert versus["p_adjusted"] == pytest.approx(9 * alone["p"])
    assert versus["verdict"] == "no clear difference"
    assert versus["ci95"][0] > 0, "the interval is that of the difference alone"


def test_maps_that_differ_by_rounding_are_not_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "x", HARD * SST), write_run(tmp_path / "y", (HARD + 1e-8) * SST)]
    versus = rows_of(compare_runs(runs))["y"]["versus_reference"]
    assert versus["p"] < 1e-6
    assert versus["verdict"] == "no clear difference"


def test_validation_decides_the_order_and_not_the_test(tmp_path: Path) -> None:
    made = {"none": (0.1, None), "b": (0.5, 0.4), "a": (0.2, 0.6), "c": (0.3, 0.4)}
    runs = [write_run(tmp_path / name, share * SST, val=val) for name, (share, val) in made.items()]
    result = compare_runs(runs)
    assert [Path(row["run"]).name for row in result["rows"]] == ["a", "b", "c", "none"]
    assert [Path(each["run"]).name for each in result["chosen"]] == ["a"]
    # Without a choice there is nothing to say of it.
    assert compare_runs(runs[:1])["chosen"] == []
    assert compare_runs(runs[2:3])["chosen"] == []


def test_what_is_left_beyond_the_token_comes_first(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", HARD * SST)
    assert "beyond token" not in describe(compare_runs([run]))
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["pairs"][PAIR]["test"] |= {"partial_r2": 0.125, "partial_r2_ci95": [0.0625, 0.1875]}
    metrics["pairs"][PAIR]["baselines"]["token"] = {"r2": 0.5}
    (run / "metrics.json").write_text(json.dumps(metrics))
    [row] = compare_runs([run])["rows"]
    assert (row["partial_r2"], row["partial_r2_ci95"]) == (0.125, [0.0625, 0.1875])
    head, *lines = describe(compare_runs([run])).splitlines()
    assert head.index("beyond token [95 %]") < head.index("R2 [95 %]")
    # Controls stand beside it where they are asked for.
    assert head.rstrip().endswith("optimum")
    assert describe(compare_runs([run]), controls=True).splitlines()[0].rstrip().endswith("token")
    [line] = [line for line in lines if line.startswith("  run ")]
    assert line.index("0.125 [0.062, 0.188]") == head.index("beyond token")


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
    versus = rows_of(compare_runs(runs))["y"]["versus_reference"]
    share = (HARD * SST).sum() / SST.sum()
    assert versus["difference"] == pytest.approx(share - share / 0.9)
    assert versus["ci95"][0] < versus["difference"] < versus["ci95"][1] < 0


def test_a_run_from_before_there_were_sums_has_a_reason_instead(tmp_path: Path) -> None:
    old = write_run(tmp_path / "old", HARD * SST + 1, closed=HARD * SST, documents=False)
    result = compare_runs([write_run(tmp_path / "new", HARD * SST), old])
    row = rows_of(result)["old"]
    assert row["r2_ci95"] is None
    for versus in (row["versus_reference"], row["versus_closed_form"]):
        assert versus["difference"] < 0
        assert (versus["ci95"], versus["p"], versus["p_adjusted"], versus["verdict"]) == (None, None, None, "unknown")
    assert set(row["reasons"]) == {"r2_ci95", "versus_reference.ci95", "versus_closed_form.ci95"}
    assert result["tests"] == 0
    text = describe(result)
    assert text.count("no interval: the run has no documents.json: it was made by an earlier version") == 1
    assert "old - new: R2 " in text
    assert text.count(", no test") == 2
    assert "etter" not in text


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
    assert [(Path(row["run"]).name, row["set"]) for row in result["rows"]] == [("low", 1), ("high", 1), ("other", 2)]
    # The first of each set is its reference, unless one is named: then the others have none.
    versus = [row["versus_reference"] and Path(row["versus_reference"]["run"]).name for row in result["rows"]]
    assert versus == [None, "low", None]
    named = rows_of(compare_runs(runs, str(runs[2])))
    assert named["other"]["versus_reference"] is None
    assert named["other"]["reasons"]["versus_reference"] == "the reference was scored on another set of rows"
    assert named["low"]["versus_reference"]["run"] == str(runs[2])
    assert [each["set"] for each in result["sets"]] == [1, 2]
    assert {**result["sets"][0], "set": 2, **place} == result["sets"][1]
    text = describe(result)
    assert "a:1->b:1, 600 test rows, set 2" in text
    assert "not compared" in text
    assert "set 1: moved.zarr, s.zarr (ffffffffffff), pairs end, sinks masked beyond 5.0 x" in text


@pytest.mark.parametrize("change", [{"numbers": range(1, DOCUMENTS + 1)}, {"n": 11}], ids=["documents", "rows"])
def test_other_documents_are_no_pairs(tmp_path: Path, change: dict[str, Any]) -> None:
    runs = [write_run(tmp_path / "x", 0.1 * SST), write_run(tmp_path / "y", 0.2 * SST, **change)]
    row = rows_of(compare_runs(runs))["y"]
    assert row["versus_reference"]["verdict"] == "unknown"
    assert row["reasons"]["versus_reference.ci95"].startswith("scored on other test rows than")
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
        with pytest.raises(AdapterError, match=r"documents\.json: /.*; the run is damaged"):
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

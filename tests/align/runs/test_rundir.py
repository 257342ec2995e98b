"""The files of a run directory: written as a run goes, and told again when it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.layers import LayerPair
from align.runs.rundir import RunDirectory, check_free, default_directory
from align.scoring.rows import Epoch
from align.settings import Settings, load_settings
from featstore.errors import SpecError

PAIR, OTHER = LayerPair("a", (1,), "b", 2), LayerPair("a", (0, 1), "b", 3)
SETTINGS = Settings("s.zarr", "lora")


def epoch(number: int, loss: float = 0.5) -> Epoch:
    return Epoch(number, loss if number else None, loss, {"r2": 1 - loss, "cosine": 0.5}, 0.01, 1.0, {"mse": loss})


def step(epoch: int, step: int) -> dict[str, Any]:
    return {"epoch": epoch, "step": step, "cka": 0.1 * step}


def events(run: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(e["event"], e["pair"], e["epoch"], *([e["step"]] if "step" in e else [])) for e in lines]


def test_a_run_begins_with_its_settings(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "r", SETTINGS)
    assert load_settings(tmp_path / "r" / "run.yaml") == SETTINGS


def test_a_directory_that_cannot_be_made_is_refused_in_one_line() -> None:
    # Nobody may make directories in /proc.
    with pytest.raises(SpecError, match=r"^--out /proc/run cannot be made \(.*\); choose another directory$"):
        RunDirectory(Path("/proc/run"), SETTINGS)


def test_epochs_of_several_pairs_share_a_file_and_are_averaged(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, SETTINGS)
    run.epoch(PAIR, epoch(1, 0.2))
    run.epoch(OTHER, epoch(1, 0.6))
    record = json.loads((tmp_path / "eval_epoch_1.json").read_text())
    assert set(record["pairs"]) == {PAIR.key, OTHER.key}
    assert record["val_loss"] == pytest.approx(0.4)
    assert record["cosine_sim"] == 0.5
    assert record["cka"] is None
    assert record["generations"] == []


def test_what_the_models_say_is_kept_with_the_epoch(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, SETTINGS)
    said = {"stitched": {"recovered": {"value": 0.5}}, "generations": [{"prompt": "p", "text": "t"}]}
    run.epoch(PAIR, epoch(1), said)
    run.epoch(OTHER, epoch(1), said)
    record = json.loads((tmp_path / "eval_epoch_1.json").read_text())
    assert record["generations"] == said["generations"] * 2
    assert record["pairs"][PAIR.key]["stitched"] == said["stitched"]


def test_a_fresh_run_removes_what_an_interrupted_one_left(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path, SETTINGS)
    first.epoch(PAIR, epoch(3))
    first.checkpoint(PAIR).mkdir(parents=True)
    RunDirectory(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_going_on_writes_the_log_anew_and_keeps_what_the_models_said(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path, SETTINGS)
    said = {"stitched": {"n_tokens": 5}, "generations": [{"pair": PAIR.key, "text": "t"}]}
    first.epoch(PAIR, epoch(0), said)
    first.step(PAIR, step(1, 100))
    with (tmp_path / "log.jsonl").open("a") as handle:
        handle.write('{"event": "step", "pa')
    second = RunDirectory(tmp_path, SETTINGS, resume=True)
    second.epoch(PAIR, epoch(0))
    second.epoch(OTHER, epoch(0))
    second.step(PAIR, step(1, 100))
    assert events(tmp_path) == [("epoch", PAIR.key, 0), ("epoch", OTHER.key, 0), ("step", PAIR.key, 1, 100)]
    record = json.loads((tmp_path / "eval_epoch_0.json").read_text())
    assert record["generations"] == said["generations"]
    assert record["pairs"][PAIR.key]["stitched"] == said["stitched"]
    assert "stitched" not in record["pairs"][OTHER.key]


def test_going_on_keeps_the_checkpoints(tmp_path: Path) -> None:
    path = RunDirectory(tmp_path, SETTINGS).checkpoint(PAIR)
    path.mkdir(parents=True)
    assert RunDirectory(tmp_path, SETTINGS, resume=True).checkpoint(PAIR).is_dir()
    assert path.parent.parent == tmp_path
    assert RunDirectory(tmp_path, SETTINGS).checkpoint(OTHER) != path


def test_of_several_processes_one_writes(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "r", SETTINGS, writes=False)
    run.epoch(PAIR, epoch(1))
    run.step(PAIR, step(1, 1))
    run.stop(PAIR, epoch=1, best_epoch=1, reason="ran all 1 epochs")
    run.finish({"pairs": {}}, {}, [], {}, {})
    assert not (tmp_path / "r").exists()
    assert run.last_epoch(PAIR)["val_loss"] == 0.5


def test_a_directory_is_free_or_holds_what_is_to_go_on(tmp_path: Path) -> None:
    check_free(tmp_path, resume=False)
    with pytest.raises(SpecError, match="holds no interrupted run"):
        check_free(tmp_path, resume=True)
    RunDirectory(tmp_path, SETTINGS)
    check_free(tmp_path, resume=True)
    check_free(tmp_path, resume=False)
    (tmp_path / "adapter.json").write_text("{}")
    with pytest.raises(SpecError, match="already holds a run; choose another"):
        check_free(tmp_path, resume=False)
    with pytest.raises(SpecError, match="there is nothing to resume"):
        check_free(tmp_path, resume=True)


def test_default_directories_count_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lora-a-b", "lora-a-b-2", "lora-a-b-3"):
        path = default_directory(SETTINGS, "a", "b")
        assert path == Path("runs") / name
        path.mkdir(parents=True)

"""`align train --eval-models`: what the map of every epoch does to the target model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import evaluate.stitching.epochs
from align.runs.train import train
from align.settings import LoopSettings, Settings, load_settings
from evaluate.generation.generate import PROMPTS
from featstore.errors import MissingPackageError


def settings_for(store: Path, **loop: Any) -> Settings:
    options = {"rank": 4, "epochs": 2, "skip": "none", "tracker": "none", **loop}
    return Settings(str(store), "lora", layers="2", eval_models=True, loop=LoopSettings(**options))


def test_every_epoch_has_its_stitched_loss_and_texts_and_models_load_once(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load = evaluate.stitching.epochs.load

    def counted(adapter: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        loads.append(name)
        return load(adapter, name, *args, **kwargs)

    monkeypatch.setattr(evaluate.stitching.epochs, "load", counted)
    train(settings_for(tiny_store), tmp_path / "run", quiet=True)
    assert sorted(loads) == ["llama", "mistral"]
    for number in range(3):
        record = json.loads((tmp_path / "run" / f"eval_epoch_{number}.json").read_text())
        stitched = record["pairs"]["llama:2->mistral:2"]["stitched"]
        assert stitched["self_bit_identical"]
        assert {"clean", "mapped", "token", "mean"} <= {name for name, block in stitched["conditions"].items() if block}
        assert [entry["prompt"] for entry in record["generations"]] == list(PROMPTS)
        assert all(isinstance(entry["text"], str) for entry in record["generations"])
        assert stitched["beyond_token"]["nats"] is not None
    # The token's prediction is that of the run, the same at every epoch.
    first, last = (
        json.loads((tmp_path / "run" / f"eval_epoch_{number}.json").read_text())["pairs"]["llama:2->mistral:2"]
        for number in (0, 2)
    )
    assert first["stitched"]["conditions"]["token"] == last["stitched"]["conditions"]["token"]
    # The map before training is the mean prediction: it is injected as it is scored.
    first = json.loads((tmp_path / "run" / "eval_epoch_0.json").read_text())["pairs"]["llama:2->mistral:2"]["stitched"]
    losses = {name: block["nats_per_token"] for name, block in first["conditions"].items() if block}
    assert losses["mapped"] == pytest.approx(losses["mean"], rel=1e-4)


def test_what_the_models_said_outlives_an_interruption(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.runs.rundir import RunDirectory

    told = RunDirectory.epoch

    def stopping(self: RunDirectory, pair: Any, epoch: Any, said: Any = None) -> None:
        told(self, pair, epoch, said)
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "epoch", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(settings_for(tiny_store), tmp_path / "run", quiet=True)
    before = json.loads((tmp_path / "run" / "eval_epoch_1.json").read_text())
    train(load_settings(tmp_path / "run" / "run.yaml"), tmp_path / "run", resume=True, quiet=True)
    after = json.loads((tmp_path / "run" / "eval_epoch_1.json").read_text())
    assert after["generations"] == before["generations"]
    assert len(after["generations"]) == len(PROMPTS)
    assert after["pairs"] == before["pairs"]


def test_without_anything_that_can_tell_the_remedy_is_named(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.runs.train.entry_points", lambda group: [])
    with pytest.raises(MissingPackageError, match=r"--eval-models.*pip install -e"):
        train(settings_for(tiny_store), tmp_path / "run", quiet=True)

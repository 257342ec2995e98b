"""The demo's stages: commands that the tools accept, each done once, and a result with three blocks."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from featstore.demo import run
from featstore.demo.blocks import DemoResult
from featstore.runtime.records import read

LAYERS = {"smollm2": (0, 15, 30), "twin": (0, 15, 30), "small": (0, 2, 4), "untrained": (0, 2, 4)}


def parsed(tool: str, name: str, *arguments: str) -> dict[str, Any]:
    """What a tool's own parser makes of a command; it exits on words that it does not know."""
    command = typer.main.get_command(importlib.import_module(f"{tool}.cli").app).commands[name]
    return command.make_context(name, list(arguments)).params


def write_files(name: str, options: dict[str, Any]) -> None:
    """As little of a command's files as the demo asks for."""
    if name == "train":
        source, target = options["source"], options["target"]
        key = f"{source}:15->{target}:{LAYERS[target][1]}"
        options["out"].mkdir(parents=True)
        (options["out"] / "adapter.json").write_text("{}")
        content = {"pairs": {key: {"test": {"r2": 0.5}, "baselines": {"token": {"r2": 0.4}}}}}
        (options["out"] / "metrics.json").write_text(json.dumps(content))
    elif name == "cka":
        first, second = options["models"].split(",")
        options["out"].mkdir(parents=True)
        layers = {model: LAYERS[model] for model in (first, second)}
        content = {"models": [first, second], "layers": layers, "cross": [[0.5] * 3] * 3}
        (options["out"] / "cka.json").write_text(json.dumps(content))
    elif name == "stitch":
        directory = Path(options["adapter"])
        [key] = json.loads((directory / "metrics.json").read_text())["pairs"]
        entry = {"conditions": {"clean": {"nats_per_token": 3.0}}, "recovered": {"value": 0.5, "ci95": [0.4, 0.6]}}
        (directory / "stitch.json").write_text(json.dumps({"pairs": {key: entry}}))
    elif name == "generate":
        (Path(options["adapter"]) / "generations.json").write_text("{}")


@pytest.fixture
def stages(monkeypatch, tmp_path) -> list[tuple[str, str, dict[str, Any]]]:
    """The commands that were run, with their options as the tools read them; no model is built."""
    done: list[tuple[str, str, dict[str, Any]]] = []

    def stage(tool: str, name: str, *arguments: str) -> dict[str, Any]:
        options = parsed(tool, name, *arguments)
        done.append((tool, name, options))
        write_files(name, options)
        return {"tool": tool}

    pair = SimpleNamespace(models={"smollm2": tmp_path / "a", "twin": tmp_path / "b"}, dataset="jsonl:sample")
    small = SimpleNamespace(models={"small": tmp_path / "c", "untrained": tmp_path / "d"})
    monkeypatch.setattr(run, "build_pair", lambda *_: pair)
    monkeypatch.setattr(run, "build_small", lambda *_: small)
    monkeypatch.setattr(run, "run_stage", stage)
    return done


def test_three_pairs_go_the_same_way_in_one_store(stages, tmp_path):
    result = run.run_demo(tmp_path / "out", tmp_path / "cache")
    names = [name for _, name, _ in stages]
    assert names.count("extract") == names.count("generate") == names.count("report") == 1
    compared = [options["models"] for _, name, options in stages if name == "cka"]
    assert compared == ["smollm2,twin", "smollm2,small", "smollm2,untrained"]
    trained = {(options["target"], options["type"]) for _, name, options in stages if name == "train"}
    assert {("small", "procrustes"), ("small", "affine"), ("small", "lora"), ("untrained", "affine")} <= trained
    assert {options["source"] for _, name, options in stages if name == "train"} == {"smollm2"}
    stitched = [Path(options["adapter"]).name for _, name, options in stages if name == "stitch"]
    assert "apart-affine" in stitched
    assert not any("untrained" in name for name in stitched)
    assert len(stages[0][2]["model"]) == 4
    assert list(result["blocks"]) == ["planted answer", "trained apart", "untrained"]
    written = read(DemoResult, tmp_path / "out")
    assert written.blocks["trained apart"].maps["affine"]["smollm2:15->small:2"].token_r2 == 0.4
    assert written.blocks["untrained"].cka["smollm2:30->untrained:4"].value == 0.5
    assert "TRAINED APART: smollm2 and small" in result["text"]


def test_what_is_done_is_not_repeated(stages, tmp_path):
    run.run_demo(tmp_path / "out", tmp_path / "cache")
    del stages[:]
    run.run_demo(tmp_path / "out", tmp_path / "cache")
    assert [name for _, name, _ in stages] == ["extract", "report"]

"""The models of a run under a device map give the figures that they give on one device, and wrong maps are one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluate
from align.maps.fitted import load_adapter
from align.runs.train import train
from align.settings import Settings
from evaluate.injection.loading import Loaded, check_card
from featstore.errors import ProbeError, SpecError
from featstore.models.devices import parse_device_map
from featstore.models.loading import load_model
from featstore.models.residual import capture
from featstore.models.skeletons import running_attention
from tests.support.commands import call

#: The maps of two models: some weights on the CPU, the others on the disk.
PLACES = {"llama": {"": "cpu", "model.layers.1": "disk"}, "mistral": {"": "disk", "model.layers.0": "cpu"}}
PROMPTS = ["The capital of France is", "a"]


@pytest.fixture(scope="module")
def run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("maps") / "run"
    train(Settings(str(tiny_store), "affine", both=True, layers="2"), out, quiet=True)
    return out


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("maps") / "map.json"
    path.write_text(json.dumps(PLACES), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def models(run: Path) -> dict[str, Loaded]:
    return evaluate.load_models(run, device_map=PLACES, quiet=True)


def test_models_are_loaded_where_the_map_says(models: dict[str, Loaded]) -> None:
    for loaded in models.values():
        assert {p.device.type for p in loaded.model.parameters()} == {"cpu", "meta"}
        assert loaded.device == torch.device("cpu")
        assert "on cpu" in repr(loaded)


def test_sinks_are_judged_over_layers_of_several_devices(models: dict[str, Loaded]) -> None:
    loaded = models["llama"]
    states = capture(loaded.stream, torch.arange(3, 20)[None], sorted(loaded.median_norm))
    flags = loaded.is_sink(states)
    wanted = torch.stack([h.norm(dim=-1) > loaded.sink_threshold * loaded.median_norm[k] for k, h in states.items()])
    assert torch.equal(flags, wanted.any(dim=0))


@pytest.mark.parametrize("keep", ["own", "hide"])
def test_stitched_losses_are_the_same(run: Path, tiny_store: Path, places: Path, capsys: Any, keep: str) -> None:
    given: dict[str, Any] = {"max_tokens": 200, "keep": keep, "write": False, "quiet": True}
    plain = evaluate.stitch(tiny_store, run, device="cpu", **given)
    assert evaluate.stitch(tiny_store, run, device_map=PLACES, **given).content() == plain.content()
    words = ("--store", tiny_store, "--adapter", run, "--max-tokens", 200, "--keep", keep, "--json")
    typed = call(capsys, "evaluate", "stitch", *words, "--device-map", places).json
    assert typed["pairs"] == json.loads(json.dumps(plain.content()["pairs"]))


def test_generated_texts_are_the_same(run: Path, places: Path) -> None:
    given: dict[str, Any] = {"max_new_tokens": 6, "write": False, "quiet": True}
    plain = evaluate.generate(run, PROMPTS, device="cpu", **given)
    assert evaluate.generate(run, PROMPTS, device_map=places, **given).content() == plain.content()


def test_answers_are_the_same(run: Path, places: Path) -> None:
    given: dict[str, Any] = {"examples": 4, "summary_tokens": 3, "max_new_tokens": 3, "write": False, "quiet": True}
    plain = evaluate.communicate(run, "countries", device="cpu", **given)
    found = evaluate.communicate(run, "countries", device_map=places, **given)
    assert found.content() == plain.content()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"device_map": "none.json"}, "--device-map none.json: cannot be read"),
        ({"device_map": {"gemma": {"": "cpu"}}}, "has modules of 'gemma'; the models are llama, mistral"),
        ({"device_map": {"": "cpu", "lm": "disk"}}, "has no module 'lm'"),
        ({"device_map": "auto", "device": "cpu"}, "--device cpu with --device-map auto"),
        ({"device_map": 3}, "--device-map 3: write auto, balanced"),
    ],
)
def test_a_wrong_map_is_refused_before_weights_are_read(
    run: Path, tiny_store: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], said: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("featstore.models.loading.load_model", refuse)
    for ask in (
        lambda: evaluate.stitch(tiny_store, run, write=False, quiet=True, **given),
        lambda: evaluate.generate(run, PROMPTS, write=False, quiet=True, **given),
        lambda: evaluate.communicate(run, write=False, quiet=True, **given),
        lambda: evaluate.load_models(run, quiet=True, **given),
    ):
        with pytest.raises(SpecError, match=said):
            ask()


@pytest.mark.parametrize("command", ["stitch", "generate", "communicate"])
def test_a_wrong_map_is_one_line(run: Path, tiny_store: Path, capsys: Any, command: str) -> None:
    store = ("--store", tiny_store) if command == "stitch" else ()
    outcome = call(capsys, "evaluate", command, *store, "--adapter", run, "--device-map", "none.json")
    assert "--device-map none.json: cannot be read" in outcome.refusal


def test_the_attention_of_the_store_is_the_one_that_runs(run: Path, models: dict[str, Loaded], tmp_path: Path) -> None:
    assert {running_attention(loaded.model) for loaded in models.values()} == {"sdpa"}
    card = json.loads((run / "adapter.json").read_text())
    assert {entry["attention"] for entry in card["models"].values()} == {"sdpa"}
    for entry in card["models"].values():
        entry["attention"] = "eager"
    for file in run.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "adapter.json").write_text(json.dumps(card))
    eager = evaluate.load_models(tmp_path, device="cpu", quiet=True)
    assert {running_attention(loaded.model) for loaded in eager.values()} == {"eager"}
    del card["models"]["llama"]["attention"]
    (tmp_path / "adapter.json").write_text(json.dumps(card))
    unnamed = evaluate.load_models(tmp_path, device="cpu", quiet=True)
    assert running_attention(unnamed["llama"].model) == "sdpa"


def test_a_model_of_ones_own_may_be_under_a_map(run: Path, models: dict[str, Loaded]) -> None:
    model = load_model(models["llama"].info.spec, dtype="float32", device_map=parse_device_map(PLACES))
    asked: dict[str, Any] = {"max_new_tokens": 2, "write": False, "quiet": True}
    found = evaluate.generate(run, PROMPTS, models={"llama": model, "mistral": models["mistral"]}, **asked)
    assert found.content() == evaluate.generate(run, PROMPTS, device="cpu", **asked).content()


def test_states_of_a_source_that_reads_ahead_are_not_injected(run: Path) -> None:
    adapter = load_adapter(run)
    check_card(adapter)
    verified = adapter.card["models"]["llama"]["verified"]
    reading = {**verified["reading"], "causal": False, "future": 0.9}
    entry = {**adapter.card["models"]["llama"], "verified": {**verified, "reading": reading}}
    ahead = replace(adapter, card={**adapter.card, "models": {**adapter.card["models"], "llama": entry}})
    with pytest.raises(ProbeError, match=r"model 'llama' reads ahead .*0\.9"):
        check_card(ahead)

"""The card of a run: what does not fit itself is named and refused, and cards of earlier versions read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from align.layers import LayerPair
from align.maps.card import Card, read_card
from align.maps.fitted import Aligner, load_adapter, save_adapter
from featstore.errors import AdapterError

KEY = "a:1->b:2"
MODEL = {"reference": "org/a", "depth": 4, "width": 3, "median_norm": {"0": 1.5, "1": 2.5, "2": 3}}


def card() -> dict[str, Any]:
    """All that a card says beside its maps."""
    return {
        "type": "procrustes",
        "models": {"a": dict(MODEL), "b": {**MODEL, "width": 5}},
        "store": {"path": "s.zarr", "fingerprint": "f" * 64},
        "corpus": {"bytes": 1000, "windows": 4, "documents": 2, "source": {"kind": "text", "location": "x.txt"}},
        "window_bytes": 512,
        "pair_policy": "end",
        "roles": ["user"],
        "coverage": {"a": 0.5, "b": 1},
        "mask": {"sink_threshold": 5.0, "keep_sinks": False},
        "provenance": {"versions": {"numpy": "2"}, "seed": 0},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    shapes = {"weight": (3, 5), "mean_source": 3, "mean_target": 5, "control_mean_source": 3, "control_mean": 5}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_adapter(tmp_path, [Aligner(LayerPair("a", (1,), "b", 2), tensors, {"scale": 0.5, "lambda": None}, 3)], card())
    return tmp_path


def put(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads((run / "adapter.json").read_text())
    change(value)
    (run / "adapter.json").write_text(json.dumps(value))


def test_a_whole_card_reads_and_keeps_all_it_says(run: Path) -> None:
    loaded = load_adapter(run)
    assert loaded.card == json.loads((run / "adapter.json").read_text())
    assert loaded.aligners[KEY].options == {"lambda": None, "scale": 0.5}
    assert read_card(run).models["b"].median_norm["2"] == 3


def test_a_card_of_an_earlier_version_reads(run: Path) -> None:
    def older(value: dict[str, Any]) -> None:
        for name in ("window_bytes", "roles", "models", "corpus", "coverage", "type", "provenance", "store", "mask"):
            del value[name]
        entry = value["pairs"][0]
        del entry["kind"], entry["source"]["layers"], entry["parameters"], entry["options"]

    put(run, older)
    loaded = load_adapter(run)
    assert loaded.aligners[KEY].pair == LayerPair("a", (1,), "b", 2)
    assert (loaded.aligners[KEY].options, loaded.aligners[KEY].trainable) == ({}, 0)


NAN, PAIR = float("nan"), "/pairs/0"


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("type", "oracle", "/type is 'oracle', expected one of procrustes"),
        ("type", "mlp", f"{PAIR}/kind is 'linear', expected that of a mlp map"),
        ("pair_policy", "word-ish", "/pair_policy is 'word-ish', expected one of end, word, byte"),
        ("roles", ["king"], "/roles/0 is 'king', expected one of"),
        ("coverage", {"a": 1.5}, "/coverage/a is 1.5, expected at most 1"),
        ("window_bytes", 0, "/window_bytes is 0, expected at least 1"),
        ("window_bytes", 10**30, "integer"),
        ("mask", {"sink_threshold": 0}, "/mask/sink_threshold is 0, expected more than 0"),
        ("mask", {"sink_threshold": NAN}, "/mask/sink_threshold is nan, expected a finite number"),
        ("mask", {"keep_sinks": 1}, "/mask/keep_sinks is 1, expected true or false"),
        ("models/a/median_norm/1", NAN, "/models/a/median_norm/1 is nan, expected a finite number"),
        ("models/a/median_norm/1", -1.0, "/models/a/median_norm/1 is -1.0, expected at least 0"),
        ("models/a/median_norm/9", 1.0, "/models/a/median_norm names layer '9', expected 0 to 4"),
        ("models/a/median_norm", {"0": 1.0}, f"{PAIR}/source/layer is 1, expected a layer that has a median norm"),
        ("models/a/depth", 0, "/models/a/depth is 0, expected at least 1"),
        ("models/a/width", 4, f"{PAIR}/source/width is 3, expected 4 by the width of a"),
        ("models/a/reference", ["x"], "/models/a/reference is a list of 1, expected text"),
        ("models/a/reference", "a\ud800", "half"),
        ("models", {"c": MODEL}, f"{PAIR}/source/model is 'a', expected one of 'c'"),
        ("models/../../x", MODEL, "has a model '../../x', expected a model's name"),
        ("corpus", 3, "/corpus is 3, expected an object"),
        ("provenance", [], "/provenance is a list of 0, expected an object"),
        ("pairs/0/key", "a:1->b:1", f"{PAIR}/key is 'a:1->b:1', expected a:1->b:2"),
        ("pairs/0/kind", "oracle", f"{PAIR}/kind is 'oracle', expected one of"),
        ("pairs/0/source/model", "../a", f"{PAIR}/source/model is '../a', expected a model's name"),
        ("pairs/0/source/layer", -1, f"{PAIR}/source/layer is -1, expected at least 0"),
        ("pairs/0/source/layer", 0, f"{PAIR}/source/layer is 0, expected the last of layers, 1"),
        ("pairs/0/source/layers", [1, 1], f"{PAIR}/source/layers is [1, 1], expected layers of which each"),
        ("pairs/0/source/layers", [], f"{PAIR}/source/layers is [], expected layers of which each"),
        ("pairs/0/source/width", 3.0, f"{PAIR}/source/width is 3.0, expected an integer"),
        ("pairs/0/target/layer", True, f"{PAIR}/target/layer is true, expected an integer"),
        ("pairs/0/parameters/trainable", -3, f"{PAIR}/parameters/trainable is -3, expected at least 0"),
        ("pairs/0/options/scale", 0.0, f"{PAIR}/options/scale is 0, expected a factor other than 0"),
        ("pairs/0/options/scale", NAN, f"{PAIR}/options/scale is nan, expected a finite number"),
        ("pairs/0/options/lambda", -1, f"{PAIR}/options/lambda is -1, expected a number from 0 on"),
    ],
)
def test_what_does_not_fit_is_named(run: Path, place: str, value: Any, words: str) -> None:
    def change(content: dict[str, Any]) -> None:
        if place == "models/../../x":
            content["models"]["../../x"] = value
            return
        *above, last = place.split("/")
        for key in above:
            content = content[int(key)] if isinstance(content, list) else content[key]
        content[last] = value

    put(run, change)
    with pytest.raises(AdapterError) as caught:
        load_adapter(run)
    message = str(caught.value)
    assert message.startswith(f"{run / 'adapter.json'}")
    assert words in message
    assert message.endswith("; the run is damaged: restore it or train it again")
    assert "\n" not in message
    with pytest.raises(AdapterError):
        read_card(run)


def test_two_maps_of_one_key_are_refused(run: Path) -> None:
    put(run, lambda value: value["pairs"].append(value["pairs"][0]))
    with pytest.raises(AdapterError, match=r"/pairs/1/key is 'a:1->b:2', expected a key of its own"):
        load_adapter(run)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (f"{KEY}.weight", np.full((3, 5), np.inf, np.float32), "'a:1->b:2.weight' holds NaN or infinity"),
        (f"{KEY}.control_mean", np.full(5, np.nan, np.float32), "'a:1->b:2.control_mean' holds NaN or infinity"),
        (f"{KEY}.weight", np.zeros((3, 5), np.float16), "'a:1->b:2.weight' is F16 (3, 5), expected F32"),
        (f"{KEY}.weight", np.zeros((3, 5), np.int32), "'a:1->b:2.weight' is I32 (3, 5), expected F32"),
        ("a:7->b:2.weight", np.zeros((3, 5), np.float32), "'a:7->b:2.weight', which belongs to no map of the card"),
        ("weight", np.zeros((3, 5), np.float32), "'weight', which belongs to no map of the card"),
    ],
)
def test_tensors_that_no_map_can_have_are_refused(run: Path, name: str, value: Any, words: str) -> None:
    path = run / "adapter.safetensors"
    save_file({**load_file(path), name: value}, path)
    with pytest.raises(AdapterError, match=r"adapter\.safetensors: ") as caught:
        load_adapter(run)
    assert words in str(caught.value)


def test_a_head_that_announces_more_than_the_file_holds_is_refused(run: Path) -> None:
    path = run / "adapter.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + size])
    head[f"{KEY}.weight"] |= {"shape": [2**20, 2**20], "data_offsets": [0, 4 << 40]}
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(AdapterError, match=r"adapter\.safetensors is damaged: its head .*; the run is damaged"):
        load_adapter(run)


def test_a_pipe_is_no_card(run: Path) -> None:
    for name in ("adapter.safetensors", "adapter.json"):
        (run / name).unlink()
        os.mkfifo(run / name)
        with pytest.raises(AdapterError, match=name):
            load_adapter(run)


def test_every_member_that_a_run_writes_is_declared(run: Path) -> None:
    record = read_card(run)
    assert set(record.content()) <= set(Card.model_fields)

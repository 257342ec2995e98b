"""The five commands in a row on every kind of architecture: extract, train, stitch, generate, communicate.

Models are tiny and random, on disk with a tokenizer, as users have them. What must come out is stated without the code
under test: rows by a plain hook on transformers' own model, texts by whole passes without a cache, and a map of a model
to itself by what it is.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluate.communication.tasks.named import make
from featstore import open_store
from tests.support.architectures.building import save
from tests.support.architectures.kinds import some_ids
from tests.support.commands import Outcome, called, strict_json
from tests.support.truth import expected_rows, swap_leaks

#: One short text and one long one: under LongRoPE they have different position encodings, which no pass may mix.
PROMPTS = ("The capital of France is", "In the year 2050, humanity will look back at this one long line and wonder why")
NEW, ANSWER, EXAMPLES, TASK = 6, 4, 3, "lookup:2"
LAYERS = (0, 2, 4)
KEY, BACK, OWN = "llama:2->x:2", "x:2->llama:2", "x:2->x:2"
#: Far above rounding in float32, far below what a fault does.
ROUNDING = 1e-4
RECURRENT = r"blocks? [\d, ]+ keeps? a recurrent or convolution state, which no attention mask can hide"


@dataclass(frozen=True)
class Kind:
    """An architecture, and what is true of it.

    Attributes:
        name: Its type, or ``type@variant``.
        start: Whether its tokenizer puts a start token first.
        images: Whether its checkpoint holds an image part.
        left_out: What of the checkpoint is not loaded.
        hidden: Why nothing can be hidden in it, as a regular expression; empty where hiding holds.
        leaks: Stored layers that the swap test refuses.
        streams: Streams in a row.
        switch: Length at which the position encoding changes.
        quick: Whether it runs in every tier.
    """

    name: str
    start: bool = True
    images: bool = False
    left_out: str | None = None
    hidden: str = ""
    leaks: tuple[int, ...] = ()
    streams: int = 1
    switch: int | None = None
    quick: bool = False

    @property
    def id(self) -> str:
        return f"{self.name}-images" if self.images else self.name


KINDS = (
    # A table of positions; no start token.
    Kind("gpt2", start=False, quick=True),
    Kind("opt", start=False),
    # Rotary and sinusoidal-free positions under the cache names of old; attention with linear biases.
    Kind("gpt_neox", start=False, quick=True),
    Kind("bloom", start=False),
    # Capped logits, sinks in attention: no sdpa.
    Kind("gemma2"),
    Kind("gpt_oss", start=False),
    # Wrappers of a text model; of the last one the causal class leaves the image part out.
    Kind("gemma3", images=True, quick=True),
    Kind("qwen3_5", start=False, images=True, hidden=RECURRENT),
    Kind("llama4"),
    Kind("llama4", images=True, left_out="26 tensors for images", quick=True),
    # Latent attention; four streams, and experts chosen by token id in the first two blocks.
    Kind("deepseek_v3"),
    Kind(
        "deepseek_v4",
        hidden=r"two prompts with the same injected states differ by [\d.]+ of the largest logit",
        leaks=(0,),
        streams=4,
        quick=True,
    ),
    # State spaces and convolutions, with and without attention between them.
    Kind("granitemoehybrid", start=False, hidden=RECURRENT, quick=True),
    Kind("mamba2", start=False, hidden=RECURRENT, quick=True),
    Kind("lfm2", start=False, hidden=RECURRENT),
    # Two position encodings, by the longest sequence of a pass.
    Kind("phi3@longrope", switch=16, quick=True),
)


@dataclass
class Road:
    """A store of a tiny model and a tiny Llama with the other tokenizer, and what commands made of it.

    Attributes:
        kind: The architecture.
        base: Directory of everything.
        paths: The two models.
        store: Their store.
        extracted: What the command said.
        runs: Directories of runs, by name.
    """

    kind: Kind
    base: Path
    paths: dict[str, Path]
    prompts: Path
    extracted: Outcome
    runs: dict[str, Path] = field(default_factory=dict)
    _models: dict[str, Any] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        return self.base / "s.zarr"

    @cached_property
    def attributes(self) -> dict[str, Any]:
        return open_store(self.store).model("x").attributes

    def trained(self, name: str, *words: object, type_: str = "affine") -> Path:
        """A run, trained on first use."""
        if name not in self.runs:
            self.runs[name] = self.base / name
            done = called("align", "train", "--store", self.store, "--type", type_, *words, "--out", self.runs[name])
            assert done.code == 0, done.err
        return self.runs[name]

    @property
    def both(self) -> Path:
        return self.trained("both", "--source", "llama", "--target", "x", "--both", "--layers", "2")

    @property
    def one(self) -> Path:
        return self.trained("one", "--source", "llama", "--target", "x", "--layers", "2")

    @property
    def own(self) -> Path:
        return self.trained("own", "--source", "x", "--target", "x", "--layers", "2")

    def evaluated(self, command: str, run: Path, *words: object, task: str = TASK) -> Outcome:
        """A command of `evaluate` on a run, its result beside the run's own files."""
        more: dict[str, tuple[object, ...]] = {
            "stitch": ("--store", self.store, "--max-tokens", 300),
            "generate": ("--prompts", self.prompts, "--max-new-tokens", NEW),
            "communicate": (
                *("--task", task, "--examples", EXAMPLES),
                *("--max-new-tokens", ANSWER, "--summary-tokens", ANSWER),
            ),
        }
        return called("evaluate", command, "--adapter", run, *more[command], *words, "--json")

    def model(self, name: str) -> Any:
        """The model as transformers alone loads it."""
        if name not in self._models:
            self._models[name] = AutoModelForCausalLM.from_pretrained(self.paths[name], dtype=torch.float32).eval()
        return self._models[name]

    @torch.inference_mode()
    def continuation(self, name: str, text: str, length: int) -> str:
        """Greedy text by whole passes, without a cache and without a batch."""
        tokenizer, model = AutoTokenizer.from_pretrained(self.paths[name]), self.model(name)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(length):
            first, second = model(input_ids=ids, use_cache=False).logits[0, -1].topk(2).values.tolist()
            assert first - second > ROUNDING, "this model cannot decide; choose another seed"
            step = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(dim=-1)
            if int(step) == model.generation_config.eos_token_id:
                break
            ids = torch.cat([ids, step[:, None]], dim=1)
        return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, sample_texts: list[str], request: Any) -> dict[str, Any]:
    """What all roads share: text, prompts, two tokenizers and a Llama with each."""
    base = tmp_path_factory.mktemp("architectures")
    corpus, prompts = base / "corpus.jsonl", base / "prompts.txt"
    # Windows of a few tokens and of many.
    texts = [text[: 60 if number % 4 == 0 else 400] for number, text in enumerate(sample_texts[:30])]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    found: dict[str, Any] = {"corpus": corpus, "prompts": prompts}
    for start, name in ((True, "start_token_tokenizer"), (False, "byte_level_tokenizer")):
        request.getfixturevalue(name).save_pretrained(base / name)
        found["tokenizer", start] = base / name
        found["llama", start] = save("llama", base / f"llama-{start}", base / name)
    return found


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, id=kind.id, marks=() if kind.quick else pytest.mark.thorough) for kind in KINDS],
)
def road(request: Any, places: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Road]:
    kind: Kind = request.param
    base = tmp_path_factory.mktemp("road")
    x = save(kind.name, base / "model", places["tokenizer", kind.start], seed=1, with_images=kind.images)
    paths = {"llama": places["llama", not kind.start], "x": x}
    done = called(
        *("featstore", "extract", *(word for name, path in paths.items() for word in ("--model", f"{name}={path}"))),
        *("--layers", "0,50%,100%", "--dataset", f"jsonl:{places['corpus']}", "--max-tokens", "all"),
        *("--window-bytes", 256, "--batch-tokens", 512, "--shard-rows", 1024, "--format", "float32"),
        *("--device", "cpu", "--store", base / "s.zarr", "--json"),
    )
    yield Road(kind, base, paths, places["prompts"], done)
    gc.collect()


def test_rows_are_those_of_a_plain_hook_on_transformers_own_model(road: Road) -> None:
    assert road.extracted.json["models"]["x"]["rows"] > 1000
    store = open_store(road.store)
    table, model = store.tokens("x"), road.model("x")
    rows = {layer: store.rows("x", layer)[:] for layer in LAYERS}
    lengths = np.bincount(table.window)
    if road.kind.switch is not None:
        assert lengths.min() <= road.kind.switch < lengths.max()
    for window in range(0, len(lengths), 2):
        own = np.flatnonzero(table.window == window)
        ids = torch.from_numpy(table.id[own].astype(np.int64))[None]
        expected = expected_rows(model, road.kind.name, ids)
        assert max(expected) == LAYERS[-1]
        for layer in LAYERS:
            wanted = expected[layer][0].numpy()
            assert np.abs(rows[layer][own] - wanted).max() < ROUNDING * np.abs(wanted).max(), (window, layer)


def test_the_store_says_what_was_verified(road: Road) -> None:
    verified = road.attributes["verified"]
    assert verified["blocks"] == LAYERS[-1]
    assert (verified["streams"], verified["width"]) == (road.kind.streams, 64 * road.kind.streams)
    assert verified["width"] == road.attributes["width"] == open_store(road.store).rows("x", 2).width
    reading = verified["reading"]
    assert reading["causal"]
    assert reading.get("switch") == road.kind.switch
    assert verified.get("left_out") == road.kind.left_out
    said = f"x is read without its {road.kind.left_out}\n"
    assert (said in road.extracted.err) == (road.kind.left_out is not None)


def test_a_map_of_a_model_to_itself_is_exact(road: Road) -> None:
    turned = road.trained("turned", "--source", "x", "--target", "x", "--layers", "2", type_="procrustes")
    for run in (road.own, turned):
        assert strict_json((run / "metrics.json").read_text())["pairs"][OWN]["test"]["r2"] == pytest.approx(1, abs=1e-6)
    assert (
        strict_json((road.own / "adapter.json").read_text())["models"]["x"]["verified"] == road.attributes["verified"]
    )
    entry = road.evaluated("stitch", road.own).json["pairs"][OWN]
    nats = {name: block["nats_per_token"] for name, block in entry["conditions"].items() if block}
    assert entry["self_bit_identical"]
    assert nats["self"] == nats["clean"]
    assert nats["mapped"] == pytest.approx(nats["clean"], abs=1e-3)
    assert abs(nats["mean"] - nats["clean"]) > 2e-3


def test_procrustes_turns_one_model_into_another_of_any_width(road: Road) -> None:
    run = road.trained("across", "--source", "llama", "--target", "x", "--layers", "2", type_="procrustes")
    assert road.evaluated("stitch", run).json["pairs"][KEY]["self_bit_identical"]


def test_stitching_replaces_the_stream_and_nothing_else(road: Road) -> None:
    result = road.evaluated("stitch", road.both).json
    assert list(result["pairs"]) == [KEY, BACK]
    for entry in result["pairs"].values():
        assert entry["self_bit_identical"]
        assert entry["leak"] == 0
        # One test document makes no interval, and that is all there is to say.
        assert [found["code"] for found in entry["warnings"]] == ["few-documents"]
        assert entry["replaced_share"] > 0.5
        nats = {name: block["nats_per_token"] for name, block in entry["conditions"].items() if block}
        assert len(set(nats.values())) >= len(nats) - 1, "self and clean are alike, no others"
    layers = result["verified"]["x"]["layers"]
    assert list(layers) == ["2"]
    assert layers["2"]["self_identical"]
    assert result["verified"]["x"]["reading"] == road.attributes["verified"]["reading"]


def test_what_is_hidden_is_hidden_or_the_reason_is_told(road: Road) -> None:
    run = road.one
    done = road.evaluated("stitch", run, "--keep", "hide")
    if road.kind.hidden:
        assert (done.code, done.out) == (2, "")
        line = done.err.splitlines()[-1]
        assert line.startswith("evaluate: model 'x', layer 2: --keep hide fails the two-prompt test: ")
        assert line.endswith("; use --keep own")
        assert _matches(road.kind.hidden, line)
        assert not (run / "stitch.json").exists()
        return
    result = done.json
    [entry] = result["pairs"].values()
    assert entry["self_bit_identical"]
    layer = result["verified"]["x"]["layers"]["2"]
    assert max(layer["hide"], layer["hide_cached"]) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(road.paths["x"])
    assert result["start"]["x"] == {"id": tokenizer.bos_token_id, "token": tokenizer.bos_token}


def test_texts_are_those_of_whole_passes(road: Road) -> None:
    result = road.evaluated("generate", road.both).json
    assert [entry["prompt"] for entry in result["entries"]] == list(PROMPTS)
    for entry in result["entries"]:
        assert entry["target_alone"] == road.continuation("x", entry["prompt"], NEW)
        assert entry["source_alone"] == road.continuation("llama", entry["prompt"], NEW)
        assert entry["source_to_target"][KEY]["self"] == entry["target_alone"]
        assert entry["target_to_source"][BACK]["self"] == entry["source_alone"]
        likelihood = entry["likelihood"]["source_to_target"][KEY]
        assert likelihood["self"] == pytest.approx(entry["likelihood"]["target_alone"], abs=1e-5)
    assert any(e["source_to_target"][KEY]["mapped"] != e["target_alone"] for e in result["entries"])
    assert result["leaks"] == {KEY: 0, BACK: 0}
    assert set(result["verified"]) == {"llama", "x"}
    assert result["verified"]["x"]["continuing"]["kind"] == "cached"


def test_answers_are_those_of_whole_passes_and_a_condition_that_cannot_be_says_why(road: Road) -> None:
    result = road.evaluated("communicate", road.both).json
    task = make(TASK, EXAMPLES)
    there, back = (result["tasks"][f"lookup ({pair})"] for pair in ("llama->x", "x->llama"))
    for entry, name in ((there, "x"), (back, "llama")):
        assert entry["target"] == name
        for example, told in zip(entry["examples"], task.examples, strict=True):
            assert example["context"] == told.context
            texts = {"silent": task.question_text(told), "text": task.text(told)}
            for condition, text in texts.items():
                assert example["given"][condition] == road.continuation(name, text, ANSWER), condition
    assert set(result["verified"]) == {"llama", "x"}
    methods = {block["condition"] for block in there["conditions"].values()}
    assert {"silent", "text", "summary", "replace", "sum", "mean"} <= methods
    assert ("aligned" in methods) == (not road.kind.hidden)
    assert any(block["condition"] == "aligned" for block in back["conditions"].values())
    if road.kind.hidden:
        [(name, reason)] = there["reasons"].items()
        assert name == f"aligned {KEY}"
        assert reason.startswith("--keep hide fails the two-prompt test: ")
        assert _matches(road.kind.hidden, reason)
        assert _matches(road.kind.hidden, result["verified"]["x"]["layers"]["2"]["hide_refused"])
    else:
        assert there["reasons"] == {}
    assert back["reasons"] == {}
    if road.kind.switch is not None:
        # With a short context, what is hidden and what follows it would be passes of two position encodings.
        entry = road.evaluated("communicate", road.one, task="lookup:1").json["tasks"]["lookup"]
        assert {block["condition"] for block in entry["conditions"].values()} >= {"silent", "text", "replace"}
        [(name, reason)] = entry["reasons"].items()
        assert name == f"aligned {KEY}"
        assert _matches(r"^a prompt of \d+ tokens is read on to \d+, and the position encoding changes at 16$", reason)


def test_a_layer_that_leaks_is_refused_and_the_leak_stands_beside_its_figures(road: Road) -> None:
    for layer in road.kind.leaks:
        run = road.trained(f"leak-{layer}", "--source", "llama", "--target", "x", "--layers", layer)
        key = f"llama:{layer}->x:{layer}"
        for command in ("stitch", "generate", "communicate"):
            refused = road.evaluated(command, run)
            assert (refused.code, refused.out) == (2, "")
            line = refused.err.splitlines()[-1]
            assert _matches(rf"^evaluate: model 'x', layer {layer}: the swap test leaks 0\.\d+ ", line)
            assert "type --allow-side-channel" in line
            taken = road.evaluated(command, run, "--allow-side-channel").json
            assert taken["verified"]["x"]["layers"][str(layer)]["leak"] > 0.05
            if command == "stitch":
                leak, warnings = taken["pairs"][key]["leak"], taken["pairs"][key]["warnings"]
            elif command == "generate":
                leak, warnings = taken["leaks"][key], taken["warnings"]
            else:
                [entry] = taken["tasks"].values()
                leak, warnings = entry["pairs"][key]["leak"], entry["warnings"]
            assert leak == taken["verified"]["x"]["layers"][str(layer)]["leak"]
            assert "side-channel" in [warning["code"] for warning in warnings]
    leaking = [layer for layer in LAYERS[:-1] if _leak(road, layer) != 0]
    assert leaking == list(road.kind.leaks)


def _leak(road: Road, layer: int) -> float:
    """What plain hooks on transformers' own model say of a layer."""
    return swap_leaks(road.model("x"), road.kind.name, some_ids(1), some_ids(2))[layer]


def _matches(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None
